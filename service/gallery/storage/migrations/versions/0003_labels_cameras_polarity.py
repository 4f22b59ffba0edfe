"""Polarity, cameras, an append-only audit log, and one spelling for every label.

Labels become what `model.labels` makes of them. Those that become one with another are named in the
audit log by their keyed hash; those of which nothing would be left stay as they are. Changed items
are noted for caches, so that a snapshot of the index gives no old label.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from model.labels import cleaned_label
from service.gallery.storage.audit import checked_key, read_key

revision = "0003"
down_revision = "0002"

log = logging.getLogger(__name__)

_ROWS = 500  # per statement

_items = sa.table(
    "items", *map(sa.column, ("number", "person_id", "camera_id", "modality", "polarity"))
)
_changes = sa.table("changes", *map(sa.column, ("item", "kind", "moment")))
_audit = sa.table("audit", *map(sa.column, ("moment", "actor", "action", "subject", "details")))
_secrets = sa.table("secrets", *map(sa.column, ("name", "data")))


def upgrade() -> None:
    """Add a column, a table and triggers, and respell labels."""
    op.add_column("items", sa.Column("polarity", sa.String(9)))
    # What earlier releases took all infrared for.
    op.execute(_items.update().where(_items.c.modality == "ir").values(polarity="white_hot"))
    op.create_table(
        "cameras",
        sa.Column("camera_id", sa.Text, primary_key=True),
        sa.Column("modality", sa.String(4)),
        sa.Column("polarity", sa.String(9)),
    )
    connection = op.get_bind()
    _respell(connection)
    if connection.dialect.name == "sqlite":
        refuse = "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        op.execute(f"CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit {refuse}")
        op.execute(f"CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit {refuse}")
        # REPLACE deletes without telling the trigger before.
        op.execute(
            "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
            f"WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number) {refuse}"
        )
    else:
        op.execute(
            "CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()"
        )


def _respell(connection: sa.Connection) -> None:
    touched: set[int] = set()
    kept = 0
    merged: dict[str, Mapping[str, Sequence[str]]] = {}
    for column in (_items.c.person_id, _items.c.camera_id):
        stored = connection.execute(
            sa.select(column).where(column.is_not(None)).distinct().order_by(column)
        ).scalars()
        spellings: defaultdict[str, list[str]] = defaultdict(list)
        for text in stored:
            label = cleaned_label(text)
            if label is None:
                kept += 1
            else:
                spellings[label].append(text)
        for label, texts in spellings.items():
            for text in texts:
                if text != label:
                    respelled = sa.update(_items).where(column == text)
                    touched.update(
                        connection.execute(
                            respelled.values({column: label}).returning(_items.c.number)
                        ).scalars()
                    )
        merged[column.name] = {label: texts for label, texts in spellings.items() if texts[1:]}
    if touched:
        _note(connection, sorted(touched), merged)
        log.warning(
            "labels of %d items are spelled anew (normalization form C, nothing invisible); "
            "%d persons and %d cameras were spelled in several ways and are one each now: the "
            "audit log has them by their keyed hashes",
            *(len(touched), len(merged["person_id"]), len(merged["camera_id"])),
        )
    if kept:
        log.warning(
            "%d labels cannot be respelled and stay as they are; filters and erasures accept them "
            "exactly as they are stored",
            kept,
        )


def _note(
    connection: sa.Connection,
    touched: Sequence[int],
    merged: Mapping[str, Mapping[str, Sequence[str]]],
) -> None:
    """Note respelled items for caches, and what became one in the audit log."""
    moment = time.time_ns() // 1000
    for start in range(0, len(touched), _ROWS):
        connection.execute(
            sa.insert(_changes),
            [
                {"item": number, "kind": "labels", "moment": moment}
                for number in touched[start : start + _ROWS]
            ],
        )
    key = _audit_key(connection)
    entries: list[tuple[str | None, dict[str, Any]]] = [(None, {"items": len(touched)})]
    if key is not None:  # else nobody could compare the hashes with earlier entries
        entries += [
            (_pseudonym(key, label), {"persons": [_pseudonym(key, text) for text in texts]})
            for label, texts in merged["person_id"].items()
        ]
    entries += [
        (None, {"camera_id": label, "cameras": list(texts)})
        for label, texts in merged["camera_id"].items()
    ]
    connection.execute(
        sa.insert(_audit),
        [
            {
                "moment": moment,
                "actor": "system",
                "action": "respell",
                "subject": subject,
                "details": json.dumps(details),
            }
            for subject, details in entries
        ],
    )


def _audit_key(connection: sa.Connection) -> bytes | None:
    """The key of pseudonyms: a file beside SQLite's database, or a row."""
    if connection.dialect.name == "sqlite":
        file = context.config.attributes["folder"] / "audit.key"
        return read_key(file) if file.exists() else None
    query = sa.select(_secrets.c.data).where(_secrets.c.name == "audit")
    key = connection.execute(query).scalar_one_or_none()
    return None if key is None else checked_key(key, "the audit log's key in the table secrets")


def _pseudonym(key: bytes, text: str) -> str:
    return hmac.digest(key, text.encode(), "sha256").hex()
