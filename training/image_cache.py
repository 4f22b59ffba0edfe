"""Decoded training images: resized once, kept as uint8 in a memory-mapped file.

A second run with the same images and size opens the file instead of decoding. The folder holds, for
every list of samples and size,

    KEY.images            3×height×width bytes for each image that decodes, in the order of the list
    KEY.unreadable.json   row → reason for those that do not; absent where all do

KEY covers path, size, time of change and modality of every file, and the version of the rules by
which pictures are read (`model.pictures.POLICY`). Images are stored under the key of the
readable ones alone: once the others are removed from the dataset, as the error advises, nothing is
decoded again. Files of lists that are no longer used stay; the folder may be deleted at any time.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from model.atomic_file import SHARED, whole_file, write_whole
from model.pictures import POLICY
from model.pixels import resize
from model.terminal import Console
from training.datasets.decoding import READERS, UnreadableImageError, decode
from training.datasets.sample import DatasetError, Sample

Unreadable = Literal["stop", "skip"]

_CHUNK = 256  # images handed to the threads at once: decoded ones must not pile up in memory


class CacheError(RuntimeError):
    """The decoded images cannot be stored; the message says what to change."""


def readable_samples(
    samples: Sequence[Sample],
    height: int,
    width: int,
    folder: Path,
    unreadable: Unreadable = "stop",
) -> tuple[list[Sample], list[str]]:
    """Decode into the cache what is not there yet → the samples to train on, and what was skipped.

    height, width: of the decoded images, in pixels.
    unreadable: "stop" at images that cannot be decoded, or "skip" them.
    Returns the samples that decode, in their order, and one sentence for each that was skipped.
    `cached_images` of the former decodes nothing again.
    Raises DatasetError where an image cannot be decoded and none are skipped, or where no image
    can; it names the first, with the number of all. Raises CacheError where the disk has no room
    for the decoded images.
    """
    _, problems = _fill(samples, height, width, folder)
    if problems and (unreadable == "stop" or len(problems) == len(samples)):
        raise _unreadable(samples, problems)
    kept = [sample for row, sample in enumerate(samples) if row not in problems]
    return kept, [f"Skipped {samples[row].path}: {problems[row]}." for row in sorted(problems)]


def cached_images(samples: Sequence[Sample], height: int, width: int, folder: Path) -> np.ndarray:
    """uint8 array of len(samples)×3×height×width, memory-mapped read-only from `folder`.

    Raises DatasetError where an image cannot be decoded (any more); it names the first, with the
    number of all. Raises CacheError where the disk has no room for the decoded images.
    """
    path, problems = _fill(samples, height, width, folder)
    if problems:
        raise _unreadable(samples, problems)
    return np.memmap(path, np.uint8, mode="r", shape=(len(samples), 3, height, width))


def _unreadable(samples: Sequence[Sample], problems: dict[int, str]) -> DatasetError:
    first = min(problems)
    return DatasetError(
        f"{samples[first].path} cannot be decoded ({problems[first]}); {len(problems)} of "
        f"{len(samples)} images are unreadable: replace or remove what 'cmt data check' names, or "
        "train without them by --unreadable skip"
    )


def _fill(
    samples: Sequence[Sample], height: int, width: int, folder: Path
) -> tuple[Path, dict[int, str]]:
    """File of the readable images, and the reason for each row that is not; decodes if needed."""
    facts = [_facts(sample) for sample in samples]
    stored = _stored(facts, height, width, folder)
    if stored is not None:
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        stored = _stored(facts, height, width, folder)  # by the process that we waited for
        if stored is None:
            problems = _build(samples, facts, height, width, folder)
            stored = _images_file(facts, problems, height, width, folder), problems
    return stored


def _stored(
    facts: Sequence[str], height: int, width: int, folder: Path
) -> tuple[Path, dict[int, str]] | None:
    """What `_fill` returns, if it is completely in the folder already."""
    note = _problems_file(facts, height, width, folder)
    problems = {}
    if note.is_file():
        problems = {int(row): reason for row, reason in json.loads(note.read_text()).items()}
    path = _images_file(facts, problems, height, width, folder)
    size = (len(facts) - len(problems)) * 3 * height * width
    if path.is_file() and path.stat().st_size == size:
        return path, problems
    return None


def _build(
    samples: Sequence[Sample], facts: Sequence[str], height: int, width: int, folder: Path
) -> dict[int, str]:
    """Decode everything → reasons by row; the files appear under their names only when whole."""
    needed = len(samples) * 3 * height * width
    problems: dict[int, str] = {}
    # What a killed process left behind; nobody else writes while we hold the lock.
    for partial in folder.glob("*.partial"):
        partial.unlink()
    if shutil.disk_usage(folder).free < needed:
        raise CacheError(_no_room(needed, folder))
    # Which images decode, and with it the file's name, is known at the end. Until then it has the
    # name that it gets if all do: if some do not, it is too short to be taken for that.
    images = _images_file(facts, {}, height, width, folder)
    try:
        # Not through a memory map: on a full disk that ends the process without a message.
        with whole_file(images, SHARED) as file:
            for row, pixels in enumerate(_decoded(samples, height, width)):
                if isinstance(pixels, str):
                    problems[row] = pixels
                else:
                    file.write(pixels.data)
        if problems:
            images.replace(_images_file(facts, problems, height, width, folder))
            write_whole(_problems_file(facts, height, width, folder), json.dumps(problems))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(_no_room(needed, folder)) from error
        raise
    return problems


def _decoded(samples: Sequence[Sample], height: int, width: int) -> Iterator[np.ndarray | str]:
    """3×height×width pixels of every sample, or why it has none, in order."""

    def read(sample: Sample) -> np.ndarray | str:
        try:
            pixels = resize(decode(sample.path, sample.modality), height, width)
        except UnreadableImageError as error:
            return str(error)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    with ThreadPoolExecutor(READERS) as pool:
        for start in track(
            range(0, len(samples), _CHUNK),
            f"Decoding {len(samples)} images at {height}×{width}",
            console=_console(),
            transient=True,
            disable=not _shows(),
        ):
            yield from pool.map(read, samples[start : start + _CHUNK])


def _no_room(needed: int, folder: Path) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"The decoded images need {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are "
        "free; make room, or name a folder on another disk with --cache."
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process decodes, the others (of one `torchrun`, say) wait and find its file.

    The lock dies with its process. Its file stays: removing it would let two processes lock two
    files of one name.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if _shows():
                _console().print(f"Waiting for another process to decode into {folder}.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _shows() -> bool:
    """Whether this process shows its progress: on a terminal, and one process per machine."""
    return _console().is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"


def _console() -> Console:
    return Console(stderr=True)


def _images_file(
    facts: Sequence[str], problems: dict[int, str], height: int, width: int, folder: Path
) -> Path:
    readable = [fact for row, fact in enumerate(facts) if row not in problems]
    return folder / f"{_key(readable, height, width)}.images"


def _problems_file(facts: Sequence[str], height: int, width: int, folder: Path) -> Path:
    return folder / f"{_key(facts, height, width)}.unreadable.json"


def _key(facts: Sequence[str], height: int, width: int) -> str:
    digest = hashlib.sha256(f"{POLICY}|{height}x{width}".encode())
    for fact in facts:
        digest.update(fact.encode(errors="surrogateescape"))  # a name need not be text
    return digest.hexdigest()[:32]


def _facts(sample: Sample) -> str:
    """What changes when a file does; a file that is not there is unreadable, not an error here."""
    name = f"{sample.path.absolute()}|{sample.modality}"
    try:
        facts = sample.path.stat()
    except OSError as error:
        return f"{name}|{error.strerror}"
    return f"{name}|{facts.st_size}|{facts.st_mtime_ns}"
