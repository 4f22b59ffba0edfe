"""`cmt gallery export`, `cmt reembed` and what `cmt doctor` finds of keys and databases."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
from datetime import timedelta
from pathlib import Path

import pytest

from model import CheckpointInfo, CMTConfig, load_checkpoint
from model.cli import main
from service.auth.keys import KeyFile
from service.client import Client
from service.gallery import Gallery
from service.gallery.times import utc_now
from tests.service.conftest import Serve
from tests.service.object_server import Bucket


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CMT_DATABASE_URL",
        "CMT_CROPS_URL",
        "CMT_API_KEYS_FILE",
        "CMT_API_KEY",
        "CMT_URL",
    ):
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
    assert "1 key, for query" in printed
    assert "a process of its own decodes images" in printed
    keys.chmod(0o644)
    nowhere = "postgresql+psycopg://u:secret@127.0.0.1:1/x"
    status, printed, _ = run(capsys, "doctor", "--api-keys-file", keys, "--database-url", nowhere)
    assert status == 1
    assert "chmod 600" in printed
    assert "does not answer" in printed
    assert "secret" not in printed


def test_doctor_compares_the_clock_with_the_databases(
    postgres_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "NTP" not in run(capsys, "doctor", "--database-url", postgres_url)[1]
    behind = utc_now() - timedelta(hours=1)
    monkeypatch.setattr("service.gallery.times.utc_now", lambda: behind)
    status, printed, _ = run(capsys, "doctor", "--database-url", postgres_url)
    assert (status, "s behind the database's" in printed) == (0, True)


@pytest.mark.usefixtures("faked")
def test_doctor_looks_at_the_gpu_that_is_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMT_DEVICE", "cuda:0")
    status, printed, _ = run(capsys, "doctor")
    assert (status, "a faked GPU as cuda:0" in printed) == (0, True)
    status, printed, _ = run(capsys, "doctor", "--device", "cuda:1")
    assert (status, "there is no GPU 1, only 1" in printed) == (1, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_doctor_takes_keys_that_a_group_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    KeyFile(keys).create("desk", ["query"])
    os.chown(keys, 10001, os.getegid())
    for mode, expected in ((0o440, 0), (0o444, 1)):
        keys.chmod(mode)
        assert run(capsys, "doctor", "--api-keys-file", keys)[0] == expected, oct(mode)


def test_cameras_have_defaults_until_they_are_deleted(
    serve: Serve, tmp_path: Path, infrared: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(tmp_path / "data") as url, Client(url) as client:
        at = ("--url", url)
        inverted = ("--modality", "ir", "--polarity", "black_hot")
        status, printed, _ = run(capsys, "cameras", "set", "yard/2 [red]", *inverted, *at)
        assert (status, "yard/2 [red] are ir, black_hot" in printed) == (0, True)
        assert run(capsys, "cameras", "set", "dome", *at)[0] == 2  # no default at all
        status, printed, _ = run(capsys, "cameras", "list", *at)
        assert [line.split() for line in printed.splitlines()] == [
            ["camera", "modality", "polarity"],
            ["yard/2", "[red]", "ir", "black_hot"],
        ]
        wanted = {"camera_id": "yard/2 [red]", "modality": "ir", "polarity": "black_hot"}
        assert json.loads(run(capsys, "cameras", "list", "--json", *at)[1]) == wanted

        labels = ("--camera-id", "yard/2 [red]")
        assert run(capsys, "enroll", infrared[0], *labels, *at)[0] == 0
        assert run(capsys, "enroll", infrared[0], *labels, "--polarity", "white_hot", *at)[0] == 0
        items = client.list().items
        assert [(item.modality_source, item.polarity) for item in items] == [
            ("camera", "black_hot"),
            ("camera", "white_hot"),
        ]
        query = ("query", infrared[0], "--json", *at)
        for given, polarity in (
            (("--query-camera-id", "yard/2 [red]"), "black_hot"),
            (("--polarity", "black_hot"), "black_hot"),
            ((), "white_hot"),
        ):
            answer = json.loads(run(capsys, *query, *given)[1])
            assert (answer["query"]["polarity"], answer["searched"]) == (polarity, 2)

        out = tmp_path / "out"
        assert run(capsys, "gallery", "export", out, *at)[0] == 0
        with (out / "manifest.csv").open(newline="") as file:
            assert [row["polarity"] for row in csv.DictReader(file)] == ["black_hot", "white_hot"]
        assert run(capsys, "cameras", "delete", "yard/2 [red]", *at)[0] == 0
        status, _, told = run(capsys, "cameras", "delete", "yard/2 [red]", *at)
        assert (status, "no defaults are stored" in told) == (1, True)
        assert client.cameras() == []


def test_doctor_tries_a_lock_and_looks_at_modes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))
    Gallery.open(tmp_path / "data", info).close()
    look = ("doctor", "--data-dir", tmp_path / "data")
    status, printed, _ = run(capsys, *look)
    assert (status, "writable, lockable and private" in printed) == (0, True)
    (tmp_path / "data" / "gallery.sqlite3").chmod(0o644)
    status, printed, _ = run(capsys, *look)
    assert (status, "warning" in printed, "others may use 1 file" in printed) == (
        0,
        True,
        True,
    )

    key = tmp_path / "data" / "audit.key"
    key.rename(tmp_path / "elsewhere")
    status, printed, _ = run(capsys, *look)
    assert (status, "warning" in printed) == (0, True)
    assert {"missing:", "backup,", "pseudonyms"} <= set(printed.split())
    key.write_bytes(b"short")
    status, printed, _ = run(capsys, *look)
    assert (status, "wrong" in printed, "32 random bytes" in printed) == (1, True, True)
    (tmp_path / "elsewhere").rename(key)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    status, printed, _ = run(capsys, *look)
    assert (status, "wrong" in printed, "cannot lock files" in printed) == (1, True, True)


@pytest.mark.parametrize(
    "command",
    [
        ("serve", "--checkpoint", "x.safetensors"),
        ("backup", "x.zip"),
        ("restore", "x.zip"),
        ("reembed", "x.safetensors"),
        ("doctor",),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_data_folder_is_not_the_current_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    given: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, told = run(capsys, *command, "--data-dir", given)
    assert (status, printed) == (2, "")
    assert "it is empty; name a folder" in told
    if command[0] in ("serve", "doctor", "restore"):
        monkeypatch.setenv("CMT_DATA_DIR", given)
        status, printed, told = run(capsys, *command)
        assert status in (1, 2)
        assert "DATA_DIR" in told or "data_dir" in told
    assert list(tmp_path.iterdir()) == []


def test_crops_move_into_a_bucket_and_back_and_are_backed_up_from_there(
    bucket: Bucket,
    serve: Serve,
    tiny_checkpoint: Path,
    visible: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, place = tmp_path / "data", ["--crops-url", bucket.url]
    with serve(data) as url, Client(url) as client:
        ids = [client.enroll(file).id for file in visible[:3]]
        status, _, told = run(capsys, "crops", "move", "--data-dir", data, *place)
        assert (status, "stop that one" in told) == (1, True), told
    assert "--crops-url" in run(capsys, "crops", "move", "--data-dir", data)[2]
    move = ["crops", "move", "--data-dir", data, *place, "--inline-bytes", 0]
    where = "0 are in the database now, and 3 in the bucket."
    assert run(capsys, *move)[:2] == (0, f"Moved 3 crops: {where}\n")
    assert run(capsys, *move)[:2] == (0, f"Moved 0 crops: {where}\n")
    assert len(bucket.objects()) == 3
    status, _, told = run(capsys, "backup", tmp_path / "b.zip", "--data-dir", data)
    assert (status, "set it to the one" in told) == (1, True)
    status, _, told = run(
        capsys, "backup", tmp_path / "b.zip", "--data-dir", data, "--crops-url", bucket.url
    )
    assert status == 0, told
    run(capsys, "restore", tmp_path / "b.zip", "--data-dir", tmp_path / "restored")
    with serve(tmp_path / "restored") as url, Client(url) as client:
        assert client.image(ids[0])[0] == visible[0].read_bytes()
    again = ["reembed", tiny_checkpoint, "--data-dir", data, "--device", "cpu", *place]
    assert run(capsys, *again)[0] == 0
    bucket.s3.delete_object(Bucket=bucket.name, Key=next(iter(bucket.objects())))
    status, _, told = run(
        capsys, "backup", tmp_path / "c.zip", "--data-dir", data, "--crops-url", bucket.url
    )
    assert status == 1
    assert any(f"the crop of item {item} is missing" in told for item in ids)
    assert not (tmp_path / "c.zip").exists()


def test_doctor_tries_the_bucket(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = run(capsys, "doctor", "--crops-url", bucket.url)
    assert (status, "written, read and deleted" in printed) == (0, True)
    bucket.s3.put_bucket_versioning(
        Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"}
    )
    status, printed, _ = run(capsys, "doctor", "--crops-url", bucket.url)
    assert (status, "keeps versions" in printed) == (0, True)
    missing = bucket.url.replace(bucket.name, "no-such-bucket")
    status, printed, _ = run(capsys, "doctor", "--crops-url", missing)
    assert (status, "there is no such bucket" in printed) == (1, True)
