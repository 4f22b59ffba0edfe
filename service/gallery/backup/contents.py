"""What the database of a backup holds, which may have been changed by anybody since."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

from service.gallery.backup.archive import Manifest
from service.gallery.storage.tables import AUDIT_TRIGGERS


def described(database: Path, created_at: datetime) -> Manifest:
    """The manifest of a copy, without its members. Raises sqlite3.Error."""
    with closing(read_only(database)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        if not all(_is_ours(*row) for row in rows):
            raise sqlite3.DatabaseError("it has more than tables, indexes and their triggers")
        names = {name for kind, name, _ in rows if kind == "table" and name.isidentifier()}
        names -= {"alembic_version", "secrets", "sqlite_sequence"}

        def first(statement: str) -> Any:
            row = connection.execute(statement).fetchone()
            return None if row is None else row[0]

        return Manifest(
            created_at=created_at,
            revision=str(first("SELECT version_num FROM alembic_version")),
            active=first("SELECT fingerprint FROM models WHERE state = 'active'"),
            counts={name: first(f"SELECT count(*) FROM {name}") for name in sorted(names)},
        )


def _is_ours(kind: str, name: str, sql: str | None) -> bool:
    """Whether a part of a database is one that a gallery has; a view or a trigger may run SQL."""
    if kind == "trigger":
        return AUDIT_TRIGGERS.get(name) == sql
    return kind in ("table", "index") and "VIRTUAL" not in (sql or "")


def read_only(database: Path) -> sqlite3.Connection:
    """A connection that creates no file next to the database."""
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)
