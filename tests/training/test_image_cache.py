"""Decoding happens once, by one process, wholly or not at all; what cannot be read is named."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import CMTConfig, preprocess
from model.pictures import POLICY
from model.pixels import normalise, resize
from service.images.decode import decode
from training import image_cache
from training.datasets.sample import DatasetError, Sample
from training.image_cache import CacheError, cached_images, readable_samples

SIZE = (32, 16)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Six photographs, JPEG and PNG."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(6)]
    for path in paths:
        pixels = generator.integers(0, 256, (60, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return [Sample(path, i, 1, "rgb") for i, path in enumerate(paths)]


def expected(samples: Sequence[Sample]) -> torch.Tensor:
    config = CMTConfig(parts=2, dim=8, input_height=SIZE[0], input_width=SIZE[1])
    return torch.stack([preprocess(Image.open(sample.path), config) for sample in samples])


def assert_right(cached: np.ndarray, samples: Sequence[Sample]) -> None:
    assert torch.equal(normalise(torch.from_numpy(cached.copy())), expected(samples))


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded although it is in the cache")

    monkeypatch.setattr(image_cache, "decode", refuse)


def test_cached_images_are_what_the_service_would_see(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cached = cached_images(samples, *SIZE, cache)
    assert_right(cached, samples)
    assert not cached.flags.writeable
    no_decoding(monkeypatch)
    assert np.array_equal(cached_images(samples, *SIZE, cache), cached)
    assert readable_samples(samples, *SIZE, cache) == (samples, [])


def test_more_images_than_are_decoded_at_once_keep_their_order(
    samples: list[Sample], tmp_path: Path
) -> None:
    many = 100 * samples  # in three turns of 256
    assert_right(cached_images(many, *SIZE, tmp_path / "cache"), many)


def damage(samples: Sequence[Sample]) -> None:
    samples[1].path.write_bytes(samples[1].path.read_bytes()[:-30])  # truncated: the last rows
    samples[2].path.write_bytes(b"no image")
    samples[4].path.unlink()


def test_the_first_unreadable_image_is_named_with_the_number_of_all(
    samples: list[Sample], tmp_path: Path
) -> None:
    damage(samples)
    for read in (readable_samples, cached_images):
        with pytest.raises(DatasetError) as caught:
            read(samples, *SIZE, tmp_path / "cache")
        assert f"{samples[1].path} cannot be decoded" in str(caught.value)
        assert "truncated" in str(caught.value)
        assert "3 of 6 images" in str(caught.value)
        assert "--unreadable skip" in str(caught.value)


def test_unreadable_images_are_skipped_and_named_once(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(samples)
    cache = tmp_path / "cache"
    kept, skipped = readable_samples(samples, *SIZE, cache, "skip")
    assert kept == [samples[0], samples[3], samples[5]]
    assert all(str(samples[i].path) in line for i, line in zip((1, 2, 4), skipped, strict=True))
    assert skipped[2].endswith("No such file or directory.")
    no_decoding(monkeypatch)  # neither for the next start nor for the images that are left
    assert readable_samples(samples, *SIZE, cache, "skip") == (kept, skipped)
    assert_right(cached_images(kept, *SIZE, cache), kept)
    with pytest.raises(DatasetError, match="3 of 6 images"):
        readable_samples(samples, *SIZE, cache)


def test_if_no_image_can_be_read_nothing_is_left_to_skip_to(
    samples: list[Sample], tmp_path: Path
) -> None:
    for sample in samples:
        sample.path.write_bytes(b"")
    with pytest.raises(DatasetError, match="6 of 6 images"):
        readable_samples(samples, *SIZE, tmp_path / "cache", "skip")


def test_a_file_that_changes_or_vanishes_after_caching_is_noticed(
    samples: list[Sample], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cached_images(samples, *SIZE, cache)
    Image.linear_gradient("L").resize((30, 60)).convert("RGB").save(samples[0].path)
    assert_right(cached_images(samples, *SIZE, cache), samples)
    samples[3].path.unlink()
    with pytest.raises(DatasetError, match=r"3\.jpg cannot be decoded \(No such file"):
        cached_images(samples, *SIZE, cache)


def test_a_shortened_cache_is_not_taken_for_whole(samples: list[Sample], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cached_images(samples, *SIZE, cache)
    (file,) = cache.glob("*.images")
    os.truncate(file, file.stat().st_size - 1)
    assert_right(cached_images(samples, *SIZE, cache), samples)


def test_too_little_room_is_said_before_anything_is_decoded(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000))
    no_decoding(monkeypatch)
    with pytest.raises(CacheError, match=r"need 0\.00 GB in .*cache.*--cache"):
        cached_images(samples, *SIZE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / ".lock"]


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_no_partial_file(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    def full(_: int) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="make room"):
        cached_images(samples, *SIZE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / ".lock"]
    monkeypatch.undo()
    assert_right(cached_images(samples, *SIZE, tmp_path / "cache"), samples)


def test_a_write_that_the_system_refuses_is_an_error_and_leaves_nothing(
    samples: list[Sample], tmp_path: Path
) -> None:
    """The size limit of a process stands for a full disk: write() itself fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            cached_images(samples, *SIZE, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / ".lock"]


def test_ctrl_c_leaves_no_file_and_the_next_start_decodes(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "resize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_images(samples, *SIZE, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / ".lock"]
    monkeypatch.undo()
    (tmp_path / "cache" / ".partial").write_bytes(b"of a process that was killed")
    assert_right(cached_images(samples, *SIZE, tmp_path / "cache"), samples)
    assert not (tmp_path / "cache" / ".partial").exists()


def test_of_two_processes_one_decodes_and_the_other_waits(
    samples: list[Sample], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    # "w" when it found nothing and goes for the lock, "d" for each image it decodes.
    script = (
        "import fcntl, os, sys; from pathlib import Path; from training import image_cache as c;"
        "from training.datasets.sample import Sample;"
        "decode, flock = c.decode, fcntl.flock;"
        "c.decode = lambda *what: os.write(1, b'd') and decode(*what);"
        "fcntl.flock = lambda file, how: ("
        "    os.write(1, b'w') if how & fcntl.LOCK_NB else 0, flock(file, how)"
        ");"
        "s = [Sample(Path(p), i, 1, 'rgb') for i, p in enumerate(sys.argv[1:])];"
        f"c.cached_images(s, *{SIZE}, Path({str(cache)!r}))"
    )
    arguments = [sys.executable, "-c", script, *(str(sample.path) for sample in samples)]
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(2)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"w"
        assert not list(cache.glob("*.images"))
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(outputs) == [b"", b"d" * len(samples)]
    assert_right(cached_images(samples, *SIZE, cache), samples)


def test_pictures_of_every_kind_are_read_as_the_service_reads_them(tmp_path: Path) -> None:
    light = np.linspace(0, 1, 64)[:, None] * np.ones((64, 32))
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray((4095 * light).astype(np.uint16)).save(tmp_path / "12 bits in 16.png")
    Image.fromarray((29_000 + 900 * light).astype(np.uint16)).save(tmp_path / "thermal.tif")
    Image.fromarray((16 + 20 * light).astype(np.float32)).save(tmp_path / "celsius.tif")
    gray = Image.fromarray((255 * light).astype(np.uint8))
    gray.convert("RGB").save(tmp_path / "turned.jpg", exif=turned)
    see_through = gray.convert("RGBA")
    see_through.paste((255, 0, 0, 0), (0, 0, 8, 8))
    see_through.save(tmp_path / "alpha.png")
    Image.merge("RGB", [gray, gray.point(lambda v: v // 2), gray]).save(tmp_path / "tint.png")
    samples = [Sample(path, 1, 3, "ir") for path in sorted(tmp_path.iterdir())]
    cached = cached_images(samples, 64, 32, tmp_path / "cache")
    for sample, pixels in zip(samples, cached, strict=True):
        served = decode(sample.path.read_bytes(), modality="ir").image
        assert (pixels.transpose(1, 2, 0) == resize(served, 64, 32)).all(), sample.path
        assert np.ptp(pixels) > 200, sample.path


def test_a_half_picture_is_unreadable(samples: list[Sample], tmp_path: Path) -> None:
    whole = samples[1].path.read_bytes()
    samples[1].path.write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    with pytest.raises(DatasetError, match=r"1\.jpg cannot be decoded .*truncated"):
        cached_images(samples, *SIZE, tmp_path / "cache")


def test_images_read_by_other_rules_are_not_taken_from_the_cache(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_images(samples, *SIZE, tmp_path / "cache")
    monkeypatch.setattr(image_cache, "POLICY", POLICY + 1)
    no_decoding(monkeypatch)
    with pytest.raises(AssertionError, match="decoded although"):
        cached_images(samples, *SIZE, tmp_path / "cache")
