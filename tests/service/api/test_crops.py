"""Crops in an object storage, over HTTP: a service whose storage is there, hangs and comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from model import load_checkpoint
from model.cli import main
from service.gallery import Gallery
from service.gallery.backup.restore import restore
from service.gallery.storage import crops as crops_module
from service.gallery.storage import objects as objects_module
from tests.service.conftest import Serve
from tests.service.object_server import Bucket
from tests.service.processes import gauge, wait_for


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often for what is to be deleted."""
    monkeypatch.setattr(crops_module, "_CLEAN_SECONDS", 0.1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the storage little time, so that a test need not wait for it: see `served`."""
    monkeypatch.setattr(objects_module, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(objects_module, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(objects_module, "_REST_SECONDS", 0.5)


def served(call: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer once the storage, which is given little time, has answered in it."""

    def answered() -> httpx.Response | None:
        answer = call()
        return None if answer.status_code == 503 else answer

    found: httpx.Response = wait_for(answered, "the storage does not answer")
    return found


def enroll(http: httpx.Client, image: Path, **fields: str) -> httpx.Response:
    headers = {"Idempotency-Key": fields.pop("key")} if "key" in fields else {}
    files = {"image": image.read_bytes()}
    return http.post("/gallery", files=files, data=fields, headers=headers)


def test_a_service_whose_storage_hangs_says_so_and_goes_on_searching(
    serve: Serve,
    bucket: Bucket,
    visible: list[Path],
    tmp_path: Path,
    hasty: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings: dict[str, Any] = {"crops_url": bucket.url, "crops_inline_bytes": 0}
    with (
        serve(tmp_path / "data", **settings) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        fine = {"status": "ok", "crops": "ok"}
        wait_for(lambda: http.get("/readyz").json() == fine, "it is not ready")
        new = [partial(enroll, http, visible[n], person_id=f"p{n // 2}") for n in range(6)]
        ids = [served(one).json()["id"] for one in new]
        again = partial(enroll, http, visible[6], key="again")
        assert [served(again).status_code for _ in range(2)] == [201, 200]
        wait_for(lambda: len(bucket.objects()) == 7, "a repeat writes something")
        image = served(lambda: http.get(f"/gallery/{ids[0]}/image"))
        assert image.content in bucket.objects().values()
        small = served(lambda: http.get(f"/gallery/{ids[0]}/image", params={"height": 64}))
        assert small.headers["content-type"] == "image/jpeg"
        assert http.delete(f"/gallery/{ids[0]}").status_code in (202, 204)  # at once, or soon
        wait_for(lambda: len(bucket.objects()) == 6, "what was erased is not deleted")

        bucket.server.pause()
        try:
            refused = enroll(http, visible[7])
            assert (refused.status_code, refused.json()["code"]) == (503, "crops_unavailable")
            assert int(refused.headers["Retry-After"]) > 0
            plain = {"modulation": "false", "rerank": "none"}
            found = http.post("/query", files={"image": visible[1].read_bytes()}, data=plain)
            assert found.json()["results"][0]["item"]["id"] == ids[1]
            picture = http.get(f"/gallery/{ids[1]}/image")
            assert (picture.status_code, picture.json()["code"]) == (503, "crops_unavailable")
            assert http.get(f"/gallery/{ids[1]}").status_code == 200
            ready = http.get("/readyz")
            assert (ready.status_code, ready.json()["crops"]) == (200, "unavailable")
            assert gauge(http, "cmt_crops_unavailable") == 1
            one = http.delete(f"/gallery/{ids[1]}")
            assert (one.status_code, one.json()) == (202, {"deleted": 1, "pending": 1})
            one_more = ["gallery", "delete", ids[2], "--yes", "--url", url]
            assert main(one_more) == 0
            told = capsys.readouterr()
            assert "Deleted 1 item." in told.out
            assert "it still has 1 picture" in told.err
            rest = http.delete("/gallery", params={"person_id": "p1"})
            assert (rest.status_code, rest.json()) == (202, {"deleted": 1, "pending": 1})
            # And what may be there of the enrollment that was refused.
            wait_for(lambda: gauge(http, "cmt_objects_pending") == 4, "they are not counted")
        finally:
            bucket.server.resume()
        wait_for(lambda: len(bucket.objects()) == 3, "what was erased is not deleted")
        wait_for(lambda: http.get("/readyz").json()["crops"] == "ok", "it is not seen to be back")
        wait_for(lambda: gauge(http, "cmt_crops_unavailable") == 0, "it is said to be away")
        last = http.delete("/gallery", params={"person_id": "p2"})
        assert (last.status_code in (200, 202), last.json()["deleted"]) == (True, 2)
        wait_for(lambda: len(bucket.objects()) == 1, "what was erased is not deleted")
        assert http.get("/gallery").json()["total"] == 1
        assert served(lambda: enroll(http, visible[7])).status_code == 201


def test_objects_are_embedded_again_backed_up_and_restored(
    serve: Serve,
    bucket: Bucket,
    checkpoints: tuple[Path, Path],
    visible: list[Path],
    tmp_path: Path,
) -> None:
    data, backup = tmp_path / "data", tmp_path / "backup.zip"
    sizes = sorted(file.stat().st_size for file in visible)
    middle = sizes[len(sizes) // 2]  # some in the database, some in the bucket
    settings: dict[str, Any] = {"crops_url": bucket.url, "crops_inline_bytes": middle}
    with (
        serve(data, checkpoint=checkpoints[0], **settings) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        ids = [enroll(http, file).json()["id"] for file in visible]
        assert 0 < len(bucket.objects()) < len(visible)
        before = {item: http.get(f"/gallery/{item}/image").content for item in ids}
        http.post("/admin/reembed", json={"checkpoint": checkpoints[1].name})
        wait_for(lambda: http.get("/admin/reembed").json()["state"] != "running", "it hangs")
        assert http.get("/admin/reembed").json()["state"] == "done"
        answer = http.post("/admin/backup")
        backup.write_bytes(answer.content)
        assert answer.status_code == 200
    there = bucket.objects()
    restore(backup, tmp_path / "all-inside")
    _, info = load_checkpoint(checkpoints[1])
    with closing(Gallery.open(tmp_path / "all-inside", info)) as gallery:
        assert {item: gallery.image(item)[0] for item in ids} == before
        gallery.delete(ids[0])
    assert bucket.objects() == there  # a restored gallery has nothing to do with them
    # And into a place of its own, with another size.
    elsewhere = bucket.url.replace("/gate", "/restored")
    restore(backup, tmp_path / "all-outside")
    with closing(
        Gallery.open(tmp_path / "all-outside", info, crops_url=elsewhere, crops_inline_bytes=0)
    ) as gallery:
        assert sum(gallery.move_crops()) == len(ids)
        assert {item: gallery.image(item)[0] for item in ids} == before
    assert len(bucket.objects()) == len(there) + len(ids)
