"""The paper's Figure 4: t-SNE of original features F and compensated features F̂, with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import CMT, CheckpointInfo, load_checkpoint
from model.machine import machine
from training.ablation.cells import AblationError
from training.datasets import LAYOUTS, DatasetName, Sample
from training.evaluation.embedding import embed_samples
from training.evaluation.metrics import FloatArray, IntArray
from training.files import write_figure
from training.learnt import refuse_known_people

PERPLEXITY = 30.0
MOST_PEOPLE = 20  # colours that can be told apart


@dataclass(frozen=True)
class Cloud:
    """Features of one kind: M×P·D, with the person of each."""

    title: str
    features: FloatArray
    people: IntArray


@dataclass(frozen=True)
class Alignment:
    """How well two clouds agree on who is who, in feature space (not in the picture).

    title: which clouds.
    distance_ratio: mean Euclidean distance between the clouds of the same person's features /
        of different people's; 1 where the person makes no difference.
    silhouette: mean silhouette coefficient of both clouds together, grouped by person.
    """

    title: str
    distance_ratio: float
    silhouette: float


@dataclass(frozen=True)
class Figure4Request:
    """What Figure 4 is drawn of.

    checkpoint: with modality alignment. dataset, root: where the images are. ids: a list of
    identities to choose from; None: the test side of `trial`. name: of the data set, where it is
    stated. people: how many of them to show.
    seed: of the choice of people and of t-SNE. device: "cpu", "cuda", ….
    """

    checkpoint: Path
    dataset: DatasetName
    root: Path
    ids: Path | None = None
    trial: int = 1
    people: int = 10
    seed: int = 0
    device: str = "cpu"
    name: str | None = None


@dataclass(frozen=True)
class Figure4:
    """The clouds of Figure 4, how well they agree, and where t-SNE puts them, M×2 of each."""

    info: CheckpointInfo
    clouds: list[Cloud]
    alignments: list[Alignment]
    plane: list[FloatArray]


def figure_4(request: Figure4Request) -> Figure4:
    """Choose people, embed their images and compare the features.

    Raises AblationError where too few people have both modalities or the network has no modality
    alignment, DatasetError for a folder that is not as its layout says or people whom the network
    was trained on, and CheckpointError.
    """
    layout = LAYOUTS[request.dataset]
    model, info = load_checkpoint(request.checkpoint, request.device)
    ids = None if request.ids is None else layout.read_ids(request.ids)
    samples = layout.test(request.root, request.trial, ids)
    chosen = choose_people(samples, request.people, request.seed)
    refuse_known_people(info, chosen, request.dataset, request.name)
    clouds = clouds_of(model, chosen)
    return Figure4(info, clouds, alignments(clouds), embed_in_plane(clouds, request.seed))


def choose_people(samples: Sequence[Sample], people: int, seed: int) -> list[Sample]:
    """All images of `people` identities that have both modalities, drawn with `seed`.

    Raises AblationError where there are fewer, or more are asked for than colours tell apart.
    """
    seen = {
        modality: {sample.person_id for sample in samples if sample.modality == modality}
        for modality in ("rgb", "ir")
    }
    both = sorted(seen["rgb"] & seen["ir"])
    if not 2 <= people <= min(len(both), MOST_PEOPLE):
        raise AblationError(
            f"{people} people cannot be shown: {len(both)} have images of both modalities; choose "
            f"2 to {min(len(both), MOST_PEOPLE)} with --people"
        )
    chosen = set(np.random.default_rng(seed).choice(both, people, replace=False).tolist())
    return [sample for sample in samples if sample.person_id in chosen]


def clouds_of(model: CMT, samples: Sequence[Sample]) -> list[Cloud]:
    """F^R and F^I of the images, F̂^R (of infrared images) and F̂^I (of visible ones), all M×P·D.

    Raises AblationError for a network without modality alignment.
    """
    embedded = embed_samples(model, samples)
    if embedded.compensated is None:
        raise AblationError(
            "the checkpoint has no modality alignment, so there are no compensated features to "
            "show; choose one trained with it"
        )
    people = np.array([sample.person_id for sample in samples], dtype=np.int64)
    is_ir = torch.tensor([sample.modality == "ir" for sample in samples])

    def cloud(title: str, features: Tensor, chosen: Tensor) -> Cloud:
        return Cloud(title, features[chosen].flatten(1).double().numpy(), people[chosen.numpy()])

    return [
        cloud("F rgb", embedded.features, ~is_ir),
        cloud("F ir", embedded.features, is_ir),
        cloud("F̂ rgb", embedded.compensated, is_ir),
        cloud("F̂ ir", embedded.compensated, ~is_ir),
    ]


def align(title: str, one: Cloud, other: Cloud) -> Alignment:
    """Figures of two clouds; both have the same people, at least two of them."""
    from sklearn.metrics import silhouette_score

    distances = torch.cdist(
        torch.from_numpy(one.features),
        torch.from_numpy(other.features),
        compute_mode="donot_use_mm_for_euclid_dist",
    ).numpy()
    same = one.people[:, None] == other.people
    features = np.concatenate([one.features, other.features])
    return Alignment(
        title=title,
        distance_ratio=float(distances[same].mean() / distances[~same].mean()),
        silhouette=float(silhouette_score(features, np.concatenate([one.people, other.people]))),
    )


def alignments(clouds: Sequence[Cloud]) -> list[Alignment]:
    """Before: the two modalities' own features. After: real against compensated, by modality."""
    rgb, ir, rgb_hat, ir_hat = clouds
    return [
        align("before: F rgb and F ir", rgb, ir),
        align("after: F rgb and F̂ rgb", rgb, rgb_hat),
        align("after: F ir and F̂ ir", ir, ir_hat),
    ]


def embed_in_plane(clouds: Sequence[Cloud], seed: int) -> list[FloatArray]:
    """t-SNE of all clouds together → M×2 of each, so that the panels share one map."""
    from sklearn.manifold import TSNE

    together = np.concatenate([cloud.features for cloud in clouds])
    perplexity = min(PERPLEXITY, (len(together) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(together)
    return np.split(plane, np.cumsum([len(cloud.people) for cloud in clouds])[:-1])


def plot_figure_4(drawn: Figure4, path: Path) -> None:
    """Three panels, as .png, .svg or .pdf: colour is the person; circles F, triangles F̂.

    Filled markers are visible features, hollow ones infrared.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    people = np.unique(drawn.clouds[0].people)
    palette = colormaps["tab10" if people.size <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colour = {person: palette[number] for number, person in enumerate(people.tolist())}
    markers = {"F rgb": ("o", True), "F ir": ("o", False), "F̂ rgb": ("^", True)}
    markers["F̂ ir"] = ("^", False)
    panels_of = (("F rgb", "F ir"), ("F rgb", "F̂ rgb"), ("F ir", "F̂ ir"))

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, titles, alignment in zip(panels, panels_of, drawn.alignments, strict=True):
        for cloud, points in zip(drawn.clouds, drawn.plane, strict=True):
            if cloud.title not in titles:
                continue
            marker, filled = markers[cloud.title]
            colours = [colour[person] for person in cloud.people.tolist()]
            panel.scatter(
                *points.T,
                s=26,
                marker=marker,
                facecolors=colours if filled else "none",
                edgecolors="white" if filled else colours,
                linewidths=0.4 if filled else 1.1,
            )
        panel.set_title(
            f"{alignment.title}\nsame / other distance {alignment.distance_ratio:.2f}, "
            f"silhouette {alignment.silhouette:.2f}",
            fontsize="medium",
        )
        panel.set(xticks=[], yticks=[])
    kinds = [
        Line2D(
            *([], []),
            linestyle="",
            marker=marker,
            color="black",
            markerfacecolor="black" if filled else "none",
            label=f"{title}, {'compensated' if title.startswith('F̂') else 'original'}",
        )
        for title, (marker, filled) in markers.items()
    ]
    patches = [
        Line2D([], [], linestyle="", marker="s", color=colour[person], label=f"person {person}")
        for person in people.tolist()
    ]
    figure.legend(handles=kinds + patches, loc="outside right center", fontsize="small")
    write_figure(path, figure, dpi=150)


def figure_4_json(request: Figure4Request, drawn: Figure4) -> dict[str, Any]:
    """Who is shown of which checkpoint, how many features of each kind, and the figures."""
    return {
        "ablation": "Figure 4",
        "checkpoint": {"file": request.checkpoint.name, "fingerprint": drawn.info.fingerprint},
        "dataset": request.dataset.value,
        "seed": request.seed,
        "people": np.unique(drawn.clouds[0].people).tolist(),
        "features": {cloud.title: len(cloud.people) for cloud in drawn.clouds},
        "alignments": [vars(alignment) for alignment in drawn.alignments],
        "machine": machine(),
    }
