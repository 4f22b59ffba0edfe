"""Checkpoints whose features the gallery holds: listed, and dropped when they are out of use."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from torch import Tensor

from model import load_checkpoint
from model.cli import main
from service.auth.keys import KeyFile
from service.client import AsyncClient, Client, ServiceProblem
from service.embedding.embedder import Embedder
from service.errors import ModelVersionConflict
from service.gallery import Gallery, NewItem
from service.images.decode import Crop, decode
from tests.service.conftest import Serve
from tests.service.processes import wait_for


def fingerprints(checkpoints: Sequence[Path]) -> list[str]:
    return [load_checkpoint(file)[1].fingerprint for file in checkpoints]


def switch(client: Client, name: str) -> None:
    """Embed the gallery with the checkpoint `name`, and wait until it is in use."""
    client.reembed(name)
    wait_for(lambda: client.reembed_status().state == "done", "it is not embedded again")
    wait_for(lambda: client.model().fingerprint == client.versions()[-1].fingerprint, "no switch")


def test_an_old_version_is_listed_and_dropped(
    serve: Serve, tmp_path: Path, checkpoints: tuple[Path, Path], visible: list[Path]
) -> None:
    old, new = fingerprints(checkpoints)
    with serve(tmp_path / "data", checkpoint=checkpoints[0]) as url, Client(url) as client:
        ids = [client.enroll(file).id for file in visible[:3]]
        [only] = client.versions()
        assert (only.fingerprint, only.state, only.embedded) == (old, "active", 3)
        assert only.configuration is not None
        assert only.configuration["dim"] == 16
        switch(client, "second.safetensors")
        client.enroll(visible[3])
        listed = [(one.fingerprint, one.state, one.embedded) for one in client.versions()]
        assert listed == [(old, "retired", 3), (new, "active", 4)]

        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            assert http.delete(f"/admin/versions/{old}").status_code == 204
            again = http.delete(f"/admin/versions/{old}")
            assert (again.status_code, again.json()["code"]) == (404, "model_version_unknown")

        assert [one.fingerprint for one in client.versions()] == [new]
        entries = client.audit().entries
        assert [entry.subject for entry in entries if entry.action == "drop"] == [old]
        answer = client.query(visible[0], modulation=False, top_k=1)
        assert (answer.searched, answer.results[0].item.id) == (4, ids[0])


def test_the_version_in_use_and_unknown_ones_cannot_be_dropped(
    http: httpx.Client, visible: list[Path]
) -> None:
    image = {"image": visible[0].read_bytes()}
    item = http.post("/gallery", files=image).json()
    [version] = http.get("/admin/versions").json()["versions"]
    answer = http.delete(f"/admin/versions/{version['fingerprint']}")
    assert (answer.status_code, answer.json()["code"]) == (409, "model_version_conflict")
    assert "in use" in answer.json()["detail"]
    for unknown in ("0" * 64, version["fingerprint"][:12], "no%2Ffingerprint", "é"):
        answer = http.delete(f"/admin/versions/{unknown}")
        assert answer.status_code == 404, unknown
    assert http.get("/admin/versions").json()["versions"] == [version]
    found = http.post("/query", files=image, data={"modulation": "false"}).json()
    assert found["results"][0]["item"]["id"] == item["id"]


def test_a_parameter_that_there_is_not_is_refused(http: httpx.Client) -> None:
    for call in (http.get("/admin/versions?state=retired"), http.delete("/admin/versions/x?y=1")):
        assert (call.status_code, call.json()["code"]) == (422, "parameters_invalid")


def test_only_administrators_may(serve: Serve, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    _, token = file.create("desk", ["query", "enroll"])
    with (
        serve(tmp_path / "data", api_keys_file=file.path) as url,
        Client(url, api_key=token) as client,
    ):
        for call in (client.versions, lambda: client.drop_version("0" * 64)):
            with pytest.raises(ServiceProblem) as refused:
                call()
            assert refused.value.status == 403


def test_a_version_that_is_being_built_stays(
    tmp_path: Path, checkpoints: tuple[Path, Path], visible: list[Path]
) -> None:
    first, second = (Embedder(file, runtime="torch") for file in checkpoints)
    gallery = Gallery.open(tmp_path / "data", first.info)
    begun, go_on = threading.Event(), threading.Event()

    def embed(crops: Sequence[Crop]) -> Tensor:
        begun.set()
        assert go_on.wait(60)
        return second.embed(crops)

    crop = decode(visible[0].read_bytes())
    gallery.add([NewItem(crop)], first.embed([crop]))
    building = threading.Thread(target=gallery.reembed, args=(second.info, embed))
    building.start()
    try:
        assert begun.wait(60)
        with pytest.raises(ModelVersionConflict, match="being embedded with"):
            gallery.drop_version(second.info.fingerprint)
    finally:
        go_on.set()
        building.join()
    assert gallery.model == second.info.fingerprint
    gallery.drop_version(first.info.fingerprint)
    assert [one.fingerprint for one in gallery.versions] == [second.info.fingerprint]
    gallery.close()


def test_the_command_lists_and_drops_by_the_first_digits(
    serve: Serve,
    tmp_path: Path,
    checkpoints: tuple[Path, Path],
    visible: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CMT_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    old, new = fingerprints(checkpoints)
    with serve(tmp_path / "data", checkpoint=checkpoints[0]) as url, Client(url) as client:
        client.enroll(visible[0])
        switch(client, "second.safetensors")

        def run(*arguments: str) -> tuple[int, str, str]:
            status = main(["gallery", "versions", *arguments, "--url", url])
            captured = capsys.readouterr()
            return status, captured.out, captured.err

        status, printed, _ = run("list")
        assert status == 0
        assert [line.split()[:3] for line in printed.splitlines()[1:]] == [
            [old[:12], "retired", "1"],
            [new[:12], "active", "1"],
        ]
        status, printed, _ = run("list", "--json")
        assert [json.loads(line)["fingerprint"] for line in printed.splitlines()] == [old, new]

        status, _, told = run("drop", "x", "--yes")
        assert (status, "no checkpoint begins with 'x'" in told) == (2, True)
        status, _, told = run("drop", "", "--yes")
        assert (status, "2 checkpoints begin with" in told) == (2, True)
        status, _, told = run("drop", new[:12], "--yes")
        assert (status, "in use" in told) == (1, True)
        status, printed, _ = run("drop", old[:12], "--yes")
        assert (status, printed) == (0, f"Dropped the features of 1 item by {old[:12]}.\n")
        assert [one.fingerprint for one in client.versions()] == [new]


def test_the_asynchronous_client_speaks_of_versions_too(url: str) -> None:
    async def ask() -> None:
        async with AsyncClient(url) as client:
            [version] = await client.versions()
            assert version.state == "active"
            with pytest.raises(ServiceProblem, match="in use"):
                await client.drop_version(version.fingerprint)
            with pytest.raises(ServiceProblem) as refused:
                await client.drop_version("0" * 64)
            assert refused.value.status == 404

    asyncio.run(ask())
