"""What the store gives to caches: blocks of items, and what changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FEATURE_DTYPE = np.dtype("<f2")
_GOLDEN = 0x9E3779B9  # 2³² times the fraction of the golden ratio
_LOW_31, _LOW_32 = (1 << 31) - 1, (1 << 32) - 1


@dataclass(frozen=True)
class Stored:
    """A block of items as the index needs them: N rows, features N×(P·D) fp16.

    captured: microseconds since 1970 UTC.
    """

    numbers: list[int]
    persons: list[str | None]
    cameras: list[str | None]
    modalities: list[str]
    captured: list[int | None]
    features: npt.NDArray[np.float16]


@dataclass(frozen=True)
class Slice:
    """One of `count` shares of a gallery: the items whose row numbers it takes, by a hash.

    The fraction of a multiple of the golden ratio: shares differ by few items, and none gets all
    that come from one of several cameras in turn.
    """

    index: int
    count: int

    def condition(self, column: str) -> str:
        """SQL that lets the rows of the slice pass; its numbers fit 64 bits."""
        hashed = f"(({column} & {_LOW_31}) * {_GOLDEN}) & {_LOW_32}"
        return f"((({hashed}) * {self.count}) >> 32) = {self.index}"

    def holds(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these numbers it takes, by the same hash."""
        hashed = ((numbers & _LOW_31) * _GOLDEN) & _LOW_32
        mine: npt.NDArray[np.bool_] = (hashed * self.count >> 32) == self.index
        return mine


class Position(NamedTuple):
    """How far a reader has come: the last item's row number and the last change's number."""

    item: int
    change: int


class Witness(NamedTuple):
    """What a store holds at a position, so that another store's position is not taken for it.

    item: id of the item there, None once it is deleted. change: moment of the change there.
    version: when the model version was registered; one that is registered again differs.
    """

    item: str | None
    change: int | None
    version: int


@dataclass(frozen=True)
class Changes:
    """What happened after a position to items up to it.

    deleted: row numbers. updated: items with new labels, as they are now, and any whose features
    were added late: a cache replaces those it has and adds the others.
    """

    deleted: list[int]
    updated: Stored
