"""A typed client of the service: `Client`, and `AsyncClient` with the same verbs as coroutines.

Both retry a 429 or 503 when the server says how long to wait (Retry-After).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.api.schemas import (
    Erased,
    GalleryItem,
    GalleryPage,
    ModalityChoice,
    ModelCard,
    Problem,
    QueryAnswer,
)
from service.settings import is_loopback

M = TypeVar("M", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"
# Long enough for a CPU that embeds a full queue first; connecting to a service takes no time.
TIMEOUT = httpx.Timeout(120, connect=5)
LONGEST_WAIT = 30.0

ImageSource = Path | bytes


class ServiceProblem(Exception):  # noqa: N818 (named like the body it carries)
    """An error answered by the service; `problem` is its body. The message is its sentence."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.status, self.code = problem.status, problem.code


class Unreachable(Exception):  # noqa: N818 (a state, not an error of the caller)
    """No answer from the service; the message says what to check."""


class _Call(NamedTuple):
    """One request, ready to be sent by either client."""

    method: str
    path: str
    params: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] | None = None


def _enroll(
    image: ImageSource, box: Sequence[int] | None, key: str | None, fields: Mapping[str, Any]
) -> _Call:
    data = _form({"box": _box(box), **fields})
    headers = None if key is None else {"Idempotency-Key": key}
    return _Call("POST", "/gallery", data=data, files=[_file(image)], headers=headers)


def _query(
    images: ImageSource | Sequence[ImageSource],
    box: Sequence[int] | None,
    fields: Mapping[str, Any],
) -> _Call:
    several = [images] if isinstance(images, Path | bytes) else images
    data = _form({"box": _box(box), **fields})
    return _Call("POST", "/query", data=data, files=[_file(image) for image in several])


def _list(fields: Mapping[str, Any]) -> _Call:
    return _Call("GET", "/gallery", params=_form(fields))


def _form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the API writes them; those that are None or an empty list are left out."""
    return {name: _text(value) for name, value in fields.items() if value not in (None, (), [])}


def _text(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return [_text(element) for element in value]
    return str(value)


def _box(box: Sequence[int] | None) -> str | None:
    return None if box is None else ",".join(map(str, box))


def _file(image: ImageSource) -> tuple[str, tuple[str, bytes]]:
    if isinstance(image, Path):
        return "image", (image.name, image.read_bytes())
    return "image", ("image", image)


def _wait(response: httpx.Response, attempt: int, retries: int) -> float | None:
    """Seconds until the next attempt; None where the answer stands."""
    if response.status_code not in (429, 503) or attempt >= retries:
        return None
    try:
        return min(float(response.headers["Retry-After"]), LONGEST_WAIT)
    except (KeyError, ValueError):
        return None


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_success:
        return response
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = Problem(
            title=response.reason_phrase,
            status=response.status_code,
            code="http_error",
            detail=f"{response.url} answered {response.status_code}; is it a CMT service?",
            instance=response.url.path,
        )
    raise ServiceProblem(problem)


def _parsed(response: httpx.Response, model: type[M]) -> M:
    try:
        return model.model_validate_json(_checked(response).content)
    except ValidationError as error:
        raise Unreachable(
            f"{response.url} answered something else than expected; is it a CMT service of this "
            "release?"
        ) from error


def _unreachable(url: httpx.URL, error: httpx.TransportError) -> Unreachable:
    return Unreachable(
        f"no answer from {url} ({error or type(error).__name__}); start the service with "
        "`cmt serve`, or give its address with --url"
    )


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


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
            headers=_headers(api_key),
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
        return _parsed(self._send(_enroll(image, box, idempotency_key, fields)), GalleryItem)

    def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Any,
    ) -> QueryAnswer:
        """POST /query; fields: modality, top_k, candidates, exhaustive, modulation, group_by, …"""
        return _parsed(self._send(_query(images, box, fields)), QueryAnswer)

    def list(self, **fields: Any) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return _parsed(self._send(_list(fields)), GalleryPage)

    def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return _parsed(self._send(_Call("GET", f"/gallery/{item_id}")), GalleryItem)

    def image(self, item_id: str) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop and its media type."""
        response = _checked(self._send(_Call("GET", f"/gallery/{item_id}/image")))
        return response.content, response.headers["Content-Type"]

    def delete(self, item_id: str) -> None:
        """DELETE /gallery/{id}."""
        _checked(self._send(_Call("DELETE", f"/gallery/{item_id}")))

    def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        call = _Call("DELETE", "/gallery", params={"person_id": person_id})
        return _parsed(self._send(call), Erased).deleted

    def model(self) -> ModelCard:
        """GET /model."""
        return _parsed(self._send(_Call("GET", "/model")), ModelCard)

    def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        _checked(self._send(_Call("GET", "/readyz")))

    def _send(self, call: _Call) -> httpx.Response:
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
                raise _unreachable(self._http.base_url, error) from error
            wait = _wait(response, attempt, self._retries)
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
            headers=_headers(api_key),
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
        return _parsed(await self._send(_enroll(image, box, idempotency_key, fields)), GalleryItem)

    async def query(
        self,
        images: ImageSource | Sequence[ImageSource],
        *,
        box: Sequence[int] | None = None,
        **fields: Any,
    ) -> QueryAnswer:
        """POST /query; fields: modality, top_k, candidates, exhaustive, modulation, group_by, …"""
        return _parsed(await self._send(_query(images, box, fields)), QueryAnswer)

    async def list(self, **fields: Any) -> GalleryPage:
        """GET /gallery; fields: person_id, camera_id, modality, …, limit, cursor."""
        return _parsed(await self._send(_list(fields)), GalleryPage)

    async def get(self, item_id: str) -> GalleryItem:
        """GET /gallery/{id}."""
        return _parsed(await self._send(_Call("GET", f"/gallery/{item_id}")), GalleryItem)

    async def image(self, item_id: str) -> tuple[bytes, str]:
        """GET /gallery/{id}/image → the stored crop and its media type."""
        response = _checked(await self._send(_Call("GET", f"/gallery/{item_id}/image")))
        return response.content, response.headers["Content-Type"]

    async def delete(self, item_id: str) -> None:
        """DELETE /gallery/{id}."""
        _checked(await self._send(_Call("DELETE", f"/gallery/{item_id}")))

    async def erase(self, person_id: str) -> int:
        """DELETE /gallery?person_id=… → how many items were erased."""
        call = _Call("DELETE", "/gallery", params={"person_id": person_id})
        return _parsed(await self._send(call), Erased).deleted

    async def model(self) -> ModelCard:
        """GET /model."""
        return _parsed(await self._send(_Call("GET", "/model")), ModelCard)

    async def ready(self) -> None:
        """GET /readyz. Raises ServiceProblem while the service is not ready."""
        _checked(await self._send(_Call("GET", "/readyz")))

    async def _send(self, call: _Call) -> httpx.Response:
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
                raise _unreachable(self._http.base_url, error) from error
            wait = _wait(response, attempt, self._retries)
            if wait is None:
                break
            await asyncio.sleep(wait)
        return response
