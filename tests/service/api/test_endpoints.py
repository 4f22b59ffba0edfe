"""The main job through HTTP: enroll, list, look, query, delete, and what every answer says."""

from __future__ import annotations

import asyncio
import io
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute
from PIL import Image
from starlette.types import Receive, Scope, Send

from service.api import admin, backup, cameras, gallery, operate, page, query
from service.api.schemas import QueryAnswer
from service.app import create_app
from service.auth.authorization import ROUTE_SCOPES
from service.http.exception_handlers import catalogue
from service.settings import load_settings
from tests.faked_device import FakedDevice
from tests.service.conftest import Serve


def enroll(http: httpx.Client, file: Path, **fields: str) -> dict[str, Any]:
    response = http.post("/gallery", files={"image": file.read_bytes()}, data=fields)
    assert response.status_code == 201, response.text
    return dict(response.json())


def ask(http: httpx.Client, *files: Path, **fields: Any) -> dict[str, Any]:
    parts = [("image", file.read_bytes()) for file in files]
    response = http.post("/query", files=parts, data=fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.fixture(scope="module")
def enrolled(http: httpx.Client, visible: list[Path]) -> list[dict[str, Any]]:
    """Eight persons, one crop each, from two cameras."""
    assert ask(http, visible[0])["results"] == []  # an empty gallery answers with nothing
    return [
        enroll(http, file, person_id=file.parent.name, camera_id=f"cam{place % 2}")
        for place, file in enumerate(visible)
    ]


def test_item_says_what_was_enrolled(http: httpx.Client, visible: list[Path]) -> None:
    item = enroll(
        http,
        visible[0],
        person_id="p 1",
        camera_id="gate",
        captured_at="2026-03-01T14:05:00+01:00",
        metadata='{"note": "né <b>", "n": [1, 2.5, null]}',
    )
    assert UUID(item["id"]).version == 7
    assert datetime.fromisoformat(item["captured_at"]) == datetime.fromisoformat(
        "2026-03-01T13:05:00+00:00"
    )
    assert datetime.fromisoformat(item["enrolled_at"]).tzinfo is not None
    assert (item["modality"], item["modality_source"]) == ("rgb", "detected")
    assert item["metadata"] == {"note": "né <b>", "n": [1, 2.5, None]}
    assert item["model"] == http.get("/model").json()["fingerprint"]
    path = f"/gallery/{item['id']}"
    assert http.get(path).json() == item
    picture = http.get(f"{path}/image")
    assert picture.content == visible[0].read_bytes()
    assert picture.headers["content-type"] == "image/jpeg"
    assert http.delete(path).status_code == 204
    assert http.get(path).json()["code"] == "item_not_found"
    assert http.get(f"{path}/image").status_code == http.delete(path).status_code == 404


@pytest.mark.parametrize("told", ["2016-12-31T23:59:60Z", "2017-01-01T00:59:60+01:00"])
def test_a_leap_second_is_the_next_second(
    http: httpx.Client, visible: list[Path], told: str
) -> None:
    item = enroll(http, visible[0], captured_at=told)
    assert datetime.fromisoformat(item["captured_at"]) == datetime(2017, 1, 1, tzinfo=UTC)
    assert http.delete(f"/gallery/{item['id']}").status_code == 204


def test_modality_is_detected_and_can_be_given(http: httpx.Client, infrared: list[Path]) -> None:
    detected = enroll(http, infrared[0])
    given = enroll(http, infrared[0], modality="rgb")
    assert (detected["modality"], detected["modality_source"]) == ("ir", "detected")
    assert (given["modality"], given["modality_source"]) == ("rgb", "given")
    assert ask(http, infrared[0])["query"] == {
        "modality": "ir",
        "modality_source": "detected",
        "polarity": "white_hot",
        "images": 1,
    }
    for item in (detected, given):
        http.delete(f"/gallery/{item['id']}")


def test_a_lone_query_is_answered_as_those_that_come_together(
    http: httpx.Client, enrolled: list[dict[str, Any]], infrared: list[Path]
) -> None:
    def newest() -> list[dict[str, Any]]:
        return http.get("/admin/audit", params={"limit": 30}).json()["entries"]  # type: ignore[no-any-return]

    before = newest()[0]["number"]
    alone = [ask(http, file, top_k=4) for file in infrared[:4]]
    with ThreadPoolExecutor(4) as clients:
        together = list(clients.map(partial(ask, http, top_k=4), infrared[:4]))
    for one, other in zip(alone, together, strict=True):
        assert [r["item"]["id"] for r in one["results"]] == [
            r["item"]["id"] for r in other["results"]
        ]
        assert [r["distance"] for r in one["results"]] == pytest.approx(
            [r["distance"] for r in other["results"]], rel=1e-3
        )
    noted = [e["details"] for e in newest() if e["number"] > before and e["action"] == "query"]
    assert noted == [{"images": 1, "modality": "ir", "top_k": 4, "exhaustive": False}] * 8


def test_a_query_whose_client_has_gone_holds_up_no_other_one(
    url: str, http: httpx.Client, enrolled: list[dict[str, Any]], infrared: list[Path]
) -> None:
    whole = ask(http, infrared[0], top_k=4)
    for _ in range(5):
        with httpx.Client(base_url=url, timeout=0.002) as impatient, suppress(httpx.HTTPError):
            impatient.post("/query", files={"image": infrared[0].read_bytes()})
        assert ask(http, infrared[0], top_k=4)["results"] == whole["results"]


def test_box_is_cut_out_before_it_is_stored(http: httpx.Client, visible: list[Path]) -> None:
    item = enroll(http, visible[0], box="3,5,20,40")
    stored = Image.open(io.BytesIO(http.get(f"/gallery/{item['id']}/image").content))
    with Image.open(visible[0]) as frame:
        assert np.array_equal(np.asarray(stored), np.asarray(frame.crop((3, 5, 23, 45))))
    http.delete(f"/gallery/{item['id']}")


def test_list_filters_and_pages(http: httpx.Client, enrolled: list[dict[str, Any]]) -> None:
    ids = [item["id"] for item in enrolled]
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = http.get("/gallery", params={"limit": 3, **({"cursor": cursor} if cursor else {})})
        body = page.json()
        assert body["total"] == len(ids)
        seen += [item["id"] for item in body["items"]]
        cursor = body["next_cursor"]
        if cursor is None:
            break
    assert seen == ids
    some = http.get(
        "/gallery", params={"person_id": [enrolled[0]["person_id"], enrolled[3]["person_id"]]}
    ).json()
    assert [item["id"] for item in some["items"]] == [ids[0], ids[3]]
    assert http.get("/gallery", params={"camera_id": "cam1"}).json()["total"] == 4
    assert http.get("/gallery", params={"modality": "ir"}).json()["total"] == 0


def test_query_ranks_and_explains(
    http: httpx.Client, enrolled: list[dict[str, Any]], infrared: list[Path]
) -> None:
    answer = ask(http, infrared[0], explain="true", debug="true", top_k=5)
    assert [result["rank"] for result in answer["results"]] == [1, 2, 3, 4, 5]
    distances = [result["distance"] for result in answer["results"]]
    assert distances == sorted(distances)
    for result in answer["results"]:
        assert sum(result["parts"]) == pytest.approx(result["distance"] ** 2, rel=1e-5)
        assert result["recall_rank"] >= 1
        assert 1 <= result["unmodulated_rank"] <= len(enrolled)
        assert result["rank_before_rerank"] == result["rank"]
        # The tiny checkpoint holds no calibration.
        assert (result["similarity"], result["probability"], result["agreement"]) == (None,) * 3
    assert (answer["probability_enrolled"], answer["match"]) == (None, None)
    scores = [result["score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["searched"] == answer["candidates"] == len(enrolled)
    assert answer["people"] == len({item["person_id"] for item in enrolled})
    assert answer["rerank"] == "none"
    assert set(answer["timings_ms"]) == {
        "receive", "decode", "queue", "embed", "modulate", "recall", "rescore", "rerank", "fetch",
        "rank", "audit", "answer", "total",
    }  # fmt: skip
    *stages, total = answer["timings_ms"].values()
    assert sum(stages) == pytest.approx(total, abs=0.01)
    assert min(stages) >= 0
    plain = ask(http, infrared[0])
    assert "timings_ms" not in plain
    assert "parts" not in plain["results"][0]
    exhaustive = ask(http, infrared[0], exhaustive="true")
    assert exhaustive["exhaustive"]
    assert exhaustive["results"][0]["recall_rank"] is None
    assert [r["item"]["id"] for r in exhaustive["results"]] == [
        r["item"]["id"] for r in plain["results"]
    ]


def test_a_query_and_the_gallery_say_the_same_of_an_item(
    http: httpx.Client, visible: list[Path]
) -> None:
    labels = {"person_id": "Zoë", "metadata": '{"lane": [2.5, null, "ä"]}'}
    for moment in ("2024-03-01T12:00:00.25+02:00", ""):
        item = enroll(http, visible[0], captured_at=moment, **labels)
        answer = ask(http, visible[0], person_id="Zoë", modulation="false", rerank="none")
        [result] = answer["results"]
        assert result["item"] == item == http.get(f"/gallery/{item['id']}").json()
        told = QueryAnswer.model_validate(answer).model_dump(mode="json", exclude_unset=True)
        assert told == answer
        assert http.delete(f"/gallery/{item['id']}").status_code == 204


def test_an_enrolled_image_finds_itself_unmodulated(
    http: httpx.Client, enrolled: list[dict[str, Any]], visible: list[Path]
) -> None:
    for item, file in zip(enrolled, visible, strict=True):
        best = ask(http, file, modulation="false")["results"][0]
        assert best["item"]["id"] == item["id"]
        assert best["distance"] < 0.01
    modulated = ask(http, visible[0])["results"][0]["distance"]
    assert modulated > 0.01  # γ, β of this checkpoint are not the identity


def test_filters_apply_before_the_shortlist(
    http: httpx.Client, enrolled: list[dict[str, Any]], infrared: list[Path]
) -> None:
    answer = ask(http, infrared[0], camera_id="cam1", candidates=1, top_k=1)
    assert answer["searched"] == 4
    assert answer["results"][0]["item"]["camera_id"] == "cam1"
    without = ask(http, infrared[0], exclude_camera_id=["cam0", "cam1"])
    assert without["searched"] == 0
    assert without["results"] == []
    assert ask(http, infrared[0], gallery_modality="ir")["searched"] == 0
    people = [enrolled[2]["person_id"], enrolled[5]["person_id"]]
    answer = ask(http, infrared[0], person_id=people)
    assert {r["item"]["person_id"] for r in answer["results"]} == set(people)
    nearest = ask(http, infrared[0])["results"]
    bound = (nearest[2]["distance"] + nearest[3]["distance"]) / 2
    assert len(ask(http, infrared[0], max_distance=bound)["results"]) == 3


def test_group_by_person_keeps_the_best_image(
    http: httpx.Client, enrolled: list[dict[str, Any]], visible: list[Path], infrared: list[Path]
) -> None:
    more = visible[0].with_name("0002.jpg")
    extra = enroll(http, more, person_id=enrolled[0]["person_id"])
    every = ask(http, infrared[0])["results"]
    grouped = ask(http, infrared[0], group_by="person_id")["results"]
    best: dict[str, str] = {}
    for result in every:
        best.setdefault(result["item"]["person_id"], result["item"]["id"])
    assert [result["item"]["id"] for result in grouped] == list(best.values())
    http.delete(f"/gallery/{extra['id']}")


def test_several_images_are_one_query(
    http: httpx.Client, enrolled: list[dict[str, Any]], infrared: list[Path], visible: list[Path]
) -> None:
    once = ask(http, infrared[0])["results"]
    twice = ask(http, infrared[0], infrared[0])
    assert twice["query"]["images"] == 2
    for one, two in zip(once, twice["results"], strict=True):
        assert one["item"]["id"] == two["item"]["id"]
        assert one["distance"] == pytest.approx(two["distance"], rel=1e-4)
    mixed = ask(http, infrared[0], visible[1])
    assert mixed["query"]["modality"] == "mixed"
    assert mixed["results"][0]["distance"] != pytest.approx(once[0]["distance"], rel=1e-3)
    assert len(ask(http, *[infrared[0]] * 16)["results"]) == len(enrolled)


def test_erasing_a_person_takes_all_of_them(
    http: httpx.Client, enrolled: list[dict[str, Any]], visible: list[Path], infrared: list[Path]
) -> None:
    for file in visible[:2]:
        enroll(http, file, person_id="gone")
    answer = http.delete("/gallery", params={"person_id": "gone"})
    assert answer.json() == {"deleted": 2}
    found = ask(http, infrared[0], top_k=1000)["results"]
    assert len(found) == len(enrolled)
    assert all(result["item"]["person_id"] != "gone" for result in found)


def test_idempotency_key_makes_a_repeat_harmless(http: httpx.Client, visible: list[Path]) -> None:
    before = http.get("/gallery").json()["total"]
    image = {"image": visible[0].read_bytes()}
    headers = {"Idempotency-Key": "first-of-gate"}
    first = http.post("/gallery", files=image, data={"person_id": "i"}, headers=headers)
    again = http.post("/gallery", files=image, data={"person_id": "i"}, headers=headers)
    other = http.post("/gallery", files=image, data={"person_id": "j"}, headers=headers)
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 409)
    assert first.json() == again.json()
    assert other.json()["code"] == "idempotency_conflict"
    without = [http.post("/gallery", files=image, data={"person_id": "i"}) for _ in range(2)]
    assert len({answer.json()["id"] for answer in [first, *without]}) == 3
    assert http.get("/gallery").json()["total"] == before + 3
    # Once the item is gone, its key enrolls anew.
    assert http.delete("/gallery", params={"person_id": "i"}).json() == {"deleted": 3}
    renewed = http.post("/gallery", files=image, data={"person_id": "i"}, headers=headers)
    assert renewed.status_code == 201
    http.delete(f"/gallery/{renewed.json()['id']}")


def test_answers_survive_a_restart(
    serve: Serve, tmp_path: Path, visible: list[Path], infrared: list[Path]
) -> None:
    answers = []
    for start in range(2):
        with (
            serve(tmp_path) as url,
            httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
        ):
            if start == 0:
                for file in visible:
                    enroll(http, file, person_id=file.parent.name)
            answers.append(ask(http, infrared[0], explain="true"))
            answers.append(http.get("/gallery").json())
    assert answers[:2] == answers[2:]
    assert len(answers[0]["results"]) == len(visible)


def test_recall_and_rescoring_both_run_on_a_default_query(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path], infrared: list[Path]
) -> None:
    app = create_app(
        load_settings(checkpoint=tiny_checkpoint, data_dir=tmp_path, runtime="torch", port=0)
    )

    async def scenario() -> None:
        async with app.router.lifespan_context(app) as state:
            assert state is not None
            given = dict(state)

            async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
                scope["state"] = given
                await app(scope, receive, send)

            counters = given["resources"].gallery.counters
            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                for file in visible[:3]:
                    await http.post("/gallery", files={"image": file.read_bytes()})
                before = (counters.recall_calls, counters.rescore_calls)
                image = {"image": infrared[0].read_bytes()}
                answer = (await http.post("/query", files=image)).json()
                assert len(answer["results"]) == 3
                after = (counters.recall_calls, counters.rescore_calls)
                assert after == (before[0] + 1, before[1] + 1)

    asyncio.run(scenario())

    async def started_again() -> None:
        again = create_app(
            load_settings(checkpoint=tiny_checkpoint, data_dir=tmp_path, runtime="torch", port=0)
        )
        async with again.router.lifespan_context(again) as state:
            assert state is not None
            gallery = dict(state)["resources"].gallery
            # Before anybody asks, a picture of each modality was searched for, which is no query.
            assert gallery.counters.recall_calls == gallery.counters.rescore_calls == 2
            assert [entry.action for entry in gallery.audit(10).entries] == ["query"]

    asyncio.run(started_again())


def shown(answer: httpx.Response) -> Image.Image:
    """The picture of an answer."""
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content))


def test_a_thumbnail_has_the_height_that_was_asked_for(
    http: httpx.Client, visible: list[Path]
) -> None:
    item = enroll(http, visible[0])
    path = f"/gallery/{item['id']}/image"
    for height in (64, 200, 512):
        answer = http.get(path, params={"height": height})
        small = shown(answer)
        assert answer.headers["content-type"] == "image/jpeg"
        assert small.size == (round(height * item["width"] / item["height"]), height)
        whole = Image.open(visible[0]).resize(small.size)
        assert np.abs(np.asarray(small, float) - np.asarray(whole, float)).mean() < 6
    for wrong in ("63", "513", "0", "-64", "64.5", "tall", ""):
        assert http.get(path, params={"height": wrong}).json()["code"] == "parameters_invalid"
    assert http.get(path, params={"width": 64}).status_code == 422
    assert http.get(path).content == visible[0].read_bytes()


@pytest.mark.parametrize("shape", [{"height": 64}, {}], ids=["thumbnail", "crop"])
def test_a_picture_is_kept_by_browsers_until_the_item_is_gone(
    http: httpx.Client, visible: list[Path], shape: dict[str, int]
) -> None:
    path = f"/gallery/{enroll(http, visible[1])['id']}/image"
    first = http.get(path, params=shape)
    tag = first.headers["etag"]
    # Never shown without asking: an erased item's picture would be.
    assert first.headers["cache-control"] == "private, no-cache"
    assert first.headers["vary"] == "Authorization"
    for known in (tag, f'"other", {tag}', "*", tag.removeprefix("W/")):
        again = http.get(path, params=shape, headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"] == "private, no-cache"
    for other in ({"height": 65}, {} if shape else {"height": 64}):
        answer = http.get(path, params=other, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.headers["etag"] != tag) == (200, True)
        assert answer.content
    http.delete(path.removesuffix("/image"))
    gone = http.get(path, params=shape, headers={"If-None-Match": tag})
    assert gone.json()["code"] == "item_not_found"


def test_thumbnails_of_infrared_show_what_was_stored(http: httpx.Client) -> None:
    ramp = np.tile(np.linspace(7000, 9000, 48), (96, 1)).astype(np.uint16)  # a twentieth of 16 bits
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    for polarity in ("white_hot", "black_hot"):
        fields = {"modality": "ir", "polarity": polarity}
        item = http.post("/gallery", files={"image": buffer.getvalue()}, data=fields).json()
        small = shown(http.get(f"/gallery/{item['id']}/image", params={"height": 96}))
        line = np.asarray(small.convert("L"), float)[48]
        assert line[2] < 40
        assert line[-3] > 215
        assert line[12] < line[24] < line[36]


def test_a_strip_is_no_way_to_make_the_service_draw_millions_of_pixels(
    http: httpx.Client, visible: list[Path]
) -> None:
    buffer = io.BytesIO()
    Image.open(visible[0]).resize((30_000, 32)).save(buffer, "PNG")
    item = http.post("/gallery", files={"image": buffer.getvalue()}).json()
    small = shown(http.get(f"/gallery/{item['id']}/image", params={"height": 512}))
    assert small.size == (2048, 2)


def test_probes_and_model_card(http: httpx.Client) -> None:
    assert http.get("/livez").json() == http.get("/readyz").json() == {"status": "ok"}
    card = http.get("/model").json()
    assert card["config"]["parts"] == 6
    assert (card["device"], card["runtime"], card["metric"]) == ("cpu", "torch", "euclidean")
    assert card["precision"]


def test_readyz_names_the_part_that_fails(serve: Serve, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serve(data) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        data.rename(tmp_path / "gone")
        answer = http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["code"] == "storage_moved"
        assert "data folder" in answer.json()["detail"]
        assert str(tmp_path) not in answer.text  # the route is open to everybody
        assert http.get("/livez").status_code == 200
        (tmp_path / "gone").rename(data)
        assert http.get("/readyz").status_code == 200


def test_docs_need_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(links) >= 3
    assert not re.search(r"https?://|(?:src|href)=\"//", page.text)
    for link in links:
        if link != "data:,":
            answer = http.get(f"/{link}")
            assert answer.status_code == 200
            assert len(answer.content) > 50
    assert http.get("/docs/nothing.js").json()["code"] == "route_not_found"


def test_openapi_documents_every_route_and_error(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    hidden = {
        ("GET", path) for path in ("/openapi.json", "/docs", "/docs/{asset}", "/", "/page/{path}")
    }
    assert set(operations) == set(ROUTE_SCOPES) - hidden
    for operation in operations.values():
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"]
    assert "422" in operations["POST", "/query"]["responses"]
    assert all(f"`{kind.code}`" in document["info"]["description"] for kind in catalogue())
    references = set(re.findall(r"#/components/schemas/(\w+)", http.get("/openapi.json").text))
    assert references <= set(document["components"]["schemas"])


def test_every_route_has_a_scope() -> None:
    routes = {
        (method, route.path_format)
        for module in (admin, backup, cameras, gallery, operate, page, query)
        for route in module.router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert routes | {("GET", "/openapi.json")} == set(ROUTE_SCOPES)


def test_a_full_gpu_is_told_and_refuses_what_fits_nowhere(
    faked: FakedDevice,
    serve: Serve,
    visible: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {"cpu": 2, "cuda": 2}
    for module in ("chunks", "features"):
        monkeypatch.setattr(f"service.gallery.index.{module}.CHUNK_ROWS", rows)
    monkeypatch.setattr("service.gallery.index.room._DEVICE_SHARE", 0)
    with (
        serve(tmp_path, device="cuda") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):

        def enroll(place: int) -> httpx.Response:
            return http.post("/gallery", files={"image": visible[place].read_bytes()})

        def query() -> dict[str, Any]:
            picture = {"image": visible[0].read_bytes()}
            answer: dict[str, Any] = http.post(
                "/query", files=picture, data={"debug": "true"}
            ).json()
            return answer

        assert [enroll(place).status_code for place in range(2)] == [201, 201]
        assert http.get("/readyz").json() == {"status": "ok"}
        assert "items_on_host" not in query()
        monkeypatch.setattr("service.gallery.index.features.device_room", lambda _: 0)
        assert [enroll(place).status_code for place in range(2, 4)] == [201, 201]
        assert http.get("/readyz").json() == {"status": "ok", "items_on_host": 2}
        before = query()
        assert (before["items_on_host"], before["searched"]) == (2, 4)
        assert "\ncmt_gallery_spilled_items 2.0\n" in http.get("/metrics").text
        monkeypatch.setattr("service.gallery.index.features.host_room", lambda: 0)
        refused = enroll(4)
        assert (refused.status_code, refused.json()["code"]) == (507, "gallery_full")
        batch = http.post(
            "/gallery/batch",
            files=[("image", visible[place].read_bytes()) for place in (4, 5)],
        )
        assert (batch.status_code, batch.json()["code"]) == (507, "gallery_full")
        assert http.get("/readyz").status_code == 200
        assert query()["results"] == before["results"]
