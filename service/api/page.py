"""The web page: what a browser shows at `/`, and the files that it loads from `/page/`."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from fastapi import APIRouter, Request, Response

from service import errors
from service.api.conditional import not_modified

router = APIRouter()

# By the end of the name: what the machine knows of media types differs between machines. What has
# none of these ends is text, such as a licence.
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
}


def _found(folder: Traversable, path: str = "") -> dict[str, Traversable]:
    """The files below a folder, by their path in it."""
    found: dict[str, Traversable] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _found(entry, f"{path}{entry.name}/")
        else:
            found[f"{path}{entry.name}"] = entry
    return found


_FILES = _found(files("service") / "web" / "page")


@router.get("/", include_in_schema=False)
def page(request: Request) -> Response:
    """The page, whose links are relative: it works wherever the service is mounted."""
    return _answer("index.html", request)


@router.get("/page/{path:path}", include_in_schema=False)
def page_file(path: str, request: Request) -> Response:
    """A file of the page."""
    return _answer(path, request)


def _answer(path: str, request: Request) -> Response:
    # Looked up in what is there: a path is never put together from what a client sent.
    file = _FILES.get(path)
    if file is None:
        raise errors.RouteNotFound("the page has no such file; open /")
    data = file.read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    # Asked for again each time and answered from the cache: a new release never runs old scripts.
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    media_type = _MEDIA_TYPES.get(PurePosixPath(path).suffix, "text/plain")
    if not_modified(request, tag):
        # With the media type: by it goes the policy, and a browser takes over that of this answer.
        return Response(status_code=304, headers=headers, media_type=media_type)
    return Response(data, media_type=media_type, headers=headers)
