"""What a process is opened with, where settings ask for what a machine does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import RuntimeUnavailable
from service.gallery.index.figures import Figures
from service.resources import _index
from service.settings import Settings


def settings(folder: Path, **given: Any) -> Settings:
    return Settings(checkpoint=folder / "none.safetensors", data_dir=folder, **given)


def test_an_index_that_cannot_be_built_here_is_one_sentence(tmp_path: Path) -> None:
    assert _index(settings(tmp_path), "cpu") is None
    assert _index(settings(tmp_path, index="HNSW"), "cpu") == "HNSW"
    with pytest.raises(RuntimeUnavailable, match="GPU-Flat needs a GPU, and this gallery is on"):
        _index(settings(tmp_path, index="GPU-Flat"), "cpu")
    with pytest.raises(RuntimeUnavailable, match=r"needs FAISS for GPUs.* install the extra gpu"):
        _index(settings(tmp_path, index="GPU-Flat"), "cuda")


@pytest.mark.usefixtures("faked")
def test_figures_count_on_the_gpu_that_they_are_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "recall.json"
    here = settings(tmp_path, index_figures=file)
    assert _index(here, "cpu") is None
    with pytest.raises(RuntimeUnavailable, match=r"recall.json cannot be read .*cmt bench recall"):
        _index(here, "cuda")
    report: dict[str, Any] = {"settings": {"device": "cuda"}, "results": []}
    file.write_text(json.dumps({**report, "machine": {"gpu": "a faked GPU"}}))
    assert isinstance(_index(here, "cuda"), Figures)
    file.write_text(json.dumps({**report, "machine": {"gpu": "another GPU"}}))
    assert _index(here, "cuda") is None
    assert "are of the GPU another GPU and this is a faked GPU" in caplog.text
