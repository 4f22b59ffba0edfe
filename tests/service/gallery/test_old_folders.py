"""Data folders of earlier releases open, and answer as they did."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from model import CheckpointInfo, CMTConfig, Modulation
from service.gallery import Filters, Gallery
from service.gallery.follower import read_snapshot
from tests.paths import DATA

CONFIG = CMTConfig(input_height=96, input_width=48, dim=8, heads=2)
INFO = CheckpointInfo("a" * 64, CONFIG)


def sampled(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("release", ["0.1.0"])
def test_a_folder_of_an_earlier_release_opens_and_answers_the_same(
    release: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(DATA / f"data-folder-{release}", folder)
    assert read_snapshot(folder, INFO, "cpu") is not None
    answers = json.loads((folder / "answers.json").read_text())
    query = sampled(2, CONFIG.parts, CONFIG.dim)
    modulation = Modulation(1 + 0.1 * sampled(3, 1, CONFIG.dim), 0.1 * sampled(4, 1, CONFIG.dim))
    with closing(Gallery.open(folder, INFO)) as gallery:
        assert (len(gallery), gallery.awaiting) == (11, 0)
        for name, used in (("modulated", modulation), ("unmodulated", None)):
            hits = gallery.search(query, used, top_k=11).hits
            assert [hit.item.id for hit in hits] == [item for item, _ in answers[name]]
            expected = [distance for _, distance in answers[name]]
            assert [hit.distance for hit in hits] == pytest.approx(expected, abs=2e-5)
        page = gallery.list(Filters(person_id=("person 1",)), 10)
        assert [item.metadata for item in page.items] == [{"n": 3}, {"n": 5}]
        assert all(gallery.image(item.id)[1] == "image/png" for item in page.items)
        gallery.check()
