"""Start a run from the weights of another: fine-tuning, another input size, other people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import CMT, CheckpointInfo, CMTConfig, load_checkpoint


class StartError(ValueError):
    """A checkpoint that a network cannot start from; the message says what differs."""


@dataclass(frozen=True)
class InitialWeights:
    """Where a run's first weights come from; what is not given is drawn at random.

    backbone: "imagenet" or a local file, see `CMT`.
    checkpoint: of a whole network, see `start_from`.
    """

    backbone: str | Path | None = None
    checkpoint: Path | None = None

    def network(self, config: CMTConfig) -> tuple[CMT, dict[str, Any]]:
        """A new network with these weights, and what its checkpoint records of them.

        "learnt_from" and "selected_on" are the people of a whole network, see `training.learnt`.

        Raises StartError, or CheckpointError where the checkpoint cannot be read.
        """
        model = CMT(config, weights=self.backbone)
        facts: dict[str, Any] = {}
        if self.backbone is not None:
            facts["weights"] = Path(self.backbone).name
        if self.checkpoint is not None:
            start = start_from(model, self.checkpoint)
            facts["start"] = start.fingerprint
            facts["learnt_from"] = [people.model_dump() for people in start.facts.people()]
            facts["selected_on"] = [p.model_dump() for p in start.facts.selecting_people()]
        return model, facts


RANDOM_WEIGHTS = InitialWeights()


def start_from(model: CMT, checkpoint: Path) -> CheckpointInfo:
    """Copy into `model` the weights of every module that both networks have → the start's info.

    Backbone and part features must be there with the same shapes. Modality and instance alignment
    are taken where both networks have them. One that only `model` has starts as doing nothing
    (F̂ = 0; γ = 1, β = 0): the network then computes what the start computes, and one identity-only
    network starts every row of an ablation at the same point.
    Raises StartError, or CheckpointError where the file cannot be read.
    """
    start, info = load_checkpoint(checkpoint)
    own, given = model.state_dict(), start.state_dict()
    for name, tensor in own.items():
        if name in given and given[name].shape != tensor.shape:
            raise StartError(
                f"{checkpoint} has {name} of shape {tuple(given[name].shape)} and the recipe asks "
                f"for {tuple(tensor.shape)}; start from a checkpoint of the same backbone, width, "
                "parts and dim"
            )
        if name not in given and name.startswith(("backbone.", "parts.")):
            raise StartError(
                f"{checkpoint} has no {name}; start from a checkpoint of the same backbone"
            )
    model.load_state_dict({n: t for n, t in given.items() if n in own}, strict=False)
    if model.alignment is not None and start.alignment is None:
        model.alignment.decoder.start_at_zero()
    return info
