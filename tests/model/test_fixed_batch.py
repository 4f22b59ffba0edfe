"""A graph that several threads may compute has one batch size; where it is open, there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model import CMT
from model.fixed_batch import ANY_SIZE, IN_FP32, IN_FP32_AT_ANY_SIZE, fixed_batch
from model.graphs import embedding_graph, to_openvino
from model.quiet_openvino import openvino


def test_a_graph_of_one_batch_size_gives_the_same_and_refuses_others(tiny_model: CMT) -> None:
    graph = to_openvino(embedding_graph(tiny_model, "ir"))
    fixed = fixed_batch(graph, 3)
    assert not fixed.is_dynamic()
    assert graph.input().partial_shape[0].is_dynamic  # a copy was changed
    assert fixed_batch(fixed, ANY_SIZE).input().partial_shape == graph.input().partial_shape
    images = torch.randn(3, *embedding_graph(tiny_model, "ir").example.shape[1:]).numpy()
    core = openvino.Core()
    given = core.compile_model(fixed, "CPU", IN_FP32)(images)[0]
    open_size = core.compile_model(graph, "CPU", IN_FP32_AT_ANY_SIZE)
    np.testing.assert_allclose(given, open_size(images)[0], atol=1e-6)
    with pytest.raises(RuntimeError):
        core.compile_model(fixed, "CPU", IN_FP32)(images[:2])
