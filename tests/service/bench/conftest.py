"""What the tests of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def without_openvino() -> Iterator[None]:
    """As where it is not installed: to convert a network takes longer than all of these."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("service.embedding.embedder.find_spec", lambda name: None)
        yield
