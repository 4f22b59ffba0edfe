"""`cmt gallery export`, `cmt reembed` and what `cmt doctor` finds of keys and databases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from model import load_checkpoint
from model.cli import main
from service.auth.keys import KeyFile
from service.client import Client
from service.gallery import Gallery
from tests.service.conftest import Serve


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CMT_DATABASE_URL", "CMT_API_KEYS_FILE", "CMT_API_KEY", "CMT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_export_is_whole_resumable_and_can_be_enrolled_again(
    serve: Serve, tmp_path: Path, visible: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with serve(tmp_path / "data") as url, Client(url) as client:
        items = [
            client.enroll(file, person_id=f"p, {place}", camera_id='g "1"' if place else None)
            for place, file in enumerate(visible[:3])
        ]
        status, printed, _ = run(capsys, "gallery", "export", out, "--url", url)
        assert (status, printed) == (0, f"3 crops are in {out}.\n")
        lines = (out / "items.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [item.id for item in items]
        with (out / "manifest.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["person_id"] for row in rows] == ["p, 0", "p, 1", "p, 2"]
        for row, source in zip(rows, visible, strict=False):
            assert (out / row["file"]).read_bytes() == source.read_bytes()
        before = {file: file.stat().st_mtime_ns for file in out.glob("*.jpeg")}
        (out / rows[1]["file"]).unlink()
        assert run(capsys, "gallery", "export", out, "--url", url, "--person-id", "p, 1")[0] == 0
        kept = out / rows[0]["file"]
        assert kept.stat().st_mtime_ns == before[kept]
        assert (out / rows[1]["file"]).exists()
    with serve(tmp_path / "other") as url, Client(url) as client:
        manifest = out / "manifest.csv"
        status, _, _ = run(capsys, "enroll", out, "--manifest", manifest, "--url", url)
        assert status == 0
        [item] = client.list().items
        assert (item.person_id, item.camera_id) == ("p, 1", 'g "1"')


def test_reembed_with_and_without_a_service(
    serve: Serve,
    tmp_path: Path,
    checkpoints: tuple[Path, Path],
    visible: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = checkpoints
    data = tmp_path / "data"
    with serve(data, checkpoint=first) as url, Client(url) as client:
        for file in visible[:3]:
            client.enroll(file)
        status, printed, _ = run(capsys, "reembed", second.name, "--url", url)
        assert status == 0
        assert "All items are embedded" in printed
        assert client.query(visible[0]).searched == 3
        status, _, told = run(capsys, "reembed", "none.safetensors", "--url", url)
        assert status == 1
        assert "none.safetensors" in told
    assert run(capsys, "reembed", first, "--data-dir", data)[0] == 0
    _, info = load_checkpoint(first)
    gallery = Gallery.open(data, info)
    try:
        assert gallery.awaiting == 0
        states = {version.fingerprint: version.state for version in gallery.versions}
        assert states[info.fingerprint] == "active"
    finally:
        gallery.close()
    status, _, told = run(capsys, "reembed", "--data-dir", data)
    assert status == 2
    assert "path of the checkpoint" in told


def test_doctor_looks_at_keys_and_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    KeyFile(keys).create("desk", ["query"])
    database = f"sqlite:///{tmp_path / 'x.sqlite3'}"
    options = ["--api-keys-file", keys, "--database-url", database]
    status, printed, _ = run(capsys, "doctor", *options)
    assert status == 0, printed
    assert "1 keys, for query" in printed
    assert "a process of its own decodes images" in printed
    keys.chmod(0o644)
    nowhere = "postgresql+psycopg://u:secret@127.0.0.1:1/x"
    status, printed, _ = run(capsys, "doctor", "--api-keys-file", keys, "--database-url", nowhere)
    assert status == 1
    assert "chmod 600" in printed
    assert "does not answer" in printed
    assert "secret" not in printed
