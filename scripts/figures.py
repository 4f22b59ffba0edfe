"""Draw the pictures of docs/concepts from the demo checkpoint and the example crops.

Every number in them is what the service answers, or what the network computes, when this runs: on
another machine, where another precision is fastest, the second digit may differ, and two results
that are almost equal change places. The text beside a picture has to stay true of it.

Example: python -m scripts.figures
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from model import Modality, load_checkpoint, preprocess
from model.pictures import read
from scripts.demo_service import CHECKPOINT, EXAMPLES, IMAGES, demo_service
from service.api.schemas import QueryAnswer, Result
from service.client import Client

RIGHT, WRONG, QUIET = "#2e7d32", "#c62828", "#777777"
VISIBLE, INFRARED = "#1565c0", "#d84315"


def person(file: Path) -> str:
    """The label of an example, as its manifest has it: without leading zeros."""
    return str(int(file.name[:4]))


def query_of(name: str) -> Path:
    """An example query by the beginning of its name."""
    [found] = (EXAMPLES / "queries").glob(f"{name}*")
    return found


def crops_of(name: str) -> list[Path]:
    """The gallery's crops of a person."""
    return sorted((EXAMPLES / "gallery").glob(f"{name}*"))


def show(axes: Axes, picture: Path | bytes, title: str = "", color: str = "black") -> None:
    """A crop, as wide as high 1:3, with a frame in a color."""
    source = picture if isinstance(picture, Path) else io.BytesIO(picture)
    image = Image.open(source).convert("RGB").resize((128, 384), Image.Resampling.LANCZOS)
    axes.imshow(np.asarray(image), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=color)
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2 if color != "black" else 0.8)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write docs/images/NAME.png."""
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight", metadata={"Software": ""})
    plt.close(figure)


def light_and_parts(folder: Path) -> None:
    """Three people in both kinds of light, and the six parts of a crop."""
    names = ("0122", "0152", "0373")
    figure, rows = plt.subplots(1, 8, figsize=(9, 3.1), width_ratios=[1, 1, 0.35, 1, 1, 0.35, 1, 1])
    for place, name in zip((0, 3, 6), names, strict=True):
        show(rows[place], query_of(name), "infrared", INFRARED)
        show(rows[place + 1], crops_of(name)[0], "visible", VISIBLE)
    for place in (2, 5):
        rows[place].axis("off")
    for edge in range(1, 6):
        rows[0].axhline(edge * 64, color="white", linewidth=1.2)
        rows[1].axhline(edge * 64, color="white", linewidth=1.2)
    for part in range(6):
        rows[0].text(6, part * 64 + 40, f"part {part + 1}", color="white", fontsize=7)
    save(figure, folder, "light-and-parts")


def network(folder: Path) -> None:
    """What compensation does to features, and γ, β of three queries."""
    model, _ = load_checkpoint(CHECKPOINT)
    names = [query.name[:4] for query in sorted((EXAMPLES / "queries").iterdir())]
    kinds: Sequence[tuple[Modality, list[Path]]] = (
        ("ir", [query_of(name) for name in names]),
        ("rgb", [crops_of(name)[0] for name in names]),
    )
    raw, complete = {}, {}
    for modality, files in kinds:
        batch = torch.stack([preprocess(_picture(file, modality), model.config) for file in files])
        with torch.inference_mode():
            seen = model.represent(batch, modality)
        raw[modality], complete[modality] = seen.features, seen.embedding

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    titles = ("features F as they are seen", "with the other light added: F + F̂")
    for axes, features, title in zip(panels, (raw, complete), titles, strict=True):
        flat = {kind: _unit(features[kind].flatten(1).numpy()) for kind in ("ir", "rgb")}
        both = np.concatenate([flat["ir"], flat["rgb"]])
        axis = flat["ir"].mean(0) - flat["rgb"].mean(0)
        gap = float(np.linalg.norm(axis))
        axis /= gap
        across = (both - both.mean(0)) @ axis
        rest = both - both.mean(0) - across[:, None] * axis
        other = rest @ np.linalg.svd(rest, full_matrices=False)[2][0]
        count = len(names)
        for one in range(count):
            axes.plot(across[[one, count + one]], other[[one, count + one]], color="#cccccc", lw=1)
        axes.scatter(across[:count], other[:count], color=INFRARED, marker="^", label="infrared")
        axes.scatter(across[count:], other[count:], color=VISIBLE, label="visible")
        nearest = np.linalg.norm(flat["ir"][:, None] - flat["rgb"][None], axis=2).argmin(1)
        right = int((nearest == np.arange(count)).sum())
        axes.set_title(
            f"{title}\nnearest visible crop is the person: {right} of {count}", fontsize=9
        )
        axes.set(xlabel=f"between the two kinds of light (gap {gap:.2f})", ylabel="among people")
        axes.set(xticks=[], yticks=[])
    panels[0].legend(fontsize=8)
    save(figure, folder, "compensation")

    x = complete["ir"]
    with torch.inference_mode():
        gamma, beta = model.modulation(x)
    shown = [names.index(name) for name in ("0013", "0122", "0373")]
    figure, axis_rows = plt.subplots(2, 1, figsize=(9, 3.8), sharex=True)
    channels = np.arange(gamma.shape[1])
    for axes, values, label in zip(axis_rows, (gamma, beta), ("γ", "β"), strict=True):
        mean = values.mean(0).numpy()
        axes.bar(channels, mean, width=1, color="#d0d0d0", label="mean of all 20 queries")
        for one in shown:
            axes.plot(channels, values[one].numpy(), lw=0.9, label=f"person {int(names[one])}")
        axes.set(ylabel=label, xlim=(-0.5, len(channels) - 0.5))
        low, high = float(values.min()), float(values.max())
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axis_rows[0].legend(fontsize=7, ncols=4, loc="upper right")
    axis_rows[1].set_xlabel(f"channel, 1 to {len(channels)}")
    save(figure, folder, "gamma-beta")


def _picture(file: Path, modality: Modality) -> Image.Image:
    return read(file.read_bytes(), modality=modality).image


def _unit(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def two_orders(
    client: Client, folder: Path, name: str, files: list[Path], ways: dict[str, dict[str, Any]]
) -> None:
    """Each query's first six by two ways of ranking, and lines where an item has moved."""
    count = 6
    rows = len(files) * 2
    figure = plt.figure(figsize=(6.2, 5.3 * len(files)))
    grid = figure.add_gridspec(rows, count + 1, hspace=0.3, wspace=0.12)
    for number, file in enumerate(files):
        placed: list[dict[str, Axes]] = []
        for offset, (label, fields) in enumerate(ways.items()):
            answer = client.query(file, top_k=count, **fields)
            first = figure.add_subplot(grid[number * 2 + offset, 0])
            show(first, file, f"person {person(file)}")
            first.set_ylabel(label, fontsize=9)
            at: dict[str, Axes] = {}
            for column, result in enumerate(answer.results):
                axes = figure.add_subplot(grid[number * 2 + offset, column + 1])
                right = result.item.person_id == person(file)
                show(
                    axes, client.image(result.item.id)[0],
                    f"{result.rank}: {result.item.person_id}", RIGHT if right else WRONG,
                )  # fmt: skip
                at[result.item.id] = axes
            placed.append(at)
        for item, above in placed[0].items():
            below = placed[1].get(item)
            if below is not None:
                box, under = above.get_position(), below.get_position()
                figure.add_artist(
                    matplotlib.lines.Line2D(
                        [(box.x0 + box.x1) / 2, (under.x0 + under.x1) / 2],
                        [box.y0 - 0.002, under.y1 + 0.022 / len(files) * 2],
                        color=QUIET if box.x0 == under.x0 else "#f9a825",
                        linewidth=1 if box.x0 == under.x0 else 2.5,
                    )
                )
    save(figure, folder, name)


def agreement(client: Client, folder: Path) -> None:
    """Six bands over the crops of one answer, green where a part agrees."""
    file = query_of("0013")
    answer = client.query(file, top_k=30, group_by="person_id", explain=True)
    colors = plt.get_cmap("RdYlGn")
    figure, panels = plt.subplots(1, 6, figsize=(9, 3.3))
    show(panels[0], file, f"query, person {person(file)}")
    for axes, result in zip(panels[1:], answer.results, strict=False):
        right = result.item.person_id == person(file)
        show(
            axes, client.image(result.item.id)[0],
            f"{result.rank}: person {result.item.person_id}", RIGHT if right else WRONG,
        )  # fmt: skip
        for part, value in enumerate(result.agreement or []):
            axes.add_patch(Rectangle((0, part * 64), 128, 64, color=colors(value), alpha=0.35))
            axes.text(4, part * 64 + 40, f"{value:.2f}", fontsize=8, color="white", weight="bold")
    save(figure, folder, "agreement")


def probability(client: Client, folder: Path) -> None:
    """What an answer says, with the person enrolled and without, and by the prior."""
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1.1, 1])
    shown = [query_of(name) for name in ("0122", "0161", "0013", "0212")]
    rows, labels = [], []
    people = sorted({person(file) for file in (EXAMPLES / "gallery").iterdir()})
    for file in shown:
        for absent in (False, True):
            others = [one for one in people if one != person(file)]
            answer = client.query(file, person_id=others if absent else None)
            rows.append(answer)
            labels.append(f"person {person(file)}{', left out' if absent else ''}")
    for place, answer in enumerate(rows):
        first = _first(answer)
        assert answer.probability_enrolled is not None
        assert first.probability is not None
        bars.barh(place, answer.probability_enrolled, color="#bbdefb")
        bars.barh(place, first.probability, height=0.45, color=VISIBLE)
        bars.text(1.02, place, str(answer.match), va="center", fontsize=8)
    bars.set(yticks=range(len(rows)), yticklabels=labels, xlim=(0, 1), xlabel="probability")
    bars.tick_params(labelsize=8)
    bars.invert_yaxis()
    bars.set_title("wide: the person is enrolled; narrow: it is the first", fontsize=8, loc="left")
    for cut in (0.2, 0.8):
        bars.axvline(cut, color=QUIET, lw=0.8, ls=":")
    priors = [0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9]
    for file in shown:
        values = [client.query(file, top_k=1, prior=prior).probability_enrolled for prior in priors]
        curves.plot(priors, values, marker=".", label=f"person {person(file)}")
    curves.set(
        xscale="log", xlabel="prior: enrolled before looking", ylabel="enrolled after looking"
    )
    curves.legend(fontsize=8)
    figure.tight_layout()
    save(figure, folder, "probability")


def _first(answer: QueryAnswer) -> Result:
    return answer.results[0]


def main() -> None:
    """Draw all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    light_and_parts(folder)
    network(folder)
    with demo_service() as (_, client):
        two_orders(
            client, folder, "with-and-without",
            [query_of("0013"), query_of("0313")],
            {
                "without γ, β": {"modulation": False, "rerank": "none"},
                "with γ, β": {"rerank": "none"},
            },
        )  # fmt: skip
        two_orders(
            client, folder, "re-ranking",
            [query_of("0158")],
            {"by distance": {"rerank": "none"}, "re-ranked": {"rerank": "k_reciprocal"}},
        )  # fmt: skip
        agreement(client, folder)
        probability(client, folder)


if __name__ == "__main__":
    main()
