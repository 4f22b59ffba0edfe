"""Alembic's folder: migrations of the database from one release to the next."""
