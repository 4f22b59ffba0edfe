"""Places for galleries on either database, and a gallery with a past to put into one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sqlalchemy import select
from torch import Tensor

from model import CheckpointInfo, CMTConfig
from service.gallery import Camera, Filters, Gallery, ItemUpdate, NewItem, RequestKey
from service.gallery.storage.store import Store
from service.gallery.storage.tables import schema, secrets
from tests.service.postgres import PostgresServer
from tests.service.stores import crop

INFO = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))
SIZE = INFO.config.parts * INFO.config.dim
KINDS = ("sqlite", "postgresql")
# Takes back what the newest tables of SQLite have and those of release 0.1.0 have not.
EARLIER_RELEASE = """
    DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete; DROP TRIGGER audit_no_replace;
    DROP TABLE IF EXISTS clock; DROP TABLE IF EXISTS undated; DROP TABLE cameras;
    DROP TABLE objects; DROP TABLE loose_objects; DROP TABLE object_owner;
    ALTER TABLE items DROP COLUMN polarity;
    UPDATE alembic_version SET version_num = '0002';
"""


class Place(NamedTuple):
    """A data folder and, on PostgreSQL, a database."""

    folder: Path
    url: str | None

    def open(self) -> Gallery:
        return Gallery.open(self.folder, INFO, database_url=self.url)

    def store(self) -> closing[Store]:
        """The rows behind a gallery, which may be open meanwhile."""
        return closing(Store(self.folder, INFO.fingerprint, SIZE, self.url))

    def tables(self) -> dict[str, list[Any]]:
        """Every row of every table that a backup carries."""
        with self.store() as store, store.database.reading() as connection:
            return {
                table.name: list(
                    connection.execute(select(table).order_by(*table.primary_key.columns))
                )
                for table in schema.sorted_tables
                if table is not secrets
            }

    def pseudonym(self, person: str) -> str:
        with self.store() as store:
            return store.audit.pseudonym(person)


class MakePlace:
    """Places on SQLite and on one PostgreSQL server, the latter dropped after the test."""

    def __init__(self, root: Path, postgres: Callable[[], PostgresServer]) -> None:
        self._root, self._postgres = root, postgres
        self._numbers = itertools.count()
        self._urls: list[str] = []

    def __call__(self, kind: str) -> Place:
        folder = self._root / f"place-{next(self._numbers)}"
        folder.mkdir()
        if kind == "sqlite":
            return Place(folder, None)
        server = self._postgres()
        server.start()
        self._urls.append(server.make_database())
        return Place(folder, self._urls[-1])

    def drop(self) -> None:
        for url in self._urls:
            self._postgres().drop_database(url)


@pytest.fixture
def make_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakePlace]:
    made = MakePlace(tmp_path, lambda: request.getfixturevalue("postgres"))
    yield made
    made.drop()


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, INFO.config.parts, INFO.config.dim, generator=generator)


def fill(gallery: Gallery, count: int = 12) -> list[str]:
    """Items of all kinds, with a past: labels changed, some deleted → the ids of those left."""
    new = [
        NewItem(
            replace(crop(i), polarity="black_hot" if i % 3 == 0 else "white_hot"),
            person_id=f"person-{i % 3}" if i % 4 else None,
            camera_id=None if i % 2 else 'gate "1"; \\t\\N ü',
            captured_at=datetime(2026, 1, 1 + i, tzinfo=UTC) if i % 2 else None,
            metadata={"note": "zwölf\\n", "n": i},
            request=RequestKey(f"key-{i}", f"{i:064x}"),
        )
        for i in range(count)
    ]
    items = gallery.add(new, features(count, 0))
    gallery.put_camera(Camera("moved", "ir", "black_hot"), actor="key:1")
    gallery.update(items[1].id, ItemUpdate(camera_id="moved"), actor="key:1")
    gallery.delete(items[2].id, actor="key:2")
    gallery.delete_where("person-0", actor="key:2")
    gallery.delete(items[-1].id, actor="key:2")  # the last number, which nobody may get again
    return [item.id for item in gallery.list(Filters(), 1000).items]
