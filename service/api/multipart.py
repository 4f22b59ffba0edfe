"""A multipart form, read strictly: all of it or nothing.

`python_multipart` finds the parts. It accepts a body that ends early, and would lose the part that
is open then: a label, a filter. Here a form has its closing boundary, each part has a name, and
text is UTF-8, so that nothing is left out or guessed.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import FormMalformed

_PLAIN_ENCODINGS = frozenset({b"", b"7bit", b"8bit", b"binary"})
_UTF_8 = frozenset({b"", b"utf-8", b"utf8"})
_BOUNDARY = re.compile(r";\s*boundary\s*=", re.IGNORECASE)
_PLAIN_HEADER = re.compile(
    rb'Content-Disposition: form-data; name="(\w+)"(; filename="[\w .()-]*")?'
    rb"(?:\r\nContent-Type: [\w.+-]+/[\w.+-]+)?",
    re.IGNORECASE,
)
_LONGEST_DELIMITER = 4 + 70  # RFC 2046, 5.1.1
_LINE_END = re.compile(rb"[ \t]*(\r?\n|$)")


@dataclass
class Part:
    """One part of a form. size: bytes sent; `data` has fewer where more than the limit were sent.

    charset: what the part says its text is in, in lower case; empty where it says nothing.
    """

    name: bytes = b""
    is_file: bool = False
    charset: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    size: int = 0

    def text(self) -> str:
        """The text. Raises UnicodeDecodeError where it is not UTF-8, or said to be another code."""
        return self.data.decode("utf-8" if self.charset in _UTF_8 else "ascii")


async def read_form(
    content_type: str,
    chunks: AsyncIterator[bytes],
    *,
    max_files: int,
    max_file_bytes: int,
    max_fields: int,
    max_field_bytes: int,
) -> list[Part]:
    """All parts of a form, in order. A file over `max_file_bytes` keeps its size, not its bytes.

    Raises FormMalformed, and what `chunks` raises.
    """
    delimiter = b"\r\n--" + _boundary_of(content_type)
    form = _Form(max_files, max_file_bytes, max_fields, max_field_bytes)
    ahead = [await anext(chunks, b"")]
    if ahead[0].endswith((delimiter + b"--\r\n", delimiter + b"--")):
        async for chunk in chunks:
            ahead.append(chunk)
            if chunk:
                break
        else:
            if form.take_plain(ahead[0], delimiter):
                return form.parts
    parser = _parser(delimiter, form)
    # What was read and may be the beginning of a boundary. The first boundary has no line before
    # it; what else precedes it is a preamble (RFC 2046, 5.1.1), which is skipped.
    tail = b"\r\n"
    started, rest = False, b""
    async for chunk in _both(ahead, chunks):
        window = tail + chunk
        tail = window[-len(delimiter) - 1 :]
        if not started:
            start = window.find(delimiter)
            if start == -1:
                continue
            started, chunk = True, window[start:]
        ended_before = form.ended
        try:
            parser.write(chunk)
        except FormParserError as error:
            raise FormMalformed(
                "the form cannot be read: a boundary or the header of a part is damaged; let a "
                "library write the form"
            ) from error
        if form.ended and not ended_before:
            window = window[window.index(delimiter + b"--") + len(delimiter) + 2 :]
            rest = window[:64]
        elif form.ended:
            rest = (rest + chunk)[:64]
        if form.ended and delimiter in window:
            raise FormMalformed("the form goes on after its closing boundary; send one form")
    if not started:
        raise FormMalformed(
            "the form has no part after a boundary of its Content-Type; let a library write the "
            "form"
        )
    if not form.ended or not _LINE_END.match(rest):
        raise FormMalformed(
            "the form ends without its closing boundary, so that a part of it may be missing; send "
            "all of it, with --BOUNDARY-- at its end"
        )
    return form.parts


async def _both(read: Iterable[bytes], chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in read:
        yield chunk
    async for chunk in chunks:
        yield chunk


def _boundary_of(content_type: str) -> bytes:
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not boundary or len(_BOUNDARY.findall(content_type)) > 1:
        raise FormMalformed(
            "the Content-Type of a form names one boundary; let a library write the form"
        )
    return boundary


class _Form:
    """What the parser calls, and the parts that come of it."""

    def __init__(
        self, max_files: int, max_file_bytes: int, max_fields: int, max_field_bytes: int
    ) -> None:
        self.parts: list[Part] = []
        self.ended = False
        self._left = {True: max_files, False: max_fields}
        self._most = {True: max_file_bytes, False: max_field_bytes}
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""

    def take_plain(self, body: bytes, delimiter: bytes) -> bool:
        """Read a whole body as most clients write it; False, and nothing is read, for any other.

        It gives what the parser gives, which looks at every byte of a header in Python. body: ends
        with the closing boundary.
        """
        opening, parts = delimiter[2:] + b"\r\n", []
        if len(delimiter) > _LONGEST_DELIMITER or not body.startswith(opening):
            return False
        pieces = body[len(opening) : body.rindex(delimiter)].split(delimiter + b"\r\n")
        if body.count(delimiter) != len(pieces):  # one of them ends otherwise
            return False
        left = dict(self._left)
        for piece in pieces:
            head, end, data = piece.partition(b"\r\n\r\n")
            header = _PLAIN_HEADER.fullmatch(head)
            if header is None or not end:
                return False
            is_file = header[2] is not None
            left[is_file] -= 1
            if left[is_file] < 0 or len(data) > self._most[is_file]:
                return False
            parts.append(Part(header[1], is_file, b"", bytearray(data), len(data)))
        self.parts = parts
        return True

    def on_part_begin(self) -> None:
        self.parts.append(Part())
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        name = self._name.lower()
        if name in self._headers:
            raise FormMalformed("a part of the form has the same header twice; send it once")
        self._headers[name] = self._value
        self._name = self._value = b""

    def on_headers_finished(self) -> None:
        part = self.parts[-1]
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise FormMalformed(
                "a part of the form has no name; send a Content-Disposition of form-data with one"
            )
        if self._headers.get(b"content-transfer-encoding", b"").lower() not in _PLAIN_ENCODINGS:
            raise FormMalformed("a part of the form is encoded; send its bytes as they are")
        part.name, part.is_file = options[b"name"], b"filename" in options
        _, described = parse_options_header(self._headers.get(b"content-type"))
        part.charset = described.get(b"charset", b"").lower()
        self._left[part.is_file] -= 1
        if self._left[part.is_file] < 0:
            raise FormMalformed("the form has too many parts; send fewer at once")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self.parts[-1]
        part.size += end - start
        if part.size <= self._most[part.is_file]:
            part.data += data[start:end]
        elif part.is_file:
            part.data.clear()
        else:
            raise FormMalformed(
                f"a text of the form has more than {self._most[False] // 1024} KB; send less"
            )

    def on_end(self) -> None:
        self.ended = True


def _parser(delimiter: bytes, form: _Form) -> MultipartParser:
    try:
        return MultipartParser(
            delimiter[4:],
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_end": form.on_end,
            },
        )
    except FormParserError as error:
        raise FormMalformed("the boundary of the form is too long; use 70 characters") from error
