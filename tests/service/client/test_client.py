"""Both clients against a real service, and how they behave when it is busy or not there."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import time
import unicodedata
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from urllib.parse import unquote
from uuid import UUID

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.api.schemas import GalleryItem, ItemPatch, ListParameters, QueryForm
from service.auth.keys import KeyFile
from service.client import (
    AsyncClient,
    BatchItem,
    Client,
    Entry,
    InvalidValue,
    OtherGallery,
    ServiceProblem,
    Unreachable,
    spread,
)
from service.client.requests import (
    LONGEST_WAIT,
    ListFields,
    PatchFields,
    QueryFields,
    camera_path,
    item_path,
    wait_before_retry,
)
from service.client.stream import SENDERS
from tests.service.conftest import Serve
from tests.service.processes import ServiceProcess, wait_for


def test_every_verb(url: str, visible: list[Path], infrared: list[Path]) -> None:
    when = datetime(2026, 3, 1, 13, 5, tzinfo=UTC)
    with Client(url) as client:
        client.ready()
        item = client.enroll(
            visible[0],
            person_id="1",
            camera_id="gate",
            captured_at=when,
            modality="rgb",
            box=(2, 3, 40, 80),
            metadata={"note": "ü"},
            idempotency_key="k",
        )
        assert (item.captured_at, item.metadata, item.width) == (when, {"note": "ü"}, 40)
        other = client.enroll(visible[1].read_bytes(), person_id="2")
        assert client.get(item.id) == item
        page = client.list(person_id=["1", "2"], limit=1)
        assert (page.total, page.items) == (2, [item])
        rest = client.list(person_id=["1", "2"], limit=1, cursor=page.next_cursor)
        assert (rest.items, rest.next_cursor) == ([other], None)
        answer = client.query(
            [infrared[0], infrared[1]], explain=True, debug=True, top_k=1, rerank="k_reciprocal",
            prior=0.1,
        )  # fmt: skip
        assert (answer.rerank, answer.match) == ("k_reciprocal", None)  # without a calibration
        assert answer.query.images == 2
        assert len(answer.results) == 1
        assert answer.timings_ms is not None
        assert answer.model == client.model().fingerprint == item.model
        assert client.query(infrared[0], person_id=["2"]).results[0].item == other
        camera = client.set_camera("door/1", modality="ir", polarity="black_hot")
        assert client.camera("door/1") == camera
        assert client.cameras() == [camera]
        answer = client.query(visible[0], query_camera_id="door/1")
        assert (answer.query.modality_source, answer.query.polarity) == ("camera", "black_hot")
        inverted = client.enroll(visible[0], camera_id="door/1", polarity="white_hot")
        assert (inverted.modality_source, inverted.polarity) == ("camera", "white_hot")
        client.delete_camera("door/1")
        with pytest.raises(ServiceProblem, match="GET /cameras lists"):
            client.camera("door/1")
        client.delete(inverted.id)
        data, media_type = client.image(other.id)
        assert (data, media_type) == (visible[1].read_bytes(), "image/jpeg")
        small, _ = client.image(other.id, height=64)
        assert Image.open(io.BytesIO(small)).height == 64
        client.delete(other.id)
        assert client.erase("1") == 1
        with pytest.raises(ServiceProblem) as raised:
            client.get(item.id)
        assert (raised.value.status, raised.value.code) == (404, "item_not_found")


def test_every_verb_as_coroutines(url: str, visible: list[Path], infrared: list[Path]) -> None:
    async def scenario() -> None:
        async with AsyncClient(url) as client:
            await client.ready()
            items = await asyncio.gather(
                *(client.enroll(file, person_id=file.parent.name) for file in visible[:3])
            )
            assert (await client.list()).total == 3
            assert await client.get(items[0].id) == items[0]
            camera = await client.set_camera("door", polarity="black_hot")
            assert await client.camera("door") == camera
            assert await client.cameras() == [camera]
            turned = await client.query(infrared[0], query_camera_id="door")
            assert turned.query.polarity == "black_hot"
            await client.delete_camera("door")
            assert await client.cameras() == []
            answer = await client.query(infrared[0], modulation=False, rerank="none", prior=0.1)
            assert len(answer.results) == 3
            assert answer.model == (await client.model()).fingerprint
            assert (await client.image(items[0].id))[0] == visible[0].read_bytes()
            small, _ = await client.image(items[0].id, height=64)
            assert Image.open(io.BytesIO(small)).height == 64
            await client.delete(items[0].id)
            for item in items[1:]:
                assert await client.erase(item.person_id or "") == 1
            with pytest.raises(ServiceProblem, match="GET /gallery lists"):
                await client.get(items[0].id)

    asyncio.run(scenario())


def test_a_path_may_be_text(url: str, visible: list[Path]) -> None:
    crop = str(visible[0])
    with Client(url) as client:
        item = client.enroll(crop, person_id="by text")
        [streamed] = client.enroll_many([Entry(crop, BatchItem(person_id="by text"))])
        one, two = client.query(crop), client.query([crop, visible[0]])
        client.erase("by text")
    assert streamed.item is not None
    assert (streamed.status, streamed.item.sha256) == (201, item.sha256)
    assert (one.query.images, two.query.images) == (1, 2)


def test_a_key_is_sent(serve: Serve, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, token = file.create("desk", ["query"])
    with serve(tmp_path / "data", api_keys_file=file.path) as url:
        with Client(url) as client, pytest.raises(ServiceProblem, match="cmt keys create"):
            client.list()
        with Client(url, api_key=token) as client:
            assert client.list().total == 0


HOSTILE_IDS = (
    "", ".", "..", "%2e%2e", "%2E", "batch", "..%2fgallery", "../gallery?person_id=x", "a/b", "a#b",
    "a?b", "a\\b", "a\nb", "a\0b", "a b", "\udcff", "http://elsewhere/", "//elsewhere/x",
    "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10/../x", "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10\n",
)  # fmt: skip
ITEM_ID = "0198c6f2-7d3e-7a55-9b0e-3f1f6f6f2a10"


def sent_to() -> tuple[list[tuple[str, bytes]], httpx.MockTransport]:
    """Method and target of what is sent through a transport that answers {}, or that it is gone."""
    seen: list[tuple[str, bytes]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.method, request.url.raw_path))
        if request.method == "DELETE" and not request.url.query:
            return httpx.Response(204)
        return httpx.Response(200, content=b"{}", headers={"Content-Type": "image/jpeg"})

    return seen, httpx.MockTransport(answer)


def test_an_id_goes_to_its_own_route() -> None:
    seen, transport = sent_to()
    with Client("http://service/prefix", transport=transport) as client:
        client.delete(ITEM_ID)
        client.image(ITEM_ID.upper())
        client.drop_version("3f1f" * 16)
        with pytest.raises(Unreachable):  # which is no answer of a service
            client.erase("../gallery?person_id=y&x#z")
    assert seen == [
        ("DELETE", f"/prefix/gallery/{ITEM_ID}".encode()),
        ("GET", f"/prefix/gallery/{ITEM_ID.upper()}/image".encode()),
        ("DELETE", b"/prefix/admin/versions/" + b"3f1f" * 16),
        ("DELETE", b"/prefix/gallery?person_id=..%2Fgallery%3Fperson_id%3Dy%26x%23z"),
    ]


@pytest.mark.parametrize("text", HOSTILE_IDS)
def test_what_is_no_id_is_not_sent(text: str) -> None:
    seen, transport = sent_to()
    with Client("http://service", transport=transport) as client:
        for verb in (client.get, client.image, client.delete, client.update, client.drop_version):
            with pytest.raises(InvalidValue, match="is no"):
                verb(text)

    async def scenario() -> None:
        async with AsyncClient("http://service", transport=transport) as client:
            for verb in (client.get, client.image, client.delete, client.update):
                with pytest.raises(InvalidValue, match="is no"):
                    await verb(text)
            with pytest.raises(InvalidValue, match="is no"):
                await client.drop_version(text)

    asyncio.run(scenario())
    assert seen == []


@settings(deadline=None)
@given(st.text() | st.uuids().map(str) | st.text("0123456789abcdefABCDEF-/.%\n", max_size=38))
def test_an_item_is_asked_for_by_exactly_its_id_or_not_at_all(text: str) -> None:
    try:
        path = item_path(text)
    except InvalidValue:
        with suppress(ValueError):
            assert str(UUID(text)) != text.lower()
        return
    assert httpx.URL("http://service").join(path).raw_path == f"/gallery/{text}".encode()
    assert set(text) <= set("0123456789abcdefABCDEF-")


@settings(deadline=None)
@given(st.text(max_size=20) | st.text("./%2eE?#a\\", max_size=6))
@example("a/../b")
@example("%2f..")
@example("gate 3/north ä?x=1#y%41")
def test_a_camera_is_asked_for_by_exactly_its_label(text: str) -> None:
    try:
        path = camera_path(text)
    except ValueError:
        return
    target = httpx.URL("http://service").join(path).raw_path.decode()
    room, name = target.rsplit("/", 1)  # one segment, whatever proxy resolves it
    assert room == "/cameras"
    assert not set("?#") & set(name)
    assert unicodedata.normalize("NFC", text) == unquote(name)
    assert not {".", ".."} & set(unquote(name).split("/"))


def test_texts_that_no_request_can_carry_are_refused(tmp_path: Path) -> None:
    seen, transport = sent_to()
    pipe = tmp_path / "live.jpg"
    os.mkfifo(pipe)
    with Client("http://service", transport=transport) as client:
        for person in ("", "J\udcfcrgen"):
            with pytest.raises(InvalidValue):
                client.erase(person)
        with pytest.raises(InvalidValue, match="is no UTF-8 text"):
            client.enroll(b"image", person_id="J\udcfcrgen")
        with pytest.raises(InvalidValue, match="the idempotency key"):
            client.enroll(b"image", idempotency_key="a\r\nX-Other: b")
        with pytest.raises(OSError, match="is a pipe, not a file"):
            client.query(pipe)
    for key in ("", "cmt_x\n", "ключ"):
        with pytest.raises(InvalidValue, match="the API key"):
            Client("http://service", api_key=key)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="no request is answered in"):
            Client("http://service", request_timeout=seconds)
    assert seen == []


def test_a_time_limit_goes_with_every_upload() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("X-Request-Timeout"))
        return httpx.Response(504)

    async def scenario() -> None:
        transport = httpx.MockTransport(answer)
        async with AsyncClient(
            "http://service", request_timeout=2.5, transport=transport
        ) as client:
            with pytest.raises(ServiceProblem):
                await client.query(b"image")

    asyncio.run(scenario())
    with (
        Client("http://service", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(ServiceProblem),
    ):
        client.query(b"image")
    assert seen == ["2.5", None]


def busy_until(free_at: float, header: dict[str, str]) -> httpx.MockTransport:
    """A server that is busy until a moment: the one thing that a real one cannot be told to be."""

    def answer(request: httpx.Request) -> httpx.Response:
        if time.monotonic() < free_at:
            problem = {
                "title": "Overloaded",
                "status": 429,
                "code": "overloaded",
                "detail": "try again",
                "instance": "/",
            }
            return httpx.Response(429, json=problem, headers=header)
        return httpx.Response(200, json={"items": [], "next_cursor": None, "total": 0})

    return httpx.MockTransport(answer)


def test_busy_is_waited_for_as_long_as_the_server_says() -> None:
    transport = busy_until(time.monotonic() + 0.5, {"Retry-After": "0.2"})
    with Client("http://service", transport=transport) as client:
        assert client.list().total == 0

    async def scenario() -> None:
        transport = busy_until(time.monotonic() + 0.5, {"Retry-After": "0.2"})
        async with AsyncClient("http://service", transport=transport) as client:
            assert (await client.list()).total == 0

    asyncio.run(scenario())


def test_busy_is_not_waited_for_without_a_time_or_for_ever() -> None:
    never = time.monotonic() + 1000
    with Client("http://service", transport=busy_until(never, {})) as client:
        with pytest.raises(ServiceProblem) as raised:
            client.list()
        assert raised.value.code == "overloaded"
    transport = busy_until(never, {"Retry-After": "0.01"})
    with (
        Client("http://service", retries=2, transport=transport) as client,
        pytest.raises(ServiceProblem),
    ):
        client.list()


def test_those_refused_together_do_not_come_back_together() -> None:
    refused = httpx.Response(429, headers={"Retry-After": "2"})
    waits = [wait_before_retry(refused, 0, 1) for _ in range(50)]
    assert all(wait is not None and 2 <= wait <= 3 for wait in waits)
    assert len(set(waits)) > 40
    long = httpx.Response(503, headers={"Retry-After": "1000"})
    assert wait_before_retry(long, 0, 1) == LONGEST_WAIT


def test_a_time_to_wait_may_be_a_date_and_need_not_be_sensible() -> None:
    def wait(text: str) -> float | None:
        return wait_before_retry(httpx.Response(503, headers={"Retry-After": text}), 0, 1)

    later = format_datetime(datetime.now(UTC) + timedelta(seconds=12), usegmt=True)
    assert 10 < (wait(later) or 0) <= 18
    assert wait("0") == wait("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert wait("1e9") == LONGEST_WAIT
    for text in ("", "-5", "inf", "nan", "soon", "Thu, 99 Jan 1970 00:00:00 GMT"):
        assert wait(text) is None


def test_no_service_is_a_sentence() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable, match="cmt serve"):
        client.list()

    async def scenario() -> None:
        async with AsyncClient("http://127.0.0.1:9") as client:
            await client.list()

    with pytest.raises(Unreachable, match="cmt serve"):
        asyncio.run(scenario())


def test_files_that_had_no_time_left_in_their_batch_are_sent_alone(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    with (
        serve(tmp_path / "data", decode_budget=1e-6, decode_processes=1) as url,
        Client(url) as client,
    ):
        results = client.enroll_batch([file.read_bytes() for file in visible])
        codes = [one.problem.code for one in results if one.problem is not None]
        assert codes == ["decode_budget_spent"] * (len(visible) - 1)
        sent = client.enroll_many(Entry(file) for file in visible)
        assert all(result.item is not None for result in sent)
        assert client.list().total == len(visible) + 1


def crops(visible: list[Path], taken: list[int]) -> Iterator[Entry]:
    """A stream that says how far it was read: crops, a file that is missing and one that is bad."""
    for number in range(12):
        taken.append(number)
        image: Path | bytes = visible[number % 8]
        if number == 3:
            image = Path("missing.jpg")
        elif number == 5:
            image = b"\x89PNG\r\n\x1a\nrest"
        elif number % 2:
            image = visible[number % 8].read_bytes()
        yield Entry(image, BatchItem(person_id=f"{number}"))


def test_a_stream_is_enrolled_as_it_is_read_and_can_be_sent_again(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    with serve(tmp_path / "data") as url, Client(url) as client:
        taken: list[int] = []
        results = client.enroll_many(crops(visible, taken), per_request=2)
        first = next(results)
        # What is sent at the same time and one request more is all that was taken.
        assert len(taken) <= 2 * (SENDERS + 1)
        assert client.get(first.item.id if first.item else "").person_id == "0"
        results.close()  # interrupted
        so_far = client.list().total
        assert so_far < 12

        taken.clear()
        every = list(client.enroll_many(crops(visible, taken), per_request=2))
        assert [one.entry.item.person_id for one in every] == [str(n) for n in range(12)]
        assert [one.status for one in every].count(200) == so_far
        assert (every[3].status, every[3].reason) == (None, "No such file or directory")
        assert (every[5].status, every[5].code) == (422, "image_undecodable")
        assert [one.reason for one in every if one.item is None] == [
            every[3].reason,
            every[5].reason,
        ]
        assert client.list().total == 10

        async def again(stream: Iterator[Entry]) -> None:
            async def slowly() -> AsyncIterator[Entry]:
                for entry in stream:
                    await asyncio.sleep(0)
                    yield entry

            async with AsyncClient(url) as other:
                same = [one async for one in other.enroll_many(slowly(), per_request=5)]
                assert [one.item for one in same] == [one.item for one in every]
                assert {one.status for one in same if one.item is not None} == {200}
                listed = other.enroll_many([Entry(visible[0], BatchItem(key="own"))])
                assert [one.status async for one in listed] == [201]

        asyncio.run(again(crops(visible, taken)))
        assert client.list().total == 11


def test_a_stream_stops_where_nothing_more_can_be_enrolled(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, token = file.create("desk", ["query"])
    taken: list[int] = []
    with (
        serve(tmp_path / "data", api_keys_file=file.path) as url,
        Client(url, api_key=token) as client,
        pytest.raises(ServiceProblem) as raised,
    ):
        list(client.enroll_many(crops(visible, taken), per_request=1))
    assert raised.value.status == 403
    assert len(taken) < 12


def test_a_busy_service_is_waited_for_longer_by_a_stream() -> None:
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        results = [{"status": 201}]  # whatever was enrolled
        busy = httpx.Response(429, headers={"Retry-After": "0.001"})
        return busy if asked <= 30 else httpx.Response(200, json={"results": results})

    with Client("http://service", retries=5, transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(ServiceProblem):
            client.enroll(b"image")
        assert asked == 6
        [result] = client.enroll_many([Entry(b"image")])
    assert (result.status, asked) == (201, 31)


def embeds(service: ServiceProcess) -> bool:
    """Whether a service has embedded an upload."""
    with service.client() as http:
        return 'cmt_stage_seconds_count{stage="embed"}' in http.get("/metrics").text


def test_a_stream_goes_on_where_one_of_its_services_is_killed(
    serve: Serve, tiny_checkpoint: Path, tmp_path: Path, visible: list[Path], postgres_url: str
) -> None:
    def entries() -> Iterator[Entry]:
        return (Entry(visible[n % 8], BatchItem(person_id=f"{n}")) for n in range(80))

    other = ServiceProcess(tmp_path / "other", tiny_checkpoint, database_url=postgres_url)
    with serve(tmp_path / "data", database_url=postgres_url) as url, Client(url) as client, other:
        with Client(other.url) as second:
            results = []
            for result in client.enroll_many(entries(), per_request=2, others=[second]):
                results.append(result)
                if len(results) == 20:
                    wait_for(lambda: embeds(other), "it does not do its share")
                    other.kill()
            assert [one.entry.item.person_id for one in results] == [f"{n}" for n in range(80)]
            assert all(one.item is not None for one in results)
            assert client.list().total == 80
            # The one that is gone may also be named first, and by the other client.
            again = list(second.enroll_many(entries(), others=[client]))
            assert {one.status for one in again} == {200}

        async def async_again() -> set[int | None]:
            async with AsyncClient(other.url) as gone, AsyncClient(url) as there:
                stream = gone.enroll_many(entries(), per_request=5, others=[there])
                return {one.status async for one in stream}

        assert asyncio.run(async_again()) == {200}
    with Client(url) as gone, Client(other.url) as too, pytest.raises(Unreachable):
        list(gone.enroll_many(entries(), others=[too]))


def test_a_stream_goes_on_where_one_of_its_services_is_stopped(
    serve: Serve, tmp_path: Path, visible: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "_LEAST_WAIT", 0.5)
    never = httpx.Timeout(None)
    with (
        socket.create_server(("127.0.0.1", 0)) as stopped,  # takes all, says nothing
        serve(tmp_path / "data") as url,
        Client(url) as client,
        Client(f"http://127.0.0.1:{stopped.getsockname()[1]}", timeout=never) as other,
    ):
        entries = (Entry(visible[n % 8], BatchItem(person_id=f"{n}")) for n in range(24))
        results = list(client.enroll_many(entries, per_request=2, others=[other]))
        stopped.settimeout(0)
        stopped.accept()[0].close()  # it was asked
    assert [one.status for one in results] == [201] * 24


def test_a_stream_is_not_divided_between_two_galleries(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    entries = [Entry(file) for file in visible]
    with (
        serve(tmp_path / "one") as url, serve(tmp_path / "two") as elsewhere,
        Client(url) as client, Client(elsewhere) as other,
    ):  # fmt: skip
        with pytest.raises(OtherGallery, match="share a database"):
            list(client.enroll_many(entries, per_request=1, others=[other]))
        assert client.list().total > 0
        assert other.list().total == 0
        # Nor where the other one has the same pictures, which it keeps.
        assert all(one.item is not None for one in other.enroll_many(entries))
        with pytest.raises(OtherGallery):
            list(client.enroll_many(entries, others=[other], per_request=1))
        assert other.list().total == len(entries)


def test_a_busy_service_leaves_its_share_to_another() -> None:
    answered = {"busy": 0, "other": 0}

    def answer(request: httpx.Request) -> httpx.Response:
        answered[request.url.host] += 1
        if request.url.host == "busy" and answered["busy"] > 1:
            return httpx.Response(502, text="a proxy whose service has ended")
        count = request.content.count(b'; name="image"')
        item = GalleryItem(
            id=ITEM_ID, person_id=None, camera_id=None, captured_at=None,
            enrolled_at=datetime(2026, 1, 1, tzinfo=UTC), modality="rgb", modality_source="given",
            polarity=None, width=16, height=32, bit_depth=8, sha256="0" * 64, metadata={},
            model="0" * 64,
        )  # fmt: skip
        results = [{"status": 200, "item": item.model_dump(mode="json")}] * count
        return httpx.Response(200, json={"results": results})

    transport = httpx.MockTransport(answer)
    with (
        Client("http://busy", transport=transport) as busy,
        Client("http://other", transport=transport) as other,
    ):
        entries = [Entry(b"image %d" % n) for n in range(6)]
        results = list(busy.enroll_many(entries, per_request=1, others=[other], senders=1))
    assert {one.status for one in results} == {200}
    assert answered["other"] >= 6  # a crop for comparison, and five of six


def test_the_clients_name_every_field_of_the_api() -> None:
    assert {*QueryFields.__annotations__, "box"} == set(QueryForm.model_fields)
    assert set(ListFields.__annotations__) == set(ListParameters.model_fields)
    assert set(PatchFields.__annotations__) == set(ItemPatch.model_fields)
