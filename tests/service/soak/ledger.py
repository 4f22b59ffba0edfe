"""What the service has acknowledged, and whether it still says so."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tests.service.crash.subject import crop_bytes
from tests.service.processes import wait_until_idle

AT_ZERO = 0.02  # a crop's own distance: its features in fp16 against those of the query in fp32
VANISHED = "vanished"  # the label of what clients enroll that do not wait for an answer
MOST_COMPLAINTS = 50


@dataclass(frozen=True)
class Known:
    """An item as it was acknowledged last; key: the number that its crop is made from."""

    key: int
    person: str
    camera: str | None


class Ledger:
    """The acknowledged state, in plain Python. Thread-safe.

    known: id → item. gone: id → when its deletion was answered. doubtful: keys of enrollments
    whose client did not wait for an answer. violations: what the service did otherwise.
    """

    def __init__(self, fingerprints: set[str]) -> None:
        self.known: dict[str, Known] = {}
        self.gone: dict[str, float] = {}
        self.doubtful: set[int] = set()
        self.violations: list[str] = []
        self.enrolled = self.rounds = self.verified = 0
        self._fingerprints = fingerprints
        self._lock = threading.Condition()
        self._working = 0
        self._quiet = False

    @contextmanager
    def working(self) -> Iterator[None]:
        """A call and its entry in the ledger; not while somebody compares."""
        with self._lock:
            self._lock.wait_for(lambda: not self._quiet)
            self._working += 1
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1
                self._lock.notify_all()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nobody works meanwhile."""
        with self._lock:
            self._quiet = True
            self._lock.wait_for(lambda: self._working == 0)
        try:
            yield
        finally:
            with self._lock:
                self._quiet = False
                self._lock.notify_all()

    def note(self, item_id: str, known: Known, *, new: bool) -> None:
        """An enrollment or a change that was answered."""
        with self._lock:
            self.known[item_id] = known
            self.enrolled += new

    def remove(self, ids: Iterable[str], answered: float) -> None:
        """Deletions that were answered."""
        with self._lock:
            for item_id in ids:
                del self.known[item_id]
                self.gone[item_id] = answered

    def complain(self, text: str) -> None:
        """Something that the service must not do."""
        with self._lock:
            if len(self.violations) < MOST_COMPLAINTS:
                self.violations.append(text)

    def check_answer(self, answer: dict[str, Any], asked: float) -> None:
        """A query's answer: nothing deleted before it was asked, one model, nothing twice."""
        ids = [result["item"]["id"] for result in answer["results"]]
        if len(set(ids)) != len(ids):
            self.complain("a query returned an item twice")
        for item_id in ids:
            if self.gone.get(item_id, asked) < asked:
                self.complain(f"a query returned {item_id}, whose deletion was answered before")
        models = {result["item"]["model"] for result in answer["results"]} | {answer["model"]}
        if len(models) > 1 or models - self._fingerprints:
            self.complain(f"a query answered with items of {len(models)} models: {models}")

    def verify(self, http: httpx.Client, dice: random.Random, sample: int | None) -> None:
        """Compare with the service: all of its list, and bytes and a search for `sample` items,
        or for all. Nobody may be working."""
        wait_until_idle(http)
        http.delete("/gallery", params={"person_id": VANISHED}).raise_for_status()
        listed = {item["id"]: item for item in self._listed(http)}
        self._each("acknowledged items are lost", self.known.keys() - listed.keys())
        self._each("acknowledged deletes are back", self.gone.keys() & listed.keys())
        self._each("items that nobody enrolled", listed.keys() - self.known.keys())
        for item_id in self.known.keys() & listed.keys():
            item = listed[item_id]
            told = Known(item["metadata"]["key"], item["person_id"], item["camera_id"])
            if told != self.known[item_id]:
                self.complain(f"{item_id} is {told}, acknowledged was {self.known[item_id]}")
        chosen = sorted(self.known.keys() & listed.keys())
        if sample is not None:
            chosen = dice.sample(chosen, min(sample, len(chosen)))
        for item_id in chosen:
            self._verify_item(http, item_id)
        self.rounds += 1
        self.verified += len(chosen)

    def _verify_item(self, http: httpx.Client, item_id: str) -> None:
        image = crop_bytes(self.known[item_id].key)
        if http.get(f"/gallery/{item_id}/image").content != image:
            self.complain(f"{item_id} has other bytes")
        form = {"modulation": "false", "top_k": "1"}
        [hit] = http.post("/query", files={"image": image}, data=form).json()["results"]
        if hit["item"]["id"] != item_id or hit["distance"] > AT_ZERO:
            self.complain(f"{item_id} is not the first hit for its own crop: {hit}")

    def _listed(self, http: httpx.Client) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        page = {"limit": "1000"}
        while True:
            answer = http.get("/gallery", params=page).raise_for_status().json()
            for item in answer["items"]:
                if item["id"] in seen:
                    self.complain(f"{item['id']} is listed twice")
                seen.add(item["id"])
                yield item
            if answer["next_cursor"] is None:
                return
            page["cursor"] = answer["next_cursor"]

    def _each(self, what: str, ids: set[str]) -> None:
        if ids:
            self.complain(f"{what}: {len(ids)}, such as {sorted(ids)[:3]}")
