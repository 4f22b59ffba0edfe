"""Decoding processes: the same answers as in this process, and no harm when one dies."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.preprocess import resize
from service.errors import ImageTooLarge, ImageUndecodable, ServiceError
from service.images import Decoders
from service.images.decode import Box, ImageLimits, Picture, decode
from tests.service.processes import wait_for

SIZE = (96, 48)


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    pool = Decoders(2, ImageLimits(max_pixels=5_000_000), seconds=60)
    yield pool
    pool.close()


def noise(width: int, height: int) -> bytes:
    """A PNG that takes its time."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.mark.parametrize("box", [None, Box(3, 5, 20, 40)])
@pytest.mark.parametrize("modality", ["auto", "ir"])
def test_a_process_decodes_as_we_do(
    decoders: Decoders, visible: list[Path], box: Box | None, modality: str
) -> None:
    picture = Picture(visible[0].read_bytes(), modality, box)  # type: ignore[arg-type]
    here = decode(picture.data, modality=picture.modality, box=box)
    there = decoders.decode(picture, *SIZE)
    assert np.array_equal(np.asarray(there.image), resize(here.image, *SIZE))
    for name in ("modality", "modality_source", "width", "height", "bit_depth", "sha256"):
        assert getattr(there, name) == getattr(here, name)
    assert (there.data, there.media_type) == (here.data, here.media_type)


@pytest.mark.parametrize(
    "data", [b"", b"no image", noise(64, 128)[:500], noise(10, 10), noise(3000, 2000)]
)
def test_errors_come_across_as_they_are(decoders: Decoders, data: bytes) -> None:
    limits = ImageLimits(max_pixels=5_000_000)
    with pytest.raises(ServiceError) as here:
        decode(data, limits=limits)
    with pytest.raises(ServiceError) as there:
        decoders.decode(Picture(data), *SIZE)
    assert type(there.value) is type(here.value)
    assert there.value.detail == here.value.detail


def test_a_process_that_is_killed_is_replaced_and_the_image_tried_again(
    decoders: Decoders, visible: list[Path]
) -> None:
    picture = Picture(visible[0].read_bytes())
    before = decoders.processes
    for process in before:
        os.kill(process, signal.SIGKILL)
    assert decoders.decode(picture, *SIZE).modality == "rgb"
    assert decoders.decode(picture, *SIZE).modality == "rgb"
    assert set(decoders.processes) != set(before)


def test_a_process_that_dies_in_the_middle_fails_no_other_image(
    decoders: Decoders, visible: list[Path]
) -> None:
    pictures = [Picture(file.read_bytes()) for file in visible] * 20
    outcomes: list[str] = []
    kills = 0
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(_outcome, decoders, picture) for picture in pictures]
        for number, one in enumerate(running):
            if number % 8 == 0:  # while others are decoded
                with suppress(ProcessLookupError):
                    os.kill(decoders.processes[0], signal.SIGKILL)
                kills += 1
            outcomes.append(one.result())
    # One that was hit twice in a row is told to be at fault; all others are decoded.
    assert set(outcomes) <= {"rgb", "image_undecodable"}
    assert 2 * outcomes.count("image_undecodable") <= kills
    assert decoders.decode(pictures[0], *SIZE).modality == "rgb"


def _outcome(decoders: Decoders, picture: Picture) -> str:
    try:
        return decoders.decode(picture, *SIZE).modality
    except ServiceError as error:
        return error.code


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_decoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4000, 4000, 3), dtype=np.uint8)
    slow, small = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(slow, "JPEG", quality=100, progressive=True)  # half a second
    Image.new("RGB", (16, 32)).save(small, "BMP")
    with closing(Decoders(1, ImageLimits(max_bytes=50_000_000), seconds=0.2)) as pool:

        def decodes_the_small_one() -> bool:
            with suppress(ImageUndecodable):  # on a busy machine even that may take too long
                return pool.decode(Picture(small.getvalue()), *SIZE).width == 16
            return False

        with pytest.raises(ImageUndecodable, match=r"takes longer than 0\.2 seconds"):
            pool.decode(Picture(slow.getvalue()), *SIZE)
        wait_for(decodes_the_small_one, "nothing is decoded any longer")


def test_a_process_that_is_stopped_is_killed() -> None:
    picture = Picture(noise(64, 128))
    with closing(Decoders(1, ImageLimits(), seconds=0.5)) as pool:

        def decodes() -> bool:
            with suppress(ImageUndecodable):  # on a busy machine even that may take too long
                return pool.decode(picture, *SIZE).width == 64
            return False

        wait_for(decodes, "nothing is decoded")
        [process] = pool.processes
        os.kill(process, signal.SIGSTOP)
        with pytest.raises(ImageUndecodable):
            pool.decode(picture, *SIZE)
        assert process not in pool.processes
        wait_for(decodes, "nothing is decoded any longer")


def test_limits_reach_the_processes(decoders: Decoders) -> None:
    with pytest.raises(ImageTooLarge, match="5,000,000"):
        decoders.decode(Picture(noise(3000, 2000)), *SIZE)


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "import time"
        "\nfrom service.images import Decoders"
        "\nfrom service.images.decode import ImageLimits"
        "\npool = Decoders(2, ImageLimits(), seconds=5)"
        "\nprint(*pool.processes, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    wait_for(
        lambda: not any(Path(f"/proc/{child}").exists() for child in children),
        "decoding processes outlive the service",
    )
