"""Requests and answers of the API as plain values: what both clients share."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypedDict, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from model.image_files import read_file
from model.labels import LabelError, normalized_label
from model.modalities import Polarity
from service.api.schemas import (
    KEY_PATTERN,
    BatchItem,
    CameraDefaults,
    Erased,
    ItemPatch,
    ModalityChoice,
    Rerank,
)
from service.errors import BackupInvalid
from service.gallery.backup.archive import check
from service.http.problem import Problem
from service.kit.text import is_utf_8

M = TypeVar("M", bound=BaseModel)

LONGEST_WAIT = 30.0

ImageSource = str | Path | bytes


class ServiceProblem(Exception):  # noqa: N818 (named like the body it carries)
    """An error answered by the service; `problem` is its body. The message is its sentence."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.status, self.code = problem.status, problem.code
        self.retry_after = retry_after
        """Seconds after which the service asks to try again, where it says so."""


class Unreachable(Exception):  # noqa: N818 (a state, not an error of the caller)
    """No answer from the service; the message says what to check."""


class InvalidValue(ValueError):  # noqa: N818 (as LabelError, which it stands beside)
    """A value that no request can carry, or would carry to another route; nothing was sent."""


class Call(NamedTuple):
    """One request, as `httpx.Client.build_request` takes it."""

    method: str
    url: str
    params: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    headers: Mapping[str, str] | None = None
    json: Any = None
    timeout: Any = httpx.USE_CLIENT_DEFAULT


class QueryFields(TypedDict, total=False):
    """Fields of POST /query beside images and box; None is as not given."""

    query_camera_id: str | None
    modality: ModalityChoice | None
    polarity: Polarity | None
    top_k: int | None
    candidates: int | None
    exhaustive: bool
    modulation: bool
    rerank: Rerank | None
    prior: float | None
    group_by: Literal["person_id"] | None
    person_id: str | Sequence[str] | None
    camera_id: str | Sequence[str] | None
    exclude_camera_id: str | Sequence[str] | None
    gallery_modality: str | Sequence[str] | None
    captured_from: datetime | None
    captured_to: datetime | None
    max_distance: float | None
    explain: bool
    debug: bool


class ListFields(TypedDict, total=False):
    """Parameters of GET /gallery; None is as not given."""

    person_id: str | Sequence[str] | None
    camera_id: str | Sequence[str] | None
    modality: str | Sequence[str] | None
    captured_from: datetime | None
    captured_to: datetime | None
    limit: int | None
    cursor: str | None


class PatchFields(TypedDict, total=False):
    """Body of PATCH /gallery/{id}: None empties a field, what is not given stays."""

    person_id: str | None
    camera_id: str | None
    captured_at: datetime | None
    metadata: Mapping[str, Any]


_ITEM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII)
_FINGERPRINT = re.compile(r"[0-9a-f]{1,64}", re.IGNORECASE | re.ASCII)

# The answer begins once the service has copied its gallery.
BACKUP = Call("POST", "/admin/backup", timeout=httpx.Timeout(3600, connect=5))


def enroll(
    image: ImageSource, box: Sequence[int] | None, key: str | None, fields: Mapping[str, Any]
) -> Call:
    """POST /gallery; key: the Idempotency-Key."""
    data = _form({"box": _box(box), **fields})
    if key is not None and not re.fullmatch(KEY_PATTERN, key):
        raise InvalidValue(
            f"the idempotency key {key!a} is empty or holds more than printable ASCII; change it"
        )
    headers = None if key is None else {"Idempotency-Key": key}
    return Call("POST", "/gallery", data=data, files=[_file(image)], headers=headers)


def enroll_batch(images: Sequence[ImageSource], items: Sequence[BatchItem] | None) -> Call:
    """POST /gallery/batch."""
    data = {}
    if items is not None:
        labels = [item.model_dump(mode="json", exclude_unset=True) for item in items]
        data["items"] = json.dumps(labels)
    return Call("POST", "/gallery/batch", data=data, files=[_file(image) for image in images])


def update(item_id: str, fields: PatchFields) -> Call:
    """PATCH /gallery/{id}; None empties a field."""
    changed = ItemPatch.model_validate(fields).model_dump(mode="json", include=set(fields))
    return Call("PATCH", item_path(item_id), json=changed)


def query(
    images: ImageSource | Sequence[ImageSource],
    box: Sequence[int] | None,
    fields: QueryFields,
) -> Call:
    """POST /query; fields that are None are left out."""
    several = [images] if isinstance(images, str | Path | bytes) else images
    data = _form({"box": _box(box), **fields})
    return Call("POST", "/query", data=data, files=[_file(image) for image in several])


def item_path(item_id: str) -> str:
    """/gallery/{id}. Raises InvalidValue for what is no item's id."""
    if not _ITEM_ID.fullmatch(item_id):
        raise InvalidValue(
            f"{item_id!a} is no item's id, which looks like 0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10; "
            "`cmt gallery list` shows them"
        )
    return f"/gallery/{item_id}"


def image(item_id: str, height: int | None) -> Call:
    """GET /gallery/{id}/image; height: of a thumbnail, None for the crop as it is stored."""
    return Call("GET", f"{item_path(item_id)}/image", params=_form({"height": height}))


def camera_path(camera_id: str) -> str:
    """/cameras/{camera_id}, whatever characters the label holds.

    Raises LabelError for what is no label, and for one with a step "." or "..": proxies resolve
    those even in percent-encoding.
    """
    label = normalized_label(camera_id)
    if {".", ".."} & set(label.split("/")):
        raise LabelError(f"a camera cannot be called {label!a} in a path; rename it without dots")
    return f"/cameras/{quote(label, safe='')}"


def set_camera(camera_id: str, defaults: Mapping[str, Any]) -> Call:
    """PUT /cameras/{camera_id}."""
    body = CameraDefaults(**defaults).model_dump(mode="json")
    return Call("PUT", camera_path(camera_id), json=body)


def erase(person_id: str) -> Call:
    """DELETE /gallery?person_id=…, of that one person."""
    if not isinstance(person_id, str) or not person_id:
        raise InvalidValue("a person to erase needs a label; give person_id")
    return Call("DELETE", "/gallery", params=_form({"person_id": person_id}))


def drop_version(fingerprint: str) -> Call:
    """DELETE /admin/versions/{fingerprint}. Raises InvalidValue for what is no fingerprint."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidValue(
            f"{fingerprint!a} is no fingerprint of a checkpoint; `cmt gallery versions list` "
            "shows them"
        )
    return Call("DELETE", f"/admin/versions/{fingerprint}")


def list_items(fields: ListFields) -> Call:
    """GET /gallery."""
    return Call("GET", "/gallery", params=_form(fields))


def _form(fields: Mapping[str, object]) -> dict[str, Any]:
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
    text = str(value)
    if not is_utf_8(text):
        raise InvalidValue(f"{text!a} is no UTF-8 text; write it in UTF-8")
    return text


def _box(box: Sequence[int] | None) -> str | None:
    return None if box is None else ",".join(map(str, box))


def _file(image: ImageSource) -> tuple[str, tuple[str, bytes]]:
    """A part of a form. A file's name stays here: it need not be text, and nobody asks for it."""
    return "image", ("image", image_bytes(image))


def image_bytes(image: ImageSource) -> bytes:
    """The bytes of an image, which is a file's path or its content. Raises OSError."""
    return image if isinstance(image, bytes) else read_file(Path(image))


def wait_before_retry(response: httpx.Response, attempt: int, retries: int) -> float | None:
    """Seconds until the next attempt; None where the answer stands.

    The server's Retry-After plus up to half of it at random, so that clients which were refused
    together do not retry together.
    """
    asked = _retry_after(response)
    if response.status_code not in (429, 503) or attempt >= retries or asked is None:
        return None
    return min(asked * random.uniform(1, 1.5), LONGEST_WAIT)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: a number of them or, by some proxies, a date."""
    text = response.headers.get("Retry-After", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text).replace(tzinfo=UTC)  # as all dates of HTTP are
        except ValueError:
            return None
        seconds = max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return seconds if 0 <= seconds < math.inf else None


def checked(response: httpx.Response) -> httpx.Response:
    """Return a successful response. Raises ServiceProblem for any other."""
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
    raise ServiceProblem(problem, _retry_after(response))


def whole(response: httpx.Response) -> httpx.Response:
    """A successful response whose body cannot have been cut off unnoticed.

    Raises ServiceProblem, and Unreachable where only the end of the connection ends the body.
    """
    framing = {"content-length", "transfer-encoding"}  # httpx iterates over them so
    if checked(response).http_version != "HTTP/2" and framing.isdisjoint(response.headers):
        raise Unreachable(
            f"the answer of {response.url} does not say its length, so that it may be cut off; let "
            "the proxy in between speak HTTP/1.1"
        )
    return response


def check_backup(file: BinaryIO, name: Path, url: httpx.URL) -> None:
    """Check a received backup before it gets its name. Raises Unreachable where it is not whole."""
    try:
        check(file, name)
    except BackupInvalid as error:
        raise Unreachable(
            f"{url} sent no whole backup, as where an answer ends in the middle, and nothing was "
            "written; look into the logs of the service and the proxy, and try again"
        ) from error


def parsed(response: httpx.Response, model: type[M]) -> M:
    """The body as `model`. Raises ServiceProblem, or Unreachable where it is no `model`."""
    try:
        return model.model_validate_json(checked(response).content)
    except ValidationError as error:
        raise Unreachable(
            f"{response.url} answered something else than expected; is it a CMT service of this "
            "release?"
        ) from error


def erased(response: httpx.Response) -> Erased:
    """The answer to an erasure; without a body one item is erased completely."""
    if checked(response).status_code == 204:
        return Erased(deleted=1)
    return parsed(response, Erased)


def unreachable(url: httpx.URL, error: httpx.TransportError) -> Unreachable:
    """The error for a connection that failed."""
    return Unreachable(
        f"no answer from {url} ({error or type(error).__name__}); start the service with "
        "`cmt serve`, or give its address with --url"
    )


@contextmanager
def receiving(url: httpx.URL) -> Iterator[None]:
    """Receive an answer in this context. Raises Unreachable where it ends too early."""
    try:
        yield
    except httpx.TransportError as error:
        raise Unreachable(
            f"{url} ended its answer in the middle ({error or type(error).__name__}); look into "
            "the service's log and try again"
        ) from error


def authorization(api_key: str | None) -> dict[str, str]:
    """Headers that carry the key. Raises InvalidValue for what is no key."""
    if api_key is not None and not re.fullmatch(KEY_PATTERN, api_key):
        raise InvalidValue(
            "the API key is empty or holds white space or other characters that no key has; copy "
            "it again as `cmt keys create` printed it"
        )
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def time_limit(seconds: float | None) -> dict[str, str]:
    """Headers that say how long an upload may take. Raises InvalidValue for no time at all."""
    if seconds is not None and not 0 < seconds < math.inf:
        raise InvalidValue(f"no request is answered in {seconds:g} seconds; give it more, or None")
    return {} if seconds is None else {"X-Request-Timeout": str(seconds)}
