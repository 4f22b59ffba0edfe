"""Alembic's folder: the database's way from one release to the next."""
