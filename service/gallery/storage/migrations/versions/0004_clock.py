"""What is known of the time: when the gallery last ran, and which items have no date to go by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create two empty tables; the first start fills them."""
    op.create_table(
        "clock",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("moment", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "undated",
        sa.Column(
            "number",
            _number,
            sa.ForeignKey("items.number", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("seen_at", sa.BigInteger),
    )
