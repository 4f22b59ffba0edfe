"""Hostile text in every field: kept as it is, or refused; it is never run and never a path."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from model.cli import main
from tests.service.conftest import Serve
from tests.service.hostile import KEPT, REFUSED, UNSEEN, answers_are_data  # noqa: F401 - fixtures

LONE = ("\\ud800", "\\udfff", "\\udc00\\ud800")  # halves of surrogate pairs, as JSON may name them


@pytest.fixture
def item(http: httpx.Client, image: bytes) -> Iterator[str]:
    """The path of an item that the test may change."""
    path = f"/gallery/{http.post('/gallery', files={'image': image}).json()['id']}"
    yield path
    http.delete(path)


@pytest.mark.parametrize("name", KEPT)
def test_text_is_stored_and_found_to_the_character(
    http: httpx.Client, image: bytes, name: str
) -> None:
    text = KEPT[name]
    metadata = {text: text, "list": [text, {"deep": text}]}
    labels = {"person_id": text, "camera_id": text, "metadata": json.dumps(metadata)}
    sent = {"person_id": text, "camera_id": text, "metadata": metadata}
    label = unicodedata.normalize("NFC", text)
    wanted = {"person_id": label, "camera_id": label, "metadata": metadata}
    others = http.get("/gallery").json()["total"]

    single = http.post("/gallery", files={"image": image}, data=labels)
    items = json.dumps([sent])
    batch = http.post("/gallery/batch", files={"image": image}, data={"items": items})
    plain = http.post("/gallery", files={"image": image}).json()
    patched = http.patch(f"/gallery/{plain['id']}", json=sent)
    answers = [single.json(), batch.json()["results"][0]["item"], patched.json()]
    for answer in answers:
        assert wanted.items() <= answer.items()
        assert http.get(f"/gallery/{answer['id']}").json() == answer
        stored = http.get(f"/gallery/{answer['id']}/image")
        assert (stored.content, stored.headers["content-type"]) == (image, "image/jpeg")

    listed = http.get("/gallery", params={"person_id": text, "camera_id": text}).json()
    assert listed["items"] == answers
    found = http.post("/query", files={"image": image}, data={"person_id": text}).json()
    assert found["searched"] == 3
    by_id = {answer["id"]: answer for answer in answers}
    assert {result["item"]["id"]: result["item"] for result in found["results"]} == by_id
    none = http.post("/query", files={"image": image}, data={"exclude_camera_id": text})
    assert none.json()["searched"] == others
    erased = http.delete("/gallery", params={"person_id": text})
    assert erased.json() == {"deleted": 3}
    assert http.get("/gallery").json()["total"] == others


@pytest.mark.parametrize("name", REFUSED)
def test_text_that_no_label_may_be_is_refused_everywhere(
    http: httpx.Client, image: bytes, item: str, name: str
) -> None:
    text, before = REFUSED[name], http.get("/gallery").json()
    for field in ("person_id", "camera_id"):
        labels = {field: text}
        items = {"items": json.dumps([labels])}
        for answer in (
            http.post("/gallery", files={"image": image}, data=labels),
            http.post("/gallery/batch", files={"image": image}, data=items),
            http.post("/query", files={"image": image}, data=labels),
            http.post("/query", files={"image": image}, data={"query_camera_id": text}),
            http.patch(item, json=labels),
        ):
            assert answer.status_code in (400, 413, 422)
            assert text not in answer.text
        if len(text) < 50_000:  # a longer line of a request is the server's to refuse
            assert http.get("/gallery", params=labels).status_code == 422
    if len(text) < 50_000:
        assert http.delete("/gallery", params={"person_id": text}).status_code == 422
        camera = f"/cameras/{quote(text, safe='')}"
        for method in ("GET", "PUT", "DELETE"):
            body: dict[str, str] | None = {} if method == "PUT" else None
            assert http.request(method, camera, json=body).status_code in (404, 422)
    assert http.get("/gallery").json() == before


@pytest.mark.parametrize("name", UNSEEN)
def test_metadata_keeps_what_no_label_may_be(http: httpx.Client, item: str, name: str) -> None:
    metadata = {UNSEEN[name]: [UNSEEN[name]]}
    assert http.patch(item, json={"metadata": metadata}).json()["metadata"] == metadata


@pytest.mark.parametrize("escape", LONE)
def test_half_of_a_surrogate_pair_is_refused_wherever_json_can_name_one(
    http: httpx.Client, image: bytes, item: str, escape: str
) -> None:
    before = http.get("/gallery").json()
    for body in (
        f'{{"person_id": "{escape}"}}',
        f'{{"camera_id": "a{escape}b"}}',
        f'{{"captured_at": "{escape}"}}',
        f'{{"metadata": {{"{escape}": 1}}}}',
        f'{{"metadata": {{"a": ["{escape}"]}}}}',
        f'{{"{escape}": 1}}',
    ):
        kind = {"Content-Type": "application/json"}
        assert http.patch(item, content=body, headers=kind).status_code == 422
        assert http.post("/admin/reembed", content=body, headers=kind).status_code == 422
        batch = {"items": f"[{body}]"}
        answer = http.post("/gallery/batch", files={"image": image}, data=batch)
        assert answer.status_code == 422
    labels = {"metadata": f'{{"{escape}": "{escape}"}}'}
    assert http.post("/gallery", files={"image": image}, data=labels).status_code == 422
    assert http.get("/gallery").json() == before


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b'{"metadata": ' + b"[" * 30_000,
        b'{"metadata": {"a": ' + b"9" * 5000 + b"}}",
        b'{"metadata": {"a": NaN}}',
        b'{"metadata": {"a": -Infinity}}',
        b'{"metadata": {"a": 1e999}}',
        b'{"metadata": {"a\\u0000": 1}}',
        b'{"person_id": "\xff\xfe"}',
        b'{"person_id": "a"} trailing',
        b'{"person_id": 5}',
        b'{"captured_at": 0}',
        b'{"person_id": "a", "camera_id": "c", "person_id": "b"}',
        b'{"metadata": {"note": [{"a": 1, "a": 1}]}}',
        b'{"person_id": "a", "person\\u005fid": "a"}',
        '{"person_id": "sixteen bits"}'.encode("utf-16"),
        b"\x1f\x8b\x08\x00 compressed",
        b'{"person_id": "' + b"z" * 70_000 + b'"}',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_json_that_some_reader_would_choke_on_is_refused(
    http: httpx.Client, item: str, body: bytes
) -> None:
    before = http.get(item).json()
    kind = {"Content-Type": "application/json"}
    for answer in (
        http.patch(item, content=body, headers=kind),
        http.post("/admin/reembed", content=body, headers=kind),
    ):
        assert answer.status_code in (413, 422)
    assert http.get(item).json() == before


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/html"])
def test_a_body_that_pages_of_other_sites_could_send_is_not_taken_for_json(
    http: httpx.Client, item: str, kind: str
) -> None:
    answer = http.patch(item, content=b'{"person_id": "x"}', headers={"Content-Type": kind})
    assert answer.status_code == 415


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_the_contact_sheet_shows_hostile_labels_as_text(
    serve: Serve, tmp_path: Path, image: bytes, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    query = tmp_path / '"><img src=x onerror=alert(1)>.jpg'
    query.write_bytes(image)
    sheet = tmp_path / "sheet.html"
    with (
        serve(tmp_path / "data") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as client,
    ):
        for text in KEPT.values():
            labels = {"person_id": text, "camera_id": text}
            assert client.post("/gallery", files={"image": image}, data=labels).is_success
        arguments = ["--url", url, "--html", str(sheet), "--top-k", "100"]
        assert main(["query", str(query), *arguments]) == 0, capsys.readouterr().err
    page = Page(sheet.read_text())
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "p", "section", "figure", "img",
        "figcaption", "b", "br", "div", "span", "i", "dl", "dt", "dd",
    }  # fmt: skip
    names = {name for name, _ in page.attributes}
    assert not [name for name in names if name.startswith("on")]
    assert all(value.startswith("data:image/") for name, value in page.attributes if name == "src")
    assert "href" not in names
    for text in KEPT.values():
        assert unicodedata.normalize("NFC", text) in page.shown
