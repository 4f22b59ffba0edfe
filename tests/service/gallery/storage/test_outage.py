"""PostgreSQL goes away and comes back: sentences meanwhile, nothing acknowledged is lost."""

from __future__ import annotations

import io
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.errors import DatabaseUnavailable
from service.gallery import Filters, Gallery, NewItem
from service.images.decode import decode
from tests.service.postgres import PostgresServer
from tests.service.postgres_wire import wired
from tests.service.processes import wait_for

INFO = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))
PATIENCE = 60  # seconds until a thread that makes no progress is called stuck


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, INFO.config.parts, INFO.config.dim, generator=generator)


def new_item(person_id: str | None = None) -> NewItem:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((16, 32)).save(buffer, "PNG")
    return NewItem(decode(buffer.getvalue()), person_id)


class Caller(threading.Thread):
    """Calls again and again; counts answers and refusals, keeps any other error."""

    def __init__(self, call: Callable[[], None], ended: threading.Event) -> None:
        super().__init__()
        self._call, self._ended = call, ended
        self.answers = 0
        self.refusals: list[str] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        while not self._ended.is_set():
            try:
                self._call()
                self.answers += 1
            except DatabaseUnavailable as error:
                self.refusals.append(error.detail)
                time.sleep(0.01)
            except BaseException as error:
                self.failure = error
                self._ended.set()


def wait_until(condition: Callable[[], bool], callers: list[Caller]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for caller in callers:
            if caller.failure is not None:
                raise caller.failure
        assert time.monotonic() < deadline, [(c.answers, len(c.refusals)) for c in callers]
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_server_stopped_under_load_and_started_again(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path, how: Literal["fast", "immediate"]
) -> None:
    gallery = Gallery.open(tmp_path, INFO, database_url=postgres_url)
    acknowledged: dict[str, Tensor] = {}
    gone: set[str] = set()
    deleting: set[str] = set()  # asked for, not acknowledged: either is right
    guard, seeds, dice = threading.Lock(), iter(range(10**6)), random.Random(1)

    def enroll() -> None:
        y = features(2, next(seeds))
        items = gallery.add([new_item(), new_item()], y)
        with guard:
            acknowledged.update((item.id, row) for item, row in zip(items, y, strict=True))

    def delete() -> None:
        with guard:
            ids = sorted(acknowledged.keys() - gone - deleting)
            if len(ids) < 10:
                return
            item_id = dice.choice(ids)
            deleting.add(item_id)
        gallery.delete(item_id)
        with guard:
            gone.add(item_id)

    def search() -> None:
        with guard:
            dead = set(gone)
            rows = list(acknowledged.values())
        x = dice.choice(rows) if rows else features(1, 0)[0]
        ids = [hit.item.id for hit in gallery.search(x, None, top_k=5).hits]
        assert not dead & set(ids)
        time.sleep(0.005)

    def listing() -> None:
        gallery.list(Filters(), 10)
        time.sleep(0.005)

    ended = threading.Event()
    callers = [Caller(work, ended) for work in (enroll, enroll, delete, search, listing)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: len(acknowledged) > 40 and len(gone) > 5, callers)
        postgres.stop() if how == "fast" else postgres.kill()
        wait_until(lambda: all(len(c.refusals) > 2 for c in callers), callers)
        before = [caller.answers for caller in callers]
        postgres.start()
        wait_until(
            lambda: all(c.answers > n + 10 for c, n in zip(callers, before, strict=True)), callers
        )
    finally:
        ended.set()
        for caller in callers:
            caller.join()
    for caller in callers:
        if caller.failure is not None:
            raise caller.failure
        for refusal in caller.refusals:
            assert "does not answer" in refusal
            assert "try again later" in refusal
            assert "\n" not in refusal

    for reopened in (False, True):
        if reopened:
            gallery.close()
            gallery = Gallery.open(tmp_path, INFO, database_url=postgres_url)
        listed = [item.id for item in gallery.list(Filters(), 10**5).items]
        assert len(listed) == len(set(listed))
        assert acknowledged.keys() - gone - deleting <= set(listed)
        assert not gone & set(listed)
        for item_id in set(listed) & acknowledged.keys():
            hit = gallery.search(acknowledged[item_id], None, top_k=1).hits[0]
            assert (hit.item.id, hit.distance < 0.02) == (item_id, True)
    gallery.check()
    gallery.close()


def test_opening_without_a_server_is_a_sentence(
    postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    postgres.stop()
    with pytest.raises(DatabaseUnavailable, match=r"does not answer .* try again later"):
        Gallery.open(tmp_path, INFO, database_url=postgres_url)
    postgres.start()
    Gallery.open(tmp_path, INFO, database_url=postgres_url).close()


@pytest.mark.parametrize("call", ["add", "delete"])
def test_a_commit_whose_answer_is_lost_leaves_index_and_store_in_step(
    postgres_url: str, tmp_path: Path, call: str
) -> None:
    """The connection is cut between the server's commit and its answer: the call fails though it
    happened. Search must agree with the list from then on, without a restart."""
    with tempfile.TemporaryDirectory() as folder, wired(Path(folder), postgres_url) as wire:
        gallery = Gallery.open(tmp_path, INFO, database_url=wire.url)
        first, second = gallery.add([new_item(), new_item()], features(2, seed=1))
        wire.lose_next_commit()
        calls: dict[str, Callable[[], object]] = {
            "add": lambda: gallery.add([new_item()], features(1, seed=2)),
            "delete": lambda: gallery.delete(first.id),
        }
        with pytest.raises(DatabaseUnavailable):
            calls[call]()
        deadline = time.monotonic() + PATIENCE
        expected = 3 if call == "add" else 1
        while (page := gallery.list(Filters(), 10)).total != expected:
            assert time.monotonic() < deadline, "the server did not commit"
            time.sleep(0.01)
        assert second.id in {item.id for item in page.items}

        def found() -> set[str]:
            return {h.item.id for h in gallery.search(features(1, 2)[0], None, top_k=10).hits}

        # The server may have committed after the gallery has looked, which it does again soon.
        listed = {item.id for item in page.items}
        wait_for(lambda: found() == listed, "the index does not follow")
        gallery.check()
        gallery.close()
