"""What goes into a gallery and what comes out: plain values, without SQL, tensors or HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from service.images import Crop, Modality, ModalitySource


class RequestKey(NamedTuple):
    """A client's Idempotency-Key, with the SHA-256 of what it enrolls under it."""

    key: str
    sha256: str


@dataclass(frozen=True)
class NewItem:
    """A crop to enroll, with what its sender knows of it. captured_at needs an offset."""

    crop: Crop
    person_id: str | None = None
    camera_id: str | None = None
    captured_at: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    request: RequestKey | None = None


@dataclass(frozen=True)
class Item:
    """An enrolled crop. id: UUIDv7. Times are UTC. model: fingerprint of its features' checkpoint.

    sha256 is of the uploaded bytes; width, height and modality are of the stored crop.
    """

    id: str
    person_id: str | None
    camera_id: str | None
    captured_at: datetime | None
    enrolled_at: datetime
    modality: Modality
    modality_source: ModalitySource
    width: int
    height: int
    bit_depth: int
    sha256: str
    metadata: dict[str, Any]
    model: str


@dataclass(frozen=True)
class Filters:
    """Which items count. An empty tuple or None does not filter; several values mean any of them.

    Items without a camera pass `exclude_camera_id`; items without a time fail both time bounds.
    captured_from is inclusive, captured_to exclusive.
    """

    person_id: tuple[str, ...] = ()
    camera_id: tuple[str, ...] = ()
    exclude_camera_id: tuple[str, ...] = ()
    gallery_modality: tuple[Modality, ...] = ()
    captured_from: datetime | None = None
    captured_to: datetime | None = None

    @property
    def active(self) -> bool:
        """Whether anything is filtered at all."""
        return self != Filters()


@dataclass(frozen=True)
class Page:
    """Items in order of enrollment. next_cursor is None on the last page; total ignores paging."""

    items: list[Item]
    next_cursor: str | None
    total: int


@dataclass(frozen=True)
class Hit:
    """One answer to a query.

    rank counts from 1. distance: Euclidean after modulation, or 1 − cosine where that is the
    checkpoint's metric. recall_rank: place in the recall stage's shortlist, None when exhaustive.
    unmodulated_rank: place by the unmodulated distance among what was scored. parts: the squared
    part distances, whose sum is distance². The last two only when asked to explain.
    """

    rank: int
    item: Item
    distance: float
    recall_rank: int | None
    unmodulated_rank: int | None = None
    parts: list[float] | None = None


@dataclass(frozen=True)
class SearchResult:
    """searched: items that passed the filters. candidates: how many of them were rescored."""

    hits: list[Hit]
    searched: int
    candidates: int
    exhaustive: bool
    timings_ms: dict[str, float]
