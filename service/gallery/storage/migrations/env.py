"""Run by Alembic: migrate over the connection that `Database.migrate` passes."""

from alembic import context

from service.gallery.storage.tables import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
