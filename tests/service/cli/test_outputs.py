"""What commands write: never over a gallery's files, and over others only when it is said."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.cli import main
from service.auth.keys import KeyFile
from service.client import Client
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


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input from a terminal → the descriptor that types into it."""
    typed, read = os.openpty()
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield typed
        os.close(typed)


def identity(path: Path, database: Path) -> tuple[int, bytes]:
    """A file's inode, and its content where no running service may change it."""
    served = path.resolve().name.startswith(database.name) or path.samefile(database)
    return path.stat().st_ino, b"" if served else path.read_bytes()


def test_no_output_replaces_a_file_of_a_gallery(
    serve: Serve, tmp_path: Path, visible: list[Path], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    data, keys = tmp_path / "data", tmp_path / "keys.json"
    _, token = KeyFile(keys).create("desk", ["query", "admin", "enroll"])
    monkeypatch.chdir(tmp_path)
    with (
        serve(data, api_keys_file=keys) as url,
        Client(url, api_key=token) as client,
    ):
        item = client.enroll(visible[0])
        (data / "index").mkdir(exist_ok=True)
        (data / "index" / "MANIFEST").touch()
        monkeypatch.setenv("CMT_URL", url)
        monkeypatch.setenv("CMT_API_KEY", token)
        database = data / "gallery.sqlite3"
        links = [tmp_path / "symbolic.zip", tmp_path / "hard.zip", tmp_path / "lock.zip"]
        links[0].symlink_to(database)
        links[1].hardlink_to(database)
        links[2].hardlink_to(data / "lock")
        (tmp_path / "folder").symlink_to(data)
        files = [
            *sorted(path for path in data.rglob("*") if path.is_file()),
            *links,
            *(Path("data/gallery.sqlite3"), Path("folder/audit.key"), keys, Path("keys.json")),
            data / "gallery.sqlite3-journal",  # which SQLite would take for its own
            data / "cache" / "new",
            data,
        ]
        assert {database, data / "gallery.sqlite3-wal", data / "index" / "MANIFEST"} < {*files}
        before = {path: identity(path, database) for path in files if path.is_file()}
        for path in files:
            for command in (
                ["backup", path],
                ["query", visible[0], "--html", path],
                ["gallery", "show", item.id, "--save", path],
            ):
                status, out, err = run(capsys, *command, "--force")
                assert (status, out) == (2, ""), command
                assert "give another name" in err
        for folder in (data, data / "index", Path("folder"), Path("data/cache/new")):
            status, _, err = run(capsys, "gallery", "export", folder, "--force")
            assert (status, "give another" in err) == (2, True)
        assert {path: identity(path, database) for path in files if path.is_file()} == before
        assert client.list().total == 1
    status, _, err = run(capsys, "backup", links[0], "--force", "--data-dir", data)
    assert (status, "give another name" in err) == (2, True)


def test_a_file_that_is_there_is_replaced_only_when_it_is_said(
    serve: Serve, tmp_path: Path, visible: list[Path], terminal: int,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, out = tmp_path / "notes", tmp_path / "out"
    out.mkdir()
    with serve(tmp_path / "data") as url, Client(url) as client:
        item = client.enroll(visible[0])
        monkeypatch.setenv("CMT_URL", url)
        commands: list[tuple[Path, list[object]]] = [
            (file, ["backup", file]),
            (file, ["query", visible[0], "--html", file]),
            (file, ["gallery", "show", item.id, "--save", file]),
            (out / "manifest.csv", ["gallery", "export", out]),
        ]
        for target, command in commands:
            target.write_text("mine")
            os.write(terminal, b"n\n")
            status, printed, err = run(capsys, *command)
            assert (status, printed.strip()) == (1, "")
            assert f"{target} exists. Replace it?" in err
            assert target.read_text() == "mine"
            os.write(terminal, b"y\n")
            assert run(capsys, *command)[0] == 0
            assert "mine" not in target.read_text("latin-1")
            assert stat.S_IMODE(target.stat().st_mode) == 0o600
            target.write_text("mine")
            with monkeypatch.context() as patch, Path(os.devnull).open() as nobody:
                patch.setattr("sys.stdin", nobody)
                status, _, err = run(capsys, *command)
                assert status == 2
                assert "--force" in err
                assert len(err.splitlines()) == 1
                assert target.read_text() == "mine"
                assert run(capsys, *command, "--force")[0] == 0
                assert "mine" not in target.read_text("latin-1")
        # The lists of an earlier export are replaced unasked, and so is a file without a byte.
        assert run(capsys, "gallery", "export", out)[0] == 0
        file.write_bytes(b"")
        assert run(capsys, "backup", file)[0] == 0
        # What is no file is written to, not replaced.
        assert run(capsys, "query", visible[0], "--html", "/dev/null")[0] == 0
        assert Path("/dev/null").is_char_device()
        for nowhere in (tmp_path / "none" / "x.zip", Path("/dev/null"), out):
            assert run(capsys, "backup", nowhere, "--force")[0] == 2
        assert client.list().total == 1
