"""examples/clients/videos.py against a real service, on videos that the tests make."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import struct
import subprocess
import sys
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import av
import pytest
import torch
from PIL import Image, ImageChops, ImageStat

from model.torchvision_compat import extension_loads, prepare
from service.client import Client
from tests.paths import MINI, ROOT
from tests.service.processes import ServiceProcess, wait_for

PROGRAM = ROOT / "examples" / "clients" / "videos.py"
PLACE = (80, 16, 48, 112)  # x, y, width, height of the person in a frame of 320 by 160

# What a user writes: people are all that is not black. It notes how often it was asked.
FINDER = """
import time
from pathlib import Path

def people(frame):
    with Path("asked").open("a") as asked:
        asked.write(".")
    found = frame.convert("L").point(lambda value: 255 * (value > 40)).getbbox()
    if found is None:
        return []
    left, top, right, bottom = found
    return [(left, top, right - left, bottom - top, 0.9), (0, 0, 10, 10)]

def slowly(frame):
    time.sleep(0.3)
    return people(frame)

def never(frame):
    raise RuntimeError("no such network")

def loaded(weights):
    assert weights.name == "weights.bin"
    return people
"""


def write_video(
    file: Path,
    crop: Path,
    seen: range,
    *,
    seconds: int = 4,
    created: str | None = None,
    place: tuple[int, int, int, int] = PLACE,
) -> None:
    """Ten frames a second; the person is there in those of `seen`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    x, y, width, height = place
    with Image.open(crop) as opened:
        person = opened.resize((width, height)).point(lambda value: max(value, 60))
    with av.open(str(file), "w") as container:
        if created is not None:
            container.metadata["creation_time"] = created
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 160, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(10 * seconds):
            picture = Image.new("RGB", (320, 160))
            if number in seen:
                picture.paste(person, (x, y))
            frame = av.VideoFrame.from_image(picture)  # type: ignore[no-untyped-call]
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder that a user works in, with a detector and recordings of two cameras."""
    (tmp_path / "finder.py").write_text(FINDER)
    visible = sorted((MINI / "cam1").glob("*/0001.jpg"))
    infrared = sorted((MINI / "cam3").glob("*/0001.jpg"))
    folder = tmp_path / "recordings"
    write_video(folder / "gate" / "ch1-20260301_120000.mp4", visible[0], range(5, 25))
    write_video(
        folder / "yard" / "night.mkv", infrared[1], range(40), created="2026-03-02T22:00:00Z"
    )
    (folder / "yard" / "notes.txt").write_text("no video")
    (folder / "@eaDir").mkdir()
    shutil.copy(folder / "yard" / "night.mkv", folder / "@eaDir" / "night.mkv")
    return tmp_path


def command(place: Path, url: str, *more: str) -> list[str]:
    """The program on the recordings; they are finished."""
    given = [place / "recordings", "--url", url, "--settle", "0"]
    times = ["--started", "%Y%m%d_%H%M%S", "--zone", "Europe/Berlin"]
    return [sys.executable, str(PROGRAM), *map(str, given), *times, *more]


def run(
    place: Path, url: str, *more: str, detector: str = "finder:people"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(place, url, "--detector", detector, *more),
        cwd=place, capture_output=True, text=True, check=False,
    )  # fmt: skip


def asked(place: Path) -> int:
    """How many frames the detector was asked about since the last time."""
    file = place / "asked"
    count = len(file.read_text()) if file.exists() else 0
    file.unlink(missing_ok=True)
    return count


def test_people_of_all_videos_are_enrolled_once(
    service: ServiceProcess, client: Client, place: Path
) -> None:
    night = place / "recordings" / "yard" / "night.mkv"
    broken = place / "recordings" / "door" / "broken.mkv"
    broken.parent.mkdir()
    broken.write_bytes(night.read_bytes()[:300])
    empty = broken.with_name("empty.mp4")
    empty.touch()

    early = run(place, service.url, "--settle", "86400")
    assert (early.returncode, early.stdout) == (0, "")
    assert all("changed in the last 86400 s" in line for line in early.stderr.splitlines())
    assert len(early.stderr.splitlines()) == 4

    done = run(place, service.url)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == [
        "door/broken.mkv", "door/empty.mp4",
    ]  # fmt: skip
    assert asked(place) == 8  # four seconds each
    items = client.list().items
    assert [(item.camera_id, item.captured_at) for item in items] == [
        ("gate", datetime(2026, 3, 1, 11, 0, 1, tzinfo=UTC)),
        ("gate", datetime(2026, 3, 1, 11, 0, 2, tzinfo=UTC)),
        *(("yard", datetime(2026, 3, 2, 22, 0, second, tzinfo=UTC)) for second in range(4)),
    ]
    assert items[1].metadata == {"video": "gate/ch1-20260301_120000.mp4", "seconds": 2.0}
    assert [item.modality for item in items] == ["rgb"] * 2 + ["ir"] * 4
    assert all(abs(item.width - 48) <= 8 and abs(item.height - 112) <= 8 for item in items)

    # The next run reads what it could not read before, and nothing else.
    write_video(broken, sorted((MINI / "cam1").glob("*/0001.jpg"))[2], range(10))
    empty.unlink()
    again = run(place, service.url, "--every", "0.5")
    assert again.returncode == 0, again.stderr
    assert again.stdout == "door/broken.mkv: 2 enrolled, 0 known\n"
    assert asked(place) == 8
    # Without its state it reads all of them anew, and the service knows them.
    (place / "videos.json").unlink()
    anew = run(place, service.url)
    assert anew.returncode == 0, anew.stderr
    assert anew.stdout.splitlines()[1:] == [
        "gate/ch1-20260301_120000.mp4: 0 enrolled, 2 known",
        "yard/night.mkv: 0 enrolled, 4 known",
    ]
    assert client.list().total == 8


def test_a_video_that_was_filmed_upright_is_turned(
    service: ServiceProcess, client: Client, tmp_path: Path
) -> None:
    (tmp_path / "finder.py").write_text(FINDER)
    lying = tmp_path / "lying.png"
    with Image.open(sorted((MINI / "cam1").glob("*/0001.jpg"))[0]) as opened:
        person = opened.resize((48, 112)).point(lambda value: max(value, 60))
        person.transpose(Image.Transpose.ROTATE_90).save(lying)
    video = tmp_path / "recordings" / "phone" / "clip.mp4"
    write_video(video, lying, range(10), seconds=1, place=(40, 40, 112, 48))
    # The matrix by which a player turns it by 90° clockwise, as phones write it.
    data = bytearray(video.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack("!9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    video.write_bytes(data)
    done = run(tmp_path, service.url)
    assert done.returncode == 0, done.stderr
    [item] = client.list().items
    crop = Image.open(BytesIO(client.image(item.id)[0])).convert("RGB").resize((48, 112))

    def difference(other: Image.Image) -> float:
        return sum(ImageStat.Stat(ImageChops.difference(crop, other)).mean) / 3

    assert item.height > item.width
    assert difference(person) < 15 < difference(person.transpose(Image.Transpose.ROTATE_180))


def test_an_interrupted_run_goes_on_where_it_was(
    service: ServiceProcess, client: Client, place: Path
) -> None:
    shutil.rmtree(place / "recordings" / "gate")
    many = command(place, service.url, "--detector", "finder:slowly", "--every", "0.02")
    process = subprocess.Popen(
        many, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        asking = place / "asked"
        wait_for(lambda: asking.exists() and len(asking.read_text()) > 5, "it does not begin")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert told.splitlines()[-1].startswith("stopped; what was enrolled stays")
    assert "Traceback" not in told

    # From a state in the middle, it seeks there and begins with that frame.
    name = "yard/night.mkv"
    size = (place / "recordings" / name).stat().st_size
    (place / "videos.json").write_text(json.dumps({name: [size, 3.0]}))
    asked(place)
    done = run(place, service.url, "--every", "0.02")
    assert done.returncode == 0, done.stderr
    assert asked(place) == 10
    moments = [item.metadata["seconds"] for item in client.list(limit=1000).items]
    assert len(set(moments)) == len(moments)
    assert {3.0, 3.9} <= set(moments)
    # Another file under the same name is another video.
    write_video(place / "recordings" / name, sorted((MINI / "cam1").glob("*/0001.jpg"))[3],
                range(10), seconds=1)  # fmt: skip
    total = len(moments)
    assert run(place, service.url).stdout == f"{name}: 1 enrolled, 0 known\n"
    assert client.list().total == total + 1


def test_a_detector_that_is_wrong_is_a_sentence(
    service: ServiceProcess, client: Client, place: Path
) -> None:
    for detector, words in (
        ("finder:never", "fails on gate/ch1-20260301_120000.mp4 at 0.00 s"),
        ("finder:nobody", "no detector finder:nobody"),
        ("nowhere:people", "no detector nowhere:people"),
        ("finder", "no detector finder"),
    ):
        answer = run(place, service.url, detector=detector)
        assert answer.returncode == 1
        assert words in answer.stderr
        assert "Traceback" not in answer.stderr
    (place / "weights.bin").touch()
    assert run(place, service.url, "--weights", "weights.bin", detector="finder:loaded").stdout
    assert client.list().total == 6


def test_people_are_found_with_a_file_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, in which one label was made to be what it sees everywhere."""
    monkeypatch.syspath_prepend(PROGRAM.parent)
    people = importlib.import_module("torchvision_people").people
    torch.manual_seed(5)
    prepare()
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as small_network

    state = small_network(weights=None, weights_backbone=None).state_dict()
    file = tmp_path / "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth"

    def found(label: int) -> list[tuple[float, float, float, float]]:
        state["roi_heads.box_predictor.cls_score.bias"].zero_()[label] = 50
        torch.save(state, file)
        return list(people(file)(Image.new("L", (320, 160), 90)))

    if not extension_loads():  # where torch is a build for the CPU, and torchvision is not
        with pytest.raises(RuntimeError, match="install both from one index"):
            found(1)
        return
    boxes = found(1)
    assert boxes
    for x, y, width, height in boxes:
        assert min(x, y) >= 0
        assert x + width <= 320.01
        assert y + height <= 160.01
        assert min(width, height) > 0
    assert found(3) == []  # a car
