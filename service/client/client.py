"""A typed client of the service: `Client`, and `AsyncClient` with the same verbs as coroutines.

Both retry a 429 or 503 when the server says how long to wait (Retry-After).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Generator,
    Iterable,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, closing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from model.atomic_file import whole_file
from model.modalities import Polarity
from service.api.schemas import (
    AuditRecords,
    BatchAnswer,
    BatchItem,
    BatchResult,
    CameraRecord,
    CameraRecords,
    Erased,
    GalleryItem,
    GalleryPage,
    ModalityChoice,
    ModelCard,
    ModelVersionRecord,
    ModelVersions,
    QueryAnswer,
    ReembedStatus,
)
from service.client import requests as calls
from service.client import stream
from service.client.requests import ImageSource, InvalidValue, ServiceProblem, Unreachable
from service.client.spread import OtherGallery, Spread
from service.client.stream import Entry, EntryResult
from service.kit.urls import DEFAULT_URL, is_loopback

__all__ = [
    "AsyncClient",
    "Client",
    "InvalidValue",
    "OtherGallery",
    "ServiceProblem",
    "Unreachable",
]

# Long enough for a CPU that embeds a full queue first; connecting to a service takes no time.
TIMEOUT = httpx.Timeout(120, connect=5)


class Client:
    """Verbs of the HTTP API. Raises ServiceProblem for an error answer, Unreachable for none.

    InvalidValue and LabelError are ValueErrors for ids and texts that are not sent at all.

    An image is a path or bytes. Keyword arguments of the verbs are the fields of the API.

    retries: of what is refused for now. timeout: how long to wait for a byte, connecting and
    between two. request_timeout: seconds within which the service is to answer an upload, each time
    that it is sent; it refuses at once (429) what it cannot, and gives up (504) what comes late.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        retries: int = 5,
        timeout: httpx.Timeout = TIMEOUT,
        request_timeout: float | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=url,
            headers=calls.authorization(api_key) | calls.time_limit(request_timeout),
            timeout=timeout,
            transport=transport,
            # A proxy from the environment is for other machines, not for this one.
            trust_env=not is_loopback(httpx.URL(url).host),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The address of the service."""
        return str(self._http.base_url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def enroll(
        self,
        image: ImageSource,
        *,
        person_id: str | None = None,
        camera_id: str | None = None,
        captured_at: datetime | None = None,
        modality: ModalityChoice | None = None,
        polarity: Polarity | None = None,
        box: Sequence[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> GalleryItem:
        """POST /gallery. With a key, a repeat gives the item that is stored already."""
        fields = {
            "person_id": person_id,
            "camera_id": camera_id,
            "captured_at": captured_at,
            "modality": modality,
            "polarity": polarity,
            "metadata": metadata,
        }
        return calls.parsed(
            self._send(calls.enroll(image, box, idempotency_key, fields)), GalleryItem
        )

    def enroll_batch(
        self, images: Sequence[ImageSource], items: Sequence[BatchItem] | None = None
    ) -> list[BatchResult]:
        """POST /gallery/batch: up to 256 images, with the labels of each → a result for each."""
        call = calls.enroll_batch(images, items)
        return calls.parsed(self._send(call), BatchAnswer).results

    def enroll_many(
        self,
        entries: Iterable[Entry],
        *,
        per_request: int = stream.PER_REQUEST,
        others: Sequence[Client] = (),
        senders: int = stream.SENDERS,
    ) -> Generator[EntryResult, None, None]:
        """Enroll a stream of any length → what became of each entry, in order, as it comes.

        Entries are taken as they are needed; a few requests of `per_request` images (256 at most)
        are in memory. An entry without a key gets one from its file's path, content and labels, so
        that the same stream can be sent again after an interruption. A bad image fails alone; a
        busy service is waited for. others: further services of the same gallery, which share the
        work; what one that ends was sent, another enrolls. senders: requests on their way to each,
        more where one address has several devices behind it. Raises Unreachable, ServiceProblem
        where no other request would fare better, and OtherGallery for `others` of another gallery.
        """
        spread = Spread([(client.url, client) for client in (self, *others)])
        at_once = senders * (1 + len(others))
        waiting: deque[Future[list[EntryResult]]] = deque()
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for batch in stream.batches(entries, per_request):
                    waiting.append(pool.submit(_enroll_some, spread, batch))
                    if len(waiting) >= stream.window(at_once):
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                for request in waiting:
                    request.cancel()

    def update(self, item_id: str, **fields: Unpack[calls.PatchFields]) -> GalleryItem:
        """PATCH /gallery/{id}; fields: person_id, camera_id, captured_at, metadata.

        None empties one; those not given stay.
        """
        return calls.parsed(self._send(calls.update(item_id, fields)), GalleryItem)

    def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Unpack[calls.QueryFields],
    ) -> QueryAnswer:
        """POST /query; fields: query_camera_id, modality, top_k, group_by, rerank, prior, …"""
        return calls.parsed(self._send(calls.query(images, box, fields)), QueryAnswer)

    def list(self, **fields: Unpack[calls.ListFields]) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return calls.parsed(self._send(calls.list_items(fields)), GalleryPage)

    def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return calls.parsed(self._send(calls.Call("GET", calls.item_path(item_id))), GalleryItem)

    def image(self, item_id: str, *, height: int | None = None) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop, or its thumbnail, and its media type.

        height: of the thumbnail, 64 to 512 pixels.
        """
        response = self._send(calls.image(item_id, height))
        return calls.whole(response).content, response.headers["Content-Type"]

    def delete(self, item_id: str) -> Erased:
        """DELETE /gallery/{id} → what an object storage is still to delete of it, if anything."""
        return calls.erased(self._send(calls.Call("DELETE", calls.item_path(item_id))))

    def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        return self.erasure(person_id).deleted

    def erasure(self, person_id: str) -> Erased:
        """The same → also what an object storage is still to delete."""
        return calls.erased(self._send(calls.erase(person_id)))

    def cameras(self) -> Sequence[CameraRecord]:
        """GET /cameras: those that have defaults, by id."""
        call = calls.Call("GET", "/cameras")
        return calls.parsed(self._send(call), CameraRecords).cameras

    def camera(self, camera_id: str) -> CameraRecord:
        """GET /cameras/{camera_id}."""
        call = calls.Call("GET", calls.camera_path(camera_id))
        return calls.parsed(self._send(call), CameraRecord)

    def set_camera(
        self,
        camera_id: str,
        *,
        modality: ModalityChoice | None = None,
        polarity: Polarity | None = None,
    ) -> CameraRecord:
        """PUT /cameras/{camera_id}: its defaults, in place of those it had."""
        call = calls.set_camera(camera_id, {"modality": modality, "polarity": polarity})
        return calls.parsed(self._send(call), CameraRecord)

    def delete_camera(self, camera_id: str) -> None:
        """DELETE /cameras/{camera_id}: its defaults; its items stay."""
        calls.checked(self._send(calls.Call("DELETE", calls.camera_path(camera_id))))

    def model(self) -> ModelCard:
        """GET /model."""
        return calls.parsed(self._send(calls.Call("GET", "/model")), ModelCard)

    def reembed(self, checkpoint: str | None = None) -> ReembedStatus:
        """POST /admin/reembed; checkpoint: the name of a file beside the one in use."""
        call = calls.Call("POST", "/admin/reembed", json={"checkpoint": checkpoint})
        return calls.parsed(self._send(call), ReembedStatus)

    def reembed_status(self) -> ReembedStatus:
        """GET /admin/reembed."""
        return calls.parsed(self._send(calls.Call("GET", "/admin/reembed")), ReembedStatus)

    def versions(self) -> Sequence[ModelVersionRecord]:
        """GET /admin/versions: the checkpoints whose features the gallery holds, oldest first."""
        call = calls.Call("GET", "/admin/versions")
        return calls.parsed(self._send(call), ModelVersions).versions

    def drop_version(self, fingerprint: str) -> None:
        """DELETE /admin/versions/{fingerprint}."""
        calls.checked(self._send(calls.drop_version(fingerprint)))

    def audit(self, *, limit: int = 100, cursor: str | None = None) -> AuditRecords:
        """GET /admin/audit."""
        fields = {"limit": limit, **({} if cursor is None else {"cursor": cursor})}
        call = calls.Call("GET", "/admin/audit", params=fields)
        return calls.parsed(self._send(call), AuditRecords)

    def backup(self, file: Path) -> None:
        """POST /admin/backup → a file that only its owner may read.

        It is complete and checked, or what was there before stays.
        """
        response = self._send(calls.BACKUP, stream=True)
        with closing(response), calls.receiving(response.url):
            if not response.is_success:
                response.read()
            calls.checked(response)
            with whole_file(file) as target:
                for block in response.iter_bytes():
                    target.write(block)
                calls.check_backup(target, file, response.url)

    def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        calls.checked(self._send(calls.Call("GET", "/readyz")))

    def _send(self, call: calls.Call, *, stream: bool = False, patience: int = 1) -> httpx.Response:
        """Send a request. patience: times the usual retries."""
        retries = self._retries * patience
        for attempt in range(retries + 1):
            try:
                request = self._http.build_request(**call._asdict())
                response = self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                raise calls.unreachable(self._http.base_url, error) from error
            wait = calls.wait_before_retry(response, attempt, retries)
            if wait is None:
                break
            response.close()
            time.sleep(wait)
        return response


class AsyncClient:
    """`Client` as coroutines."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        retries: int = 5,
        timeout: httpx.Timeout = TIMEOUT,
        request_timeout: float | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=calls.authorization(api_key) | calls.time_limit(request_timeout),
            timeout=timeout,
            transport=transport,
            # A proxy from the environment is for other machines, not for this one.
            trust_env=not is_loopback(httpx.URL(url).host),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """The address of the service."""
        return str(self._http.base_url)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def enroll(
        self,
        image: ImageSource,
        *,
        person_id: str | None = None,
        camera_id: str | None = None,
        captured_at: datetime | None = None,
        modality: ModalityChoice | None = None,
        polarity: Polarity | None = None,
        box: Sequence[int] | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> GalleryItem:
        """POST /gallery. With a key, a repeat gives the item that is stored already."""
        fields = {
            "person_id": person_id,
            "camera_id": camera_id,
            "captured_at": captured_at,
            "modality": modality,
            "polarity": polarity,
            "metadata": metadata,
        }
        return calls.parsed(
            await self._send(calls.enroll(image, box, idempotency_key, fields)), GalleryItem
        )

    async def enroll_batch(
        self, images: Sequence[ImageSource], items: Sequence[BatchItem] | None = None
    ) -> list[BatchResult]:
        """POST /gallery/batch: up to 256 images, with the labels of each → a result for each."""
        call = calls.enroll_batch(images, items)
        return calls.parsed(await self._send(call), BatchAnswer).results

    async def enroll_many(
        self,
        entries: AsyncIterable[Entry] | Iterable[Entry],
        *,
        per_request: int = stream.PER_REQUEST,
        others: Sequence[AsyncClient] = (),
        senders: int = stream.SENDERS,
    ) -> AsyncGenerator[EntryResult, None]:
        """`Client.enroll_many`, of an asynchronous stream or an ordinary one."""
        spread = Spread([(client.url, client) for client in (self, *others)])
        at_once = senders * (1 + len(others))
        places = asyncio.Semaphore(at_once)
        waiting: deque[asyncio.Task[list[EntryResult]]] = deque()
        try:
            async for batch in stream.batches_of_any(entries, per_request):
                waiting.append(asyncio.create_task(_enroll_some_async(spread, batch, places)))
                if len(waiting) >= stream.window(at_once):
                    for result in await waiting.popleft():
                        yield result
            while waiting:
                for result in await waiting.popleft():
                    yield result
        finally:
            for request in waiting:
                request.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def update(self, item_id: str, **fields: Unpack[calls.PatchFields]) -> GalleryItem:
        """PATCH /gallery/{id}; fields: person_id, camera_id, captured_at, metadata.

        None empties one; those not given stay.
        """
        return calls.parsed(await self._send(calls.update(item_id, fields)), GalleryItem)

    async def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Unpack[calls.QueryFields],
    ) -> QueryAnswer:
        """POST /query; fields: query_camera_id, modality, top_k, group_by, rerank, prior, …"""
        return calls.parsed(await self._send(calls.query(images, box, fields)), QueryAnswer)

    async def list(self, **fields: Unpack[calls.ListFields]) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return calls.parsed(await self._send(calls.list_items(fields)), GalleryPage)

    async def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return calls.parsed(
            await self._send(calls.Call("GET", calls.item_path(item_id))), GalleryItem
        )

    async def image(self, item_id: str, *, height: int | None = None) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop, or its thumbnail, and its media type.

        height: of the thumbnail, 64 to 512 pixels.
        """
        response = await self._send(calls.image(item_id, height))
        return calls.whole(response).content, response.headers["Content-Type"]

    async def delete(self, item_id: str) -> Erased:
        """DELETE /gallery/{id} → what an object storage is still to delete of it, if anything."""
        return calls.erased(await self._send(calls.Call("DELETE", calls.item_path(item_id))))

    async def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        return (await self.erasure(person_id)).deleted

    async def erasure(self, person_id: str) -> Erased:
        """The same → also what an object storage is still to delete."""
        return calls.erased(await self._send(calls.erase(person_id)))

    async def cameras(self) -> Sequence[CameraRecord]:
        """GET /cameras: those that have defaults, by id."""
        call = calls.Call("GET", "/cameras")
        return calls.parsed(await self._send(call), CameraRecords).cameras

    async def camera(self, camera_id: str) -> CameraRecord:
        """GET /cameras/{camera_id}."""
        call = calls.Call("GET", calls.camera_path(camera_id))
        return calls.parsed(await self._send(call), CameraRecord)

    async def set_camera(
        self,
        camera_id: str,
        *,
        modality: ModalityChoice | None = None,
        polarity: Polarity | None = None,
    ) -> CameraRecord:
        """PUT /cameras/{camera_id}: its defaults, in place of those it had."""
        call = calls.set_camera(camera_id, {"modality": modality, "polarity": polarity})
        return calls.parsed(await self._send(call), CameraRecord)

    async def delete_camera(self, camera_id: str) -> None:
        """DELETE /cameras/{camera_id}: its defaults; its items stay."""
        calls.checked(await self._send(calls.Call("DELETE", calls.camera_path(camera_id))))

    async def model(self) -> ModelCard:
        """GET /model."""
        return calls.parsed(await self._send(calls.Call("GET", "/model")), ModelCard)

    async def reembed(self, checkpoint: str | None = None) -> ReembedStatus:
        """POST /admin/reembed; checkpoint: the name of a file beside the one in use."""
        call = calls.Call("POST", "/admin/reembed", json={"checkpoint": checkpoint})
        return calls.parsed(await self._send(call), ReembedStatus)

    async def reembed_status(self) -> ReembedStatus:
        """GET /admin/reembed."""
        return calls.parsed(await self._send(calls.Call("GET", "/admin/reembed")), ReembedStatus)

    async def versions(self) -> Sequence[ModelVersionRecord]:
        """GET /admin/versions: the checkpoints whose features the gallery holds, oldest first."""
        call = calls.Call("GET", "/admin/versions")
        return calls.parsed(await self._send(call), ModelVersions).versions

    async def drop_version(self, fingerprint: str) -> None:
        """DELETE /admin/versions/{fingerprint}."""
        calls.checked(await self._send(calls.drop_version(fingerprint)))

    async def audit(self, *, limit: int = 100, cursor: str | None = None) -> AuditRecords:
        """GET /admin/audit."""
        fields = {"limit": limit, **({} if cursor is None else {"cursor": cursor})}
        call = calls.Call("GET", "/admin/audit", params=fields)
        return calls.parsed(await self._send(call), AuditRecords)

    async def backup(self, file: Path) -> None:
        """POST /admin/backup → a file that only its owner may read.

        It is complete and checked, or what was there before stays.
        """
        response = await self._send(calls.BACKUP, stream=True)
        async with aclosing(response):
            with calls.receiving(response.url):
                if not response.is_success:
                    await response.aread()
                calls.checked(response)
                with whole_file(file) as target:
                    async for block in response.aiter_bytes():
                        await asyncio.to_thread(target.write, block)
                    await asyncio.to_thread(calls.check_backup, target, file, response.url)

    async def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        calls.checked(await self._send(calls.Call("GET", "/readyz")))

    async def _send(
        self, call: calls.Call, *, stream: bool = False, patience: int = 1
    ) -> httpx.Response:
        """Send a request. patience: times the usual retries."""
        retries = self._retries * patience
        for attempt in range(retries + 1):
            try:
                request = self._http.build_request(**call._asdict())
                response = await self._http.send(request, stream=stream)
            except httpx.TransportError as error:
                raise calls.unreachable(self._http.base_url, error) from error
            wait = calls.wait_before_retry(response, attempt, retries)
            if wait is None:
                break
            await response.aclose()
            await asyncio.sleep(wait)
        return response


def _enroll_some(spread: Spread[Client], entries: Sequence[Entry]) -> list[EntryResult]:
    steps = spread.enroll(stream.load(entries))
    try:
        step = next(steps)
        while True:
            try:
                response = step.service._send(step.call, patience=step.patience)
            except Unreachable as error:
                step = steps.throw(error)
            else:
                step = steps.send(response)
    except StopIteration as end:
        results: list[EntryResult] = end.value
        return results


async def _enroll_some_async(
    spread: Spread[AsyncClient], entries: Sequence[Entry], places: asyncio.Semaphore
) -> list[EntryResult]:
    async with places:
        steps = spread.enroll(await asyncio.to_thread(stream.load, entries))
        try:
            step = next(steps)
            while True:
                try:
                    response = await step.service._send(step.call, patience=step.patience)
                except Unreachable as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as end:
            results: list[EntryResult] = end.value
            return results
