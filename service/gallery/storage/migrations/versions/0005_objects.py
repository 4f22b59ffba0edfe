"""Crops outside of the database, and objects that are to be deleted there."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create three empty tables; every crop stays where it is."""
    op.create_table(
        "objects",
        sa.Column(
            "number",
            _number,
            sa.ForeignKey("items.number", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("media_type", sa.String(32), nullable=False),
        sa.Column("name", sa.String(32), nullable=False, unique=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "loose_objects",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("item", _number),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_loose_objects_item", "loose_objects", ["item"])
    op.create_table(
        "object_owner",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(32), nullable=False),
    )
