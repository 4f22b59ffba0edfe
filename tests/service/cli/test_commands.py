"""`cmt` as a person meets it: what it prints, writes and returns."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.cli import main
from service.api.schemas import GalleryItem
from service.auth.keys import KeyFile
from service.client import Client
from service.client.stream import PER_REQUEST
from service.errors import Overloaded, ServiceError
from tests.faked_device import FakedDevice
from tests.service.conftest import Serve
from tests.service.processes import STARTING_SECONDS, is_up, wait_for

CMT = [sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def clean_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests; the commands find the module's service."""
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CMT_URL", url)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(autouse=True)
def logging_stays() -> Iterator[None]:
    """`cmt serve` takes over the process's logs, which would then go to a closed stream."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """The module's service, emptied of what the test enrolled."""
    with Client(url) as client:
        yield client
        for item in client.list(limit=1000).items:
            client.delete(item.id)


@pytest.fixture
def folder(tmp_path: Path, visible: list[Path]) -> Path:
    """Four crops in two folders, and a file that is no image by its name."""
    for place, file in enumerate(visible[:4]):
        target = tmp_path / "crops" / f"{place % 2}" / f"{file.parent.name}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "crops" / "notes.txt").write_text("not an image")
    return tmp_path / "crops"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_enroll_can_be_run_again(
    client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(capsys, "enroll", folder, "--camera-id", "gate")
    assert status == 0
    assert "4 of 4 files are enrolled" in out
    assert client.list(camera_id=["gate"]).total == 4
    # Interrupted and started again, with one file more: nothing is enrolled twice.
    shutil.copy(sorted((folder / "0").iterdir())[0], folder / "another.jpg")
    assert run(capsys, "enroll", folder, "--camera-id", "gate")[0] == 0
    assert client.list(camera_id=["gate"]).total == 5


def test_enroll_tells_which_files_failed(
    client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    missing = folder / "missing.jpg"
    status, out, err = run(capsys, "enroll", folder, missing)
    assert status == 1
    assert "4 of 6 files are enrolled" in out
    assert "broken.png" in out
    assert "missing.jpg" in out
    assert "No such file" in out
    assert "Traceback" not in out + err
    assert client.list().total == 4


def test_enroll_leaves_alone_what_is_nobodys_picture(
    client: Client, folder: Path, tmp_path: Path, visible: list[Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for other in ("@eaDir/a.jpg/thumb.jpg", ".thumbnails/a.jpg", "0/._a.jpg"):
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(b"not a picture")
    no_text = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
    shutil.copy(visible[4], no_text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(visible[5], elsewhere / "b.jpg")
    (folder / "cam9").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(folder)
    status, out, _ = run(capsys, "enroll", folder)
    assert status == 0
    assert "6 of 6 files are enrolled" in out
    assert "Left alone, of other programs or read already: 4" in out
    assert client.list().total == 6
    os.mkfifo(folder / "live.png")
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    no_text.write_bytes(b"no picture")
    (folder / "\x1b[2J[bold]\n.jpg").write_bytes(b"")
    status, out, _ = run(capsys, "enroll", folder)
    assert status == 1
    assert "5 of 9 files are enrolled" in out
    assert f"{folder}/live.png: is a pipe, not a file" in out
    assert f"{folder}/gone.jpg: is a link to nothing" in out
    assert f"{folder}/caf\\xe9.jpg: " in out
    assert f"{folder}/\\x1b[2J[bold]\\n.jpg: " in out
    assert "\x1b" not in out
    assert client.list().total == 6
    monkeypatch.chdir(folder)
    status, _, err = run(capsys, "enroll", "")  # a variable that is not set
    assert status == 2
    assert "it is empty" in err
    for command in (["query", folder / "live.png"], ["enroll", folder / "live.png"]):
        status, out, err = run(capsys, *command)
        assert status == 1
        assert "is a pipe, not a file" in out + err


def test_enroll_by_manifest(
    client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(folder.glob("*/*.jpg"))
    rows = [f"{file.relative_to(folder)};p{n}; c{n};rgb" for n, file in enumerate(files)]
    rows[0] = rows[0].replace("/", "\\")  # as Windows writes it
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(["File; person_id;camera_id;modality", *rows]), "utf-8-sig")
    assert run(capsys, "enroll", folder / "0", "--manifest", manifest)[0] == 0
    labels = {(item.person_id, item.camera_id) for item in client.list().items}
    assert labels == {("p0", "c0"), ("p1", "c1")}
    manifest.write_text("path\nx")
    status, _, err = run(capsys, "enroll", folder, "--manifest", manifest)
    assert status == 1
    assert "it needs the columns" in err


def test_a_manifest_with_a_problem_sends_nothing(
    client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other, more, last = (file.relative_to(folder) for file in sorted(folder.glob("*/*.jpg")))
    manifest = folder / "manifest.csv"
    lines = [
        "file,person_id,captured_at,metadata,role",
        f"{good},anna,,,x",
        f"{other},b\u200bc,,,x",
    ]
    lines += [f"{more},d,yesterday,[1],x", f"{good},e,,,x", f"{last}", ",f,,,x"]
    manifest.write_text("\n".join(lines))
    status, _, err = run(capsys, "enroll", folder, "--manifest", manifest)
    assert status == 1
    assert "the column 'role' is unknown" in err
    arguments = ("enroll", folder, "--manifest", manifest, "--ignore-column", "role")
    status, _, err = run(capsys, *arguments)
    assert status == 1
    for problem in ("line 3: person_id: ", "line 4: captured_at: must be a time with an offset",
                    "line 4: metadata: must be a JSON object", "line 6 has 1 cells",
                    "line 5 names the file of line 2 again", "line 7 names no file",
                    "6 problems in"):  # fmt: skip
        assert problem in err
    assert client.list().total == 0
    manifest.write_text("\n".join(lines[:2]))
    assert run(capsys, *arguments, "--camera-id", "gate", "--person-id", "other")[0] == 0
    [item] = client.list().items
    assert (item.person_id, item.camera_id) == ("anna", "gate")


def test_enroll_takes_labels_from_paths(
    client: Client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(folder.glob("?/*.jpg"))
    shutil.copy(files[0], folder / "1" / "7 .jpg")
    shutil.copy(files[0], folder / "top.jpg")
    report = tmp_path / "failed.csv"
    arguments = ("enroll", folder, "--pattern", "{camera}/{person}.jpg")
    status, out, _ = run(
        capsys, *arguments, "--report", report, "--camera-id", "other", "--modality", "rgb"
    )
    assert status == 1
    assert "4 of 5 files are enrolled." in out
    assert "7 .jpg: person_id: the label begins or ends with white space" in out
    assert f"Left out by the pattern: 1 ({folder}/top.jpg)" in out
    labels = {(item.camera_id, item.person_id) for item in client.list().items}
    assert labels == {(file.parent.name, file.stem) for file in files}
    # The report is a manifest, with what is to be mended as it is written in the path.
    status, _, err = run(capsys, "enroll", "--manifest", report)
    assert (status, client.list().total) == (1, 4)
    assert "line 2: person_id: the label begins or ends with white space" in err
    report.write_text(report.read_text().replace('"7 "', '"7"'))
    assert run(capsys, "enroll", "--manifest", report, "--report", report)[0] == 0
    assert client.list(person_id="7", camera_id="1", modality="rgb").total == 1
    assert len(report.read_text().splitlines()) == 1
    assert run(capsys, *arguments, "--file-time")[0] == 1
    assert {item.captured_at is not None for item in client.list().items} == {False, True}


def test_enroll_says_what_is_wrong_with_a_pattern(
    client: Client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(folder.glob("?/*"))[0]
    for options, sentence in (
        (("--pattern", "{person}/{camera}/*.jpg"), f"for example {first} does not: it lies 1 fold"),
        (("--pattern", "{persn}/*"), "is it {person}?"),
        (("--pattern", "{person}/*", "--manifest", "x.csv"), "give one of them"),
        (("--pattern", "{time}.jpg", "--timezone", "Mars/Base"), "'Mars/Base' is no time zone"),
    ):
        status, out, err = run(capsys, "enroll", folder, *options)
        assert status in (1, 2)
        assert sentence in err
        assert (len(err.splitlines()), out) == (1, "")
    for path in (first, tmp_path / "nowhere"):
        status, _, err = run(capsys, "enroll", path, "--pattern", "{person}.jpg")
        assert status == 2
        assert f"{path} is none; name the folder" in err
    assert run(capsys, "enroll")[0] == 2
    assert client.list().total == 0


def test_what_many_files_lack_is_said_of_the_first(
    client: Client, visible: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crops, report = tmp_path / "crops", tmp_path / "failed.csv"
    crops.mkdir()
    for number in range(25):
        shutil.copy(visible[0], crops / f"{number:02}.jpg")
    arguments = ("enroll", crops, "--pattern", "{time}.jpg", "--timezone", "UTC")
    status, out, _ = run(capsys, *arguments)
    assert status == 1
    first, *named, last = out.splitlines()
    assert first == "0 of 25 files are enrolled."
    assert (len(named), last) == (20, "5 more failed; --report FILE names all.")
    assert f"5 more failed; all are in {report}." in run(capsys, *arguments, "--report", report)[1]
    assert len(report.read_text().splitlines()) == 26
    assert client.list().total == 0


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.jsonl"])
def test_an_unknown_column_can_be_left_out(
    name: str, client: Client, visible: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    manifest = tmp_path / name
    rows = {"manifest.csv": f"file,Shot by\n{visible[0]},me\n",
            "manifest.jsonl": json.dumps({"file": str(visible[0]), "Shot by": "me"})}  # fmt: skip
    manifest.write_text(rows[name])
    status, _, err = run(capsys, "enroll", "--manifest", manifest)
    assert status == 1
    [column] = re.findall(r"--ignore-column '([^']+)'", err)
    for written in (column, "Shot by"):
        arguments = ("enroll", "--manifest", manifest, "--ignore-column", written)
        status, out, err = run(capsys, *arguments)
        assert (status, err) == (0, "")
        assert out.startswith("1 of 1 file is enrolled")
    assert client.list().total == 1


def test_a_backup_that_is_none_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for file in ("cut.zip", "missing.zip"):
        for folder in (tmp_path / "new" / "deep", there):
            status, _, err = run(capsys, "restore", tmp_path / file, "--data-dir", folder)
            assert status == 1
            assert err.startswith("Error: ")
        assert not (tmp_path / "new").exists()
        assert (there / "notes.txt").read_text() == "mine"


def test_enroll_by_json_lines_and_what_failed_as_such(
    client: Client, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, lost = sorted(folder.glob("?/*"))[0], folder / "bad.png", folder / "lost.jpg"
    bad.write_bytes(b"no picture")
    manifest, report = folder / "list.jsonl", tmp_path / "failed.jsonl"
    name = str(good.relative_to(folder))
    rows: list[dict[str, Any]] = [
        {"file": name, "person_id": 7, "box": [0, 0, 30, 60], "metadata": {"shift": [1, None]}},
        {"file": "bad.png", "camera_id": "gate"},
        {"file": "lost.jpg", "person_id": None},
    ]
    manifest.write_text("\n\n".join(map(json.dumps, rows)))
    assert run(capsys, "enroll", "--manifest", manifest, "--report", report)[0] == 1
    [item] = client.list().items
    assert (item.person_id, item.width, item.metadata) == ("7", 30, {"shift": [1, None]})
    told = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(one["file"], one["code"]) for one in told] == [
        (str(bad), "image_type_unsupported"),
        (str(lost), "file_unreadable"),
    ]
    for file in (bad, lost):
        shutil.copy(good, file)
    assert run(capsys, "enroll", "--manifest", report)[0] == 0
    assert client.list().total == 3
    assert client.list(camera_id="gate").total == 1
    manifest.write_text('{"file": "a", "persn_id": "b"}\n[]\n{"file": ""}\n{"file"\n')
    status, _, err = run(capsys, "enroll", "--manifest", manifest)
    assert status == 1
    for problem in (
        "line 1: the name 'persn_id' is unknown; is it 'person_id'?",
        "line 2 is no object",
        "line 3 names no file",
        "line 4 is no JSON",
    ):
        assert problem in err
    kept = tmp_path / "kept.csv"
    kept.write_text("mine")
    assert run(capsys, "enroll", folder, "--report", kept)[0] == 2
    assert kept.read_text() == "mine"


def test_enroll_that_is_interrupted_goes_on_where_it_was(
    serve: Serve, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crops, keys = tmp_path / "crops", KeyFile(tmp_path / "keys.json")
    crops.mkdir()
    count = 5 * PER_REQUEST
    for number in range(count):
        (crops / f"{number}.jpg").write_bytes(image)
    # Slow enough to be interrupted: a request in so many seconds.
    _, slow = keys.create("slow", ["enroll"], rate="1/2 seconds")
    _, token = keys.create("desk", ["query", "enroll"])
    with (
        serve(tmp_path / "data", api_keys_file=keys.path) as url,
        Client(url, api_key=token) as client,
    ):
        process = subprocess.Popen(
            [*CMT, "enroll", str(crops), "--url", url, "--api-key", slow],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_for(lambda: client.list(limit=1).total, "nothing is enrolled")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        stored = client.list(limit=1).total
        assert 0 < stored < count
        assert f"{stored} of {count} files are enrolled" in out
        assert "Run the same command again to go on" in err
        assert "Traceback" not in err
        again = ("enroll", crops, "--url", url, "--api-key", token)
        status, out, _ = run(capsys, *again)
        assert status == 0
        assert f"{count} of {count} files are enrolled, {stored} of them before." in out
        assert client.list(limit=1).total == count


def test_enroll_stops_where_the_service_ends(
    serve: Serve, image: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    _, token = keys.create("desk", ["query"])
    (tmp_path / "a.jpg").write_bytes(image)
    with serve(tmp_path / "data", api_keys_file=keys.path) as url:
        report = tmp_path / "failed.csv"
        for options, sentence in (
            ((), "CMT_API_KEY"),
            (("--api-key", token), "scope"),
        ):
            arguments = ("enroll", tmp_path / "a.jpg", "--url", url, "--report", report, *options)
            status, out, err = run(capsys, *arguments)
            assert (status, out) == (1, "0 of 1 file is enrolled.\n")
            assert "again" not in err  # it cannot help
            assert err.splitlines()[-1].startswith("Error: ")
            assert sentence in err.splitlines()[-1]
        assert len(report.read_text().splitlines()) == 1  # nothing is wrong with the file


def test_enroll_at_several_services_of_which_one_is_gone(
    url: str, client: Client, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"
    status, out, err = run(capsys, "enroll", folder, "--url", nobody, "--url", url, "--url", url)
    assert (status, out.splitlines()[0]) == (0, "4 of 4 files are enrolled.")
    assert err.startswith(f"{nobody} is not ready, the others are: no answer from {nobody}")
    assert client.list().total == 4
    status, _, err = run(capsys, "enroll", folder, "--url", nobody, "--url", "http://127.0.0.1:7")
    assert status == 1
    assert err.startswith(f"Error: no answer from {nobody}")


def test_an_export_can_be_enrolled_again(
    client: Client, visible: list[Path], infrared: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    when = datetime(2026, 3, 1, 13, 5, 0, 250000, tzinfo=UTC)
    client.enroll(
        visible[0],
        person_id='anna "a", b;c',
        camera_id="gate",
        captured_at=when,
        metadata={"note": 'ü, "x"\n', "n": [1, {"deep": None}]},
    )
    client.enroll(infrared[0])
    client.enroll(visible[1], person_id="Zoë")
    before = client.list().items
    out = tmp_path / "out"
    assert run(capsys, "gallery", "export", out)[0] == 0
    for item in before:
        client.delete(item.id)
    assert run(capsys, "enroll", out, "--manifest", out / "manifest.csv")[0] == 0
    changed = {"id", "enrolled_at", "modality_source"}

    def labels(items: list[GalleryItem]) -> list[dict[str, Any]]:
        return sorted((item.model_dump(exclude=changed) for item in items), key=str)

    assert labels(client.list().items) == labels(before)


def test_query_prints_a_table_json_and_a_sheet(
    client: Client, visible: list[Path], infrared: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    hostile = "<script>alert(1)</script>[bold]"
    for file in visible[:3]:
        client.enroll(file, person_id=hostile if file is visible[0] else file.parent.name)
    sheet = tmp_path / "sheet.html"
    status, out, _ = run(capsys, "query", infrared[0], "--html", sheet)
    assert status == 0
    assert hostile in out
    assert "3 items searched" in out
    assert "ir (detected)" in out
    page = sheet.read_text()
    assert page.count("<img") == 4
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    status, out, _ = run(capsys, "query", infrared[0], infrared[1], "--json", "--top-k", 2)
    answer = json.loads(out)
    assert answer["query"]["images"] == 2
    assert len(answer["results"]) == 2
    (tmp_path / "crop.csv").write_text("no picture")
    status, _, err = run(capsys, "query", infrared[0], tmp_path / "crop.csv", infrared[1])
    assert status == 1
    assert err.startswith(f"Error: {tmp_path}/crop.csv: ")
    _, out, _ = run(
        capsys,
        "query",
        infrared[0],
        "--json",
        "--person-id",
        "x",
        "--no-modulation",
        "--exhaustive",
    )
    assert json.loads(out)["results"] == []
    assert json.loads(out)["exhaustive"]


def test_gallery_list_show_delete(
    client: Client, visible: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [client.enroll(file, person_id=file.parent.name) for file in visible[:3]]
    status, out, _ = run(capsys, "gallery", "list", "--limit", 2)
    assert status == 0
    assert items[1].id in out
    assert items[2].id not in out
    assert "2 of 3" in out
    _, out, _ = run(capsys, "gallery", "list", "--json", "--person-id", items[2].person_id)
    assert [json.loads(line)["id"] for line in out.splitlines()] == [items[2].id]
    crop = tmp_path / "crop.jpg"
    _, out, _ = run(capsys, "gallery", "show", items[0].id, "--save", crop)
    assert json.loads(out)["sha256"] == items[0].sha256
    assert crop.read_bytes() == visible[0].read_bytes()
    status, out, err = run(capsys, "gallery", "list", "--json", "--limit", 2)
    assert (status, len(out.splitlines())) == (0, 2)
    assert err == "2 of 3; --limit 3 prints all\n"
    status, out, err = run(capsys, "gallery", "delete", "--person-id", "nobody", "--yes")
    assert (status, out) == (1, "")
    assert err.startswith("Error: no item has the person 'nobody'")
    assert client.list().total == 3
    assert run(capsys, "gallery", "delete", items[0].id, "--yes")[:2] == (0, "Deleted 1 item.\n")
    assert run(capsys, "gallery", "delete", "--person-id", items[1].person_id, "--yes")[0] == 0
    assert [item.id for item in client.list().items] == [items[2].id]
    status, _, err = run(capsys, "gallery", "show", items[0].id)
    assert status == 1
    assert err.startswith("Error: no item has the id")
    assert "Traceback" not in err
    assert run(capsys, "gallery", "delete", "--yes")[0] == 2


def test_a_path_is_no_id(
    client: Client, visible: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    item = client.enroll(visible[0], person_id="anna")
    for hostile in ("../gallery?person_id=anna", "..%2fgallery%3fperson_id=anna", "."):
        status, _, err = run(capsys, "gallery", "delete", item.id, hostile, "--yes")
        assert status == 1
        assert "is no item's id" in err
        assert run(capsys, "gallery", "show", hostile)[0] == 1
    assert client.list(person_id=["anna"]).items == [item]  # the id beside it stays too


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    status, token, _ = run(
        capsys, "keys", "create", "--file", file, "--name", "gate", "--scope", "enroll"
    )
    assert status == 0
    assert token.startswith("cmt_")
    assert len(token.split()) == 1
    _, out, _ = run(capsys, "keys", "list", "--file", file, "--json")
    [key] = json.loads(out)
    assert (key["name"], key["scopes"]) == ("gate", ["enroll"])
    _, out, _ = run(capsys, "keys", "list", "--file", file)
    assert key["id"] in out
    assert token.strip() not in out
    assert run(capsys, "keys", "revoke", "--file", file, key["id"])[0] == 0
    status, _, err = run(capsys, "keys", "revoke", "--file", file, key["id"])
    assert status == 1
    assert "cmt keys list" in err
    assert run(capsys, "keys", "create", "--file", file, "--scope", "root")[0] == 2


def test_what_others_wrote_reaches_no_terminal(
    client: Client, visible: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "[red]x[/red]\x1b]0;title\x07\x9b31m\u202e"
    file = tmp_path / "keys.json"
    KeyFile(file).create("desk", ["query"])
    file.write_text(file.read_text().replace('"desk"', json.dumps(hostile)))
    _, out, _ = run(capsys, "keys", "list", "--file", file)
    assert r"[red]x[/red]\x1b]0;title\x07\x9b31m\u202e" in out
    _, raw, _ = run(capsys, "keys", "list", "--file", file, "--json")
    assert json.loads(raw)[0]["name"] == hostile
    answers = [
        out,
        raw,
        run(capsys, "query", tmp_path / hostile)[2],
        run(capsys, "gallery", "show", hostile)[2],
        run(capsys, "gallery", "delete", "--person-id", hostile, "--yes")[2],
        run(capsys, "doctor", "--checkpoint", tmp_path / hostile)[1],
        run(capsys, "--verbose", "query", tmp_path / hostile)[2],
        run(capsys, hostile)[2],
    ]
    for answer in answers:
        assert answer
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(answer)


def test_a_narrow_terminal_of_another_encoding(
    url: str, client: Client, visible: list[Path]
) -> None:
    item = client.enroll(visible[0], person_id="Zoë [b]", camera_id="Нева")
    for command in (
        ["gallery", "list"],
        ["query", str(visible[0])],
        ["gallery", "list", "--json"],
    ):
        shown = subprocess.run(
            [*CMT, *command],
            env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "LC_ALL": "C"},
            capture_output=True,
            check=True,
        )
        assert item.id.encode() in shown.stdout
        assert shown.stdout.isascii()
        if command[-1] == "--json":
            assert json.loads(shown.stdout)["person_id"] == "Zoë [b]"
        else:
            assert b"Zo\\xeb" in shown.stdout


def test_doctor(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--checkpoint", tiny_checkpoint, "--data-dir", tmp_path)
    assert status == 0
    assert "faiss" in out
    assert "resnet18" in out
    assert "items fit into the memory that is free" in " ".join(out.split())
    status, out, _ = run(capsys, "doctor", "--checkpoint", tmp_path / "none.safetensors")
    assert status == 1
    assert "wrong" in out
    assert "no checkpoint at" in out


def test_doctor_says_what_fits_on_a_gpu(
    faked: FakedDevice, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faked.budget = 8 << 30
    width = 7 * 16  # six parts and one more, of 16 numbers
    fit = f"{(7 << 30) // (2 * width):,} items fit into the GPU's memory that is free"
    assert fit in " ".join(run(capsys, "doctor", "--checkpoint", tiny_checkpoint)[1].split())


def test_no_service_is_one_sentence(
    infrared: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CMT_URL", "http://127.0.0.1:9")
    for arguments in (["query", infrared[0]], ["enroll", infrared[0]], ["gallery", "list"]):
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert "start the service with `cmt serve`" in err
        assert len(err.strip().splitlines()) == 1


def test_serve_ends_cleanly(
    tiny_checkpoint: Path, tmp_path: Path, visible: list[Path], port: int, serve: Serve
) -> None:
    options = ("--checkpoint", tiny_checkpoint, "--data-dir", tmp_path, "--runtime", "torch")

    def started(port: int) -> subprocess.Popen[str]:
        command = [*CMT, "serve", *map(str, options), "--port", str(port)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    server, url = started(port), f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http, Client(url) as client:
        wait_for(lambda: is_up(http, "/readyz"), "it does not become ready", STARTING_SECONDS)
        item = client.enroll(visible[0])
        # A second service on the same folder is refused in a sentence.
        second = started(0)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("Error: ")
        assert str(tmp_path) in err.splitlines()[-1]
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 0
        assert "Traceback" not in err
    with serve(tmp_path) as url, Client(url) as client:
        assert client.get(item.id) == item


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "the setting checkpoint is missing"),
        (("--checkpoint", "none.safetensors"), "no checkpoint at none.safetensors"),
        (("--host", "0.0.0.0", "--checkpoint", "x"), "there is no API key"),
        (("--config", "none.toml"), "no settings file at none.toml"),
        (("--api-keys-file", "none.json", "--checkpoint", "x"), "there is no file of keys"),
    ],
)
def test_serve_that_cannot_start(
    options: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "serve", "--data-dir", tmp_path / "d", "--port", 0, *options)
    assert status == 1
    assert err.splitlines()[-1].startswith("Error: ")
    assert sentence in err.splitlines()[-1]
    assert "Traceback" not in err


def test_serve_on_a_port_in_use(
    url: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = url.rsplit(":", 1)[1]
    arguments = ["--checkpoint", tiny_checkpoint, "--data-dir", tmp_path, "--port", port]
    status, _, err = run(capsys, "serve", *arguments)
    assert status == 1
    assert "choose another with --port" in err
    assert not list(tmp_path.iterdir())  # told before anything is loaded or made


@pytest.fixture
def examples(
    tiny_checkpoint: Path, visible: list[Path], infrared: list[Path], tmp_path: Path
) -> Path:
    """A small folder of the kind that the demo shows."""
    examples = tmp_path / "examples"
    examples.mkdir()
    shutil.copy(tiny_checkpoint, examples / "demo.safetensors")
    rows = ["file,person_id,camera_id,modality,role"]
    for role, files, kind in (("gallery", visible[:4], "rgb"), ("query", infrared[:2], "ir")):
        (examples / role).mkdir()
        for file in files:
            name = f"{role}/{file.parent.name}.jpg"
            shutil.copy(file, examples / name)
            rows.append(f"{name},{file.parent.name},cam,{kind},{role}")
    (examples / "manifest.csv").write_text("\n".join(rows))
    return examples


def test_demo(
    examples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sheet = tmp_path / "sheet.html"
    monkeypatch.setenv("CMT_RUNTIME", "torch")
    monkeypatch.setenv("CMT_DATABASE_URL", "sqlite:////nowhere/else.sqlite3")  # not the demo's
    for expected, status in ((0.0, 0), (1.1, 1)):
        (examples / "expected.json").write_text(json.dumps({"rank1": expected}))
        answer = run(capsys, "demo", "--examples", examples, "--html", sheet, "--once")
        assert answer[0] == status, answer[2]
        assert "4 of 4 files are enrolled" in answer[1]
        assert "2 infrared queries against 4 visible crops" in answer[1]
        assert "Rank-1 with modulation" in answer[1]
        assert sheet.read_text().count("<img") == 2 + 2 * 4


def test_the_demo_ends_with_the_address_of_its_page(examples: Path, tmp_path: Path) -> None:
    (examples / "expected.json").write_text('{"rank1": 0}')
    command = [*CMT, "demo", "--examples", str(examples), "--html", str(tmp_path / "s.html")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CMT_RUNTIME": "torch", "COLUMNS": "200"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith("http"):
                    break
            page = httpx.get(lines[-1], trust_env=False, timeout=60)
            assert page.headers["content-type"].startswith("text/html")
            [named] = re.findall(r"\S+\.jpg", lines[-2])
            assert Path(named).parent == examples / "query"
            items = httpx.get(f"{lines[-1]}gallery", trust_env=False, timeout=60).json()["items"]
            assert all(item["captured_at"] for item in items)
        finally:
            os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == ""
        assert process.wait(60) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_leaves_nothing(
    number: signal.Signals, examples: Path, tmp_path: Path
) -> None:
    (examples / "expected.json").write_text('{"rank1": 0}')
    (tmp_path / "temporary").mkdir()
    command = [*CMT, "demo", "--examples", str(examples), "--html", str(tmp_path / "s.html")]
    environment = {**os.environ, "CMT_RUNTIME": "torch", "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("Loading")
        # What it has begun to load it loads to the end: the second signal comes before that.
        wait_for(
            lambda: list((tmp_path / "temporary").glob("cmt-demo-*/lock")), "it opens no gallery"
        )
        process.send_signal(number)
        wait_for(process.stderr.readline, "it says nothing")  # an empty line comes first
        assert "Ctrl-C once more ends at once" in process.stderr.readline()
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "Traceback" not in said
    assert "open to others" not in said
    assert not list((tmp_path / "temporary").glob("cmt-demo-*"))


# What is put away last, as large libraries are, takes its time.
_LATE = """
import os, signal, sys
from service.cli.interrupts import INTERRUPTED, stopping

number = int(sys.argv[1])

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=number):
        kill(process, number)

late = Late()
with stopping("Ending."):
    signal.raise_signal(number)
sys.exit(INTERRUPTED)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_at_the_very_end_changes_no_status(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _LATE, str(number.value)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 130


def test_every_error_has_a_code_of_its_own() -> None:
    kinds: list[Any] = ServiceError.__subclasses__()
    assert Overloaded in kinds
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(400 <= kind.status < 600 and kind.__doc__ for kind in kinds)
