"""What administrators do over HTTP: the audit log, retention, embedding again."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model import CMT, load_checkpoint, save_checkpoint
from service.auth.keys import KeyFile
from service.client import Client
from service.gallery import Gallery, NewItem
from service.gallery.storage.database import FILE_NAME
from service.images.decode import decode
from tests.conftest import alive
from tests.service.conftest import Serve
from tests.service.processes import gauge, wait_for


@pytest.fixture
def keyed(serve: Serve, tmp_path: Path) -> Iterator[tuple[httpx.Client, str]]:
    """A service with one key for everything, and the key's id."""
    file = KeyFile(tmp_path / "keys.json")
    key, token = file.create("all", ["query", "enroll", "admin"])
    with (
        serve(tmp_path / "data", api_keys_file=file.path) as url,
        httpx.Client(
            base_url=url, trust_env=False, timeout=60, headers={"Authorization": f"Bearer {token}"}
        ) as http,
    ):
        yield http, key.id


def test_the_log_says_who_did_what_and_names_no_person(
    keyed: tuple[httpx.Client, str], visible: list[Path], infrared: list[Path]
) -> None:
    http, key = keyed
    image = {"image": visible[0].read_bytes()}
    item = http.post("/gallery", files=image, data={"person_id": "Ms Secret"}).json()
    http.post("/query", files={"image": infrared[0].read_bytes()}, data={"person_id": "Ms Secret"})
    http.get("/gallery", params={"person_id": "Ms Secret"})
    http.get(f"/gallery/{item['id']}/image")
    http.patch(f"/gallery/{item['id']}", json={"camera_id": "c"})
    http.delete("/gallery", params={"person_id": "Ms Secret"})
    second = http.post("/gallery", files=image).json()
    http.delete(f"/gallery/{second['id']}")
    answer = http.get("/admin/audit")
    entries = answer.json()["entries"]
    assert {entry["actor"] for entry in entries} == {f"key:{key}"}
    actions = [entry["action"] for entry in reversed(entries)]
    assert actions == ["query", "list", "image", "update", "erase", "delete"]
    query, listed, read, changed, erased, deleted = reversed(entries)
    assert query["details"]["images"] == 1
    assert query["details"]["modality"] == "ir"
    assert query["details"]["persons"] == listed["details"]["persons"] == [erased["subject"]]
    assert (read["subject"], changed["subject"]) == (item["id"], item["id"])
    assert deleted["subject"] == second["id"]
    assert "Secret" not in answer.text
    page = http.get("/admin/audit", params={"limit": 2}).json()
    assert page["entries"][0]["action"] == "audit"
    rest = http.get("/admin/audit", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert rest["entries"][0]["number"] < page["entries"][-1]["number"]


def test_a_refused_request_is_not_an_act(keyed: tuple[httpx.Client, str]) -> None:
    http, _ = keyed
    http.post("/query", files={"image": b"no image"})
    http.get("/gallery", params={"limit": 0})
    assert http.get("/admin/audit").json()["entries"] == []


def test_what_is_too_old_goes(serve: Serve, tmp_path: Path, visible: list[Path]) -> None:
    with serve(tmp_path) as url, Client(url) as client:
        old = client.enroll(visible[0])
    days = 0.5 / 86400
    time.sleep(0.6)
    with serve(tmp_path, retention_days=days) as url, Client(url) as client:
        wait_for(lambda: client.list().total == 0, "it is not deleted")
        entries = client.audit().entries
        [deleted] = [entry for entry in entries if entry.action == "delete"]
        assert (deleted.actor, deleted.subject) == ("retention", old.id)


def test_retention_waits_for_a_clock_until_its_date_is_confirmed(
    serve: Serve, tmp_path: Path, visible: list[Path]
) -> None:
    with serve(tmp_path) as url, Client(url) as client:
        client.enroll(visible[0])
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as database:
        database.execute("UPDATE clock SET moment = moment + 86400 * 1000000")  # it ran tomorrow
        database.commit()
    days = 0.1 / 86400
    with (
        serve(tmp_path, retention_days=days) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        wait_for(lambda: gauge(http, "cmt_retention_waits") == 1, "retention does not say it waits")
        assert http.get("/gallery").json()["total"] == 1
        assert http.get("/readyz").is_success
    today = datetime.now(UTC).date()
    with serve(tmp_path, retention_days=days, clock_confirmed=today) as url, Client(url) as client:
        wait_for(lambda: client.list().total == 0, "it is not deleted")


def test_only_what_is_old_expires(tiny_checkpoint: Path, tmp_path: Path, visible: Any) -> None:
    _, info = load_checkpoint(tiny_checkpoint)
    gallery = Gallery.open(tmp_path, info)
    try:
        features = torch.randn(1, info.config.parts, info.config.dim)
        crop = decode(visible[0].read_bytes())
        first, second = (gallery.add([NewItem(crop)], features)[0] for _ in range(2))
        assert gallery.expire(datetime.now(UTC) - timedelta(days=1)) == 0
        assert gallery.expire(second.enrolled_at) == 1
        with pytest.raises(Exception, match=first.id):
            gallery.get(first.id)
        assert gallery.get(second.id) == second
    finally:
        gallery.close()


@pytest.fixture
def checkpoints(checkpoints: tuple[Path, Path]) -> tuple[Path, Path]:
    """Two checkpoints side by side, whose inputs and embeddings differ in size."""
    first, second = checkpoints
    _, info = load_checkpoint(first)
    torch.manual_seed(7)
    other = info.config.model_copy(update={"input_width": 64, "parts": 2})
    save_checkpoint(second, alive(CMT(other)).eval(), training={"dataset": "none"})
    return first, second


def wait(client: Client) -> str:
    wait_for(lambda: client.reembed_status().state != "running", "it is not embedded again")
    return client.reembed_status().state


def test_another_checkpoint_takes_over_while_the_service_goes_on(
    serve: Serve, tmp_path: Path, checkpoints: tuple[Path, Path], visible: list[Path]
) -> None:
    first, second = checkpoints
    old, new = (load_checkpoint(file)[1].fingerprint for file in checkpoints)
    with serve(tmp_path / "data", checkpoint=first) as url, Client(url) as client:
        ids = [client.enroll(file).id for file in visible]
        assert client.reembed_status().state == "idle"
        assert client.reembed("second.safetensors").checkpoint == new
        seen = set()
        while client.reembed_status().state == "running":
            answer = client.query(visible[0], modulation=False, top_k=1)
            seen.add(answer.model)
            assert answer.results[0].item.id == ids[0]
        assert wait(client) == "done"
        assert (client.reembed_status().done, seen - {old, new}) == (8, set())
        ids.append(client.enroll(visible[0]).id)
        answer = client.query(visible[3], modulation=False, top_k=1)
        assert (answer.model, answer.results[0].item.id) == (new, ids[3])
        assert client.model().fingerprint == new
        assert {item.model for item in client.list().items} == {new}
        client.ready()
    with serve(tmp_path / "data", checkpoint=second) as url, Client(url) as client:
        assert client.query(visible[3], top_k=1).searched == 9
        client.ready()


def test_a_service_started_with_another_checkpoint_embeds_again_on_demand(
    serve: Serve, tmp_path: Path, checkpoints: tuple[Path, Path], visible: list[Path]
) -> None:
    first, second = checkpoints
    with serve(tmp_path / "data", checkpoint=first) as url, Client(url) as client:
        for file in visible[:3]:
            client.enroll(file)
    with serve(tmp_path / "data", checkpoint=second) as url, Client(url) as client:
        assert client.query(visible[0]).searched == 0
        client.reembed()
        assert wait(client) == "done"
        assert client.query(visible[0]).searched == 3


@pytest.mark.parametrize(
    "name", ["../first.safetensors", "/etc/passwd", "second", ".hidden.safetensors", "a/b", ""]
)
def test_only_files_beside_the_checkpoint_can_be_named(http: httpx.Client, name: str) -> None:
    answer = http.post("/admin/reembed", json={"checkpoint": name})
    assert (answer.status_code, answer.json()["code"]) == (422, "parameters_invalid")


def test_a_file_that_is_no_checkpoint_changes_nothing(
    serve: Serve, tmp_path: Path, checkpoints: tuple[Path, Path], visible: list[Path]
) -> None:
    first, _ = checkpoints
    (first.parent / "broken.safetensors").write_bytes(b"no checkpoint")
    with (
        serve(tmp_path / "data", checkpoint=first) as url,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for name in ("broken.safetensors", "missing.safetensors"):
            answer = http.post("/admin/reembed", json={"checkpoint": name})
            assert (answer.status_code, answer.json()["code"]) == (422, "checkpoint_unusable")
        assert http.get("/readyz").status_code == 200
        assert http.get("/admin/reembed").json()["state"] == "idle"
