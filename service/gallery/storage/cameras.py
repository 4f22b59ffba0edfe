"""What the gallery knows of its cameras: what their pictures are where these do not say it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from sqlalchemy import Connection, delete, insert, select, update

from model.labels import normalized_label
from service.gallery.records import Camera
from service.gallery.storage.audit import Act, write
from service.gallery.storage.database import Database
from service.gallery.storage.group_commit import GroupCommit
from service.gallery.storage.tables import cameras


class Cameras:
    """The cameras of one gallery, read from the database at every call: replicas share them."""

    def __init__(self, database: Database, commits: GroupCommit) -> None:
        self._database, self._commits = database, commits

    def list(self) -> Sequence[Camera]:
        """All cameras that something is known of, by id."""
        with self._database.reading() as connection:
            rows = connection.execute(select(cameras).order_by(cameras.c.camera_id)).all()
        return sorted((Camera(*row) for row in rows), key=lambda camera: camera.camera_id)

    def find(self, camera_ids: Collection[str]) -> Mapping[str, Camera]:
        """Those of some cameras, as many as one request names, that something is known of."""
        if not camera_ids:
            return {}
        query = select(cameras).where(cameras.c.camera_id.in_(camera_ids))
        with self._database.reading() as connection:
            return {row.camera_id: Camera(*row) for row in connection.execute(query)}

    def put(self, camera: Camera, *, actor: str = "system") -> Camera:
        """Store what holds for a camera, in place of what did → as stored. Raises LabelError."""
        camera_id = normalized_label(camera.camera_id)
        values = {"modality": camera.modality, "polarity": camera.polarity}

        def work(connection: Connection) -> None:
            mine = cameras.c.camera_id == camera_id
            if not connection.execute(update(cameras).where(mine).values(values)).rowcount:
                connection.execute(insert(cameras).values(camera_id=camera_id, **values))
            write(connection, [Act(actor, "camera", None, {"camera_id": camera_id, **values})])

        self._commits.run(work)
        return replace(camera, camera_id=camera_id)

    def delete(self, camera_id: str, *, actor: str = "system") -> bool:
        """Forget what holds for a camera; its items stay. False: nothing was known."""

        def work(connection: Connection) -> bool:
            mine = cameras.c.camera_id == camera_id
            if not connection.execute(delete(cameras).where(mine)).rowcount:
                return False
            write(connection, [Act(actor, "camera", None, {"camera_id": camera_id})])
            return True

        return self._commits.run(work)
