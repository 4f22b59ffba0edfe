"""The tables, as the newest migration leaves them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

REVISION = "0005"
"""Of the newest migration."""

schema = MetaData()

# SQLite counts rows by itself only in a column of type INTEGER.
RowNumber = BigInteger().with_variant(Integer, "sqlite")

# number: order of enrollment, never used again after a delete. Times: microseconds since 1970 UTC,
# because SQLite knows no time zones. details: the client's metadata as JSON text. request_key: the
# client's Idempotency-Key, free again once the item is deleted; request_sha256: of what it sent.
# id: tells SQLAlchemy which of many inserted rows got which number.
# Labels are as `model.labels` has them, but for those of older releases of which nothing is left.
items = Table(
    "items",
    schema,
    Column("number", RowNumber, primary_key=True, autoincrement=True),
    Column("id", String(36), nullable=False, unique=True, insert_sentinel=True),
    Column("person_id", Text, index=True),
    Column("camera_id", Text, index=True),
    Column("captured_at", BigInteger, index=True),
    Column("enrolled_at", BigInteger, nullable=False),
    Column("modality", String(3), nullable=False),
    Column("modality_source", String(8), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("bit_depth", Integer, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("details", Text, nullable=False),
    Column("model", String(64), nullable=False),
    Column("request_key", Text, unique=True),
    Column("request_sha256", String(64)),
    Column("polarity", String(9)),
    sqlite_autoincrement=True,
)

crops = Table(
    "crops",
    schema,
    Column("number", RowNumber, ForeignKey("items.number", ondelete="CASCADE"), primary_key=True),
    Column("media_type", String(32), nullable=False),
    Column("data", LargeBinary, nullable=False),
)

# Crops outside of the database; an item has a row here or in `crops`, never in both. name: of the
# object, random. size, sha256: of its bytes.
objects = Table(
    "objects",
    schema,
    Column("number", RowNumber, ForeignKey("items.number", ondelete="CASCADE"), primary_key=True),
    Column("media_type", String(32), nullable=False),
    Column("name", String(32), nullable=False, unique=True),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

# Objects that no item has. item: the number of the erased item whose crop it is, 0 where an
# enrollment failed; all these are to be deleted. Null: it is being written, or its writer died.
loose_objects = Table(
    "loose_objects",
    schema,
    Column("name", String(32), primary_key=True),
    Column("item", RowNumber, index=True),
    Column("since", BigInteger, nullable=False),
)

# One row where objects are used: the gallery's random name, which is also beside its objects.
object_owner = Table(
    "object_owner",
    schema,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("name", String(32), nullable=False),
)

# One row per item and checkpoint, so that a new checkpoint's features are stored beside the old.
# data: P·D little-endian fp16 numbers.
features = Table(
    "features",
    schema,
    Column("model", String(64), primary_key=True),
    Column(
        "number",
        RowNumber,
        ForeignKey("items.number", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        index=True,
    ),
    Column("data", LargeBinary, nullable=False),
)

# Model versions. fingerprint: of the checkpoint. configuration: its JSON, unknown (null) for those
# of a gallery from the first release. state: "building", "active" or "retired".
models = Table(
    "models",
    schema,
    Column("fingerprint", String(64), primary_key=True),
    Column("configuration", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("state", String(8), nullable=False),
)
Index(
    "ix_models_one_active",
    models.c.state,
    unique=True,
    sqlite_where=text("state = 'active'"),
    postgresql_where=text("state = 'active'"),
)

# Changes of items after their enrollment, for caches to follow. item: its row number, nothing
# personal. kind: "delete", "labels" or "features".
changes = Table(
    "changes",
    schema,
    Column("number", RowNumber, primary_key=True, autoincrement=True),
    Column("item", RowNumber, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("moment", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# What holds for a camera's pictures that do not say it themselves; null: nothing does.
cameras = Table(
    "cameras",
    schema,
    Column("camera_id", Text, primary_key=True),
    Column("modality", String(4)),
    Column("polarity", String(9)),
)

# One row: the latest time at which the gallery ran with a clock that it believed.
clock = Table(
    "clock",
    schema,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("moment", BigInteger, nullable=False),
)

# Items that were enrolled while the clock was not believed. seen_at: when it first was, after that.
undated = Table(
    "undated",
    schema,
    Column(
        "number",
        RowNumber,
        ForeignKey("items.number", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("seen_at", BigInteger),
)

# Who did what, append-only: see `AUDIT_TRIGGERS`. subject: an item's id or a person's keyed hash.
# details: JSON text.
audit = Table(
    "audit",
    schema,
    Column("number", RowNumber, primary_key=True, autoincrement=True),
    Column("moment", BigInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", Text),
    Column("details", Text, nullable=False),
    sqlite_autoincrement=True,
)

# What keeps the audit log append-only in SQLite, by name; the third because REPLACE deletes without
# telling the second. A backup may have these triggers and no others.
AUDIT_TRIGGERS = {
    name: f"CREATE TRIGGER {name} BEFORE {event} ON audit {condition}"
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    for name, event, condition in (
        ("audit_no_update", "UPDATE", ""),
        ("audit_no_delete", "DELETE", ""),
        (
            "audit_no_replace",
            "INSERT",
            "WHEN EXISTS (SELECT 1 FROM audit WHERE number = NEW.number) ",
        ),
    )
}

# Random keys that replicas share. On SQLite they are files of the data folder instead.
secrets = Table(
    "secrets",
    schema,
    Column("name", String(32), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
