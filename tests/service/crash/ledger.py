"""What was acknowledged, what is in doubt, and whether a reopened gallery agrees."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field

from tests.service.crash.subject import ProcessGone, Session, crop_bytes

AT_ZERO = 0.02  # a crop's own distance: its features in fp16 against those of the query in fp32
SAMPLE = 20  # items of earlier rounds that every round looks at again


@dataclass(frozen=True)
class Doubt:
    """A call that was cut off: of an enrollment the keys, of a deletion the ids are known."""

    call: str
    keys: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


class Ledger:
    """The acknowledged state. items: id → key. persons: id → person."""

    def __init__(self) -> None:
        self.items: dict[str, int] = {}
        self.persons: dict[str, str] = {}
        self.survived = self.vanished = self.verified = 0
        self._gone: set[str] = set()
        self._fresh: set[str] = set()
        self._doubts: list[Doubt] = []

    def record(self, worker: Worker) -> None:
        """Take over what a worker's calls came to."""
        self._fresh |= worker.enrolled.keys()
        self.items |= worker.enrolled
        self.persons |= worker.persons
        for item_id in worker.gone:
            del self.items[item_id], self.persons[item_id]
        self._gone |= worker.gone
        if worker.doubt is not None:
            self._doubts.append(worker.doubt)

    def shares(self, count: int) -> list[dict[str, str]]:
        """The items' persons, dealt out to `count` workers so that no two share a person."""
        shares: list[dict[str, str]] = [{} for _ in range(count)]
        places = {p: i % count for i, p in enumerate(sorted(set(self.persons.values())))}
        for item_id, person in self.persons.items():
            shares[places[person]][item_id] = person
        return shares

    def verify(self, session: Session, dice: random.Random, *, everything: bool) -> None:
        """Compare with the reopened gallery: all of its list, and crops and searches of what is
        new and of a sample; or of everything."""
        listed = session.list()
        by_id = {item.item_id: item for item in listed}
        assert len(by_id) == len(listed), "an id is listed twice"
        assert len({item.key for item in listed}) == len(listed), "an enrollment is there twice"
        ids_of_keys = {item.key: item.item_id for item in listed}
        for doubt in self._doubts:
            self._settle(doubt, ids_of_keys, by_id.keys())
        self._doubts.clear()
        back = self._gone & by_id.keys()
        assert not back, f"acknowledged deletes are back: {back}"
        lost = self.items.keys() - by_id.keys()
        assert not lost, f"acknowledged enrollments are lost: {lost}"
        strange = by_id.keys() - self.items.keys()
        assert not strange, f"items that nobody enrolled: {[by_id[i] for i in strange]}"
        for item_id, item in by_id.items():
            self.persons.setdefault(item_id, item.person_id)  # one that was in doubt
            assert item == (item_id, self.persons[item_id], self.items[item_id])

        chosen = sorted(self.items)
        if not everything:
            older = sorted(self.items.keys() - self._fresh)
            chosen = sorted(self._fresh & self.items.keys())
            chosen += dice.sample(older, min(SAMPLE, len(older)))
        for item_id in chosen:
            key = self.items[item_id]
            assert session.image(item_id) == crop_bytes(key), f"{item_id} has other bytes"
            found, distance = session.nearest(key)
            assert found == item_id, f"{item_id} is not the first hit for its own crop"
            assert distance < AT_ZERO, f"{item_id} is at {distance} from its own crop"
        self.verified += len(chosen)
        self._fresh.clear()

    def _settle(self, doubt: Doubt, ids_of_keys: dict[int, str], listed: Container[str]) -> None:
        """A call that was cut off happened wholly or not at all."""
        present = [key for key in doubt.keys if key in ids_of_keys]
        assert len(present) in (0, len(doubt.keys)), f"half of an enrollment is there: {doubt}"
        for key in present:
            self.items[ids_of_keys[key]] = key
            self._fresh.add(ids_of_keys[key])
        missing = [item_id for item_id in doubt.ids if item_id not in listed]
        assert len(missing) in (0, len(doubt.ids)), f"half of a deletion happened: {doubt}"
        for item_id in missing:
            del self.items[item_id], self.persons[item_id]
            self._gone.add(item_id)
        happened = present or missing
        self.survived += bool(happened)
        self.vanished += bool(doubt.keys or doubt.ids) and not happened


class Worker(threading.Thread):
    """One caller that enrolls, deletes and searches until the process dies or it is stopped.

    It works on persons of its own, so that it knows what every answer must be.
    """

    def __init__(
        self,
        session: Session,
        dice: random.Random,
        share: dict[str, str],
        keys: dict[str, int],
        first_key: int,
        most_per_add: int,
    ) -> None:
        super().__init__()
        self.enrolled: dict[str, int] = {}
        self.persons: dict[str, str] = {}
        self.gone: set[str] = set()
        self.answers = self.searches = 0
        self.doubt: Doubt | None = None
        self.failure: BaseException | None = None
        self._session, self._dice = session, dice
        self._mine: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for item_id, person in share.items():
            self._mine[person][item_id] = keys[item_id]
        self._next_key, self._most_per_add = first_key, most_per_add
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End after the call in progress."""
        self._stopping.set()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._call()
                self.answers += 1
                self.doubt = None
        except ProcessGone:
            pass
        except BaseException as error:
            self.failure = error

    def _call(self) -> None:
        call = self._dice.choices(["add", "delete", "erase", "search"], [6, 2, 1, 2])[0]
        if call == "add" or not self._mine:
            self._add()
            return
        person = self._dice.choice(sorted(self._mine))
        items = self._mine[person]
        item_id = self._dice.choice(sorted(items))
        if call == "search":
            self.doubt = Doubt("search")
            found, distance = self._session.nearest(items[item_id])
            assert (found, distance < AT_ZERO) == (item_id, True), f"{found} at {distance}"
            self.searches += 1
        elif call == "delete":
            self.doubt = Doubt("delete", ids=[item_id])
            self._session.delete(item_id)
            self._forget(person, [item_id])
        else:
            self.doubt = Doubt("erase", ids=sorted(items))
            assert self._session.erase(person) == len(items)
            self._forget(person, sorted(items))

    def _add(self) -> None:
        count = self._dice.randint(1, self._most_per_add)
        keys = list(range(self._next_key, self._next_key + count))
        self._next_key += count
        person = f"person {keys[0] // 4}"
        self.doubt = Doubt("add", keys=keys)
        ids = self._session.add(person, keys)
        added = dict(zip(ids, keys, strict=True))
        self.enrolled |= added
        self.persons |= dict.fromkeys(ids, person)
        self._mine[person] |= added

    def _forget(self, person: str, ids: list[str]) -> None:
        for item_id in ids:
            del self._mine[person][item_id]
        if not self._mine[person]:
            del self._mine[person]
        self.gone |= set(ids)
