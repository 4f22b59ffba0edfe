"""Cameras' defaults: what holds for pictures whose sender does not say it; and polarity itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.service.conftest import Serve

INVERTED = {"modality": "ir", "polarity": "black_hot"}


def put(http: httpx.Client, camera_id: str, **defaults: Any) -> dict[str, Any]:
    answer = http.put(f"/cameras/{quote(camera_id, safe='')}", json=defaults)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def said(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["modality"], item["modality_source"], item["polarity"]


@pytest.fixture(autouse=True)
def no_cameras(http: httpx.Client) -> Iterator[None]:
    """Every test begins without defaults."""
    yield
    for camera in http.get("/cameras").json()["cameras"]:
        assert http.delete(f"/cameras/{quote(camera['camera_id'], safe='')}").status_code == 204


@pytest.mark.parametrize(
    "camera_id",
    [
        "gate",
        "north/gate 4",
        "a//b/",
        "/x",
        "50%",
        "%2F",
        "?a=b&c#d",
        ".",
        "../gallery",
        "Höf",
        "7;v=1",
    ],
)
def test_defaults_are_kept_under_any_label(http: httpx.Client, camera_id: str) -> None:
    encoded = quote(camera_id, safe="").replace(".", "%2E")
    path = f"/cameras/{encoded}"
    missing = http.get(path)
    assert (missing.status_code, missing.json()["code"]) == (404, "camera_not_found")
    put_ = http.put(path, json=INVERTED)
    assert (put_.status_code, put_.json()) == (200, {"camera_id": camera_id, **INVERTED})
    assert http.get(path).json() == put_.json()
    assert http.get("/cameras").json() == {"cameras": [put_.json()]}
    if not {"?", "%", "."} & set(camera_id):  # else a path would mean something else
        assert http.get(f"/cameras/{camera_id}").json() == put_.json()
    changed = http.put(path, json={"modality": "rgb"}).json()
    assert changed == {"camera_id": camera_id, "modality": "rgb", "polarity": None}
    assert http.delete(path).status_code == 204
    assert http.delete(path).status_code == 404
    assert http.get(path).status_code == 404


def test_both_spellings_of_a_name_are_one_camera(http: httpx.Client) -> None:
    put(http, "Ho\u0302f", **INVERTED)
    assert http.get("/cameras/H\u00f4f").json()["camera_id"] == "H\u00f4f"
    assert len(http.get("/cameras").json()["cameras"]) == 1


@pytest.mark.parametrize(
    "body",
    [{"modality": "thermal"}, {"polarity": "auto"}, {"camera_id": "x"}, {"modality": 5}, [], None],
)
def test_other_defaults_are_refused(http: httpx.Client, body: Any) -> None:
    assert http.put("/cameras/gate", json=body).status_code == 422
    assert http.get("/cameras").json() == {"cameras": []}


def test_paths_that_name_no_camera(http: httpx.Client) -> None:
    assert http.get("/cameras/").status_code == 404
    assert http.get("/cameras/gate?x=1").status_code == 422
    for method, path in (("POST", "/cameras/a/b"), ("PATCH", "/cameras/a"), ("PUT", "/cameras")):
        answer = http.request(method, path, json={})
        assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
        assert "GET" in answer.headers["allow"]


def test_enrollment_takes_the_cameras_defaults(
    http: httpx.Client, image: bytes, infrared: list[Path]
) -> None:
    dark = infrared[0].read_bytes()

    def enroll(data: bytes = image, **fields: str) -> tuple[Any, ...]:
        answer = http.post("/gallery", files={"image": data}, data=fields)
        assert answer.status_code == 201, answer.text
        item = answer.json()
        assert http.get(f"/gallery/{item['id']}").json() == item
        return said(item)

    assert enroll(camera_id="dome") == ("rgb", "detected", None)
    assert enroll(dark, camera_id="dome") == ("ir", "detected", "white_hot")
    put(http, "dome", **INVERTED)
    assert enroll(camera_id="dome") == ("ir", "camera", "black_hot")
    assert enroll(camera_id="other") == ("rgb", "detected", None)
    assert enroll() == ("rgb", "detected", None)
    # What is given wins, each by itself.
    assert enroll(camera_id="dome", modality="auto") == ("rgb", "detected", None)
    assert enroll(dark, camera_id="dome", modality="auto") == ("ir", "detected", "black_hot")
    assert enroll(camera_id="dome", modality="rgb") == ("rgb", "given", None)
    assert enroll(camera_id="dome", polarity="white_hot") == ("ir", "camera", "white_hot")
    assert enroll(dark, polarity="black_hot") == ("ir", "detected", "black_hot")
    assert enroll(modality="rgb", polarity="black_hot") == ("rgb", "given", None)
    put(http, "dome", polarity="black_hot")
    assert enroll(dark, camera_id="dome") == ("ir", "detected", "black_hot")
    put(http, "dome", modality="auto")
    assert enroll(camera_id="dome") == ("rgb", "detected", None)


def test_a_batch_takes_each_cameras_own(http: httpx.Client, image: bytes) -> None:
    put(http, "dome", **INVERTED)
    put(http, "door", modality="rgb")
    items = [
        {"camera_id": "dome"},
        {"camera_id": "door"},
        {"camera_id": "dome", "polarity": "white_hot"},
        {"modality": "ir", "polarity": "black_hot"},
        {},
    ]
    answer = http.post(
        "/gallery/batch", files=[("image", image)] * 5, data={"items": json.dumps(items)}
    )
    assert [said(result["item"]) for result in answer.json()["results"]] == [
        ("ir", "camera", "black_hot"),
        ("rgb", "camera", None),
        ("ir", "camera", "white_hot"),
        ("ir", "given", "black_hot"),
        ("rgb", "detected", None),
    ]


def test_a_query_takes_the_defaults_of_its_own_camera(
    http: httpx.Client, image: bytes, infrared: list[Path]
) -> None:
    def ask(data: bytes, **fields: str) -> dict[str, Any]:
        answer = http.post("/query", files={"image": data}, data=fields)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    dark = infrared[0].read_bytes()
    put(http, "dome", **INVERTED)
    assert said(ask(image, query_camera_id="dome")["query"]) == ("ir", "camera", "black_hot")
    assert said(ask(image, query_camera_id="unknown")["query"]) == ("rgb", "detected", None)
    assert said(ask(image, camera_id="dome")["query"]) == ("rgb", "detected", None)  # a filter
    assert said(ask(dark, polarity="black_hot")["query"]) == ("ir", "detected", "black_hot")
    given = {"query_camera_id": "dome", "modality": "ir", "polarity": "white_hot"}
    assert said(ask(dark, **given)["query"]) == ("ir", "given", "white_hot")
    total = http.get("/gallery").json()["total"]
    assert ask(image, query_camera_id="dome")["searched"] == total


def test_polarity_turns_the_picture_that_is_compared(
    serve: Serve, tmp_path: Path, infrared: list[Path]
) -> None:
    """An inverted picture said to be black-hot is the same to the network, as item and query."""
    import io

    from PIL import Image, ImageOps

    def negative(file: Path) -> bytes:
        buffer = io.BytesIO()
        ImageOps.invert(Image.open(file).convert("L")).save(buffer, "PNG")
        return buffer.getvalue()

    with serve(tmp_path) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        plain = {"modulation": "false", "top_k": "1"}
        for file in infrared:
            answer = http.post(
                "/gallery",
                files={"image": negative(file)},
                data={"polarity": "black_hot", "person_id": file.parent.name},
            )
            assert answer.status_code == 201
        for file in infrared:
            for data, fields in ((file.read_bytes(), {}), (negative(file), INVERTED)):
                found = http.post("/query", files={"image": data}, data={**plain, **fields}).json()
                [best] = found["results"]
                assert best["item"]["person_id"] == file.parent.name
                assert best["distance"] < 0.05
        crop = http.get(f"/gallery/{best['item']['id']}/image")
        assert crop.content == negative(infrared[-1])  # stored as it was sent


def test_one_key_is_one_content_with_its_polarity(http: httpx.Client, infrared: list[Path]) -> None:
    image = {"image": infrared[1].read_bytes()}

    def enroll(key: str, **fields: str) -> httpx.Response:
        return http.post("/gallery", files=image, data=fields, headers={"Idempotency-Key": key})

    first = enroll("polar", camera_id="dome", polarity="black_hot")
    assert first.status_code == 201
    again = enroll("polar", camera_id="dome", polarity="black_hot")
    assert (again.status_code, again.json()) == (200, first.json())
    assert enroll("polar", camera_id="dome").status_code == 409
    assert enroll("polar", camera_id="dome", polarity="white_hot").status_code == 409
    # What a camera's defaults are is not part of the content: a repeat stays harmless.
    plain = enroll("plain", camera_id="dome")
    put(http, "dome", **INVERTED)
    assert enroll("plain", camera_id="dome").json() == plain.json()


def test_changes_of_cameras_are_in_the_audit_log(http: httpx.Client) -> None:
    put(http, "dome", **INVERTED)
    http.delete("/cameras/dome")
    entries = http.get("/admin/audit", params={"limit": 2}).json()["entries"]
    assert {entry["action"] for entry in entries} == {"camera"}
    assert [entry["details"] for entry in entries] == [
        {"camera_id": "dome"},
        {"camera_id": "dome", **INVERTED},
    ]
    assert all(entry["actor"].startswith("address:") for entry in entries)
