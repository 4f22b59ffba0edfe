"""Model versions: which checkpoints' features the gallery holds, and the switch to another.

A new checkpoint starts as "building": `missing` gives the items that it has not embedded, with
their crops, `add_features` takes their features, and `activate` makes it the active version once
every item has them. Finished work is in the tables, so that it continues from there after a crash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Row, Select, delete, exists, func, insert, select, text, update

from service.errors import ModelVersionConflict, ModelVersionUnknown
from service.gallery.feed import FEATURE_DTYPE
from service.gallery.records import ModelVersion, StoredCrop, VersionState
from service.gallery.storage.audit import Act, write
from service.gallery.storage.crops import Crops, StoredImage
from service.gallery.storage.database import Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.rows import blocks
from service.gallery.storage.streaming import announce, checked, record_changes
from service.gallery.storage.tables import features, items, models
from service.gallery.times import microseconds, moment_of
from service.kit.text import counted

_INFRARED = (items.c.modality, items.c.polarity)
_LAST = 64  # items that are embedded while everybody else waits to write
_LAST_SECONDS = 25  # which that may take, less than they wait
_DROPPED_AT_ONCE = 2_000  # rows of features per transaction, so that enrollments wait briefly

EmbedStored = Callable[[Sequence[StoredCrop]], npt.NDArray[np.float16]]
"""Stored crops → their features, N×(P·D)."""


class Versions:
    """The versions of one gallery. Thread-safe.

    Every method that takes a fingerprint but `register` raises ModelVersionUnknown for one that
    the gallery does not know; `missing` and `sample` raise as `Crops.fetch`, too.
    """

    def __init__(self, database: Database, commits: GroupCommit, crops: Crops) -> None:
        self._database, self._commits, self._crops = database, commits, crops

    def list(self) -> list[ModelVersion]:
        """All versions, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(_versions().order_by(models.c.created_at)).all()
        return [_version(row) for row in rows]

    def get(self, fingerprint: str) -> ModelVersion:
        """One version, with how many items have features of it."""
        with self._database.reading() as connection:
            query = _versions().where(models.c.fingerprint == fingerprint)
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _unknown(fingerprint)
        return _version(row)

    def state(self, fingerprint: str) -> VersionState:
        """A version's state."""
        with self._database.reading() as connection:
            return _state(connection, fingerprint)

    def register(self, fingerprint: str, configuration: dict[str, Any] | None = None) -> None:
        """Register a checkpoint, or add the configuration of one that was registered without.

        It starts as "building"; in a gallery without an active version and without an item that
        it has not embedded, it is active at once.
        """
        text = None if configuration is None else json.dumps(configuration)

        def work(connection: Connection) -> None:
            known = models.c.fingerprint == fingerprint
            if connection.execute(select(models.c.state).where(known)).first() is None:
                nobody = ~exists().where(models.c.state == "active")
                first = connection.execute(select(nobody)).scalar_one()
                complete = not _count_missing(connection, fingerprint)
                connection.execute(
                    insert(models).values(
                        fingerprint=fingerprint,
                        configuration=text,
                        created_at=microseconds(datetime.now(UTC)),
                        state="active" if first and complete else "building",
                    )
                )
            elif text is not None:
                connection.execute(
                    update(models)
                    .where(known, models.c.configuration.is_(None))
                    .values(configuration=text)
                )

        self._commits.run(work)

    def missing(self, fingerprint: str, block: int = 64) -> Iterator[Sequence[StoredCrop]]:
        """Items without features of this version, in order of enrollment, in blocks.

        Each block is read when it is needed, so items enrolled meanwhile come too; it ends with the
        first that is not full, since others may go on to enroll for ever. An item that gets no
        features does not come again until `missing` is called again.
        """
        self.state(fingerprint)  # raises for an unknown version
        after, rows = 0, None
        while rows is None or len(rows) == block:
            with self._database.reading() as connection:
                rows = _missing_after(connection, fingerprint, after, block)
            if rows:
                after = rows[-1].number
                if there := self._with_images(rows):
                    yield there

    def _with_images(self, rows: Sequence[Row[Any]]) -> Sequence[StoredCrop]:
        """The crops of items, but for those that are deleted since."""
        images = self._crops.fetch([row.number for row in rows])
        return [_stored(row, images[row.number]) for row in rows if row.number in images]

    def add_features(
        self, fingerprint: str, numbers: Sequence[int], rows: npt.NDArray[np.float16]
    ) -> int:
        """Store features (N×(P·D)) of enrolled items → of how many.

        Items deleted meanwhile and those that have features already are left out. Raises
        ValueError for shapes that do not fit and numbers that are not finite.
        """
        given = _given(numbers, rows)

        def work(connection: Connection) -> int:
            _state(connection, fingerprint)
            return _add_features(connection, fingerprint, given)

        return self._commits.run(work)

    def sample(
        self, fingerprint: str, count: int
    ) -> tuple[Sequence[StoredCrop], npt.NDArray[np.float32]]:
        """Up to `count` random items with features of this version → crops, features N×(P·D)."""
        chosen = (
            select(features.c.number, features.c.data.label("row"))
            .where(features.c.model == fingerprint)
            .order_by(func.random())
            .limit(count)
            .subquery()
        )
        query: Select[Any] = select(chosen.c.row, chosen.c.number, *_INFRARED).join(
            items, items.c.number == chosen.c.number
        )
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        images = self._crops.fetch([row.number for row in rows])
        rows = [row for row in rows if row.number in images]
        found = [_stored(row, images[row.number]) for row in rows]
        stored = np.frombuffer(b"".join(bytes(r.row) for r in rows), FEATURE_DTYPE)
        width = len(stored) // max(1, len(found))
        return found, stored.reshape(len(found), width).astype(np.float32)

    def count_missing(self, fingerprint: str) -> int:
        """Items that have no features of this version."""
        with self._database.reading() as connection:
            _state(connection, fingerprint)
            return _count_missing(connection, fingerprint)

    def activate(
        self, fingerprint: str, *, actor: str = "system", embed: EmbedStored | None = None
    ) -> None:
        """Switch to this version in one transaction; the active one becomes retired.

        embed: for the few items that others enrolled a moment ago; nobody enrolls meanwhile. Raises
        ModelVersionConflict where some item has no features of it yet.
        """

        def work(connection: Connection) -> None:
            if _state(connection, fingerprint) == "active":
                return
            if embed is not None:
                self._embed_last(connection, fingerprint, embed)
            missing = _count_missing(connection, fingerprint)
            if missing:
                raise ModelVersionConflict(
                    f"{counted(missing, 'item has', 'items have')} no features of model version "
                    f"{fingerprint[:12]} yet; embed them again before it is activated"
                )
            active = models.c.state == "active"
            connection.execute(update(models).where(active).values(state="retired"))
            _set_state(connection, fingerprint, "active")
            other = items.c.model != fingerprint
            connection.execute(update(items).where(other).values(model=fingerprint))
            write(connection, [Act(actor, "activate", fingerprint)])
            announce(connection)

        self._commits.run(work)

    def _embed_last(self, connection: Connection, fingerprint: str, embed: EmbedStored) -> None:
        """Give features to the last items without, unless they are too many to wait for."""
        rows = _missing_after(connection, fingerprint, 0, _LAST + 1)
        if not 0 < len(rows) <= _LAST:
            return
        if connection.dialect.name == "postgresql":  # which would take it for one that is stopped
            pause = text("SELECT set_config('idle_in_transaction_session_timeout', :s, true)")
            connection.execute(pause, {"s": f"{_LAST_SECONDS}s"})
        crops = self._with_images(rows)
        _add_features(
            connection, fingerprint, _given([crop.number for crop in crops], embed(crops))
        )

    def retire(self, fingerprint: str, *, actor: str = "system") -> None:
        """Retire a version that is not active. Raises ModelVersionConflict for the active one."""

        def work(connection: Connection) -> None:
            _refuse_active(connection, fingerprint)
            _set_state(connection, fingerprint, "retired")
            write(connection, [Act(actor, "retire", fingerprint)])

        self._commits.run(work)

    def drop(self, fingerprint: str, *, actor: str = "system") -> None:
        """Remove a version with its features. Raises ModelVersionConflict for the active one.

        In several transactions; if interrupted, the rest is retired and can be dropped.
        """
        self.retire(fingerprint, actor=actor)
        of_version = features.c.model == fingerprint

        def drop_some(connection: Connection) -> bool:
            _refuse_active(connection, fingerprint)
            first = select(features.c.number).where(of_version).order_by(features.c.number)
            numbers = connection.execute(first.limit(_DROPPED_AT_ONCE)).scalars().all()
            if numbers:
                until = features.c.number <= numbers[-1]
                connection.execute(delete(features).where(of_version, until))
                return True
            connection.execute(delete(models).where(models.c.fingerprint == fingerprint))
            write(connection, [Act(actor, "drop", fingerprint)])
            return False

        while self._commits.run(drop_some):
            pass


def _given(
    numbers: Sequence[int], rows: npt.NDArray[np.float16]
) -> dict[int, npt.NDArray[np.float16]]:
    return dict(zip(numbers, checked(rows, len(numbers), None), strict=True))


def _add_features(
    connection: Connection, fingerprint: str, given: Mapping[int, npt.NDArray[np.float16]]
) -> int:
    """Store features of items that are there and have none of this version → of how many."""
    if not given:
        return 0
    _refuse_other_size(connection, fingerprint, len(next(iter(given.values()))))
    newest = select(func.max(features.c.number)).where(features.c.model == fingerprint)
    last = connection.execute(newest).scalar_one() or 0
    wanted: list[int] = []
    for part in blocks(sorted(given)):
        query = select(items.c.number).where(items.c.number.in_(part), ~_embedded(fingerprint))
        wanted += connection.execute(query.order_by(items.c.number)).scalars()
    if wanted:
        connection.execute(
            insert(features),
            [{"number": n, "model": fingerprint, "data": given[n].tobytes()} for n in wanted],
        )
    if wanted and wanted[0] < last:  # caches may have read past these numbers
        record_changes(connection, wanted, "features")
    return len(wanted)


def _missing_after(
    connection: Connection, fingerprint: str, after: int, limit: int
) -> Sequence[Row[Any]]:
    query: Select[Any] = (
        select(items.c.number, *_INFRARED)
        .where(items.c.number > after, ~_embedded(fingerprint))
        .order_by(items.c.number)
        .limit(limit)
    )
    return connection.execute(query).all()


def _stored(row: Row[Any], image: StoredImage) -> StoredCrop:
    return StoredCrop(int(row.number), image.data, image.media_type, row.modality, row.polarity)


def refuse_retired(connection: Connection, fingerprint: str) -> None:
    """Raise ModelVersionConflict for a retired version, whose items no later search would find."""
    if _state(connection, fingerprint) == "retired":
        raise ModelVersionConflict(
            f"model version {fingerprint[:12]} is retired, the gallery goes on with another; "
            "restart the service with that version's checkpoint"
        )


def _versions() -> Select[Any]:
    embedded = (
        select(func.count())
        .select_from(features)
        .where(features.c.model == models.c.fingerprint)
        .scalar_subquery()
    )
    return select(models, embedded.label("embedded"))


def _version(row: Row[Any]) -> ModelVersion:
    return ModelVersion(
        fingerprint=row.fingerprint,
        configuration=None if row.configuration is None else json.loads(row.configuration),
        created_at=moment_of(row.created_at),
        state=row.state,
        embedded=int(row.embedded),
    )


def _embedded(fingerprint: str) -> Any:
    """Whether the item at hand has features of this version."""
    return exists().where(features.c.number == items.c.number, features.c.model == fingerprint)


def _count_missing(connection: Connection, fingerprint: str) -> int:
    # Features are deleted with their items, so the difference is the number of those without.
    embedded = select(func.count()).select_from(features).where(features.c.model == fingerprint)
    difference = select(func.count()).select_from(items).scalar_subquery()
    query = select(difference - embedded.scalar_subquery())
    return int(connection.execute(query).scalar_one())


def _refuse_other_size(connection: Connection, fingerprint: str, size: int) -> None:
    of_version = features.c.model == fingerprint
    stored = connection.execute(select(func.length(features.c.data)).where(of_version).limit(1))
    length = stored.scalar_one_or_none()
    if length not in (None, size * FEATURE_DTYPE.itemsize):
        raise ValueError(
            f"features of {size} numbers for a model version with "
            f"{length // FEATURE_DTYPE.itemsize}"
        )


def _state(connection: Connection, fingerprint: str) -> VersionState:
    query = select(models.c.state).where(models.c.fingerprint == fingerprint)
    state: VersionState | None = connection.execute(query).scalar_one_or_none()
    if state is None:
        raise _unknown(fingerprint)
    return state


def _set_state(connection: Connection, fingerprint: str, state: str) -> None:
    of_version = models.c.fingerprint == fingerprint
    connection.execute(update(models).where(of_version).values(state=state))


def _refuse_active(connection: Connection, fingerprint: str) -> None:
    if _state(connection, fingerprint) == "active":
        raise ModelVersionConflict(
            f"model version {fingerprint[:12]} is the active one; activate another before"
        )


def _unknown(fingerprint: str) -> ModelVersionUnknown:
    return ModelVersionUnknown(
        f"the gallery has no model version {fingerprint[:64]}; GET /admin/versions lists them"
    )
