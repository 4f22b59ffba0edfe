"""POST /gallery/batch and PATCH: many at once, each by itself, and labels that change."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import ExifTags, Image, ImageOps

from service.api.schemas import BATCH_IMAGES, BatchItem
from service.client import Client
from tests.service.conftest import Serve


def send(http: httpx.Client, images: list[bytes], items: Any = None) -> httpx.Response:
    data = (
        {} if items is None else {"items": items if isinstance(items, str) else json.dumps(items)}
    )
    return http.post("/gallery/batch", files=[("image", image) for image in images], data=data)


def results(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return list(response.json()["results"])


def total(http: httpx.Client) -> int:
    return int(http.get("/gallery", params={"limit": 1}).json()["total"])


def test_every_image_has_its_own_labels(http: httpx.Client, visible: list[Path]) -> None:
    images = [file.read_bytes() for file in visible[:3]]
    items = [
        {"person_id": "a", "captured_at": "2026-03-01T14:05:00+01:00", "metadata": {"n": [1]}},
        {},
        {"camera_id": "gate", "modality": "ir", "box": "3,5,20,40"},
    ]
    first, second, third = (one["item"] for one in results(send(http, images, items)))
    assert (first["person_id"], first["metadata"]) == ("a", {"n": [1]})
    assert first["captured_at"].startswith("2026-03-01T13:05:00")
    assert (second["person_id"], second["camera_id"], second["metadata"]) == (None, None, {})
    assert (third["modality"], third["width"], third["height"]) == ("ir", 20, 40)
    for item, image in zip((first, second), images, strict=False):
        assert http.get(f"/gallery/{item['id']}").json() == item
        assert http.get(f"/gallery/{item['id']}/image").content == image
        found = http.post("/query", files={"image": image}, data={"modulation": "false"}).json()
        assert found["results"][0]["distance"] < 1e-2


def test_one_bad_image_fails_alone(http: httpx.Client, visible: list[Path]) -> None:
    good = [file.read_bytes() for file in visible[:4]]
    images = [good[0], b"", good[1], b"no image", good[2][:200], good[3]]
    before = total(http)
    answers = results(send(http, images))
    assert [one["status"] for one in answers] == [201, 422, 201, 415, 422, 201]
    assert all(("item" in one) == (one["status"] == 201) for one in answers)
    codes = [one["problem"]["code"] for one in answers if "problem" in one]
    assert codes[:2] == ["image_empty", "image_type_unsupported"]
    assert answers[3]["problem"]["instance"] == "/gallery/batch#3"
    assert total(http) == before + 3


def test_only_bad_images_are_still_an_answer(http: httpx.Client) -> None:
    assert [one["status"] for one in results(send(http, [b"x", b"y"]))] == [415, 415]


def test_keys_make_repeats_harmless(http: httpx.Client, visible: list[Path]) -> None:
    images = [file.read_bytes() for file in visible[:2]]
    items = [{"key": "batch-a", "person_id": "k"}, {"key": "batch-b"}]
    new = results(send(http, images, items))
    again = results(send(http, images, items))
    assert [one["status"] for one in new] == [201, 201]
    assert [one["status"] for one in again] == [200, 200]
    assert [one["item"] for one in again] == [one["item"] for one in new]
    changed = results(send(http, images, [{"key": "batch-a", "person_id": "other"}, items[1]]))
    assert [one["status"] for one in changed] == [409, 200]
    single = http.post(
        "/gallery",
        files={"image": images[0]},
        data={"person_id": "k"},
        headers={"Idempotency-Key": "batch-a"},
    )
    assert (single.status_code, single.json()) == (200, new[0]["item"])


def test_a_key_twice_in_one_batch(http: httpx.Client, visible: list[Path]) -> None:
    image = visible[0].read_bytes()
    same, other = {"key": "twice"}, {"key": "twice", "person_id": "x"}
    first, second, third = results(send(http, [image] * 3, [same, same, other]))
    assert (first["status"], second["status"], third["status"]) == (201, 200, 409)
    assert first["item"] == second["item"]


@pytest.mark.parametrize(
    ("items", "field"),
    [
        ("[{}]", "items"),
        ("{}", "items"),
        ("no json", "items"),
        ("[1, 2]", "items.0"),
        ('[{}, {"person": "x"}]', "items.1.person"),
        ('[{}, {"box": "1,2,3"}]', "items.1.box"),
        ('[{}, {"metadata": "[]"}]', "items.1.metadata"),
        ('[{}, {"metadata": {"a": "\\ud800"}}]', "items"),
        (json.dumps([{}, {"metadata": {"a": "x" * 9000}}]), "items.1.metadata"),
        ('[{}, {"key": "not a key"}]', "items.1.key"),
        ('[{}, {"captured_at": "yesterday"}]', "items.1.captured_at"),
        ('[{}, {"person_id": "anna", "person_id": "ben"}]', "items"),
        ('[{"metadata": {"a": 1, "b": {"c": 1, "c": 2}}}, {}]', "items"),
    ],
)
def test_wrong_items_enroll_nothing(
    http: httpx.Client, visible: list[Path], items: str, field: str
) -> None:
    before = total(http)
    answer = send(http, [visible[0].read_bytes()] * 2, items)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["name"] == field
    assert total(http) == before


def test_too_many_and_none(http: httpx.Client, visible: list[Path]) -> None:
    assert send(http, []).status_code in (415, 422)
    answer = send(http, [b"x"] * (BATCH_IMAGES + 1))
    assert (answer.status_code, answer.json()["code"]) == (422, "parameters_invalid")
    assert str(BATCH_IMAGES) in answer.json()["detail"]


def test_a_full_batch(http: httpx.Client, visible: list[Path]) -> None:
    images = [visible[n % len(visible)].read_bytes() for n in range(BATCH_IMAGES)]
    answers = results(send(http, images))
    assert [one["status"] for one in answers] == [201] * BATCH_IMAGES
    assert len({one["item"]["id"] for one in answers}) == BATCH_IMAGES


def test_labels_change_and_queries_filter_by_them(
    http: httpx.Client, url: str, visible: list[Path]
) -> None:
    image = visible[0].read_bytes()
    item = http.post("/gallery", files={"image": image}, data={"camera_id": "c"}).json()
    path = f"/gallery/{item['id']}"

    def found(person: str) -> list[str]:
        answer = http.post("/query", files={"image": image}, data={"person_id": person})
        return [result["item"]["id"] for result in answer.json()["results"]]

    changed = http.patch(path, json={"person_id": "patched", "metadata": {"a": 1}})
    assert changed.status_code == 200
    assert changed.json() == {**item, "person_id": "patched", "metadata": {"a": 1}}
    assert found("patched") == [item["id"]]
    emptied = http.patch(path, json={"person_id": None, "captured_at": "2026-01-01T00:00:00Z"})
    assert emptied.json()["person_id"] is None
    assert emptied.json()["camera_id"] == "c"
    assert found("patched") == []
    assert http.patch(path, json={}).json() == emptied.json() == http.get(path).json()
    with Client(url) as client:
        assert client.update(item["id"], camera_id=None, metadata={}).camera_id is None


@pytest.mark.parametrize(
    "body", [{"person": "x"}, {"metadata": None}, {"metadata": [1]}, {"person_id": 7}, [], None]
)
def test_wrong_patches_change_nothing(http: httpx.Client, visible: list[Path], body: Any) -> None:
    item = http.post("/gallery", files={"image": visible[0].read_bytes()}).json()
    path = f"/gallery/{item['id']}"
    assert http.patch(path, json=body).status_code == 422
    assert http.get(path).json() == item


def test_patch_of_nothing(http: httpx.Client) -> None:
    for unknown in ("0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10", "x"):
        answer = http.patch(f"/gallery/{unknown}", json={"person_id": "a"})
        assert (answer.status_code, answer.json()["code"]) == (404, "item_not_found")


def test_the_client_sends_batches(url: str, visible: list[Path]) -> None:
    with Client(url) as client:
        answers = client.enroll_batch(visible[:2], [BatchItem(person_id="c"), BatchItem()])
        assert [one.status for one in answers] == [201, 201]
        assert answers[0].item is not None
        assert answers[0].item.person_id == "c"


def test_one_image_that_is_too_large_fails_alone(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    good = [file.read_bytes() for file in visible[:2]]
    with (
        serve(tmp_path, max_image_bytes=10_000) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        items = [{"person_id": "a"}, {"person_id": "b"}, {"person_id": "c"}]
        answers = results(send(http, [good[0], bytes(10_001), good[1]], items))
        assert [one["status"] for one in answers] == [201, 413, 201]
        assert [answers[place]["item"]["person_id"] for place in (0, 2)] == ["a", "c"]
        problem = answers[1]["problem"]
        assert (problem["code"], problem["type"]) == ("image_too_large", "about:blank")
        assert problem["instance"] == "/gallery/batch#1"
        for path in ("/gallery", "/query"):
            refused = http.post(path, files={"image": bytes(10_001)})
            assert (refused.status_code, refused.json()["code"]) == (413, "image_too_large")


def test_every_image_may_have_all_its_metadata(http: httpx.Client, visible: list[Path]) -> None:
    metadata = {"note": "x" * 8150, "list": [1] * 10}
    assert len(json.dumps(metadata, separators=(",", ":"))) <= 8192
    image = visible[0].read_bytes()
    answers = results(send(http, [image] * 12, [{"metadata": metadata}] * 12))
    assert [one["item"]["metadata"] for one in answers] == [metadata] * 12


def test_metadata_is_measured_without_spaces(http: httpx.Client, visible: list[Path]) -> None:
    text = json.dumps({"a": [1] * 4000}, separators=(",", ":"))
    assert len(text) < 8192 < len(json.dumps(json.loads(text)))
    image = {"image": visible[0].read_bytes()}
    assert http.post("/gallery", files=image, data={"metadata": text}).status_code == 201


def test_an_empty_label_is_none(http: httpx.Client, visible: list[Path]) -> None:
    items = [{"person_id": "", "camera_id": ""}]
    [one] = results(send(http, [visible[0].read_bytes()], items))
    assert (one["item"]["person_id"], one["item"]["camera_id"]) == (None, None)
    path = f"/gallery/{one['item']['id']}"
    http.patch(path, json={"person_id": "somebody"})
    assert http.patch(path, json={"person_id": ""}).json()["person_id"] is None
    no_text: tuple[object, ...] = ({}, [], 0, False)
    for value in no_text:
        assert http.patch(path, json={"person_id": value}).status_code == 422


def test_two_persons_are_not_erased_at_once(http: httpx.Client, visible: list[Path]) -> None:
    image = visible[0].read_bytes()
    results(send(http, [image] * 2, [{"person_id": "first"}, {"person_id": "second"}]))
    refused = http.delete("/gallery", params={"person_id": ["first", "second"]})
    assert (refused.status_code, refused.json()["code"]) == (422, "parameters_invalid")
    for person in ("first", "second"):
        assert http.delete("/gallery", params={"person_id": person}).json() == {"deleted": 1}


def test_originals_are_stored_without_what_is_no_picture(
    http: httpx.Client, visible: list[Path]
) -> None:
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[ExifTags.Base.Orientation] = 6
    tags.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSAreaInformation] = b"Zoe Secret"
    with Image.open(visible[0]) as crop:
        crop.save(buffer, "JPEG", exif=tags, comment=b"Zoe Secret")
    sent = buffer.getvalue()
    alone = http.post("/gallery", files={"image": sent}).json()
    [one] = results(send(http, [sent]))
    for item in alone, one["item"]:
        stored = http.get(f"/gallery/{item['id']}/image").content
        assert b"Zoe Secret" in sent
        assert b"Zoe Secret" not in stored
        assert item["sha256"] == hashlib.sha256(sent).hexdigest()
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
        assert shown.size == (item["width"], item["height"])
        assert shown.tobytes() == ImageOps.exif_transpose(Image.open(buffer)).tobytes()
