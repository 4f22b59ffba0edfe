"""Data folders of earlier releases open, and answer as they did, but for spellings of labels."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch

from model import CheckpointInfo, CMTConfig, Modulation
from service.gallery import Filters, Gallery, NewItem
from service.gallery.follower import read_snapshot
from tests.paths import DATA
from tests.service.places import EARLIER_RELEASE
from tests.service.stores import crop

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


def test_a_snapshot_of_an_earlier_release_gives_no_old_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = sampled(5, 3, CONFIG.parts, CONFIG.dim)
    spellings = ("zo\u00eb", "zoe\u0308", "zo\u200b\u00eb")
    with monkeypatch.context() as patch:  # what that release stored
        patch.setattr("service.gallery.storage.rows.normalized_label", lambda text: text)
        with closing(Gallery.open(tmp_path, INFO)) as gallery:
            gallery.add([NewItem(crop(i), person) for i, person in enumerate(spellings)], features)
            assert gallery.save_index()
    with closing(sqlite3.connect(tmp_path / "gallery.sqlite3")) as connection:
        connection.executescript(EARLIER_RELEASE)
    assert read_snapshot(tmp_path, INFO, "cpu") is not None
    with closing(Gallery.open(tmp_path, INFO)) as gallery:
        for asked in spellings[:2]:
            filters = Filters(person_id=(asked,))
            found = gallery.search(features[0], None, top_k=5, filters=filters)
            assert [hit.item.person_id for hit in found.hits] == ["zo\u00eb"] * 3
        grouped = gallery.search(features[0], None, top_k=5, group_by="person_id")
        assert len(grouped.hits) == 1
        assert not list((tmp_path / "index").rglob("labels.json"))
        assert gallery.delete_where("zoe\u0308") == 3
