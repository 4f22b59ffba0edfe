"""The gallery on disk: SQLite or PostgreSQL through SQLAlchemy. The truth; all else is a cache."""
