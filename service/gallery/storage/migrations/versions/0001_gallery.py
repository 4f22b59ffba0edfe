"""Items, their crops and their features."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create the tables of items, crops and features."""
    op.create_table(
        "items",
        sa.Column("number", _number, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(36), nullable=False, unique=True),
        sa.Column("person_id", sa.Text),
        sa.Column("camera_id", sa.Text),
        sa.Column("captured_at", sa.BigInteger),
        sa.Column("enrolled_at", sa.BigInteger, nullable=False),
        sa.Column("modality", sa.String(3), nullable=False),
        sa.Column("modality_source", sa.String(8), nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("bit_depth", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("details", sa.Text, nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("request_key", sa.Text, unique=True),
        sa.Column("request_sha256", sa.String(64)),
        sqlite_autoincrement=True,
    )
    for column in ("person_id", "camera_id", "captured_at"):
        op.create_index(f"ix_items_{column}", "items", [column])
    op.create_table(
        "crops",
        sa.Column(
            "number", _number, sa.ForeignKey("items.number", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("media_type", sa.String(32), nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "features",
        sa.Column("model", sa.String(64), primary_key=True),
        sa.Column(
            "number",
            _number,
            sa.ForeignKey("items.number", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_features_number", "features", ["number"])
