"""`cmt watch`: what arrives in a folder is enrolled once, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from model.cli import main
from service.auth.keys import KeyFile
from service.cli.interrupts import Stopping
from service.cli.journal import KEPT_SECONDS, Journal, JournalError, Row, Version
from service.client import Client
from tests.service.conftest import Serve
from tests.service.processes import wait_for

CMT = [sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())"]
CUT = "the image is truncated"


@pytest.fixture(autouse=True)
def clean_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests; the commands find the module's service."""
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CMT_URL", url)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """The module's service, emptied of what the test enrolled."""
    with Client(url) as client:
        yield client
        for item in client.list(limit=1000).items:
            client.delete(item.id)


@pytest.fixture
def drop(tmp_path: Path) -> Path:
    """A folder that two cameras write to."""
    for camera in ("gate", "yard"):
        (tmp_path / "drop" / camera).mkdir(parents=True)
    return tmp_path / "drop"


def once(
    capsys: pytest.CaptureFixture[str], drop: object, *options: object, settle: float = 0
) -> tuple[int, str, str]:
    """`cmt watch --once` → exit status, standard output and error."""
    arguments = ["watch", drop, "--once", "--settle", settle, *options]
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@contextmanager
def watching(*options: object) -> Iterator[subprocess.Popen[str]]:
    """`cmt watch` as a process of its own, killed at the end if it still runs."""
    often = ["--interval", "0.1", "--settle", "0.1"]
    command = [*CMT, "watch", *map(str, options), *often]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_each_file_is_enrolled_once(
    client: Client, drop: Path, visible: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = drop / "gate" / "1.jpg", drop / "yard" / "2.jpg"
    shutil.copy(visible[0], first)
    shutil.copy(visible[1], second)
    shutil.copy(visible[1], drop / "top.jpg")
    (drop / "gate" / ".hidden.jpg").write_bytes(b"of another program")
    pattern = ("--pattern", "{camera}/*", "--person-id", "unknown")
    status, out, err = once(capsys, drop, *pattern)
    assert status == 0
    assert "2 files enrolled, 0 refused." in out
    assert "top.jpg: left out by the pattern '{camera}/*'; it lies 0 folders deep" in err
    labels = {(item.camera_id, item.person_id) for item in client.list().items}
    assert labels == {("gate", "unknown"), ("yard", "unknown")}
    # Neither the same file again, nor under another name or time, is enrolled again.
    second.rename(drop / "yard" / "renamed.jpg")
    os.utime(first, (1, 1))
    assert "0 files enrolled" in once(capsys, drop, *pattern)[1]
    # A copy is another file, also of one that is renamed, and so is one that is overwritten.
    first.rename(drop / "gate" / "moved.jpg")
    shutil.copy(drop / "gate" / "moved.jpg", drop / "gate" / "copy.jpg")
    shutil.copy(visible[2], first)
    assert "2 files enrolled" in once(capsys, drop, *pattern)[1]
    assert client.list().total == 4
    # Without its journal the service knows what it has, but for files with another name.
    (drop.parent / "drop.cmt-watch.sqlite3").unlink()
    assert once(capsys, drop, *pattern)[0] == 0
    assert client.list().total == 6
    # What somebody deleted from the gallery is not put there again.
    for item in client.list().items:
        client.delete(item.id)
    assert "0 files enrolled" in once(capsys, drop, *pattern)[1]
    assert client.list().total == 0


def test_what_is_refused_is_remembered_until_it_changes(
    client: Client, drop: Path, image: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    cut, bad, named = drop / "cut.jpg", drop / "bad.png", drop / "gate" / "b .jpg"
    cut.write_bytes(image[:900])
    bad.write_bytes(b"no picture")
    named.write_bytes(image)
    options = ("--pattern", "**/{person}")
    status, out, err = once(capsys, drop, *options)
    assert (status, "0 files enrolled, 3 refused." in out) == (1, True)
    assert f"cut.jpg: {CUT}" in err
    assert "gate/b .jpg: person_id: the label begins or ends with white space" in err
    status, out, err = once(capsys, drop, *options)
    assert (status, err) == (0, "")
    assert "Refused in earlier runs: 3" in out
    cut.write_bytes(image)  # the rest has come
    bad.touch()
    status, out, err = once(capsys, drop, *options)
    assert (status, err) == (0, "")
    assert "1 file enrolled, 0 refused." in out
    assert client.list(person_id="cut").total == 1
    status, out, err = once(capsys, drop, *options, "--retry-failed")
    assert (status, "2 refused" in out, client.list().total) == (1, True, 1)


def test_what_is_done_goes_where_it_shall(
    client: Client, drop: Path, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write() -> None:
        (drop / "gate" / "a.jpg").write_bytes(image)
        (drop / "gate" / "bad.jpg").write_bytes(b"no picture")
        os.utime(drop / "gate" / "bad.jpg", (1, 1))  # long ago, so that nobody still writes to it

    def files(folder: Path) -> list[str]:
        return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())

    write()
    assert once(capsys, drop, "--done", "delete")[0] == 1
    assert files(drop) == ["gate/bad.jpg"]
    write()
    (drop / "gate" / "a.jpg").write_bytes(image + b"\0")  # other bytes, the same picture
    assert once(capsys, drop, "--done", "move")[0] == 0
    assert files(drop) == []
    aside = tmp_path / "drop.done"
    assert files(aside) == ["enrolled/gate/a.jpg", "failed/gate/bad.jpg"]
    # Inside the folder it is not watched itself, and no file takes another one's place.
    inside = drop / "done"
    for last in (b"1", b"2"):
        (drop / "gate" / "a.jpg").write_bytes(image + last)
        once(capsys, drop, "--done", "move", "--move-to", inside)
    assert len(files(inside)) == 2
    assert files(drop) == [f"done/{name}" for name in files(inside)]
    assert client.list().total == 4
    # A cut file may still grow: it stays, unless it is old.
    cut = drop / "cut.jpg"
    cut.write_bytes(image[:900])
    os.utime(cut, (time.time() + 3600,) * 2)
    assert once(capsys, drop, "--done", "move", settle=1)[0] == 1
    assert cut.exists()
    os.utime(cut, (1, 1))
    assert once(capsys, drop, "--done", "move", settle=1)[0] == 0
    assert not cut.exists()


def test_a_file_is_whole_when_it_no_longer_changes(
    client: Client, drop: Path, image: bytes, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    growing, wait = drop / "growing.jpg", Stopping.wait

    def write_meanwhile(wish: Stopping, seconds: float) -> bool:
        with growing.open("ab") as file:
            file.write(b"\0")
        return wait(wish, seconds)

    growing.write_bytes(image)
    (drop / "whole.jpg").write_bytes(image)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Stopping, "wait", write_meanwhile)
        status, out, _ = once(capsys, drop, settle=0.1)
    assert status == 0
    assert "1 file enrolled, 0 refused." in out
    assert "Left for the next time: 1" in out
    assert "1 file enrolled" in once(capsys, drop)[1]
    assert client.list().total == 2


def test_it_outlives_the_service_and_itself(
    serve: Serve, port: int, drop: Path, image: bytes, tmp_path: Path
) -> None:
    """Neither a service that is away or restarts nor a kill loses or doubles a file."""
    address, data = f"http://127.0.0.1:{port}", tmp_path / "data"

    def arrive(*names: str) -> None:
        for name in names:
            (tmp_path / "part").write_bytes(image)
            (tmp_path / "part").rename(drop / name)

    def stored(client: Client, count: int) -> None:
        wait_for(lambda: client.list(limit=1).total >= count, f"{count} are not enrolled")

    options = (drop, "--url", address, "--camera-id", "gate")
    arrive("1.jpg")
    with watching(*options) as first:
        assert first.stdout is not None
        said = iter(first.stdout.readline, "")
        assert any("Waiting: no answer from" in line for line in said)
        with serve(data, port=port), Client(address) as client:
            stored(client, 1)
            arrive("2.jpg", "3.jpg")
            stored(client, 3)
            first.kill()  # perhaps between the answer and the journal
        arrive("4.jpg")
    with watching(*options) as second:
        arrive("5.jpg")
        with serve(data, port=port), Client(address) as client:
            stored(client, 5)
            second.send_signal(signal.SIGTERM)
            out, _ = second.communicate(timeout=60)
            assert second.returncode == 0
            assert "Traceback" not in out
            assert client.list().total == 5


def test_a_busy_service_is_waited_for_as_it_asks(
    serve: Serve, drop: Path, image: bytes, tmp_path: Path
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, slow = keys.create("camera", ["enroll"], rate="1/5 seconds")
    _, desk = keys.create("desk", ["query"])
    with (
        serve(tmp_path / "data", api_keys_file=keys.path) as url,
        Client(url, api_key=desk) as client,
        watching(drop, "--url", url, "--api-key", slow, "--done", "delete") as process,
    ):
        assert process.stdout is not None
        said: list[str] = []
        reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
        reader.start()
        numbers = itertools.count()

        def is_left() -> bool:
            return any(drop.glob("*.jpg"))

        def waits() -> bool:
            if not is_left():
                (drop / f"{next(numbers)}.jpg").write_bytes(image)
            return any("Waiting: " in line for line in said)

        wait_for(waits, "it never waits")
        wait_for(lambda: not is_left(), "it is not enrolled")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        reader.join(60)
        out, count = "".join(said), next(numbers)
        assert "Going on." in out
        assert f"{count} files enrolled, 0 refused." in out
        assert client.list().total == count > 1


def test_what_cannot_work_is_said_at_once(
    serve: Serve, client: Client, drop: Path, image: bytes, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (drop / "a.jpg").write_bytes(image)
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    keys = KeyFile(tmp_path / "keys.json")
    keys.create("desk", ["query"])
    with serve(tmp_path / "data", api_keys_file=keys.path) as url:
        for folder, options, sentence in (
            (tmp_path / "none", (), "there is no folder"),
            (drop, ("--pattern", "{camra}/*"), "is it {camera}?"),
            (drop, ("--journal", other), "is no journal of `cmt watch`"),
            (drop, ("--journal", tmp_path / "data" / "gallery.sqlite3"), "is the data folder"),
            (drop, ("--journal", tmp_path / "none" / "x"), "cannot be used (No such file"),
            (tmp_path / "data", (), "is the data folder of a gallery"),
            (drop, ("--url", "http://127.0.0.1:9"), "no answer from http://127.0.0.1:9"),
            (drop, ("--url", url), "CMT_API_KEY"),
            ("", (), "it is empty"),
        ):
            status, _, err = once(capsys, folder, *options)
            assert status in (1, 2)
            assert sentence in err
    assert other.read_text() == "mine"
    with closing(Journal(tmp_path / "drop.cmt-watch.sqlite3")):
        assert "another `cmt watch` has the journal" in once(capsys, drop)[2]
    assert client.list().total == 0


def test_a_journal_holds_what_was_written(tmp_path: Path) -> None:
    path, now = tmp_path / "journal", time.time()
    no_text = os.fsdecode(b"caf\xe9.jpg")
    row = Row(no_text, Version(7, 8), "ab", "enrolled", "{}", "id", at=now)
    rows = [
        row,
        Row("away.jpg", Version(1, 2), "ab", "failed", code="c", reason="r", missing_since=now),
        Row("gone.jpg", Version(1, 2), "cd", "again", missing_since=now - KEPT_SECONDS - 1),
    ]
    with closing(Journal(path)) as journal:
        journal.write(rows)
        assert [one.name for one in journal.same_content("ab")] == ["away.jpg", no_text]
    assert path.stat().st_mode & 0o777 == 0o600
    with closing(Journal(path)) as journal:
        assert list(journal.rows.values()) == sorted(rows, key=lambda one: os.fsencode(one.name))
        journal.note_present({no_text})
    with closing(Journal(path)) as journal:
        assert set(journal.rows) == {no_text, "away.jpg"}  # long gone, and forgotten
        journal.note_present({"away.jpg"})
        assert journal.rows["away.jpg"].missing_since is None
        assert journal.rows[no_text].missing_since is not None
        journal.write([], [no_text, "unknown"])
        assert journal.same_content("cd") == []
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(JournalError, match="cannot be used"):
        Journal(path)
