"""Model versions, changes for caches, the audit log and shared secrets.

The version of the newest enrollment becomes the active one, because that is what the gallery was
last served with; where there is only one, it is that. Any other version is retired. Whether every
item has features of the active version is not asked: `Versions.missing` finds those without.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create four tables, and the version of each checkpoint that has features."""
    op.create_table(
        "models",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("configuration", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
    )
    op.create_index(
        "ix_models_one_active",
        "models",
        ["state"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "changes",
        sa.Column("number", _number, primary_key=True, autoincrement=True),
        sa.Column("item", _number, nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("moment", sa.BigInteger, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "audit",
        sa.Column("number", _number, primary_key=True, autoincrement=True),
        sa.Column("moment", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text),
        sa.Column("details", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.execute(
        """
        INSERT INTO models (fingerprint, created_at, state)
        SELECT features.model, MIN(items.enrolled_at),
               CASE WHEN features.model = (SELECT model FROM items ORDER BY number DESC LIMIT 1)
                    THEN 'active' ELSE 'retired' END
        FROM features JOIN items ON items.number = features.number
        GROUP BY features.model
        """
    )
    if op.get_bind().dialect.name == "postgresql":
        # Rows up to a page stay in the table itself: a start reads them all, and reading them from
        # the TOAST table takes several times as long. Crops are compressed already.
        op.execute("ALTER TABLE features ALTER COLUMN data SET STORAGE MAIN")
        op.execute("ALTER TABLE crops ALTER COLUMN data SET STORAGE EXTERNAL")
