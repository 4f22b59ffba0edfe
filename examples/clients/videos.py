"""Enroll the people in a folder of video files: frames sampled, cut to the boxes of a detector.

    python examples/clients/videos.py recordings --detector my_detector:people --every 2

The detector is a function of yours, in the current folder or installed: it takes a frame as a PIL
image and gives boxes (x, y, width, height, …) in its pixels. With --weights FILE it is called once
with that path before, and gives the detector; torchvision_people.py is one. The folder that a file
lies in is its camera. May be interrupted and run again: --state says how far each file was
enrolled, and idempotency keys that nothing is enrolled twice. A broken file is reported and the
next one read.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import av
import typer
from PIL import Image

from model.atomic_file import write_whole
from model.image_files import is_other_programs
from model.terminal import say
from service.client import DEFAULT_URL, BatchItem, Client, Entry, ServiceProblem, Unreachable

SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm"})
LEAST_WIDTH, LEAST_HEIGHT = 16, 32  # of what the service takes
DIGITS = {"%Y": 4, "%m": 2, "%d": 2, "%H": 2, "%M": 2, "%S": 2}

Detector = Callable[[Image.Image], Iterable[Sequence[float]]]


class DetectorError(Exception):
    """The user's detector is not there or fails; the message says which and where."""


@dataclass
class Video:
    """One file. name: its path in the folder, which with `size` is what it is known by."""

    file: Path
    name: str
    camera: str
    size: int
    broken: str | None = None

    def entries(
        self,
        detect: Detector,
        every: float,
        begin: float,
        started: str | None,
        zone: ZoneInfo | None,
    ) -> Iterator[Entry]:
        """The people in it from `begin` on, in seconds. Sets `broken` where it cannot be read."""
        try:
            with av.open(str(self.file)) as container:
                start = start_of(self.file, container, started, zone)
                for seconds, frame in frames(container, every, begin):
                    for number, crop in enumerate(self._crops(detect, seconds, frame)):
                        known = f"{self.name}\0{self.size}\0{seconds:.6f}\0{number}"
                        label = BatchItem(
                            camera_id=self.camera,
                            captured_at=start + timedelta(seconds=seconds),
                            metadata={"video": self.name, "seconds": seconds},
                            key=f"video-{hashlib.sha256(known.encode()).hexdigest()}",
                        )
                        yield Entry(crop, label)
        except (av.FFmpegError, OSError) as error:
            self.broken = str(error)

    def _crops(self, detect: Detector, seconds: float, frame: Image.Image) -> Iterator[bytes]:
        try:
            boxes = [tuple(map(float, box[:4])) for box in detect(frame)]
        except Exception as error:
            raise DetectorError(
                f"the detector fails on {self.name} at {seconds:.2f} s: {error!r}"
            ) from error
        for x, y, width, height in boxes:
            left, right = (round(max(0, min(frame.width, at))) for at in (x, x + width))
            top, bottom = (round(max(0, min(frame.height, at))) for at in (y, y + height))
            if right - left >= LEAST_WIDTH and bottom - top >= LEAST_HEIGHT:
                target = BytesIO()
                frame.crop((left, top, right, bottom)).save(target, "PNG")
                yield target.getvalue()


def frames(container: Any, every: float, begin: float) -> Iterator[tuple[float, Image.Image]]:
    """A frame at each multiple of `every` seconds from `begin` on, upright, with its time."""
    if not container.streams.video:
        raise OSError("holds no video")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    first = (stream.start_time or 0) * stream.time_base
    if begin:
        container.seek(int((first + begin) / stream.time_base), stream=stream)
    due = begin
    for frame in container.decode(stream):
        seconds = None if frame.pts is None else float(frame.pts * frame.time_base - first)
        if seconds is not None and seconds >= due:
            due = (seconds // every + 1) * every
            yield seconds, frame.to_image().rotate(frame.rotation, expand=True)


def start_of(file: Path, container: Any, started: str | None, zone: ZoneInfo | None) -> datetime:
    """When a video begins: by its name, else as the file says, else by when it was written."""
    if started is not None:
        digits = re.sub(r"%[YmdHMS]", lambda part: rf"\d{{{DIGITS[part[0]]}}}", re.escape(started))
        if found := re.search(digits, file.stem):
            moment = datetime.strptime(found[0], started)
            return (moment.replace(tzinfo=zone) if zone else moment).astimezone(UTC)
    try:
        told = datetime.fromisoformat(container.metadata["creation_time"])
        if told.year > 2000:  # a camera without a clock begins in 1904 or 1970
            return told if told.tzinfo else told.replace(tzinfo=UTC)
    except (KeyError, ValueError):
        pass
    duration = (container.duration or 0) / av.time_base
    return datetime.fromtimestamp(file.stat().st_mtime - duration, UTC)


def find_videos(folder: Path, settle: float) -> Iterator[Video]:
    """The videos in a folder, by path; one that changed just now is left for the next run."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.suffix.lower() in SUFFIXES and not any(map(is_other_programs, name.parts)):
            status = file.stat()
            if time.time() - status.st_mtime < settle:
                say(
                    f"{name}: changed in the last {settle:g} s; left for the next run, or give "
                    "--settle 0 if it is whole",
                    err=True,
                )
            elif file.is_file():
                yield Video(file, name.as_posix(), file.parent.resolve().name, status.st_size)


def load_detector(name: str, weights: Path | None) -> Detector:
    """The function that MODULE:FUNCTION names. Raises DetectorError."""
    module, _, function = name.partition(":")
    sys.path.append(str(Path.cwd()))
    try:
        found: Any = getattr(importlib.import_module(module), function)
        return found if weights is None else found(weights)  # type: ignore[no-any-return]
    except Exception as error:
        raise DetectorError(f"no detector {name}, such as my_detector:people: {error!r}") from error


def main(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    detector: Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="Finds people.")],
    weights: Annotated[Path | None, typer.Option(exists=True, help="For the detector.")] = None,
    every: Annotated[float, typer.Option(min=0.001, help="Seconds between two frames.")] = 1,
    started: Annotated[
        str | None, typer.Option(help="Time in the names, such as %Y%m%d_%H%M%S.")
    ] = None,
    zone: Annotated[str | None, typer.Option(help="Of it, such as Europe/Berlin.")] = None,
    settle: Annotated[float, typer.Option(help="Seconds since the last change of a file.")] = 30,
    state: Annotated[Path, typer.Option(help="How far each file is.")] = Path("videos.json"),
    url: Annotated[str, typer.Option(envvar="CMT_URL", help="Of the service.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="CMT_API_KEY")] = None,
) -> None:
    """Enroll the people in a folder of video files.

    Example: python examples/clients/videos.py recordings --detector my_detector:people
    """
    failed = False
    try:
        local = ZoneInfo(zone) if zone else None  # that of this machine
        detect = load_detector(detector, weights)
        try:
            far: dict[str, list[Any]] = json.loads(state.read_text()) if state.exists() else {}
        except ValueError as error:
            raise ValueError(f"{state} is no state of this program; remove it") from error
        with Client(url, api_key=api_key) as client:
            client.ready()
            for video in find_videos(folder, settle):
                size, begin = far.get(video.name, (0, 0.0))
                begin = begin if size == video.size else 0.0
                if begin is None:  # to its end
                    continue
                told = Counter[str]()
                entries = video.entries(detect, every, begin, started, local)
                for result in client.enroll_many(entries):
                    known = result.status == 200 or result.code == "idempotency_conflict"
                    told["known" if known else "refused" if result.reason else "enrolled"] += 1
                    if result.reason and not known:
                        say(f"{video.name}: {result.reason}", err=True)
                    seconds = result.entry.item.metadata["seconds"]
                    far[video.name] = [video.size, seconds]
                    write_whole(state, json.dumps(far))
                if video.broken is None:
                    far[video.name] = [video.size, None]
                    write_whole(state, json.dumps(far))
                else:
                    say(f"{video.name}: cannot be read on: {video.broken}", err=True)
                failed |= video.broken is not None or told["refused"] > 0
                counts = ", ".join(f"{told[name]} {name}" for name in ("enrolled", "known"))
                say(f"{video.name}: {counts}")
    except KeyboardInterrupt:
        say("stopped; what was enrolled stays, and the next run goes on from here", err=True)
        raise typer.Exit(130) from None
    except (DetectorError, ServiceProblem, Unreachable, ValueError, OSError, LookupError) as error:
        say(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
