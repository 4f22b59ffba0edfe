"""A shard's memory in files, so that a start reads them instead of every row of the store.

    index/MANIFEST                 one line of JSON, then one with its SHA-256
    index/<random>/features-0…     lifted vectors in fp16, a file per chunk
    index/<random>/columns         row numbers, labels and times, int64
    index/<random>/labels.json     the strings of the labels
    index/<random>/faiss           the FAISS index, where one is built and nothing in it is deleted

The manifest names its folder and is replaced last, so that a crash leaves the old one valid. It is
a cache like the shard: whatever is wrong with it, the store has everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from model import CMTConfig
from model.atomic_file import PRIVATE, sync_folder
from service.gallery.feed import Position, Witness
from service.gallery.index.chunks import Chunk
from service.gallery.index.columns import Columns
from service.gallery.index.features import Features, Norms
from service.gallery.index.recall_index import RecallIndex, is_gpu_kind
from service.gallery.index.room import NoRoom, feature_bytes
from service.gallery.index.segment import Segment
from service.gallery.index.shard import Frozen

FORMAT = 2
FOLDER = "index"  # in the data folder
MANIFEST = "MANIFEST"
_FOLDER_MODE = 0o700  # there are labels and features in it
_THREADS = 8  # that read and check at once: most wait for the disk, or for memory to be mapped
# Bytes that are checked while they are still in the caches. CRC-32 finds every flipped bit, but not
# tampering; a GB takes one core of an AMD EPYC 0.15 s, which hides behind the disk.
_PIECE = 1 << 18


class SnapshotInvalid(Exception):  # noqa: N818
    """There is no snapshot that may be used; the message says why, in one sentence."""


class Restored(NamedTuple):
    """A snapshot as `load` read it.

    segment: for `Shard.restore`. position, witness: as they were given to `save`.
    """

    segment: Segment
    position: Position
    witness: Witness


@dataclass(frozen=True)
class _File:
    name: str
    size: int
    crc32: int


def save(
    frozen: Frozen, folder: Path, *, fingerprint: str, position: Position, witness: Witness
) -> None:
    """Write a snapshot into `folder`, in place of an older one, synced to disk.

    fingerprint: of the checkpoint. position: of the store, at the moment of `Shard.freeze`.
    witness: of that position. What was deleted by then is in none of the files. Raises
    OSError; the older snapshot then stays.
    """
    folder.mkdir(_FOLDER_MODE, exist_ok=True)  # not its parent: a data folder may be moved away
    own = folder / uuid.uuid4().hex
    own.mkdir(_FOLDER_MODE)
    try:
        manifest = _write_all(frozen, own)
        manifest |= {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "position": list(position),
            "witness": list(witness),
            "device": frozen.segment.features.device.type,
            "folder": own.name,
        }
        sync_folder(own)
        text = json.dumps(manifest).encode()
        fresh = own / MANIFEST
        _write(fresh, text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")
        fresh.replace(folder / MANIFEST)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(own, ignore_errors=True)
        raise
    for other in folder.iterdir():
        if other.is_dir() and other != own:
            shutil.rmtree(other, ignore_errors=True)


def load(folder: Path, config: CMTConfig, device: str, *, fingerprint: str) -> Restored:
    """Read what `save` wrote for the same checkpoint and device.

    Raises SnapshotInvalid, also where there is no memory for it.
    """
    try:
        manifest = _manifest(folder, device, fingerprint)
        segment = _read_all(manifest, folder / manifest["folder"], config, device)
    except OSError as error:
        raise SnapshotInvalid(f"{error.filename} cannot be read: {error.strerror}") from error
    except NoRoom as error:
        raise SnapshotInvalid(f"{error}: what fits is read from the store") from error
    return Restored(segment, Position(*manifest["position"]), Witness(*manifest["witness"]))


def remove(folder: Path) -> None:
    """Remove a snapshot, and one that is being written, which then fails. Raises OSError."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        for own in folder.iterdir():
            if own.is_dir():
                shutil.rmtree(own, ignore_errors=True)


def _write_all(frozen: Frozen, own: Path) -> dict[str, Any]:
    features, columns = frozen.segment.features, frozen.columns
    files: list[_File] = []
    chunks = []
    for number, chunk in enumerate(features.chunks):
        rows = min(chunk.count, len(columns) - chunk.first)
        if rows <= 0:
            break
        alive = torch.from_numpy(columns.alive[chunk.first : chunk.first + rows])
        z = chunk.z[:rows].cpu() * alive[:, None]
        files.append(_write(own / f"features-{number}", z.numpy().data.cast("B")))
        chunks.append({"rows": rows, "scale": chunk.scale})
    table, texts = columns.dump()
    files.append(_write(own / "columns", table.tobytes()))
    files.append(_write(own / "labels.json", json.dumps(texts).encode()))
    return {
        "items": columns.alive_count,
        "chunks": chunks,
        "norms": list(features.norms),
        "index": _write_index(frozen, own, files),
        "files": [asdict(file) for file in files],
    }


def _write_index(frozen: Frozen, own: Path, files: list[_File]) -> dict[str, Any] | None:
    index, columns = frozen.segment.index, frozen.columns
    # It cannot remove a deleted row: it is built again after loading. So is one on a GPU, which is
    # built nearly as soon as it would be read.
    if index is None or is_gpu_kind(index.kind) or not columns.alive[: len(index)].all():
        return None
    path = own / "faiss"
    _create(path).close()  # FAISS keeps the mode of a file that is there
    try:
        written = index.write(str(path))
    except RuntimeError as error:  # FAISS's error for a full disk or a missing folder
        raise OSError(str(error)) from error
    if written > len(columns):
        path.unlink()  # it has rows that were added after this moment
        return None
    with path.open("rb") as file:
        os.fsync(file.fileno())
    files.append(_File("faiss", path.stat().st_size, _checksum(path)))
    return {"kind": index.kind, "expected": index.expected}


def _write(path: Path, data: bytes | memoryview) -> _File:
    with _create(path) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _File(path.name, len(data), zlib.crc32(data))


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, PRIVATE), "wb")


def _manifest(folder: Path, device: str, fingerprint: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise SnapshotInvalid(f"there is no {path}")
    text, _, digest = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(text).hexdigest().encode() + b"\n":
        raise SnapshotInvalid(f"{path} is damaged: its checksum is another")
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != FORMAT:
        raise SnapshotInvalid(
            f"{path} has format {manifest['format']}, this version reads {FORMAT}"
        )
    if manifest["fingerprint"] != fingerprint:
        raise SnapshotInvalid(f"{path} holds features of another checkpoint")
    if manifest["device"] != torch.device(device).type:  # whose chunks have another size
        raise SnapshotInvalid(f"{path} was written by a gallery on {manifest['device']}")
    return manifest


def _read_all(manifest: dict[str, Any], own: Path, config: CMTConfig, device: str) -> Segment:
    files = {file["name"]: _File(**file) for file in manifest["files"]}
    segment = Segment.empty(config, device)
    features = segment.features
    with ThreadPoolExecutor(_THREADS) as threads:
        final = len(manifest["chunks"]) - 1
        jobs = [
            threads.submit(
                partial(_read_chunk, own, files[f"features-{number}"], features, number == final),
                **chunk,
            )
            for number, chunk in enumerate(manifest["chunks"])
        ]
        table = np.frombuffer(_read(own, files["columns"]), np.int64)
        texts = json.loads(_read(own, files["labels.json"]))
        index = None
        if manifest["index"] is not None:
            _check(own, files["faiss"])
            load_index = partial(RecallIndex.read, str(own / "faiss"), features.width)
            index = load_index(manifest["index"]["kind"], manifest["index"]["expected"])
        chunks = [chunk for job in jobs for chunk in job.result()]
    features.adopt(chunks, Norms(*manifest["norms"]))
    columns = Columns.restored(table, texts)
    return Segment(features, columns, index)


def _read_chunk(
    own: Path, file: _File, features: Features, last: bool, *, rows: int, scale: float
) -> list[Chunk]:
    """Read a file into the memory of new chunks: of one, or of several where they are smaller.

    last: rows will be added to it.
    """
    _check_size(own / file.name, feature_bytes(rows, features.width))
    checksum = 0
    chunks: list[Chunk] = []
    with (own / file.name).open("rb", buffering=0) as source:
        while rows:
            chunk = features.new_chunk(scale, None if last else rows)
            chunk.count = min(rows, chunk.capacity)
            z = chunk.z[: chunk.count]
            place = z if chunk.device.type == "cpu" else torch.empty_like(z, device="cpu")
            checksum = _fill(source, file.name, place.numpy().data.cast("B"), checksum)
            if place is not z:
                z.copy_(place)
            rows -= chunk.count
            chunks.append(chunk)
    _compare(own, file, checksum)
    return chunks


def _read(own: Path, file: _File) -> bytearray:
    _check_size(own / file.name, file.size)
    data = bytearray(file.size)
    with (own / file.name).open("rb", buffering=0) as source:
        checksum = _fill(source, file.name, memoryview(data), 0)
    _compare(own, file, checksum)
    return data


def _fill(source: BinaryIO, name: str, place: memoryview, checksum: int) -> int:
    """Read on in a file into memory, piece by piece → its checksum. Raises SnapshotInvalid."""
    for start in range(0, len(place), _PIECE):
        piece = place[start : start + _PIECE]
        if source.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise SnapshotInvalid(f"{name} ended while it was read")
        checksum = zlib.crc32(piece, checksum)
    return checksum


def _compare(own: Path, file: _File, checksum: int) -> None:
    if checksum != file.crc32:
        raise SnapshotInvalid(f"{own / file.name} is damaged: its checksum is another")


def _check(own: Path, file: _File) -> None:
    path = own / file.name
    _check_size(path, file.size)
    _compare(own, file, _checksum(path))


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as source:
        while piece := source.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise SnapshotInvalid(f"{path} is missing")
    if path.stat().st_size != size:
        raise SnapshotInvalid(f"{path} has {path.stat().st_size} bytes instead of {size}")
