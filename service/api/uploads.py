"""Multipart bodies with images: read within bounds of size and time, and parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from fastapi import Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError, WithJsonSchema
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from service.api.deps import actor, no_query_parameters, resources, unambiguous
from service.api.multipart import Part, read_form
from service.api.schemas import FormModel, form_errors
from service.auth.authorization import authorise, bearer
from service.errors import (
    BodyTimeout,
    BodyTooLarge,
    BoxOutside,
    ClientGone,
    ContentTypeUnsupported,
    DecodeBudgetSpent,
    EmbeddingFailed,
    FormMalformed,
    ImageBlank,
    ImageEmpty,
    ImageMultiFrame,
    ImageTooComplex,
    ImageTooLarge,
    ImageTooSmall,
    ImageTruncated,
    ImageTypeUnsupported,
    ImageUndecodable,
    MemoryExhausted,
    Overloaded,
    ParametersInvalid,
    RequestTimedOut,
    RuntimeUnavailable,
)

F = TypeVar("F", bound=FormModel)

MAX_FIELDS = 256
MAX_FIELD_BYTES = 64 * 1024
FORM_OVERHEAD_BYTES = 1024 * 1024  # small text fields and the headers of the parts

# Errors that an endpoint with an upload may answer, besides those of its images.
UPLOAD_ERRORS = (
    FormMalformed,
    BodyTimeout,
    BodyTooLarge,
    ImageTooLarge,
    ContentTypeUnsupported,
    ParametersInvalid,
    Overloaded,
    RequestTimedOut,
    EmbeddingFailed,
    MemoryExhausted,
    RuntimeUnavailable,
)

# Errors of its images.
IMAGE_ERRORS = (
    DecodeBudgetSpent,
    ImageBlank,
    ImageEmpty,
    ImageMultiFrame,
    ImageTooComplex,
    ImageTooLarge,
    ImageTooSmall,
    ImageTruncated,
    ImageTypeUnsupported,
    ImageUndecodable,
    BoxOutside,
)


_LONGEST_TIMEOUT = 86_400
_TIMEOUT_HEADER = "X-Request-Timeout"

RequestTimeout = Annotated[
    float | None,
    Header(
        alias=_TIMEOUT_HEADER,
        gt=0,
        le=_LONGEST_TIMEOUT,
        allow_inf_nan=False,
        description="Seconds that this may take. What cannot be answered by then is refused at "
        "once with 429, or given up with 504.",
    ),
    # A header is a number or not there at all, never null.
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": _LONGEST_TIMEOUT}),
]


_timeouts: TypeAdapter[float | None] = TypeAdapter(RequestTimeout)


def _timeout_of(request: Request) -> float | None:
    """The header X-Request-Timeout. Raises RequestValidationError."""
    given = request.headers.get(_TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        return _timeouts.validate_python(given)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        place = ("header", _TIMEOUT_HEADER)
        raise RequestValidationError([{**one, "loc": place} for one in errors]) from error


class LeanRoute(APIRoute):
    """A route whose endpoint takes request, resources, actor and X-Request-Timeout, nothing else.

    It is entered after the same checks as every route, which are called here: FastAPI would solve
    them as dependencies, in a third of a millisecond of the event loop for each request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            await authorise(request, await bearer(request))
            await unambiguous(request)
            await no_query_parameters(request)
            called = self.endpoint(
                request, resources(request), await actor(request), _timeout_of(request)
            )
            return cast(Response, await called)

        return handle


@dataclass(frozen=True)
class Upload:
    """A parsed multipart body: its images' bytes, in order, and its text fields.

    refused: by place, images that are too large; their bytes are dropped.
    """

    images: list[bytes]
    fields: list[tuple[str, str]]
    refused: dict[int, ImageTooLarge]

    def whole(self) -> list[bytes]:
        """All images. Raises ImageTooLarge where one is too large."""
        for error in self.refused.values():
            raise error
        return self.images

    def parse(self, model: type[F]) -> F:
        """The text fields as `model`. Raises RequestValidationError."""
        try:
            return model.parse(self.fields)
        except ValidationError as error:
            raise RequestValidationError(form_errors(error)) from error


@asynccontextmanager
async def read_upload(
    request: Request,
    max_images: int,
    max_bytes: int | None = None,
    max_field_bytes: int = MAX_FIELD_BYTES,
    within: float | None = None,
) -> AsyncIterator[Upload]:
    """Read a multipart body with 1 to `max_images` parts named `image`, bounded in size and time.

    The body is held in memory. `service.http.admission` bounds how many uploads wait and their
    bytes: the upload has a place there while the caller works on it. The caller's work is cancelled
    once the client is gone.

    max_bytes: of all images, if that is less than the sum of their limits. within: seconds until
    the answer, also of the caller's work; None leaves it to the settings. Raises FormMalformed,
    BodyTimeout, BodyTooLarge, ContentTypeUnsupported, Overloaded, RequestTimedOut, ClientGone, and
    RequestValidationError for a part of the wrong kind.
    """
    state = resources(request)
    within = within or state.settings.request_timeout
    limit = state.settings.max_image_bytes
    most = min(max_images * limit, max_bytes or max_images * limit) + FORM_OVERHEAD_BYTES
    if max_field_bytes > MAX_FIELD_BYTES:
        most += max_field_bytes
    started = time.perf_counter()
    try:
        with state.admission.receive(within) as body:
            async with _in_time_to_answer(within):
                if not is_utf8_of(request, b"multipart/form-data"):
                    raise ContentTypeUnsupported("send the form as multipart/form-data, in UTF-8")
                async with in_time(request):
                    parts = await read_form(
                        request.headers["content-type"],
                        bounded(request, most, body.grow),
                        # One too many is told as such, not as a malformed form.
                        max_files=max_images + 1,
                        max_file_bytes=limit,
                        max_fields=MAX_FIELDS,
                        max_field_bytes=max_field_bytes,
                    )
                upload = _sort(parts, limit)
                del parts
                body.arrive()
                state.pipeline.note("receive", time.perf_counter() - started)
                async with _while_connected(request):
                    yield upload
    except Overloaded:
        await asyncio.sleep(state.admission.before_refusal(time.monotonic()))
        raise


@asynccontextmanager
async def _in_time_to_answer(within: float | None) -> AsyncIterator[None]:
    """Give the block up after so many seconds, or never. Raises RequestTimedOut."""
    try:
        async with asyncio.timeout(within) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise RequestTimedOut(
            f"the request was not answered in the {within:g} seconds that it may take, and is "
            "given up; what it enrolls may be stored all the same: send it again with the same "
            "Idempotency-Key",
            headers={"Connection": "close"},
        ) from error


@asynccontextmanager
async def _while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block once the client has disconnected. Raises ClientGone."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
        if gone:  # at the moment when the block finished
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone("the client closed the connection") from None
        raise
    finally:
        watching.cancel()


def is_utf8_of(request: Request, media_type: bytes) -> bool:
    """Whether the Content-Type is this media type, in UTF-8."""
    declared, options = parse_options_header(request.headers.get("content-type", ""))
    charset = options.get(b"charset", b"utf-8").lower()
    return declared == media_type and charset in (b"utf-8", b"utf8")


@asynccontextmanager
async def in_time(request: Request) -> AsyncIterator[None]:
    """Bound the time to read a body. Raises BodyTimeout or ClientGone where it is incomplete."""
    try:
        async with asyncio.timeout(resources(request).settings.body_timeout) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise BodyTimeout(
            "the body did not arrive in time; send it faster or smaller",
            headers={"Connection": "close"},
        ) from error
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection in the middle of the body") from error


async def bounded(
    request: Request, max_bytes: int, admit: Callable[[int], None] = lambda count: None
) -> AsyncGenerator[bytes, None]:
    """The body's chunks. Raises BodyTooLarge beyond `max_bytes`.

    admit: called with the size of each chunk; may raise.
    """
    too_large = BodyTooLarge(f"the body may have {max_bytes:,} bytes; send less at once")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        admit(len(chunk))
        yield chunk


def _sort(parts: list[Part], max_image_bytes: int) -> Upload:
    images: list[bytes] = []
    fields: list[tuple[str, str]] = []
    refused: dict[int, ImageTooLarge] = {}
    for part in parts:
        name = part.name.decode(errors="replace")
        if not part.is_file:
            if name == "image":
                raise invalid_field("image", "must be a file: give the part a filename")
            try:
                fields.append((part.name.decode(), part.text()))
            except UnicodeDecodeError as error:
                raise invalid_field(name, "must be text in UTF-8") from error
        elif name != "image":
            raise invalid_field(name, "must be plain text: give the part no filename")
        elif part.size > max_image_bytes:
            refused[len(images)] = ImageTooLarge(
                f"the image has {part.size:,} bytes, the limit is {max_image_bytes:,}; "
                "send a smaller crop"
            )
            images.append(b"")
        else:
            images.append(bytes(part.data))
            part.data.clear()
    return Upload(images, fields, refused)


def invalid_field(name: str, message: str) -> RequestValidationError:
    """The error of one field of a form, for the caller to raise."""
    return RequestValidationError([{"type": "value_error", "loc": ("body", name), "msg": message}])


def check_image_count(images: Sequence[bytes], most: int) -> None:
    """Raise RequestValidationError unless there are 1 to `most` images."""
    if not images:
        raise invalid_field("image", "is missing; send it as a file part")
    if len(images) > most:
        raise invalid_field(
            "image", f"may be given {'once' if most == 1 else f'{most} times at most'}"
        )
