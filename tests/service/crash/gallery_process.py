"""The engine by itself: a process with one `Gallery`, a thread and a pipe per session."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from model import CheckpointInfo, CMTConfig
from service.errors import DatabaseUnavailable
from service.gallery import Filters, Gallery, Item, NewItem
from service.images.decode import decode
from tests.service.crash.subject import (
    CONTEXT,
    STARTING_SECONDS,
    TOGETHER,
    Listed,
    ProcessGone,
    Session,
    Subject,
    crop_bytes,
    die_at_write,
)

INFO = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))


class GalleryProcess(Subject):
    """A `Gallery` on a data folder, or on the database that a URL names.

    crops_url: a bucket, for every crop.
    """

    most_per_add = 3

    def __init__(
        self, data_dir: Path, database_url: str | None, crops_url: str | None = None
    ) -> None:
        super().__init__()
        self._data_dir, self._url, self._crops_url = data_dir, database_url, crops_url

    def start(self, dies_at_write: int | None) -> None:
        ends = [CONTEXT.Pipe() for _ in range(1 + TOGETHER)]
        self._control, *self._pipes = [ours for ours, _ in ends]
        theirs = [end for _, end in ends]
        self._process = CONTEXT.Process(
            target=_serve,
            args=(self._data_dir, self._url, self._crops_url, theirs, dies_at_write),
            daemon=True,
        )
        self._process.start()
        for end in theirs:  # so that the process's death closes the pipe
            end.close()

    def sessions(self) -> list[Session]:
        try:
            assert self._control.poll(STARTING_SECONDS), "the gallery does not open"
            self._control.recv()
        except EOFError as error:
            raise ProcessGone from error
        return [_PipeSession(pipe) for pipe in self._pipes]

    def begin_close(self) -> None:
        self._control.send("close")
        self._control.recv()


class _PipeSession:
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def add(self, person_id: str, keys: list[int]) -> list[str]:
        ids: list[str] = self._call("add", person_id, keys)
        return ids

    def delete(self, item_id: str) -> None:
        self._call("delete", item_id)

    def erase(self, person_id: str) -> int:
        return int(self._call("erase", person_id))

    def nearest(self, key: int) -> tuple[str, float]:
        item_id, distance = self._call("nearest", key)
        return item_id, distance

    def list(self) -> list[Listed]:
        return [Listed(*fields) for fields in self._call("list")]

    def image(self, item_id: str) -> bytes:
        return bytes(self._call("image", item_id))

    def _call(self, verb: str, *arguments: object) -> Any:
        try:
            self._pipe.send((verb, *arguments))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ProcessGone from error
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Answers:
    """What the process does for each verb of a session; results are plain values for the pipe."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery

    def add(self, person_id: str, keys: list[int]) -> list[str]:
        new = [NewItem(decode(crop_bytes(k)), person_id, metadata={"key": k}) for k in keys]
        return [item.id for item in self._gallery.add(new, torch.stack([*map(_features, keys)]))]

    def delete(self, item_id: str) -> None:
        self._gallery.delete(item_id)

    def erase(self, person_id: str) -> int:
        return self._gallery.delete_where(person_id)

    def nearest(self, key: int) -> tuple[str, float]:
        (hit,) = self._gallery.search(_features(key), None, top_k=1).hits
        return hit.item.id, hit.distance

    def list(self) -> list[tuple[str, str | None, int]]:
        self._gallery.check()
        return [(item.id, item.person_id, item.metadata["key"]) for item in self._everything()]

    def image(self, item_id: str) -> bytes:
        return self._gallery.image(item_id)[0]

    def _everything(self) -> Iterator[Item]:
        cursor = None
        while True:
            page = self._gallery.list(Filters(), 1000, cursor)
            yield from page.items
            cursor = page.next_cursor
            if cursor is None:
                return


def _features(key: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key)
    return torch.randn(INFO.config.parts, INFO.config.dim, generator=generator)


def _serve(
    data_dir: Path,
    url: str | None,
    crops_url: str | None,
    pipes: list[Connection],
    dies_at_write: int | None,
) -> None:
    torch.set_num_threads(1)
    control, *sessions = pipes
    gallery = Gallery.open(
        data_dir, INFO, database_url=url, crops_url=crops_url, crops_inline_bytes=0
    )
    control.send("open")
    if dies_at_write is not None:
        die_at_write(dies_at_write)
    answers = _Answers(gallery)
    threading.Thread(target=_save_often, args=(gallery,), daemon=True).start()
    for pipe in sessions:
        threading.Thread(target=_answer, args=(answers, pipe), daemon=True).start()
    control.recv()
    control.send("closing")
    gallery.close()


def _save_often(gallery: Gallery) -> None:
    """So that kills meet a snapshot that is being written, which is seldom otherwise."""
    while True:
        try:
            gallery.save_index()
        except DatabaseUnavailable:  # closed
            return
        time.sleep(0.02)


def _answer(answers: _Answers, pipe: Connection) -> None:
    while True:
        verb, *arguments = pipe.recv()
        try:
            answer = getattr(answers, verb)(*arguments)
        except Exception as error:
            answer = error
        pipe.send(answer)
