"""Forms as clients by hand write them: read completely, or refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.api.multipart import Part, read_form
from service.errors import FormMalformed

LIMITS = {"max_files": 2, "max_file_bytes": 40, "max_fields": 3, "max_field_bytes": 30}
IMAGE = b'--frame\r\nContent-Disposition: form-data; name="image"; filename="i.png"\r\n\r\n'
LABEL = b'--frame\r\nContent-Disposition: form-data; name="person_id"\r\n\r\n'
END = b"--frame--\r\n"
WHOLE = IMAGE + b"\x89PNG\r\n--fram\r\n" + b"\r\n" + LABEL + "Zoë".encode() + b"\r\n" + END


def read(
    body: bytes, size: int = 1 << 16, content_type: str = "multipart/form-data; boundary=frame"
) -> list[Part]:
    """The parts of a body that comes in chunks of `size` bytes."""

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return asyncio.run(read_form(content_type, chunks(), **LIMITS))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("before", [b"", b"\r\n", b"Made by hand.\r\n", b"--fra\r\n--\r\n"])
@pytest.mark.parametrize("after", [b"", b"  \r\n", b"\r\nThat was it.\r\n"])
def test_a_whole_form_is_read_however_it_arrives(size: int, before: bytes, after: bytes) -> None:
    image, label = read(before + WHOLE.removesuffix(b"\r\n") + after, size)
    assert (image.name, image.is_file, bytes(image.data)) == (
        b"image", True, b"\x89PNG\r\n--fram\r\n"
    )  # fmt: skip
    assert (label.name, label.is_file, label.text()) == (b"person_id", False, "Zoë")


@pytest.mark.parametrize("size", [1, 1000])
def test_a_form_that_is_cut_anywhere_is_refused(size: int) -> None:
    for length in range(len(WHOLE) - len(b"\r\n")):
        with pytest.raises(FormMalformed):
            read(WHOLE[:length], size)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "body",
    [
        WHOLE + LABEL + b"late\r\n" + END,
        WHOLE.removesuffix(b"\r\n") + b"rest\r\n",
        LABEL.replace(b"--frame\r\n", b"--frame\r\n--frame\r\n") + b"x\r\n" + END,
        LABEL.replace(b'; name="person_id"', b"") + b"x\r\n" + END,
        LABEL.replace(b"form-data", b"attachment") + b"x\r\n" + END,
        LABEL.replace(b"\r\n\r\n", b"\r\nContent-Disposition: form-data; name=x\r\n\r\n") + END,
        LABEL.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n") + END,
        LABEL.replace(b"Content-Disposition:", b"Content Disposition") + b"x\r\n" + END,
        LABEL + b"x" * 31 + b"\r\n" + END,
        b"\r\n".join([LABEL] * 4) + b"\r\n" + END,
        (IMAGE + b"\r\n") * 3 + END,
    ],
    ids=range(11),
)
def test_what_could_be_read_in_two_ways_is_refused(body: bytes, size: int) -> None:
    with pytest.raises(FormMalformed):
        read(body, size)


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=frame; boundary=other",
        "multipart/form-data; boundary=" + "f" * 5000,
        "multipart/form-data; boundary=other",
    ],
)
def test_the_boundary_is_one_that_is_there(content_type: str) -> None:
    with pytest.raises(FormMalformed):
        read(WHOLE, content_type=content_type)


def test_a_text_is_in_the_code_that_its_part_states() -> None:
    def label(charset: str, text: bytes) -> str:
        kind = f"\r\nContent-Type: text/plain; charset={charset}\r\n\r\n".encode()
        [part] = read(LABEL.replace(b"\r\n\r\n", kind) + text + b"\r\n" + END)
        return part.text()

    assert label("UTF-8", "Zoë".encode()) == "Zoë"
    assert label("ISO-8859-1", b"Zoe") == "Zoe"
    with pytest.raises(UnicodeDecodeError):  # these bytes would be another text in UTF-8
        label("ISO-8859-1", "Ã«".encode("latin-1"))


def test_a_file_over_the_limit_keeps_its_size_only() -> None:
    large, small = read(IMAGE + bytes(41) + b"\r\n" + IMAGE + bytes(40) + b"\r\n" + END, 7)
    assert (large.size, len(large.data)) == (41, 0)
    assert (small.size, len(small.data)) == (40, 40)


HEADS = (
    b'Content-Disposition: form-data; name="image"; filename="crop 1.jpg"\r\nContent-Type: a/b',
    b'content-disposition: form-data; name="image"; filename=""',
    b'Content-Disposition: form-data; name="camera_id"',
    b"Content-Disposition: form-data; name=\"camera_id\"; filename*=UTF-8''x",
    b'Content-Disposition: form-data; name="a\\"b"',
    b"Content-Disposition: form-data; name=camera_id",
    b'Content-Disposition: form-data; name="camera_id"; filename="a;b"',
    b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="camera_id"',
    b'Content-Disposition: form-data; name="camera_id"\r\nContent-Length: 4',
    b'Content-Disposition: form-data; name="camera_id"\r\nContent-Type: text/plain; charset=x',
)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("data", [b"", b"\r\n", b"--frame", b"\r\n--fram", b"\r\n\r\nZo\xff"])
@pytest.mark.parametrize("end", [b"--frame--", END])
def test_a_form_that_comes_at_once_is_read_as_one_that_comes_byte_by_byte(
    head: bytes, data: bytes, end: bytes
) -> None:
    body = b"--frame\r\n" + head + b"\r\n\r\n" + data + b"\r\n" + LABEL + b"x\r\n" + end
    assert read(body) == read(body, 1)
