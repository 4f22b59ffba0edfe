"""A typed client of the service: `Client`, and `AsyncClient` with the same verbs as coroutines.

Both retry a 429 or 503 when the server says how long to wait (Retry-After).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import httpx

from service import calls
from service.api.schemas import (
    Erased,
    GalleryItem,
    GalleryPage,
    ModalityChoice,
    ModelCard,
    QueryAnswer,
)
from service.calls import ImageSource, ServiceProblem, Unreachable
from service.settings import is_loopback

__all__ = ["AsyncClient", "Client", "ServiceProblem", "Unreachable"]

DEFAULT_URL = "http://127.0.0.1:8000"
# Long enough for a CPU that embeds a full queue first; connecting to a service takes no time.
TIMEOUT = httpx.Timeout(120, connect=5)


class Client:
    """Verbs of the HTTP API. Raises ServiceProblem for an error answer, Unreachable for none.

    An image is a path or bytes. Keyword arguments of the verbs are the fields of the API.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        retries: int = 5,
        timeout: httpx.Timeout = TIMEOUT,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=url,
            headers=calls.authorization(api_key),
            timeout=timeout,
            transport=transport,
            # A proxy that the environment names is for other machines than this one.
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
        modality: ModalityChoice = "auto",
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
            "metadata": metadata,
        }
        return calls.parsed(
            self._send(calls.enroll(image, box, idempotency_key, fields)), GalleryItem
        )

    def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Any,
    ) -> QueryAnswer:
        """POST /query; fields: modality, top_k, candidates, exhaustive, modulation, group_by, …"""
        return calls.parsed(self._send(calls.query(images, box, fields)), QueryAnswer)

    def list(self, **fields: Any) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return calls.parsed(self._send(calls.list_items(fields)), GalleryPage)

    def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return calls.parsed(self._send(calls.Call("GET", f"/gallery/{item_id}")), GalleryItem)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop and its media type."""
        response = calls.checked(self._send(calls.Call("GET", f"/gallery/{item_id}/image")))
        return response.content, response.headers["Content-Type"]

    def delete(self, item_id: str) -> None:
        """DELETE /gallery/{id}."""
        calls.checked(self._send(calls.Call("DELETE", f"/gallery/{item_id}")))

    def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        call = calls.Call("DELETE", "/gallery", params={"person_id": person_id})
        return calls.parsed(self._send(call), Erased).deleted

    def model(self) -> ModelCard:
        """GET /model."""
        return calls.parsed(self._send(calls.Call("GET", "/model")), ModelCard)

    def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        calls.checked(self._send(calls.Call("GET", "/readyz")))

    def _send(self, call: calls.Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            try:
                response = self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    data=call.data,
                    files=call.files,
                    headers=call.headers,
                )
            except httpx.TransportError as error:
                raise calls.unreachable(self._http.base_url, error) from error
            wait = calls.wait_before_retry(response, attempt, self._retries)
            if wait is None:
                break
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
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=calls.authorization(api_key),
            timeout=timeout,
            transport=transport,
            # A proxy that the environment names is for other machines than this one.
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
        modality: ModalityChoice = "auto",
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
            "metadata": metadata,
        }
        return calls.parsed(
            await self._send(calls.enroll(image, box, idempotency_key, fields)), GalleryItem
        )

    async def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Any,
    ) -> QueryAnswer:
        """POST /query; fields: modality, top_k, candidates, exhaustive, modulation, group_by, …"""
        return calls.parsed(await self._send(calls.query(images, box, fields)), QueryAnswer)

    async def list(self, **fields: Any) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return calls.parsed(await self._send(calls.list_items(fields)), GalleryPage)

    async def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return calls.parsed(await self._send(calls.Call("GET", f"/gallery/{item_id}")), GalleryItem)

    async def image(self, item_id: str) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop and its media type."""
        response = calls.checked(await self._send(calls.Call("GET", f"/gallery/{item_id}/image")))
        return response.content, response.headers["Content-Type"]

    async def delete(self, item_id: str) -> None:
        """DELETE /gallery/{id}."""
        calls.checked(await self._send(calls.Call("DELETE", f"/gallery/{item_id}")))

    async def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        call = calls.Call("DELETE", "/gallery", params={"person_id": person_id})
        return calls.parsed(await self._send(call), Erased).deleted

    async def model(self) -> ModelCard:
        """GET /model."""
        return calls.parsed(await self._send(calls.Call("GET", "/model")), ModelCard)

    async def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        calls.checked(await self._send(calls.Call("GET", "/readyz")))

    async def _send(self, call: calls.Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            try:
                response = await self._http.request(
                    call.method,
                    call.path,
                    params=call.params,
                    data=call.data,
                    files=call.files,
                    headers=call.headers,
                )
            except httpx.TransportError as error:
                raise calls.unreachable(self._http.base_url, error) from error
            wait = calls.wait_before_retry(response, attempt, self._retries)
            if wait is None:
                break
            await asyncio.sleep(wait)
        return response
