"""The labels of all items as arrays, for filters and grouping: a filter is a mask, not a query."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.gallery.feed import Stored
from service.gallery.records import Filters
from service.gallery.times import microseconds

_NO_TIME = np.iinfo(np.int64).min
_NO_CODE = -1
_LARGEST = np.iinfo(np.int64).max
_FEW_CODES = 8  # are compared with one after the other, which is faster than looking up each row's
_FIELDS = ("number", "person", "camera", "modality", "captured")
_KEPT_MASKS = 8  # of one moment


class _Numbered(dict[str | None, int]):
    """Code by string; one that is asked for the first time gets the next, and joins `texts`."""

    def __init__(self, texts: list[str | None]) -> None:
        super().__init__((text, code) for code, text in enumerate(texts) if text is not None)
        self._texts = texts

    def __missing__(self, text: str | None) -> int:
        if text is None:
            return _NO_CODE
        self._texts.append(text)
        self[text] = code = len(self._texts) - 1
        return code


class Codes:
    """Strings as numbers: equal strings have equal codes, None has −1."""

    def __init__(self, texts: Sequence[str | None] = ()) -> None:
        """texts: string by code, None where a code is no longer in use."""
        self._texts = list(texts)
        self._codes = _Numbered(self._texts)
        self._keys: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def encode(self, values: Sequence[str | None]) -> npt.NDArray[np.int64]:
        """N strings → N codes; new strings get new ones."""
        return np.fromiter(map(self._codes.__getitem__, values), np.int64, len(values))

    def known(self, values: Sequence[str]) -> list[int]:
        """The codes of those strings that have one."""
        return [self._codes[v] for v in values if v in self._codes]

    def decode(self, codes: npt.NDArray[np.int64]) -> list[str | None]:
        """N codes → N strings, the inverse of `encode`."""
        return [None if code == _NO_CODE else self._texts[code] for code in codes.tolist()]

    def keys(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """N codes → N numbers, −1 for None: equal strings have equal ones in every process.

        63 bits of a hash, so that of a million strings two have the same one with a probability of
        5·10⁻⁸.
        """
        keys = self._keys  # another thread may replace it meanwhile
        if len(keys) < len(self._texts):
            more = b"".join(map(_digest, self._texts[len(keys) :]))
            keys = np.concatenate([keys, np.frombuffer(more, np.int64) & _LARGEST])
            self._keys = keys
        if not len(keys):
            return np.full(len(codes), _NO_CODE)
        return np.where(codes < 0, _NO_CODE, keys[codes])

    def strings(self, used: npt.NDArray[np.int64]) -> list[str | None]:
        """String by code, up to the last one used; None for the others."""
        known = set(used.tolist())
        codes = range(max(known, default=-1) + 1)
        return [self._texts[code] if code in known else None for code in codes]


class Columns:
    """Row numbers, labels and times of items by position; a deleted one stays, no longer alive.

    Positions count additions from 0, as those of `Features` and `RecallIndex` do. One thread
    changes at a time; `frozen` may be called concurrently. Between two changes, its views and their
    masks are the same objects: a filter is computed once, and copied to a GPU once.
    """

    def __init__(self) -> None:
        self._persons, self._cameras, self._modalities = Codes(), Codes(), Codes()
        self._table: npt.NDArray[np.int64] = np.empty((len(_FIELDS), 0), np.int64)
        self._alive: npt.NDArray[np.bool_] = np.empty(0, np.bool_)
        self._ascending = True
        self._count = 0
        self.alive_count = 0
        self._changes = 0
        self._view: tuple[int, Columns] | None = None  # of so many changes
        self._masks: dict[Filters, npt.NDArray[np.bool_]] | None = None  # of a view
        self._facts: dict[Filters, dict[str, Any]] = {}

    def __len__(self) -> int:
        return self._count

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Row numbers by position."""
        return self._table[0, : self._count]

    @property
    def persons(self) -> npt.NDArray[np.int64]:
        """Codes of person_id by position, negative where there is none."""
        return self._table[1, : self._count]

    def person_keys(self, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of persons, by code: see `Codes.keys`."""
        return self._persons.keys(codes)

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """One flag per position."""
        return self._alive[: self._count]

    @property
    def bytes(self) -> int:
        """Memory held, unused rows included."""
        return self._table.nbytes + self._alive.nbytes

    def add(self, stored: Stored) -> None:
        """Append the labels of a block of items."""
        rows = np.array(
            [
                stored.numbers,
                self._persons.encode(stored.persons),
                self._cameras.encode(stored.cameras),
                self._modalities.encode(stored.modalities),
                _times(stored.captured),
            ],
            dtype=np.int64,
        )
        self._append(rows, np.ones(rows.shape[1], np.bool_))

    def mark_deleted(self, numbers: Sequence[int]) -> list[int]:
        """Mark items as deleted → the numbers that were alive here."""
        positions = self.positions(numbers)
        positions = positions[self._alive[positions]]
        self._alive[positions] = False
        self.alive_count -= len(positions)
        self._changes += 1
        return [int(number) for number in self._table[0, positions]]

    def update(
        self,
        numbers: Sequence[int],
        *,
        persons: Sequence[str | None] | None = None,
        cameras: Sequence[str | None] | None = None,
        captured: Sequence[int | None] | None = None,
    ) -> None:
        """Give items new labels, one for each number; None leaves them as they are.

        captured: microseconds since 1970 UTC. Unknown numbers are ignored.
        """
        changes = [
            (1, None if persons is None else self._persons.encode(persons)),
            (2, None if cameras is None else self._cameras.encode(cameras)),
            (4, None if captured is None else np.array(_times(captured), np.int64)),
        ]
        places = {number: place for place, number in enumerate(numbers)}
        positions = self.positions(numbers)
        chosen = [places[int(number)] for number in self._table[0, positions]]
        for field, values in changes:
            if values is not None:
                self._table[field, positions] = values[chosen]
        self._changes += 1

    def positions(self, numbers: Sequence[int]) -> npt.NDArray[np.int64]:
        """Where these items are, deleted ones too; those that are not here are left out."""
        wanted = np.unique(np.asarray(numbers, np.int64))
        mine = self.numbers
        if not self._ascending:
            return np.flatnonzero(np.isin(mine, wanted))
        places = np.searchsorted(mine, wanted)
        places = places[places < len(mine)]
        return places[np.isin(mine[places], wanted)]

    def frozen(self) -> Columns:
        """A view for a reader: later additions and deletions do not show."""
        changes, view = self._changes, self._view
        if view is not None and view[0] == changes:
            return view[1]
        copy = self._sibling()
        # The count first: what is read after it holds at least that many rows.
        copy._count = self._count
        copy._table = self._table
        copy._alive = self._alive[: copy._count].copy()
        copy._ascending = self._ascending
        copy.alive_count = int(np.count_nonzero(copy._alive))
        copy._masks = {}
        self._view = changes, copy  # what changed meanwhile has another number
        return copy

    def extend(self, other: Columns, positions: npt.NDArray[np.int64]) -> None:
        """Append the rows of another one at these positions."""
        self._append(self._coded(other, positions), other._alive[positions])

    def align(self, other: Columns, numbers: Sequence[int]) -> None:
        """Copy what `other` now has of these items, where both have them."""
        mine, theirs = self.positions(numbers), other.positions(numbers)
        theirs = theirs[np.isin(other.numbers[theirs], self.numbers[mine])]
        mine = mine[np.argsort(self.numbers[mine])]
        theirs = theirs[np.argsort(other.numbers[theirs])]
        self._table[:, mine] = self._coded(other, theirs)
        self._alive[mine] = other._alive[theirs]
        self.alive_count = int(np.count_nonzero(self.alive))
        self._changes += 1

    def dump(self) -> tuple[npt.NDArray[np.int64], dict[str, list[str | None]]]:
        """The table, and the strings of its codes, for a file.

        A deleted item has ~number, and −1 in all other fields; a string that no living item has is
        None: nothing that was deleted is written.
        """
        table = np.where(self.alive, self._table[:, : self._count], _NO_CODE)
        table[0] = np.where(self.alive, self.numbers, ~self.numbers)
        codes = (self._persons, self._cameras, self._modalities)
        texts = {
            name: codes[field - 1].strings(np.unique(table[field]))
            for field, name in enumerate(_FIELDS[1:4], start=1)
        }
        return table, texts

    @classmethod
    def restored(cls, table: npt.NDArray[np.int64], texts: dict[str, list[str | None]]) -> Columns:
        """Rebuild from what `dump` gave, its table flat and writable."""
        columns = cls()
        columns._persons, columns._cameras, columns._modalities = (
            Codes(texts[name]) for name in _FIELDS[1:4]
        )
        table = table.reshape(len(_FIELDS), -1)
        alive = table[0] >= 0
        table[0] = np.where(alive, table[0], ~table[0])
        columns._append(table, alive)
        return columns

    def _sibling(self) -> Columns:
        copy = Columns()
        copy._persons, copy._cameras = self._persons, self._cameras
        copy._modalities = self._modalities
        return copy

    def _coded(self, other: Columns, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of another in codes of this one, which learns only the labels of these rows."""
        rows = other._table[:, positions].copy()
        mine = self._persons, self._cameras, self._modalities
        theirs = other._persons, other._cameras, other._modalities
        for field, to, of in zip((1, 2, 3), mine, theirs, strict=True):
            used, places = np.unique(rows[field], return_inverse=True)
            rows[field] = to.encode(of.decode(used))[places]
        return rows

    def _append(self, rows: npt.NDArray[np.int64], alive: npt.NDArray[np.bool_]) -> None:
        end = self._count + rows.shape[1]
        if end > self._table.shape[1]:
            room = max(end, 2 * self._table.shape[1], 1024) - self._count
            self._table = np.pad(self._table[:, : self._count], ((0, 0), (0, room)))
            self._alive = np.pad(self._alive[: self._count], (0, room))
        self._table[:, self._count : end] = rows
        self._alive[self._count : end] = alive
        last = self._table[0, max(0, self._count - 1) : end]
        self._ascending = self._ascending and bool((np.diff(last) > 0).all())
        self.alive_count += int(np.count_nonzero(alive))
        self._count = end  # last: a reader sees whole rows only
        self._changes += 1

    def mask(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """One flag per position: alive and passing every filter. A view keeps it: write nothing."""
        if self._masks is None:
            return self._passing(filters)
        mask = self._masks.get(filters)
        if mask is None:
            mask = self._passing(filters)
            for oldest in list(self._masks)[: 1 - _KEPT_MASKS]:
                self._masks.pop(oldest, None)
            self._masks[filters] = mask
        return mask

    def facts(self, filters: Filters) -> dict[str, Any]:
        """A place for what a reader computes of the rows that pass some filters; a view keeps it.

        Nothing in it may refer to the view, which would then not go with its columns.
        """
        if self._masks is None:
            return {}
        facts = self._facts.get(filters)
        if facts is None:
            facts = {}
            for oldest in list(self._facts)[: 1 - _KEPT_MASKS]:
                self._facts.pop(oldest, None)
            self._facts[filters] = facts
        return facts

    def _passing(self, filters: Filters) -> npt.NDArray[np.bool_]:
        _, person, camera, modality, captured = self._table[:, : self._count]
        allowed = self._alive[: self._count].copy()
        if filters.person_id:
            allowed &= _among(person, self._persons.known(filters.person_id))
        if filters.camera_id:
            allowed &= _among(camera, self._cameras.known(filters.camera_id))
        if filters.exclude_camera_id:
            allowed &= ~_among(camera, self._cameras.known(filters.exclude_camera_id))
        if filters.gallery_modality:
            allowed &= _among(modality, self._modalities.known(filters.gallery_modality))
        if filters.captured_from is not None or filters.captured_to is not None:
            captured = captured.copy()  # for the same reason as in `_among`
            allowed &= captured != _NO_TIME
        if filters.captured_from is not None:
            allowed &= captured >= microseconds(filters.captured_from)
        if filters.captured_to is not None:
            allowed &= captured < microseconds(filters.captured_to)
        return allowed


def _among(column: npt.NDArray[np.int64], codes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which rows have one of these codes."""
    found: npt.NDArray[np.bool_]
    if len(codes) <= _FEW_CODES:
        found = np.zeros(len(column), np.bool_)
        for code in codes:
            found |= column == code
        return found
    # Of a copy: labels may change meanwhile, and NumPy reads a row twice, the second time as an
    # index into a table whose size the first value was checked against.
    found = np.isin(column.copy(), codes)
    return found


def _digest(text: str | None) -> bytes:
    return hashlib.blake2b((text or "").encode(), digest_size=8).digest()


def _times(captured: Sequence[int | None]) -> list[int]:
    return [_NO_TIME if moment is None else moment for moment in captured]
