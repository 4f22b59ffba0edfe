"""The paper's Figure 4: t-SNE of original features F and compensated features F̂, with figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import CMT
from training.ablation.cells import AblationError
from training.datasets import Sample
from training.evaluation.embedding import embed_samples
from training.evaluation.metrics import FloatArray, IntArray

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

    Attributes:
        title: which clouds.
        distance_ratio: mean distance between the clouds of the same person's features / of
            different people's; 1 where the person makes no difference.
        silhouette: mean silhouette coefficient of both clouds together, grouped by person.
    """

    title: str
    distance_ratio: float
    silhouette: float


def choose_people(samples: Sequence[Sample], people: int, seed: int) -> list[Sample]:
    """All images of so many people who have both modalities, drawn with `seed`.

    Raises AblationError where there are fewer.
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
    """F^R, F^I of the images, and F̂^R (from infrared images), F̂^I (from visible ones).

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
    """t-SNE of all clouds at once → M×2 of each, so that panels share one map."""
    from sklearn.manifold import TSNE

    together = np.concatenate([cloud.features for cloud in clouds])
    perplexity = min(PERPLEXITY, (len(together) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(together)
    return np.split(plane, np.cumsum([len(cloud.people) for cloud in clouds])[:-1])


def plot(
    clouds: Sequence[Cloud], plane: Sequence[FloatArray], figures: Sequence[Alignment], path: Path
) -> None:
    """Three panels, as .png, .svg or .pdf: colour is the person; circles F, triangles F̂.

    Filled markers are visible features, hollow ones infrared.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    people = np.unique(clouds[0].people)
    palette = colormaps["tab10" if people.size <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colour = {person: palette[number] for number, person in enumerate(people.tolist())}
    markers = {"F rgb": ("o", True), "F ir": ("o", False), "F̂ rgb": ("^", True)}
    markers["F̂ ir"] = ("^", False)
    panels_of = (("F rgb", "F ir"), ("F rgb", "F̂ rgb"), ("F ir", "F̂ ir"))

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, titles, alignment in zip(panels, panels_of, figures, strict=True):
        for cloud, points in zip(clouds, plane, strict=True):
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def to_json(clouds: Sequence[Cloud], figures: Sequence[Alignment]) -> dict[str, Any]:
    """Who is shown, how many features of each kind, and the figures."""
    return {
        "people": np.unique(clouds[0].people).tolist(),
        "features": {cloud.title: len(cloud.people) for cloud in clouds},
        "alignments": [vars(figure) for figure in figures],
    }
