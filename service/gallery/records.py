"""What goes into a gallery and what comes out: plain values, without SQL, tensors or HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Any, Final, Literal, NamedTuple

from model.labels import LabelError, normalized_label
from model.pictures import Polarity
from service.gallery.times import microseconds
from service.images.decode import Crop, Modality, ModalityChoice, ModalitySource

# fmt: off
IndexKind = Literal[
    "SQfp16", "Flat", "SQ8", "IVF-Flat", "IVF-SQ8", "IVF-PQ", "HNSW",
    "GPU-Flat", "GPU-IVF-SQ8", "GPU-CAGRA",
]
# fmt: on
"""Of the recall stage: a scan of the features as they are, or a kind of FAISS index."""


class RequestKey(NamedTuple):
    """A client's Idempotency-Key, with the SHA-256 of what it enrolls under it."""

    key: str
    sha256: str


@dataclass(frozen=True)
class NewItem:
    """A crop to enroll, with its labels (`model.labels`). captured_at needs a UTC offset."""

    crop: Crop
    person_id: str | None = None
    camera_id: str | None = None
    captured_at: datetime | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    request: RequestKey | None = None


@dataclass(frozen=True)
class Item:
    """An enrolled crop. id: UUIDv7. Times are UTC. model: fingerprint of its features' checkpoint.

    sha256 is of the uploaded bytes; width, height and modality are of the stored crop. polarity:
    None of a visible crop.
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
    polarity: Polarity | None = None


class _Unset(Enum):
    UNSET = "unset"


UNSET: Final = _Unset.UNSET


@dataclass(frozen=True)
class ItemUpdate:
    """New values of an item's fields; UNSET leaves a field as it is, None empties it."""

    person_id: str | Literal[_Unset.UNSET] | None = UNSET
    camera_id: str | Literal[_Unset.UNSET] | None = UNSET
    captured_at: datetime | Literal[_Unset.UNSET] | None = UNSET
    metadata: dict[str, Any] | Literal[_Unset.UNSET] = UNSET

    @property
    def fields(self) -> dict[str, Any]:
        """What is given, by name."""
        return {name: value for name, value in vars(self).items() if value is not UNSET}


@dataclass(frozen=True)
class Camera:
    """What holds for the pictures of a camera that do not say it themselves; None: nothing does."""

    camera_id: str
    modality: ModalityChoice | None = None
    polarity: Polarity | None = None


VersionState = Literal["building", "active", "retired"]


@dataclass(frozen=True)
class ModelVersion:
    """A checkpoint's features in the gallery.

    configuration: the checkpoint's, None where a gallery of an older release did not store it.
    embedded: how many items have features of it.
    """

    fingerprint: str
    configuration: dict[str, Any] | None
    created_at: datetime
    state: VersionState
    embedded: int


@dataclass(frozen=True)
class StoredCrop:
    """An enrolled crop to be embedded again."""

    number: int
    data: bytes
    media_type: str
    modality: Modality
    polarity: Polarity | None


class Erasure(NamedTuple):
    """What an erasure did.

    items: erased ones, which nothing finds any more. pending: how many of their objects the object
    storage still has, because it does not answer; they are deleted once it does.
    """

    items: int
    pending: int


@dataclass(frozen=True)
class AuditEntry:
    """Who did what, and when. subject: an item's id or a person's pseudonym."""

    number: int
    moment: datetime
    actor: str
    action: str
    subject: str | None
    details: dict[str, Any]


@dataclass(frozen=True)
class AuditPage:
    """Entries, newest first. next_cursor is None on the last page."""

    entries: list[AuditEntry]
    next_cursor: str | None


def meant_label(text: str) -> str:
    """The label that a filter or an erasure means: one that looks the same is the same.

    A text that is no label (`model.labels`) stands for itself, so that an item of an older release
    that has it is not out of reach.
    """
    try:
        return normalized_label(text)
    except LabelError:
        return text


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

    def meant(self) -> Filters:
        """The filters with their labels as items have them: see `meant_label`."""
        if not (self.person_id or self.camera_id or self.exclude_camera_id):
            return self
        return replace(
            self,
            person_id=tuple(map(meant_label, self.person_id)),
            camera_id=tuple(map(meant_label, self.camera_id)),
            exclude_camera_id=tuple(map(meant_label, self.exclude_camera_id)),
        )

    def passes(self, item: Item) -> bool:
        """Whether an item counts: the same rules as those of the index and of SQL."""
        timed = self.captured_from is not None or self.captured_to is not None
        moment = None if item.captured_at is None else microseconds(item.captured_at)
        if timed and moment is None:
            return False
        return (
            (not self.person_id or item.person_id in self.person_id)
            and (not self.camera_id or item.camera_id in self.camera_id)
            and (item.camera_id is None or item.camera_id not in self.exclude_camera_id)
            and (not self.gallery_modality or item.modality in self.gallery_modality)
            and (
                moment is None
                or (
                    (self.captured_from is None or moment >= microseconds(self.captured_from))
                    and (self.captured_to is None or moment < microseconds(self.captured_to))
                )
            )
        )

    def described(self) -> dict[str, Any]:
        """The filters as JSON, without the persons, whom a log must not name."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in vars(self).items()
            if value and name != "person_id"
        }


@dataclass(frozen=True)
class Page:
    """Items in order of enrollment. next_cursor is None on the last page; total ignores paging."""

    items: list[Item]
    next_cursor: str | None
    total: int


@dataclass(frozen=True)
class Hit:
    """One answer to a query.

    rank counts from 1. score: what orders the answer, larger is better. distance: Euclidean after
    modulation, or 1 − cosine where that is the checkpoint's metric. probability: see
    `model.ranking`; None where the checkpoint has no fit. recall_rank: place in the recall stage's
    shortlist of the item's modality, None when exhaustive. unmodulated_rank: place by the
    unmodulated distance among what was scored. rank_before_rerank: place by score without
    re-ranking. parts: the squared part distances, whose sum is distance²; unmodulated_parts: the
    same without γ and β. The last four only when asked to explain.
    """

    rank: int
    item: Item
    score: float
    distance: float
    probability: float | None
    recall_rank: int | None
    unmodulated_rank: int | None = None
    rank_before_rerank: int | None = None
    parts: list[float] | None = None
    unmodulated_parts: list[float] | None = None


@dataclass(frozen=True)
class SearchResult:
    """The answer to one query.

    hits: best first. searched: items that passed the filters. people: distinct ones among them, an
    item without a label counting as one. probability_enrolled: that the person is one of them; None
    where the checkpoint has no fit. candidates: how many of the items were rescored. timings_ms: of
    recall, rescore, rerank and fetch. shards_ok, shards_total: how many shards of the gallery
    answered, and how many there are; None in one process.
    """

    hits: list[Hit]
    searched: int
    people: int
    probability_enrolled: float | None
    candidates: int
    exhaustive: bool
    timings_ms: dict[str, float]
    shards_ok: int | None = None
    shards_total: int | None = None
