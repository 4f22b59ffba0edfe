"""What filters and grouping need of every item, as arrays: a filter is a mask, not a query."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from service.gallery.records import Filters
from service.gallery.rows import microseconds
from service.gallery.store import Stored

_NO_TIME = np.iinfo(np.int64).min
_NO_CODE = -1
_FIELDS = ("number", "person", "camera", "modality", "captured")


class Codes:
    """Strings as numbers: equal strings have equal codes, None has −1."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def encode(self, values: Sequence[str | None]) -> npt.NDArray[np.int64]:
        codes = self._codes
        return np.array(
            [_NO_CODE if v is None else codes.setdefault(v, len(codes)) for v in values],
            dtype=np.int64,
        )

    def known(self, values: Sequence[str]) -> list[int]:
        return [self._codes[v] for v in values if v in self._codes]


class Columns:
    """Row numbers, labels and times of items by position; a deleted one stays, no longer alive.

    Positions count additions from 0, as those of `Features` and `RecallIndex` do.
    """

    def __init__(self) -> None:
        self._persons, self._cameras, self._modalities = Codes(), Codes(), Codes()
        self._table: npt.NDArray[np.int64] = np.empty((len(_FIELDS), 0), np.int64)
        self._alive: npt.NDArray[np.bool_] = np.empty(0, np.bool_)
        self._positions: dict[int, int] = {}  # of those alive, by row number
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def alive_count(self) -> int:
        return len(self._positions)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Row numbers by position."""
        return self._table[0, : self._count]

    @property
    def persons(self) -> npt.NDArray[np.int64]:
        """Codes of person_id by position, negative where there is none."""
        return self._table[1, : self._count]

    def add(self, stored: Stored) -> None:
        rows = np.array(
            [
                stored.numbers,
                self._persons.encode(stored.persons),
                self._cameras.encode(stored.cameras),
                self._modalities.encode(stored.modalities),
                [_NO_TIME if moment is None else moment for moment in stored.captured],
            ],
            dtype=np.int64,
        )
        end = self._count + rows.shape[1]
        if end > self._table.shape[1]:
            room = max(end, 2 * self._table.shape[1], 1024) - self._count
            self._table = np.pad(self._table[:, : self._count], ((0, 0), (0, room)))
            self._alive = np.pad(self._alive[: self._count], (0, room))
        self._table[:, self._count : end] = rows
        self._alive[self._count : end] = True
        self._positions.update(zip(stored.numbers, range(self._count, end), strict=True))
        self._count = end

    def bury(self, numbers: Sequence[int]) -> list[int]:
        """Mark items as deleted → the numbers that were alive here."""
        buried = [number for number in numbers if number in self._positions]
        self._alive[[self._positions.pop(number) for number in buried]] = False
        return buried

    def revive(self, numbers: Sequence[int]) -> None:
        """Take `bury` back."""
        wanted = np.isin(self.numbers, numbers)
        self._alive[: self._count][wanted] = True
        positions = np.flatnonzero(wanted)
        self._positions.update((int(self.numbers[p]), int(p)) for p in positions)

    def compacted(self) -> tuple[Columns, npt.NDArray[np.int64]]:
        """A copy of those alive, and their positions here, in the same order."""
        alive = np.flatnonzero(self._alive[: self._count])
        copy = Columns()
        copy._persons, copy._cameras = self._persons, self._cameras
        copy._modalities = self._modalities
        copy._table = self._table[:, alive]
        copy._alive = np.ones(len(alive), np.bool_)
        copy._count = len(alive)
        copy._positions = {int(number): p for p, number in enumerate(copy.numbers)}
        return copy, alive

    def mask(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """One flag per position: alive and passing every filter."""
        _, person, camera, modality, captured = self._table[:, : self._count]
        allowed = self._alive[: self._count].copy()
        if filters.person_id:
            allowed &= np.isin(person, self._persons.known(filters.person_id))
        if filters.camera_id:
            allowed &= np.isin(camera, self._cameras.known(filters.camera_id))
        if filters.exclude_camera_id:
            allowed &= ~np.isin(camera, self._cameras.known(filters.exclude_camera_id))
        if filters.gallery_modality:
            allowed &= np.isin(modality, self._modalities.known(filters.gallery_modality))
        if filters.captured_from is not None or filters.captured_to is not None:
            allowed &= captured != _NO_TIME
        if filters.captured_from is not None:
            allowed &= captured >= microseconds(filters.captured_from)
        if filters.captured_to is not None:
            allowed &= captured < microseconds(filters.captured_to)
        return allowed
