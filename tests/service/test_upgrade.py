"""What an earlier release left opens with this one: the data folder, its keys, its backup."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from model import load_checkpoint
from service.gallery import Filters, Gallery
from service.gallery.backup.backup import offline
from service.gallery.backup.restore import restore
from tests.paths import DATA, MINI
from tests.service.processes import ServiceProcess, assert_no_defect

RELEASES = sorted(folder.name for folder in (DATA / "releases").iterdir() if folder.is_dir())
# bf16 on one machine and fp32 on another give a query other digits.
CLOSE = 0.01


class Left(NamedTuple):
    """What a release left, copied. told: what it answered."""

    folder: Path
    told: dict[str, Any]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def serve(self, data: Path) -> ServiceProcess:
        """This release's service on a data folder, with the earlier one's checkpoint and keys."""
        return ServiceProcess(data, self.checkpoint, api_keys_file=self.folder / "keys.json")

    def gallery(self, data: Path) -> Gallery:
        return Gallery.open(data, load_checkpoint(self.checkpoint)[1])


@pytest.fixture(params=RELEASES)
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Left:
    folder = tmp_path / "left"
    shutil.copytree(DATA / "releases" / request.param, folder)
    return Left(folder, json.loads((folder / "told.json").read_text()))


def answers(http: httpx.Client, left: Left) -> dict[str, dict[str, float]]:
    """The searches of the release again → distances by item."""
    found = {}
    for modulation in left.told["answers"]:
        answer = http.post(
            "/query",
            files={"image": (MINI / left.told["query"]).read_bytes()},
            data={"modulation": modulation, "modality": "ir", "top_k": "100"},
        )
        assert answer.status_code == 200, answer.text
        results = answer.json()["results"]
        found[modulation] = {one["item"]["id"]: one["distance"] for one in results}
    return found


def assert_same_items(items: list[dict[str, Any]], left: Left) -> None:
    """All items with all that the release said of them, and no other."""
    found = {item["id"]: item for item in items}
    assert found.keys() == {item["id"] for item in left.told["items"]}
    for item in left.told["items"]:
        assert item.items() <= found[item["id"]].items()


def assert_all_is_there(http: httpx.Client, left: Left) -> None:
    assert_same_items(http.get("/gallery", params={"limit": 1000}).json()["items"], left)
    for item in left.told["items"]:
        assert http.get(f"/gallery/{item['id']}/image").content
        assert http.get(f"/gallery/{item['id']}").json()["person_id"] == item["person_id"]
    for gone in left.told["gone"]:
        assert http.get(f"/gallery/{gone}").status_code == 404
    for modulation, distances in answers(http, left).items():
        assert distances == pytest.approx(left.told["answers"][modulation], rel=CLOSE)
    assert (http.get("/cameras/dome").status_code == 200) is left.told["cameras"]


def test_a_service_goes_on_with_the_folder_and_the_keys(left: Left) -> None:
    with left.serve(left.data) as service, service.client(left.told["key"]) as http:
        assert_all_is_there(http, left)
        actions = [one["action"] for one in http.get("/admin/audit?limit=1000").json()["entries"]]
        assert actions[-len(left.told["audit"]) :] == left.told["audit"]
        # The release's idempotency keys still hold: what a client sends again is no second item.
        first = left.told["first"]
        repeated = http.post(
            "/gallery",
            files={"image": (MINI / first["crop"]).read_bytes()},
            data=first["fields"],
            headers={"Idempotency-Key": left.told["request_key"]},
        )
        assert (repeated.status_code, repeated.json()["id"]) == (200, first["id"])
        added = http.post("/gallery", files={"image": (MINI / left.told["query"]).read_bytes()})
        assert added.status_code == 201
        assert service.client().get("/gallery").status_code == 401
        assert_no_defect(service)


def test_a_backup_before_the_first_start_restores(left: Left, tmp_path: Path) -> None:
    backup, restored = tmp_path / "before.zip", tmp_path / "restored"
    with offline(left.data) as backups:
        backups.write(backup, actor="test")
    restore(backup, restored, actor="test")
    with closing(left.gallery(restored)) as gallery:
        gallery.check()
        assert gallery.awaiting == 0
        found = gallery.list(Filters(), 1000).items
        assert {item.id for item in found} == {item["id"] for item in left.told["items"]}
        images = {item.id: gallery.image(item.id) for item in found}
    with closing(left.gallery(left.data)) as gallery:
        assert {item: gallery.image(item) for item in images} == images


def test_the_release_s_own_backup_restores_and_is_served(left: Left, tmp_path: Path) -> None:
    restored = tmp_path / "restored"
    manifest = restore(left.folder / "backup.zip", restored, actor="test")
    assert manifest.counts["items"] == len(left.told["items"])
    with left.serve(restored) as service, service.client(left.told["key"]) as http:
        assert_all_is_there(http, left)
        assert_no_defect(service)
