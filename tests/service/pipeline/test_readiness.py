"""Ready means that an image really comes through; the audit log survives a disk that is full."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from pathlib import Path

import httpx
import pytest
import torch

from model import CMT, load_checkpoint, save_checkpoint
from service.api import operate
from service.errors import DatabaseUnavailable, MemoryExhausted, NotReady, StorageFull
from service.gallery import Act, Gallery
from service.gallery.storage.database import FILE_NAME
from service.images.decode import Picture
from service.pipeline import self_check as pulse
from service.pipeline.audit_writer import AuditWriter
from service.pipeline.self_check import SelfCheck
from tests.service.conftest import Serve
from tests.service.processes import ServiceProcess


def test_a_checkpoint_that_gives_no_numbers_is_never_ready(
    serve: Serve, tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    _, info = load_checkpoint(tiny_checkpoint)
    torch.manual_seed(1)
    broken = CMT(info.config).eval()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(1e30)
    file = tmp_path / "overflowing.safetensors"
    save_checkpoint(file, broken, training={"dataset": "none"})
    with (
        serve(tmp_path / "data", checkpoint=file) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        answer = http.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert "not finite" in answer.json()["detail"]
        assert http.get("/livez").status_code == 200
        refused = http.post("/gallery", files={"image": visible[0].read_bytes()})
        assert (refused.status_code, refused.json()["code"]) == (500, "embedding_failed")
        assert http.get("/gallery").json()["total"] == 0


def test_a_check_that_waits_for_the_database_is_given_up_and_no_defect(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits, ended = threading.Event(), threading.Event()

    def check(_: Gallery) -> None:
        waits.set()
        ended.wait(60)
        raise DatabaseUnavailable("the connection is cut")

    def refuse_stale(_: Gallery) -> None:
        if waits.is_set():
            raise DatabaseUnavailable("the database does not answer in time")

    with serve(tmp_path) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        assert http.get("/readyz").status_code == 200
        monkeypatch.setattr(operate, "_PATIENCE", 0.1)
        monkeypatch.setattr(Gallery, "check", check)
        monkeypatch.setattr(Gallery, "refuse_stale", refuse_stale)
        answer = http.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert "in time" in answer.json()["detail"]
        ended.set()
    gc.collect()  # which would tell of an error that nobody asked for
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_readiness_follows_the_last_image(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = []

    async def embed(picture: Picture) -> None:
        assert picture.data.startswith(b"\x89PNG")
        if errors:
            raise errors[0]

    async def work() -> None:
        heart = SelfCheck(embed)
        with pytest.raises(NotReady, match="no image has been embedded yet"):
            heart.check()
        await heart.beat()
        heart.check()
        errors.append(MemoryExhausted("there is no memory to embed one image"))
        await heart.beat()
        with pytest.raises(NotReady, match="no memory to embed one image"):
            heart.check()
        errors.clear()
        await heart.beat()
        heart.check()
        monkeypatch.setattr(pulse, "_LATE", 0.05)
        await asyncio.sleep(0.1)
        with pytest.raises(NotReady, match="decoding or the network hangs"):
            heart.check()

    asyncio.run(work())


def test_a_service_whose_folder_is_moved_acknowledges_nothing_until_it_is_back(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path]
) -> None:
    folder, away = tmp_path / "data", tmp_path / "away"

    def enroll(http: httpx.Client, number: int) -> httpx.Response:
        return http.post("/gallery", files={"image": visible[number].read_bytes()})

    with ServiceProcess(folder, tiny_checkpoint) as service, service.client() as http:
        first = enroll(http, 0).json()["id"]
        folder.rename(away)
        for answer in (enroll(http, 1), http.get("/readyz"), http.delete(f"/gallery/{first}")):
            assert (answer.status_code, answer.json()["code"]) == (503, "storage_moved")
            assert "moved or removed" in answer.json()["detail"]
        found = http.post("/query", files={"image": visible[0].read_bytes()})
        assert found.is_success, found.text
        assert not folder.exists()  # nothing was made in its place
        away.rename(folder)
        assert http.get("/readyz").is_success
        third = enroll(http, 2)
        assert third.status_code == 201
        (folder / FILE_NAME).unlink()
        assert enroll(http, 3).json()["code"] == "storage_moved"
        assert http.get("/readyz").status_code == 503
        assert {item["id"] for item in http.get("/gallery").json()["items"]} == {
            first,
            third.json()["id"],
        }


class FullDisk:
    """A gallery whose disk is full until it is told otherwise."""

    def __init__(self) -> None:
        self.full = True
        self.acts: list[Act] = []

    def record(self, *acts: Act) -> None:
        if self.full:
            raise StorageFull("no space")
        self.acts += acts


def test_entries_of_the_audit_log_wait_for_the_disk_in_their_order() -> None:
    gallery, failures = FullDisk(), [0]

    def failed() -> None:
        failures[0] += 1

    async def work() -> None:
        writer = AuditWriter(gallery, failed)  # type: ignore[arg-type]
        await writer.note(Act("a", "query"))
        await writer.note(Act("b", "query"))
        assert (gallery.acts, failures[0]) == ([], 2)
        gallery.full = False
        await writer.note(Act("c", "query"))
        writer.close()

    asyncio.run(work())
    assert [act.actor for act in gallery.acts] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("trusted", "address"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.9")]
)
def test_forwarded_headers_are_believed_from_configured_proxies_only(
    serve: Serve, tmp_path: Path, trusted: tuple[str, ...], address: str
) -> None:
    forged = {"X-Forwarded-For": "203.0.113.9"}
    with (
        serve(tmp_path, trusted_proxies=trusted) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60, headers=forged) as http,
    ):
        assert http.get("/gallery").status_code == 200
        [entry] = http.get("/admin/audit").json()["entries"]
        assert entry["actor"] == f"address:{address}"
