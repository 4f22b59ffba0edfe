"""The network as graphs: what a runtime other than PyTorch computes, and OpenVINO's form of it.

There are three, each with the batch size B left open: the embedding of one modality, "rgb" and
"ir", since the stem is chosen before the network runs, and the modulation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.cmt import CMT
from model.modalities import MODALITIES, Modality, embedding_name

if TYPE_CHECKING:
    import openvino

MODULATION = "modulation"


@dataclass(frozen=True)
class Graph:
    """A module with one input and one or more outputs, in eval mode, and the names of both.

    example: an input of batch size 2 (a size of 1 would be taken for a constant). outputs: name →
    shape of one item; the batch comes before it, as in the input.
    """

    name: str
    module: nn.Module
    input: str
    example: Tensor
    outputs: dict[str, tuple[int, ...]]


def embedding_graph(model: CMT, modality: Modality) -> Graph:
    """images B×3×H×W of one modality → embedding B×P×D: what `CMT.embed` computes."""
    config = model.config
    return Graph(
        name=embedding_name(modality),
        module=_OneModality(model, modality).eval(),
        input="images",
        example=torch.zeros(2, 3, config.input_height, config.input_width),
        outputs={"embedding": (config.parts, config.dim)},
    )


def view_graph(model: CMT, modality: Modality) -> Graph:
    """images B×3×H×W of one modality → complete representation B×P×D: what `CMT.forward` computes.

    Of the images alone, also where the configuration has `mirror`: whoever runs it may compute the
    mirror images at the same time elsewhere.
    """
    config = model.config
    return Graph(
        name=f"view-{modality}",
        module=_OneView(model, modality).eval(),
        input="images",
        example=torch.zeros(2, 3, config.input_height, config.input_width),
        outputs={"complete": (config.parts, config.dim)},
    )


def modulation_graph(model: CMT) -> Graph:
    """embedding B×P×D → gamma, beta, B×D each: `CMT.modulation`, equation (12)."""
    config = model.config
    return Graph(
        name=MODULATION,
        module=_ModulationOnly(model).eval(),
        input="embedding",
        example=torch.zeros(2, config.parts, config.dim),
        outputs={"gamma": (config.dim,), "beta": (config.dim,)},
    )


def all_graphs(model: CMT) -> list[Graph]:
    """All that ranking needs: both embeddings and the modulation."""
    return [*(embedding_graph(model, modality) for modality in MODALITIES), modulation_graph(model)]


def to_openvino(graph: Graph) -> openvino.Model:
    """Convert to OpenVINO, in fp32 and for any batch size. Needs the package openvino.

    The weights are copied: what OpenVINO computes with then depends on no tensor of PyTorch, and no
    thread of its own ever frees one.
    """
    from model.quiet_openvino import openvino

    converted = openvino.convert_model(
        graph.module,
        example_input=graph.example,
        input=[-1, *graph.example.shape[1:]],
        share_weights=False,
    )
    converted.input(0).get_tensor().set_names({graph.input})
    for output, name in zip(converted.outputs, graph.outputs, strict=True):
        output.get_tensor().set_names({name})
    return converted


class _OneModality(nn.Module):
    """The network's embedding with the modality fixed."""

    def __init__(self, model: CMT, modality: Modality) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, images: Tensor) -> Tensor:
        return self.model.represent(images, self.modality).embedding


class _OneView(nn.Module):
    """The network without mirror images and without the ranked form, the modality fixed."""

    def __init__(self, model: CMT, modality: Modality) -> None:
        super().__init__()
        self.model, self.modality = model, modality

    def forward(self, images: Tensor) -> Tensor:
        complete: Tensor = self.model(images, self.modality).complete
        return complete


class _ModulationOnly(nn.Module):
    def __init__(self, model: CMT) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = self.model.modulation(embedding)
        return gamma, beta
