"""What is wrong with a run, judged by its values: a loss that is not finite, or modulation that
does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model import Modality
from training.losses import modulation_at_equal_distances
from training.objective import Objective
from training.progress import in_words
from training.recipe import Recipe
from training.run_log import Record, last_values

LOSSES = ("identity", "triplet", "triplet_parts", "consistency", "modulation")

# Features of a working network have norms of order 1 to 100.
_EXPLODED, _SHRUNK = 1e4, 1e-4
# L_mod this near to its value at equal distances has learned nothing; γ this near to 0 makes every
# modulated image β.
_AT_CHANCE, _DEAD_GAMMA = 0.95, 0.05


@torch.no_grad()
def why_not_finite(
    objective: Objective,
    images: Tensor,
    modalities: Sequence[Modality],
    values: Mapping[str, float],
    earlier: Mapping[str, float],
    learning_rate: float,
) -> str:
    """The likely cause, with the remedy, of a loss or gradient that is not finite at a step.

    images, modalities: the step's. values: its losses and figures. earlier: the last finite ones.
    """
    if not images.isfinite().all():
        return "the input images are not finite; check the image cache and the augmentation"
    broken = [n for n, p in objective.named_parameters() if not p.isfinite().all()]
    if broken:
        return (
            f"the weights {broken[0]} are not finite themselves ({len(broken)} such tensors): the "
            f"step before was too large; lower the learning rate ({learning_rate:.2g}) or warm up "
            "for longer"
        )
    grown = _trend(values, earlier)
    objective.model.eval()  # running statistics: no other process is waited for
    with torch.autocast(images.device.type, enabled=False):
        exact = objective.model(images, modalities).complete
    if (
        objective.precision.autocast
        and exact.isfinite().all()
        and not _finite(values, "feature_norm")
    ):
        return (
            f"features overflow in {objective.precision.dtype} and not in float32; train with "
            "--set precision=float32"
        )
    norm = values.get("feature_norm", float("nan"))
    if not _finite(values, "feature_norm") or norm > _EXPLODED:
        return (
            f"features explode{grown}; lower the learning rate ({learning_rate:.2g}) or warm up "
            "for longer"
        )
    if norm < _SHRUNK:
        return (
            f"features have shrunk to nothing{grown}, which lowers L_cyc without learning; lower "
            "the weight of consistency, and leave centroid_gradient off"
        )
    terms = [name for name in LOSSES if name in values and not _finite(values, name)]
    if terms:
        return (
            f"the loss term {terms[0]} is not finite while features are{grown}; lower its weight, "
            f"fade it in over more steps, or lower the learning rate ({learning_rate:.2g})"
        )
    names = [
        n
        for n, p in objective.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    where = f" of {names[0]}" if names else ""
    return (
        f"the losses are finite and the gradient{where} is not{grown}; lower the learning rate "
        f"({learning_rate:.2g}) or train with --set precision=float32"
    )


def modulation_verdict(recipe: Recipe, records: Sequence[Record]) -> dict[str, Any] | None:
    """L_mod (14) and γ in the last tenth of a run; None where L_mod took no part.

    records: of `read_metrics`. `collapsed` in the result: the loss is what equal distances would
    give (the margin, for triplets), or γ ≈ 0; such a run is not good, whatever it scores.
    """
    values = last_values(records, ("modulation", "gamma_mean", "gamma_std"))
    if "modulation" not in values:
        return None
    equal = modulation_at_equal_distances(
        recipe.modulation_form,
        recipe.identities,
        recipe.images,
        margin=recipe.margin,
        across_modalities=recipe.modulation_across,
    )
    dead = abs(values["gamma_mean"]) < _DEAD_GAMMA
    return {
        "loss": values["modulation"],
        "loss_at_equal_distances": equal,
        "gamma_mean": values["gamma_mean"],
        "gamma_std": values["gamma_std"],
        "collapsed": dead or values["modulation"] > _AT_CHANCE * equal,
    }


def _finite(values: Mapping[str, float], name: str) -> bool:
    return abs(values.get(name, 0.0)) < float("inf")


def _trend(values: Mapping[str, float], earlier: Mapping[str, float]) -> str:
    names = [name for name in ("feature_norm", "gamma_mean", "gradient_norm") if name in earlier]
    if not names:
        return f" ({in_words({n: values[n] for n in ('feature_norm',) if n in values})})"
    changes = (f"{n} {earlier[n]:.3g} before, {values.get(n, float('nan')):.3g} now" for n in names)
    return f" ({'; '.join(changes)})"
