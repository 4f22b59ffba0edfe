"""Decoding processes: the same answers as in this process, and no harm when one dies."""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from model.pixels import resize
from service.errors import (
    DecodeBudgetSpent,
    ImageTooLarge,
    ImageUndecodable,
    MemoryExhausted,
    RuntimeUnavailable,
    ServiceError,
)
from service.images import pool as pool_module
from service.images.decode import Box, ImageLimits, Picture, decode
from service.images.pool import Decoders
from service.images.turns import Share
from tests.service.processes import runs, wait_for

SIZE = (96, 48)


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    pool = Decoders(2, ImageLimits(max_pixels=5_000_000), seconds=60)
    yield pool
    pool.close()


def textured(width: int, height: int) -> bytes:
    """A JPEG with something on it that is small to send."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = ((rows // 7 * 31 ^ columns // 5 * 17) % 251).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


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


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGKILL, MemoryExhausted), (signal.SIGSEGV, ImageUndecodable)],
)
def test_two_deaths_are_the_fault_of_what_caused_them(
    number: signal.Signals, kind: type[ServiceError], visible: list[Path]
) -> None:
    with closing(Decoders(1, ImageLimits(), seconds=60)) as pool:
        pool.decode(Picture(visible[0].read_bytes()), *SIZE)
        slow = Picture(textured(2000, 2000), box=Box(0, 0, 2000, 2000))
        answer = pool.submit(slow, *SIZE, Share("a"))
        hit = set[int]()
        while not answer.done():
            for process in pool.processes:
                if process not in hit and accepts_images(process):
                    hit.add(process)
                    os.kill(process, number)
            time.sleep(0.002)
        with pytest.raises(kind) as caught:
            answer.result()
        assert len(hit) >= 2  # one may have been hit before it had the image
        assert caught.value.headers == ({"Retry-After": "5"} if kind is MemoryExhausted else {})
        assert pool.decode(Picture(visible[0].read_bytes()), *SIZE).modality == "rgb"


def accepts_images(process: int) -> bool:
    """Whether a decoding process has started: it limits its memory at the end of that."""
    try:
        soft, _ = resource.prlimit(process, resource.RLIMIT_AS)
    except (ProcessLookupError, PermissionError):
        return False
    return soft != resource.RLIM_INFINITY


def test_an_image_that_needs_too_much_memory_is_too_large(visible: list[Path]) -> None:
    with closing(Decoders(1, ImageLimits(), seconds=60)) as pool:
        pool.decode(Picture(visible[0].read_bytes()), *SIZE)
        [process] = pool.processes
        mapped = int(Path(f"/proc/{process}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(process, resource.RLIMIT_AS, (mapped + 20_000_000, -1))
        with pytest.raises(ImageTooLarge, match="needs too much memory"):
            pool.decode(Picture(textured(4000, 4000)), *SIZE)
        assert pool.decode(Picture(visible[0].read_bytes()), *SIZE).modality == "rgb"
        assert pool.processes == [process]


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "_GRACE", 60.0)  # a busy machine gives it no half a second
    slow = Picture(textured(4000, 4000), box=Box(0, 0, 4000, 4000))  # some seconds
    with closing(Decoders(1, ImageLimits(), seconds=0.5)) as pool:
        with pytest.raises(ImageUndecodable, match=r"takes longer than 0\.5 seconds"):
            pool.decode(slow, *SIZE)
        # The start of a process, which takes longer than that, is not counted.
        assert pool.decode(Picture(textured(64, 128)), *SIZE).width == 64


def test_a_process_that_is_stopped_is_replaced_and_the_image_tried_again() -> None:
    picture = Picture(textured(64, 128))
    with closing(Decoders(1, ImageLimits(), seconds=0.5)) as pool:
        pool.decode(picture, *SIZE)
        [process] = pool.processes
        os.kill(process, signal.SIGSTOP)
        assert pool.decode(picture, *SIZE).width == 64
        assert process not in pool.processes


def test_requests_and_their_owners_take_turns() -> None:
    order: list[str] = []
    picture = Picture(textured(600, 600))
    with closing(Decoders(1, ImageLimits(), seconds=60)) as pool:
        batch, own, other = Share("a"), Share("a"), Share("b")
        answers = []
        pool.decode(picture, *SIZE)
        (process,) = pool.processes
        os.kill(process, signal.SIGSTOP)  # until all have been submitted
        for share, name, count in (batch, "batch", 20), (own, "own", 2), (other, "other", 2):
            for _ in range(count):
                answer = pool.submit(picture, *SIZE, share)
                answer.add_done_callback(lambda _, name=name: order.append(name))  # type: ignore[misc]
                answers.append(answer)
        os.kill(process, signal.SIGCONT)
        for answer in answers:
            answer.result()
    # Behind the one or two that had their turn before the others came, not behind all of the batch.
    assert max(order.index("own"), order.index("other")) < 6
    assert order[-1] == "batch"


def test_a_request_decodes_until_its_time_is_used_up(visible: list[Path]) -> None:
    picture, share = Picture(visible[0].read_bytes()), Share("a", seconds=1e-6)
    with closing(Decoders(1, ImageLimits(), seconds=60)) as pool:
        first, *others = [pool.submit(picture, *SIZE, share) for _ in range(4)]
        assert first.result().modality == "rgb"
        for other in others:
            with pytest.raises(DecodeBudgetSpent, match="send fewer or smaller ones"):
                other.result()
        assert pool.submit(picture, *SIZE, Share("a", seconds=1e-6)).result().modality == "rgb"


def test_a_cancelled_image_gives_its_turn_back(visible: list[Path]) -> None:
    with closing(Decoders(1, ImageLimits(), seconds=60)) as pool:
        slow = Picture(textured(2000, 2000), box=Box(0, 0, 2000, 2000))
        running, *waiting = [pool.submit(slow, *SIZE, Share("a")) for _ in range(50)]
        assert all(one.cancel() for one in waiting)
        small = pool.submit(Picture(visible[0].read_bytes()), *SIZE, Share("b"))
        assert small.result().modality == "rgb"
        assert running.result().width == 2000


def test_what_waits_when_the_service_ends_is_told_so() -> None:
    pool = Decoders(1, ImageLimits(), seconds=60)
    answers = [pool.submit(Picture(textured(2000, 2000)), *SIZE, Share("a")) for _ in range(9)]
    pool.close()
    assert pool.processes == []
    with pytest.raises(RuntimeUnavailable, match="the service ends"):
        answers[-1].result(0)
    assert all(answer.done() for answer in answers)


def test_what_is_stored_has_no_metadata_unless_told(visible: list[Path]) -> None:
    sent, buffer = Image.open(visible[0]), io.BytesIO()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "Zoe Secret"
    sent.save(buffer, "JPEG", exif=exif, comment=b"Zoe Secret")
    picture = Picture(buffer.getvalue())
    crops = []
    for keep in (False, True):
        with closing(Decoders(1, ImageLimits(), seconds=60, keep_metadata=keep)) as pool:
            crops.append(pool.decode(picture, *SIZE))
    stripped, kept = crops
    assert kept.data == picture.data
    assert b"Zoe Secret" not in stripped.data
    assert stripped.sha256 == kept.sha256 == picture.sha256
    assert (stripped.width, stripped.height) == (sent.height, sent.width)
    assert np.array_equal(np.asarray(stripped.image), np.asarray(kept.image))


def test_limits_reach_the_processes(decoders: Decoders) -> None:
    with pytest.raises(ImageTooLarge, match="5,000,000"):
        decoders.decode(Picture(noise(3000, 2000)), *SIZE)


def test_processes_end_with_the_one_that_started_them() -> None:
    code = (
        "import time"
        "\nfrom service.images.pool import Decoders"
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
    wait_for(lambda: not any(map(runs, children)), "decoding processes outlive the service")


def test_a_picture_is_decoded_in_the_thread_that_asks_unless_it_would_wait(
    decoders: Decoders,
) -> None:
    picture = Picture(textured(60, 120))
    once = decoders.decode_at_once(picture, *SIZE, Share("a"))
    assert once is not None
    assert once.seconds > 0
    usual = decoders.submit(picture, *SIZE, Share("a")).result()
    assert once.image.tobytes() == usual.image.tobytes()
    assert replace(once, image=usual.image, seconds=usual.seconds) == usual
    dear = Picture(textured(2000, 2000))
    waiting = [decoders.submit(dear, *SIZE, Share(str(owner))) for owner in range(4)]
    assert decoders.decode_at_once(picture, *SIZE, Share("a")) is None
    for answer in waiting:
        answer.result()
    with pytest.raises(ServiceError):
        decoders.decode_at_once(Picture(textured(60, 120)[:200]), *SIZE, Share("a"))
