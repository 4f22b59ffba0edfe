"""What the clients do: calls of all kinds, each held to what it must answer."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import httpx

from tests.service.crash.subject import crop_bytes
from tests.service.processes import ServiceProcess, multipart
from tests.service.soak.ledger import AT_ZERO, VANISHED, Known, Ledger

PERSONS = 10  # of each worker
MOST_ITEMS = 120  # of each worker: beyond, more is deleted than enrolled
KEYS = 10_000_000  # of each worker
MALFORMED = (b"", b"no image", b"\x89PNG\r\n\x1a\nrest", crop_bytes(0)[:-40], b"\xff\xd8\xff\xe0")
REFUSED = {413, 415, 422}


class Calls:
    """How long calls took and what was answered, by kind. Thread-safe."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.statuses: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._lock = threading.Lock()

    def note(self, kind: str, seconds: float, status: int) -> None:
        """One call."""
        with self._lock:
            self.seconds[kind].append(seconds)
            self.statuses[kind][status] += 1


class Worker(threading.Thread):
    """One client, which works on persons of its own: it knows what every answer must be."""

    def __init__(
        self, service: ServiceProcess, token: str, number: int, ledger: Ledger, calls: Calls
    ) -> None:
        super().__init__(name=f"worker {number}")
        self._service, self._token, self._ledger, self._calls = service, token, ledger, calls
        self._http = service.client(token, timeout=120)
        self._dice = random.Random(number)
        self._next_key = 1 + number * KEYS
        self._persons = [f"person {number}.{place}" for place in range(PERSONS)]
        self._mine: dict[str, Known] = {}
        self.done = 0
        """How many calls, of whatever kind."""
        self._stopping = threading.Event()
        self._kinds: dict[Callable[[], None], int] = {
            self._enroll: 6,
            self._batch: 2,
            self._query: 6,
            self._query_several: 2,
            self._patch: 2,
            self._delete_one: 4,
            self._erase: 1,
            self._list: 1,
            self._image: 2,
            self._malformed: 1,
            self._vanish: 2,
        }

    def stop(self) -> None:
        """End after the call in progress."""
        self._stopping.set()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                [call] = self._dice.choices([*self._kinds], [*self._kinds.values()])
                if not self._mine:
                    call = self._enroll
                elif len(self._mine) > MOST_ITEMS and call in (self._enroll, self._batch):
                    call = self._erase if self._dice.random() < 0.2 else self._delete_one
                with self._ledger.working():
                    call()
                self.done += 1
        except Exception as error:
            self._ledger.complain(f"{self.name}: {type(error).__name__}: {error}")
        finally:
            self._http.close()

    def _call(
        self, kind: str, method: str, path: str, expected: set[int], **content: Any
    ) -> httpx.Response:
        """Raises where the answer is not one of those expected."""
        began = time.perf_counter()
        answer = self._http.request(method, path, **content)
        self._calls.note(kind, time.perf_counter() - began, answer.status_code)
        if answer.status_code not in expected:
            raise AssertionError(f"{kind}: {answer.status_code} {answer.text[:300]}")
        return answer

    def _new(self) -> Known:
        self._next_key += 1
        camera = self._dice.choice(["north", "south", None])
        return Known(self._next_key, self._dice.choice(self._persons), camera)

    def _take(self, item: dict[str, Any], known: Known) -> None:
        if (item["person_id"], item["metadata"]) != (known.person, {"key": known.key}):
            self._ledger.complain(f"{known} was enrolled as {item}")
        self._mine[item["id"]] = known
        self._ledger.note(item["id"], known, new=True)

    def _enroll(self) -> None:
        known = self._new()
        request: dict[str, Any] = {
            "data": {name: text for name, text in _labels(known).items() if text is not None},
            "files": {"image": crop_bytes(known.key)},
        }
        request["data"]["metadata"] = json.dumps(request["data"]["metadata"])
        twice = self._dice.random() < 0.2
        if twice:
            request["headers"] = {"Idempotency-Key": f"key-{known.key}"}
        item = self._call("enroll", "POST", "/gallery", {201}, **request).json()
        self._take(item, known)
        if twice:
            again = self._call("enroll again", "POST", "/gallery", {200}, **request).json()
            # Between the two the gallery may have gone on to another checkpoint.
            if again | {"model": None} != item | {"model": None}:
                self._ledger.complain(f"a repeat answered {again} for {item}")

    def _batch(self) -> None:
        wanted = [self._new() for _ in range(self._dice.randint(2, 6))]
        images = [crop_bytes(known.key) for known in wanted]
        labels = [_labels(known) for known in wanted]
        bad = self._dice.randrange(len(images)) if self._dice.random() < 0.3 else None
        if bad is not None:
            images[bad] = self._dice.choice(MALFORMED)
        answer = self._call(
            "batch",
            "POST",
            "/gallery/batch",
            {200},
            files=[("image", image) for image in images],
            data={"items": json.dumps(labels)},
        )
        results = answer.json()["results"]
        for place, (known, result) in enumerate(zip(wanted, results, strict=True)):
            if place != bad and result["status"] == 201:
                self._take(result["item"], known)
            elif place != bad or result["status"] not in REFUSED:
                self._ledger.complain(f"an image of a batch was answered with {result}")

    def _query(self) -> None:
        item_id, known = self._dice.choice([*self._mine.items()])
        form = {"top_k": "10", "modulation": self._dice.choice(["true", "false"])}
        form["exhaustive"] = self._dice.choice(["true", "false", "false"])
        answer = self._ask("query", [known.key], form)
        if form["modulation"] == "false":
            first = answer["results"][0]
            if first["item"]["id"] != item_id or first["distance"] > AT_ZERO:
                self._ledger.complain(f"{item_id} is not the first hit for its own crop")

    def _query_several(self) -> None:
        chosen = self._dice.choices([*self._mine.values()], k=self._dice.randint(2, 4))
        form = {"group_by": "person_id", "explain": "true", "camera_id": "north"}
        self._ask("query several", [known.key for known in chosen], form)

    def _ask(self, kind: str, keys: list[int], form: dict[str, str]) -> dict[str, Any]:
        asked = time.monotonic()
        files = [("image", crop_bytes(key)) for key in keys]
        answer: dict[str, Any] = self._call(
            kind, "POST", "/query", {200}, files=files, data=form
        ).json()
        self._ledger.check_answer(answer, asked)
        return answer

    def _patch(self) -> None:
        item_id, known = self._dice.choice([*self._mine.items()])
        changed = Known(known.key, self._dice.choice(self._persons), f"moved {self._next_key}")
        labels = {"person_id": changed.person, "camera_id": changed.camera}
        item = self._call("patch", "PATCH", f"/gallery/{item_id}", {200}, json=labels).json()
        if (item["person_id"], item["camera_id"]) != (changed.person, changed.camera):
            self._ledger.complain(f"{changed} was changed to {item}")
        self._mine[item_id] = changed
        self._ledger.note(item_id, changed, new=False)

    def _delete_one(self) -> None:
        item_id = self._dice.choice([*self._mine])
        self._call("delete", "DELETE", f"/gallery/{item_id}", {204})
        self._forget([item_id])
        self._call("get deleted", "GET", f"/gallery/{item_id}", {404})

    def _erase(self) -> None:
        person = self._dice.choice([*self._mine.values()]).person
        theirs = [item_id for item_id, known in self._mine.items() if known.person == person]
        answer = self._call("erase", "DELETE", "/gallery", {200}, params={"person_id": person})
        self._forget(theirs)
        if answer.json() != {"deleted": len(theirs)}:
            self._ledger.complain(f"{answer.json()} of {len(theirs)} items were erased")

    def _forget(self, ids: list[str]) -> None:
        for item_id in ids:
            del self._mine[item_id]
        self._ledger.remove(ids, time.monotonic())

    def _list(self) -> None:
        person = self._dice.choice(self._persons)
        page = {"person_id": person, "limit": 1000}
        listed = self._call("list", "GET", "/gallery", {200}, params=page).json()["items"]
        theirs = {item_id for item_id, known in self._mine.items() if known.person == person}
        if {item["id"] for item in listed} != theirs:
            self._ledger.complain(f"{len(listed)} items of {person} are listed, not {len(theirs)}")

    def _image(self) -> None:
        item_id, known = self._dice.choice([*self._mine.items()])
        answer = self._call("image", "GET", f"/gallery/{item_id}/image", {200})
        if answer.content != crop_bytes(known.key):
            self._ledger.complain(f"{item_id} has other bytes")

    def _malformed(self) -> None:
        files = {"image": self._dice.choice(MALFORMED)}
        path = self._dice.choice(["/query", "/gallery"])
        self._call("malformed", "POST", path, REFUSED, files=files)

    def _vanish(self) -> None:
        """Send a body, or a part of one, and go."""
        path = self._dice.choice(["/query", "/gallery", "/gallery/batch"])
        fields = {"person_id": VANISHED, "metadata": '{"key": 0}'} if path == "/gallery" else {}
        if path == "/gallery/batch":
            fields = {"items": json.dumps([{"person_id": VANISHED, "metadata": {"key": 0}}])}
        line, rest = multipart(path, [crop_bytes(0)], fields).split(b"\r\n", 1)
        request = line + f"\r\nAuthorization: Bearer {self._token}\r\n".encode() + rest
        part = self._dice.choice([0.3, 0.9, 1.0])
        with socket.create_connection(self._service.address, timeout=60) as connection:
            connection.sendall(request[: int(part * len(request))])
        self._calls.note("vanish", 0.0, 0)


def _labels(known: Known) -> dict[str, Any]:
    return {
        "person_id": known.person,
        "camera_id": known.camera,
        "metadata": {"key": known.key},
    }
