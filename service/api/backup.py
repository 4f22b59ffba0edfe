"""A backup of the gallery as a download."""

from __future__ import annotations

import logging
from functools import partial

from anyio import CancelScope, fail_after, to_thread
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from service import errors
from service.api.deps import NO_QUERY, ActorDep, ResourcesDep
from service.api.openapi import documented
from service.gallery.backup.backup import Backup

log = logging.getLogger(__name__)

router = APIRouter(prefix="/admin", tags=["admin"])

_PATIENCE = 60.0  # seconds that a client may take for a block, of about 1 MB


class BackupDownload(StreamingResponse):
    """A backup's blocks as a response, which closes the backup however it ends.

    It says its length, so that every client and proxy notices where it is cut off: one that speaks
    HTTP/1.0 knows no other end than that of the connection.
    """

    media_type = "application/zip"

    def __init__(self, backup: Backup) -> None:
        headers = {
            "Content-Disposition": f'attachment; filename="{backup.name}"',
            "Content-Length": str(backup.size),
        }
        super().__init__(backup, headers=headers)
        self._backup = backup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                await to_thread.run_sync(self._backup.close)

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with fail_after(_PATIENCE):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:  # the server closes the connection, since the answer is incomplete
            log.warning("a client took too long to receive a backup; it is given up")


@router.post(
    "/backup",
    dependencies=[NO_QUERY],
    response_class=Response,
    responses={
        **documented(
            errors.BackupRunning,
            errors.GalleryDamaged,
            errors.CropsUnavailable,
            errors.StorageUnwritable,
            errors.StorageFull,
        ),
        200: {
            "description": "A ZIP file that `cmt restore` takes.",
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
async def backup(state: ResourcesDep, actor: ActorDep) -> BackupDownload:
    """All that the gallery holds at this moment, as one file; enrollments go on meanwhile.

    It has every crop and label: keep it as safe as the gallery. The answer begins once a temporary
    copy is made in the data folder, which needs as much space as the gallery and may take minutes.
    """
    begin = partial(state.gallery.begin_backup, actor=actor)
    return BackupDownload(await state.pipeline.stored(begin))
