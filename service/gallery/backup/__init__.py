"""A gallery as one file, and back: of SQLite and PostgreSQL, while writes go on."""
