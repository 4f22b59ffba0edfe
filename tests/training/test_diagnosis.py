"""The likely cause of a run that went wrong is said from its values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NotRequired, TypedDict

import pytest
import torch

from model import CMT, CMTConfig
from training.diagnosis import modulation_verdict, why_not_finite
from training.losses import ModulationForm
from training.objective import Objective
from training.recipe import Recipe

NAN = math.nan
FINE = {"identity": 9.0, "feature_norm": 7.0, "loss": 9.0, "gradient_norm": 2.0}


class Given(TypedDict):
    """What `cause` is told."""

    values: dict[str, float]
    pixels: NotRequired[float]
    spoil: NotRequired[Callable[[Objective], None]]
    precision: NotRequired[torch.dtype]


def cause(
    tiny_config: CMTConfig,
    values: dict[str, float],
    *,
    pixels: float = 0.0,
    spoil: Callable[[Objective], None] | None = None,
    precision: torch.dtype | None = None,
) -> str:
    torch.manual_seed(0)
    objective = Objective(Recipe(model=tiny_config, identities=2), CMT(tiny_config), 2)
    if spoil is not None:
        spoil(objective)
    if precision is not None:
        objective.precision = objective.precision._replace(dtype=precision)
    images = torch.full((2, 3, 96, 48), pixels)
    return why_not_finite(
        objective, images, ["rgb", "ir"], {**FINE, **values}, {"feature_norm": 5.0}, 1e-3
    )


def spoil_weight(objective: Objective) -> None:
    objective.heads["complete"].weight.data[0] = NAN


def spoil_gradient(objective: Objective) -> None:
    objective.heads["complete"].bias.grad = torch.full_like(objective.heads["complete"].bias, NAN)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"pixels": NAN, "values": {"loss": NAN}}, "the input images are not finite"),
        (
            {"spoil": spoil_weight, "values": {"loss": NAN}},
            r"weights classifiers\.complete\.weight are not",
        ),
        (
            {"precision": torch.bfloat16, "values": {"feature_norm": math.inf, "loss": NAN}},
            "features overflow in torch.bfloat16 and not in float32",
        ),
        ({"values": {"feature_norm": 3e6, "loss": NAN}}, r"features explode \(feature_norm 5 bef"),
        ({"values": {"feature_norm": 1e-9, "loss": NAN}}, "features have shrunk to nothing"),
        ({"values": {"modulation": NAN, "loss": NAN}}, "the loss term modulation is not finite"),
        (
            {"spoil": spoil_gradient, "values": {"gradient_norm": NAN}},
            r"gradient of classifiers\.complete\.bias is not",
        ),
    ],
)
def test_the_cause_that_the_values_show(
    tiny_config: CMTConfig, given: Given, sentence: str
) -> None:
    found = cause(tiny_config, **given)
    assert re.search(sentence, found), found


def records(loss: float, gamma: float) -> list[dict[str, float]]:
    early = [{"step": s, "modulation": 9.0, "gamma_mean": 1.0, "gamma_std": 0.1} for s in (1, 50)]
    late = {"modulation": loss, "gamma_mean": gamma, "gamma_std": 0.01}
    return [*early, {"step": 95, **late}, {"step": 100, **late}]


@pytest.mark.parametrize(
    ("form", "loss", "gamma", "collapsed"),
    [
        ("batch_hard", 0.3, 1.0, True),  # at the margin
        ("batch_hard", 0.1, 1.0, False),
        ("batch_hard", 0.1, 0.001, True),  # every modulated image is β
        ("softmax", math.log(1 + 7 * 16), 1.0, True),  # 7 other people with 16 images each
        ("softmax", 1.0, 1.0, False),
    ],
)
def test_a_modulation_that_learned_nothing_is_not_called_good(
    form: ModulationForm, loss: float, gamma: float, collapsed: bool
) -> None:
    verdict = modulation_verdict(Recipe(modulation_form=form), records(loss, gamma))
    assert verdict is not None
    assert verdict["collapsed"] == collapsed
    assert verdict["loss"] == pytest.approx(loss)


def test_without_modulation_there_is_no_verdict() -> None:
    assert modulation_verdict(Recipe(), [{"step": 1, "loss": 2.0}]) is None
