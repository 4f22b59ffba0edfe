"""A snapshot gives back what was saved, or says why it cannot; it never crashes nor lies."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import CMTConfig, Modulation
from service.gallery.feed import Position, Stored, Witness
from service.gallery.index.shard import Scored, SearchRequest, Shard
from service.gallery.index.snapshot import MANIFEST, SnapshotInvalid, load, save
from service.gallery.records import Filters, IndexKind

PARTS, DIM, COUNT = 3, 16, 2000
CONFIG = CMTConfig(input_height=96, input_width=48, parts=PARTS, dim=DIM, heads=2)
MODEL, POSITION = "a" * 64, Position(2000, 17)
WITNESS = Witness("01a214e6-6bee-7068-accd-d0868f4e24cd", 1_790_000_000_000_000, 1_780_000_000)


def stored(count: int = COUNT, first: int = 0, scale: float = 1.0) -> Stored:
    generator = torch.Generator().manual_seed(first)
    y = scale * torch.randn(count, PARTS * DIM, generator=generator)
    return Stored(
        numbers=list(range(first, first + count)),
        persons=[None if i % 9 == 0 else f"person {i}" for i in range(first, first + count)],
        cameras=[f"c{i % 3}" for i in range(first, first + count)],
        modalities=["ir" if i % 4 else "rgb" for i in range(first, first + count)],
        captured=[None if i % 5 else i for i in range(first, first + count)],
        features=y.half().numpy(),
    )


def query() -> tuple[Tensor, Modulation]:
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(PARTS, DIM, generator=generator)
    return x, Modulation(1 + 0.5 * torch.randn(1, DIM, generator=generator), torch.zeros(1, DIM))


def answers(shard: Shard) -> list[Scored]:
    filters = (Filters(), Filters(camera_id=("c1",), gallery_modality=("ir",)))
    x, modulation = query()
    return shard.search(
        [
            SearchRequest(x, modulation, 50, 50, exhaustive, one)
            for one in filters
            for exhaustive in (True, False)
        ]
    )


def assert_equal(one: Shard, other: Shard) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(answers(one), answers(other), strict=True):
        assert np.array_equal(mine.numbers, theirs.numbers)
        assert np.array_equal(mine.distances, theirs.distances)
        assert mine.searched == theirs.searched
        assert (mine.persons < 0).tolist() == (theirs.persons < 0).tolist()


def made(kind: IndexKind = "SQfp16") -> Shard:
    shard = Shard(CONFIG, "cpu", kind)
    shard.add(stored())
    shard.wait()
    return shard


def restored(folder: Path, kind: IndexKind = "SQfp16") -> Shard:
    segment, position, witness = load(folder, CONFIG, "cpu", fingerprint=MODEL)
    assert (position, witness) == (POSITION, WITNESS)
    shard = Shard(CONFIG, "cpu", kind)
    shard.restore(segment)
    return shard


def write(shard: Shard, folder: Path) -> Path:
    """Save → the folder of the files."""
    save(shard.freeze(), folder, fingerprint=MODEL, position=POSITION, witness=WITNESS)
    [own] = [path for path in folder.iterdir() if path.is_dir()]
    return own


@pytest.mark.parametrize("kind", ["SQfp16", "Flat", "IVF-SQ8", "HNSW"])
def test_what_is_restored_answers_alike_and_goes_on(kind: IndexKind, tmp_path: Path) -> None:
    shard = made(kind)
    own = write(shard, tmp_path)
    again = restored(tmp_path, kind)
    assert again.statistics().rebuilds == 0
    assert again.statistics().index == kind
    assert (own / "faiss").exists() == (kind != "SQfp16")
    assert_equal(shard, again)
    for one in (shard, again):
        one.add(stored(500, COUNT))
        one.mark_deleted(range(100))
        one.update([150], persons=["person 151"])
    assert_equal(shard, again)
    shard.close()
    again.close()


def test_chunks_of_other_scales_and_an_empty_shard(tmp_path: Path) -> None:
    shard = made()
    shard.add(stored(10, 5000, scale=500))
    shard.add(stored(9000, 6000))
    write(shard, tmp_path)
    assert_equal(shard, restored(tmp_path))
    empty = Shard(CONFIG, "cpu")
    write(empty, tmp_path)
    assert_equal(empty, restored(tmp_path))


@pytest.mark.parametrize("kind", ["SQfp16", "HNSW"])
def test_nothing_deleted_is_written(kind: IndexKind, tmp_path: Path) -> None:
    shard = made(kind)
    shard.mark_deleted([7, 8])
    own = write(shard, tmp_path)
    files = {path.name: path.read_bytes() for path in own.iterdir()}
    assert "faiss" not in files
    assert b"person 10" in files["labels.json"]
    for number in (7, 8):
        row = stored().features[number].tobytes()
        assert not any(row in data for data in files.values())
        assert f'"person {number}"'.encode() not in files["labels.json"]
    assert stored().features[10].tobytes() in files["features-0"]
    again = restored(tmp_path, kind)
    assert again.mark_deleted([7, 8, 10]) == [10]
    shard.mark_deleted([10])
    again.wait()  # the index is built anew
    assert_equal(shard, again)
    again.close()
    shard.close()


def test_a_moment_is_saved_though_changes_go_on(tmp_path: Path) -> None:
    shard, same = made(), made()
    frozen = shard.freeze()
    shard.add(stored(300, COUNT))
    shard.mark_deleted(range(50))
    save(frozen, tmp_path, fingerprint=MODEL, position=POSITION, witness=WITNESS)
    assert_equal(same, restored(tmp_path))


def invalid(folder: Path, fingerprint: str = MODEL) -> str:
    with pytest.raises(SnapshotInvalid) as caught:
        load(folder, CONFIG, "cpu", fingerprint=fingerprint)
    return str(caught.value)


FILES = ("features-0", "columns", "labels.json", "faiss", MANIFEST)


def place(folder: Path, name: str) -> Path:
    [found] = folder.rglob(name)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    shard = made("IVF-SQ8")
    write(shard, folder)
    shard.close()
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "index"))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(copy: Path, name: str) -> None:
    place(copy, name).unlink()
    assert name in invalid(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_truncated_file(copy: Path, name: str, left: int) -> None:
    path = place(copy, name)
    data = path.read_bytes()
    path.write_bytes(data[:left])
    assert name in invalid(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(copy: Path, name: str) -> None:
    path = place(copy, name)
    data = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    places = {0, len(data) - 1, *generator.integers(len(data), size=12).tolist()}
    for byte in places:
        for bit in (0, 5, 7):
            data[byte] ^= 1 << bit
            path.write_bytes(data)
            assert name in invalid(copy)
            data[byte] ^= 1 << bit
    path.write_bytes(data)
    load(copy, CONFIG, "cpu", fingerprint=MODEL)


def test_another_checkpoint_another_format_and_no_snapshot(copy: Path, tmp_path: Path) -> None:
    assert "another checkpoint" in invalid(copy, "b" * 64)
    assert "there is no" in invalid(tmp_path / "nowhere")
    path = copy / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_bytes().splitlines()[0])
    text = json.dumps(manifest | {"format": 0}).encode()
    path.write_bytes(text + b"\n" + sha256(text).hexdigest().encode() + b"\n")
    assert "format 0" in invalid(copy)


@pytest.mark.parametrize("survives", range(8))
def test_a_crash_while_saving_leaves_the_old_one(
    saved: Path, copy: Path, survives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at one of its syncs: nothing after it runs, no cleaning up either."""
    before = load(copy, CONFIG, "cpu", fingerprint=MODEL)
    assert len(before[0].columns) == COUNT
    shard = made("IVF-SQ8")
    shard.add(stored(10, COUNT))
    shard.wait()
    calls = 0
    original = os.fsync

    def dies(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > survives:
            raise KeyboardInterrupt
        original(descriptor)

    monkeypatch.setattr(os, "fsync", dies)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    try:
        save(shard.freeze(), copy, fingerprint=MODEL, position=POSITION, witness=WITNESS)
        whole = True
    except KeyboardInterrupt:
        whole = False
    monkeypatch.undo()
    segment, *_ = load(copy, CONFIG, "cpu", fingerprint=MODEL)
    replaced = len(segment.columns) == COUNT + 10
    assert replaced or len(segment.columns) == COUNT
    assert replaced or not whole
    write(shard, copy)  # and the next one clears away what was left
    assert len(load(copy, CONFIG, "cpu", fingerprint=MODEL)[0].columns) == COUNT + 10
    shard.close()
