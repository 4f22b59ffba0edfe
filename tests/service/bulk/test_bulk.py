"""Features in files: what `cmt embed-bulk` writes, and `cmt import` makes of it or refuses."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import array, concat_tables, int64, parquet

from model import CheckpointInfo, load_checkpoint
from model.cli import main
from model.pictures import Box, read
from service.bulk.embedding import writing
from service.bulk.features import RECORD, BulkError, DamagedRow, FeatureFile, Row, Writer
from service.bulk.importing import SAME
from service.client import Client
from service.gallery.filling import filling
from service.gallery.index import room
from service.gallery.index.byte_codes import code_bytes
from service.gallery.index.room import feature_bytes
from tests.paths import MINI
from tests.service.conftest import Serve
from tests.service.crash.subject import CONTEXT
from tests.service.places import INFO
from tests.service.processes import STARTING_SECONDS, children_of, runs, wait_for

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENVIRONMENT = {"CMT_RUNTIME": "torch", "CMT_DEVICE": "cpu", "CMT_DECODE_PROCESSES": "2"}


@pytest.fixture(autouse=True)
def settings_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "160")


def tinted(file: Path) -> str:
    """Give an infrared picture a faint tint that only a coarse JPEG excuses → a box of it."""
    gray = np.asarray(Image.open(file).convert("L")).astype(int)
    height, width = gray.shape
    signs = np.random.default_rng(0).choice([-1, 1], size=(height // 8 + 1, width // 8 + 1))
    tint = 4 * signs.repeat(8, 0).repeat(8, 1)[:height, :width]
    colour = np.stack([gray + tint, gray, gray - tint], 2).clip(0, 255).astype(np.uint8)
    Image.fromarray(colour).save(file, "JPEG", quality=20)
    box = Box(2, 2, width - 4, height - 4)
    seen = read(file.read_bytes(), box=box)
    stored = io.BytesIO()
    seen.upright.save(stored, "PNG")
    assert (seen.modality, read(stored.getvalue()).modality) == ("ir", "rgb")
    return ",".join(map(str, box))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two cameras, one of them infrared, and a manifest with all kinds of labels."""
    folder = tmp_path_factory.mktemp("people")
    rows = []
    for camera in ("cam1", "cam3"):
        for file in sorted((MINI / camera).glob("*/000?.jpg")):
            person = file.parent.name
            name = folder / camera / f"{person} Zoë" / f"{file.stem}.jpg"
            name.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, name)
            rows.append({"file": str(name.relative_to(folder)), "person_id": person,
                         "camera_id": camera})  # fmt: skip
    rows[0] |= {"captured_at": "2026-03-01T08:00:00.25+01:00", "metadata": '{"note": "ü"}'}
    rows[1] |= {"box": "4,4,40,90"}
    # Seen to be infrared only by what its compression says, which its box, stored as PNG, does not.
    rows[-3] |= {"box": tinted(folder / rows[-3]["file"])}
    rows[-1] |= {"polarity": "black_hot", "modality": "ir"}
    rows[-2] |= {"person_id": "", "camera_id": ""}
    with (folder / "people.csv").open("w", newline="") as listed:
        names = ["file", "person_id", "camera_id", "captured_at", "metadata", "box", "polarity",
                 "modality"]  # fmt: skip
        table = csv.DictWriter(listed, names)
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def embedded(people: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their features, in several files; tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("bulk") / "features"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        options = ("--checkpoint", tiny_checkpoint, "--out", out, "--rows-per-file", 10)
        assert main(["embed-bulk", str(people / "people.csv"), *map(str, options)]) == 0
    return out


@pytest.fixture
def features(embedded: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(embedded, tmp_path / "features"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return status, captured.out, captured.err


def info_of(checkpoint: Path) -> CheckpointInfo:
    return load_checkpoint(checkpoint)[1]


def contents(client: Client) -> dict[str, Any]:
    """What a gallery holds of each picture and person, without what no two enrollments share."""
    own = {"id", "enrolled_at"}
    items = client.list(limit=1000).items
    return {
        f"{item.sha256} {item.person_id} {item.width}": (
            item.model_dump(exclude=own),
            client.image(item.id),
        )
        for item in items
    }


def ranking(client: Client, image: Path) -> list[tuple[Any, ...]]:
    answer = client.query(image, top_k=100, exhaustive=True)
    return [(one.item.sha256, one.item.width, round(one.distance, 4)) for one in answer.results]


def test_an_import_is_as_if_enrolled(
    serve: Serve, people: Path, features: Path, tiny_checkpoint: Path, infrared: list[Path],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    imported, enrolled = tmp_path / "imported", tmp_path / "enrolled"
    options = ("--checkpoint", tiny_checkpoint, "--data-dir", imported)
    assert run(capsys, "import", features, *options)[:2] == (0, "32 of 32 rows are imported.\n")
    assert run(capsys, "import", features, *options)[:2] == (
        0, "32 of 32 rows are imported, 32 of them before.\n",
    )  # fmt: skip
    enroll = ("enroll", "--manifest", people / "people.csv", "--url")
    with serve(enrolled) as there, serve(imported) as here:
        assert run(capsys, *enroll, there)[:2] == (0, "32 of 32 files are enrolled.\n")
        with Client(there) as one, Client(here) as other:
            assert contents(one) == contents(other)
            assert [item.person_id for item in one.list().items] == [
                item.person_id for item in other.list().items
            ]
            for query in infrared[:3]:
                assert ranking(one, query) == ranking(other, query)
            # The same pictures: neither way adds what the other has added.
            before = "32 of 32 files are enrolled, 32 of them before.\n"
            assert run(capsys, *enroll, here)[:2] == (0, before)
        status, _, err = run(capsys, "import", features, *options)
        assert (status, "is in use by another process" in err) == (1, True)
    options = ("--checkpoint", tiny_checkpoint, "--data-dir", enrolled)
    assert run(capsys, "import", features, *options)[1].endswith("32 of them before.\n")


def test_a_gallery_that_would_not_fit_is_refused_before_the_import(
    features: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    postgres_url: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = tmp_path / "data"
    load = ["import", features, "--checkpoint", tiny_checkpoint, "--sample", 0]
    here = [*load, "--data-dir", data]
    config = info_of(tiny_checkpoint).config
    width = (config.parts + 1) * config.dim
    each = feature_bytes(1, width) + code_bytes(1, width) + room._COLUMN_BYTES

    def free(items: int) -> None:
        monkeypatch.setattr(room, "available_memory", lambda: room._HOST_RESERVE + items * each)

    free(31)
    status, printed, err = run(capsys, *here)
    assert (status, printed) == (1, "")
    assert "would have 32 items" in err
    assert "holds 31; free or add memory, import fewer files, or say --served-elsewhere" in err
    free(32)
    assert run(capsys, *here)[:2] == (0, "32 of 32 rows are imported.\n")
    before = "32 of 32 rows are imported, 32 of them before.\n"
    assert run(capsys, *here)[:2] == (0, before)  # which adds nothing
    free(0)
    assert run(capsys, *here)[0] == 1
    assert run(capsys, *here, "--served-elsewhere")[:2] == (0, before)
    # Others serve what is in PostgreSQL, and may have more.
    assert run(capsys, *load, "--database-url", postgres_url)[0] == 0
    assert "needs memory for 32 more items" in caplog.text


def test_replicas_follow_an_import(
    serve: Serve, features: Path, tiny_checkpoint: Path, infrared: list[Path], tmp_path: Path,
    postgres_url: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with serve(tmp_path / "data", database_url=postgres_url) as url, Client(url) as client:
        client.set_camera("cam1", modality="ir")  # not as its pictures look: they are read anew
        options = ("--checkpoint", tiny_checkpoint, "--database-url", postgres_url)
        status, out, err = run(capsys, "import", features, *options, "--sample", 0)
        assert (status, err) == (0, "")
        assert out.startswith("32 of 32 rows are imported.\n16 of them were embedded again")
        wait_for(lambda: client.query(infrared[0]).searched == 32, "it does not follow")
        page = client.list(camera_id="cam1", limit=100)
        assert {(item.modality, item.modality_source) for item in page.items} == {("ir", "camera")}
        [entry] = [one for one in client.audit().entries if one.action == "import"]
        assert (entry.actor, entry.details) == ("command line", {"rows": 32})


def test_only_what_is_missing_is_embedded(
    people: Path, tiny_checkpoint: Path, checkpoints: tuple[Path, Path], tmp_path: Path,
    visible: list[Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    crops, out, report = tmp_path / "crops", tmp_path / "out", tmp_path / "failed.jsonl"
    (crops / "a").mkdir(parents=True)
    for number, file in enumerate(visible[:3]):
        shutil.copy(file, crops / "a" / f"{number}.jpg")
    no_text = Path(os.fsdecode(os.fsencode(crops) + b"/a/caf\xe9.jpg"))
    shutil.copy(visible[4], no_text)
    (crops / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    Image.new("RGB", (100, 200)).save(crops / "black.png")
    shutil.copy(visible[5], crops / "film.jpg")
    os.truncate(crops / "film.jpg", 1 << 38)  # no memory holds it
    embed = ("embed-bulk", crops, "--checkpoint", tiny_checkpoint, "--out", out)
    status, printed, _ = run(capsys, *embed, "--report", report)
    assert (status, printed.splitlines()[0]) == (1, "4 of 7 files are embedded.")
    failed = {Path(row["file"]).name: row["code"] for row in map(json.loads, report.open())}
    assert failed == {
        "broken.png": "image_undecodable",
        "black.png": "image_blank",
        "film.jpg": "image_too_large",
    }
    # Mended, and one more: what is there is not touched.
    shutil.copy(visible[5], crops / "broken.png")
    (crops / "black.png").unlink()
    (crops / "film.jpg").unlink()
    shutil.copy(visible[6], crops / "new.jpg")
    first = (out / "features-000001.parquet").stat()
    status, printed, _ = run(capsys, *embed, "--report", report)
    assert (status, printed) == (0, "6 of 6 files are embedded, 4 of them before.\n")
    assert (out / "features-000001.parquet").stat() == first
    assert report.read_text() == ""
    assert run(capsys, *embed)[1] == "6 of 6 files are embedded, 6 of them before.\n"
    assert [FeatureFile(file).count for file in sorted(out.glob("*.parquet"))] == [4, 2]
    # Beside rows of the same pictures, others would be enrolled twice.
    status, _, err = run(capsys, *embed, "--person-id", "other")
    assert (status, "other content or labels than it has now; give another --out" in err) == (1, 1)
    status, _, err = run(capsys, *embed[:3], checkpoints[1], *embed[4:])
    assert (status, "holds features of the checkpoint" in err) == (1, True)
    (tmp_path / "nothing").mkdir()
    status, _, err = run(capsys, "embed-bulk", tmp_path / "nothing", *embed[2:])
    assert (status, "no image under" in err) == (1, True)
    with filling(tmp_path / "data", INFO):
        pass  # a gallery
    status, _, err = run(capsys, *embed[:-1], tmp_path / "data")
    assert (status, "is the data folder of a gallery" in err) == (2, True)
    status, printed, err = run(capsys, *embed[:-1], report)
    assert (status, printed, "or give another --out" in err) == (1, "", True)


def test_what_is_killed_goes_on_where_it_was(
    serve: Serve, tiny_checkpoint: Path, tmp_path: Path, image: bytes,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    crops, out, data = tmp_path / "crops", tmp_path / "out", tmp_path / "data"
    crops.mkdir()
    for number in range(160):
        (crops / f"{number:03}.jpg").write_bytes(image)
    embed = ["embed-bulk", crops, "--checkpoint", tiny_checkpoint, "--out", out,
             "--rows-per-file", 10]  # fmt: skip
    load = ["import", out, "--checkpoint", tiny_checkpoint, "--data-dir", data]

    for _ in range(9):  # it may be done before it is killed
        shutil.rmtree(out, ignore_errors=True)
        killed = begun([*embed, "--processes", 2])
        wait_for(lambda: list(out.glob("*.parquet")), "nothing is embedded", STARTING_SECONDS)
        assert killed.pid is not None
        children = children_of(killed.pid)
        killed.kill()
        killed.join()
        assert children
        wait_for(lambda: not any(map(runs, children)), "processes are left behind")  # noqa: B023
        if not (out / RECORD).exists():
            break
    assert not (out / RECORD).exists()
    status, _, err = run(capsys, *load)
    assert (status, "is not finished" in err) == (1, True)

    with writing(out):
        status, _, err = run(capsys, *embed)
    assert (status, "another `cmt embed-bulk` writes to" in err) == (1, True)

    close = Writer.close

    def interrupted(writer: Writer) -> None:
        monkeypatch.setattr(Writer, "close", close)
        close(writer)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Writer, "close", interrupted)  # with the next file
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    status, printed, err = run(capsys, *embed)
    for number, handler in handlers.items():  # an interrupted command keeps them
        signal.signal(number, handler)
    assert (status, "Run the same command again to go on" in err) == (130, True)
    done = int(printed.split()[0])
    assert 0 < done < 160

    status, printed, _ = run(capsys, *embed)
    assert (status, printed) == (0, f"160 of 160 files are embedded, {done} of them before.\n")
    assert not list(out.glob("*.partial"))
    assert sum(FeatureFile(file).count for file in out.glob("*.parquet")) == 160

    for _ in range(9):
        shutil.rmtree(data, ignore_errors=True)
        killed = begun(load)
        wait_for(lambda: rows_of(data / "gallery.sqlite3"), "nothing is imported")
        killed.kill()
        killed.join()
        if rows_of(data / "gallery.sqlite3") < 160:
            break
    status, printed, _ = run(capsys, *load)
    before = int(printed.split(", ")[1].split()[0])
    assert (status, 0 < before < 160) == (0, True), printed
    assert printed.startswith("160 of 160 rows are imported, ")
    with serve(data) as url, Client(url) as client:
        assert client.list(limit=1).total == 160
        assert client.query(image).searched == 160


def test_a_full_disk_is_said_and_leaves_no_fragment(
    tiny_checkpoint: Path, people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    embed = ["embed-bulk", people / "cam1", "--checkpoint", tiny_checkpoint, "--out", out,
             "--rows-per-file", 4]  # fmt: skip
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        status, printed, err = run(capsys, *embed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, printed) == (1, "0 of 16 files are embedded.\n")
    assert "File too large" in err
    assert [file.name for file in out.iterdir()] == ["lock"]
    assert run(capsys, *embed)[:2] == (0, "16 of 16 files are embedded.\n")


def test_a_folder_that_cannot_be_locked_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    told = r"^the file system of .*out cannot lock files .*, or give another --out$"
    with pytest.raises(BulkError, match=told), writing(tmp_path / "out"):
        pass
    monkeypatch.undo()
    (tmp_path / "file").touch()
    told = "^the folder of features .*/file/out cannot be written .*, or give another --out$"
    with pytest.raises(BulkError, match=told), writing(tmp_path / "file" / "out"):
        pass


def begun(arguments: Sequence[object]) -> BaseProcess:
    """A command in a process of its own, which has imported torch already."""
    process = CONTEXT.Process(target=_command, args=(list(map(str, arguments)),))
    process.start()
    return process


def _command(arguments: list[str]) -> None:
    os.environ.update(ENVIRONMENT)
    main(arguments)


def rows_of(database: Path) -> int:
    """How many items another process has committed."""
    address = f"file:{database}?mode=ro"
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(address, uri=True)) as connection,
    ):
        return int(connection.execute("SELECT count(*) FROM items").fetchone()[0])
    return 0


def rewritten(file: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    """Replace a file by one whose rows are changed and whose checksums fit."""
    opened = FeatureFile(file)
    rows = [row for at in range(len(opened.groups())) for row in opened.read_group(at)]
    sound = [row for row in rows if isinstance(row, Row)]
    with file.open("wb") as target:
        writer = Writer(target, opened.header)
        writer.write(change(sound))
        writer.close()


def test_rows_are_refused_one_by_one(
    features: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "failed.csv"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    changes: dict[str, dict[str, Any]] = {
        "image_type_unsupported": {"crop": b"<svg/>"},
        "image_too_small": {"crop": buffer.getvalue()},
        "labels_invalid": {"person_id": "x" * 129},
        "labels_invalid ": {"metadata": "[1]"},
        "labels_invalid  ": {"metadata": '{"a": '},
        "labels_invalid   ": {"metadata": '{"a":' * 2_000},
        "features_invalid": {"features": np.full(96, np.nan, np.float16)},
        "features_invalid ": {"features": np.full(96, 1, np.float16)},
        "row_damaged": {"sha256": "none"},
        "row_damaged ": {"bit_depth": 0},
    }

    def change(rows: list[Row]) -> list[Row]:
        assert len(rows) == len(changes)
        changed = [
            replace(row, path=f"{code.replace(' ', '+')}.jpg", **values)
            for row, (code, values) in zip(rows, changes.items(), strict=True)
        ]
        one, other = (replace(row, key="one") for row in rows[:2])
        return [*changed, replace(one, path="first.jpg"), replace(other, path="second.jpg")]

    rewritten(features / "features-000001.parquet", change)
    data = tmp_path / "data"
    load = ("import", features, "--checkpoint", tiny_checkpoint, "--data-dir", data)
    status, printed, _ = run(capsys, *load, "--report", report)
    assert (status, printed.splitlines()[0]) == (1, "23 of 34 rows are imported.")
    with report.open() as file:
        failed = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    expected = {code.replace(" ", "+"): code.strip() for code in changes}
    expected["second"] = "idempotency_conflict"
    assert {name: row["code"] for name, row in failed.items()} == expected
    assert failed["labels_invalid"]["person_id"] == "x" * 129
    root = FeatureFile(features / "features-000001.parquet").header.root
    assert {str(Path(row["file"]).parent) for row in failed.values()} == {root}


def test_features_of_something_else_are_noticed_by_the_sample(
    features: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = np.ones(96, np.float64)
    unit = (other / np.linalg.norm(other)).astype(np.float16)
    rewritten(
        features / "features-000002.parquet",
        lambda rows: [replace(row, features=unit) for row in rows],
    )
    data = tmp_path / "data"
    load = ("import", features, "--checkpoint", tiny_checkpoint, "--data-dir", data)
    status, printed, err = run(capsys, *load)
    assert (status, printed) == (1, "")
    assert "are not those that the checkpoint computes here (cosine " in err
    with filling(data, info_of(tiny_checkpoint)) as store:
        assert store.count() == 0


def test_another_checkpoint_is_refused(
    features: Path, checkpoints: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    first, second = checkpoints
    data = tmp_path / "data"
    status, _, err = run(capsys, "import", features, "--checkpoint", second, "--data-dir", data)
    assert (status, "give the one that made them" in err) == (1, True)
    assert not data.exists()
    with filling(data, info_of(second)):
        pass
    status, _, err = run(capsys, "import", features, "--checkpoint", first, "--data-dir", data)
    assert (status, "the gallery is searched with the checkpoint" in err) == (1, True)
    with filling(data, info_of(second)) as store:
        assert [one.fingerprint for one in store.versions.list()] == [info_of(second).fingerprint]


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 1000] ^= 1  # in a crop
    file.write_bytes(content)


def without_column(file: Path) -> None:
    table = parquet.read_table(file)
    parquet.write_table(table.drop_columns(["width"]), file)


def of_one_group(file: Path) -> None:
    table = parquet.read_table(file)
    parquet.write_table(concat_tables([table] * 30), file)


def foreign(file: Path) -> None:
    parquet.write_table(parquet.read_table(file).replace_schema_metadata(None), file)


def of_a_newer_release(file: Path) -> None:
    table = parquet.read_table(file)
    header = {"format": 2, "release": "9.0"}
    parquet.write_table(table.replace_schema_metadata({"cmt-features": json.dumps(header)}), file)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda file: os.truncate(file, file.stat().st_size - 100), "as a whole Parquet"),
    "empty": (lambda file: os.truncate(file, 0), "as a whole Parquet"),
    "text": (lambda file: file.write_text("PAR1, but not really"), "as a whole Parquet"),
    "column": (without_column, "has other columns or row groups than"),
    "groups": (of_one_group, "has other columns or row groups than"),
    "foreign": (foreign, "is no file of `cmt embed-bulk`"),
    "newer": (of_a_newer_release, "was written by another release (9.0)"),
    "missing": (Path.unlink, "is missing; put it back"),
    "record": (lambda file: (file.parent / RECORD).write_text("{}"), "is damaged"),
    "unfinished": (lambda file: (file.parent / RECORD).unlink(), "is not finished"),
    "nothing": (lambda file: shutil.rmtree(file.parent), "holds no features"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_before_anything_is_imported(
    damage: str, features: Path, tiny_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil, sentence = DAMAGES[damage]
    spoil(features / "features-000002.parquet")
    load = ("import", features, "--checkpoint", tiny_checkpoint, "--data-dir", tmp_path / "data")
    status, printed, err = run(capsys, *load)
    assert (status, printed, err.startswith("Error: ")) == (1, "", True)
    assert sentence in err
    assert not (tmp_path / "data").exists()


def test_a_flipped_bit_costs_the_rows_that_it_may_have_changed(
    people: Path, features: Path, tiny_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flipped(features / "features-000002.parquet")
    load = ("import", features, "--checkpoint", tiny_checkpoint, "--data-dir", tmp_path / "data")
    status, printed, _ = run(capsys, *load)
    assert (status, printed.splitlines()[0]) == (1, "22 of 32 rows are imported.")
    assert f"{features / 'features-000002.parquet'}, row 1: " in printed
    # As it says: without that file, the same command embeds what it held.
    (features / "features-000002.parquet").unlink()
    embed = ("embed-bulk", people / "people.csv", "--checkpoint", tiny_checkpoint, "--out")
    assert run(capsys, *embed, features)[1] == "32 of 32 files are embedded, 22 of them before.\n"
    assert run(capsys, *load)[1] == "32 of 32 rows are imported, 22 of them before.\n"


def test_a_row_that_another_tool_changed_is_damaged(features: Path) -> None:
    file = features / "features-000001.parquet"
    table = parquet.read_table(file)
    people = table["person_id"].to_pylist()
    position = table.schema.names.index("person_id")
    swapped = [*people[1:], people[0]]
    field = table.schema.field(position)
    changed = table.set_column(position, field, [swapped])
    parquet.write_table(changed, file)
    read = FeatureFile(file).read_group(0)
    assert [isinstance(row, DamagedRow) for row in read] == [
        one != other for one, other in zip(people, swapped, strict=True)
    ]


def test_many_files_are_not_held_open(features: Path) -> None:
    """A million crops are a thousand files, and a process may have as many open."""
    names = sorted(features.glob("*.parquet"))
    open_files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    files = [FeatureFile(name) for name in names]
    assert sum(len(file.read_group(0)) for file in files) == 32
    assert len(os.listdir("/proc/self/fd")) == open_files  # noqa: PTH208
    names[0].unlink()
    with pytest.raises(BulkError, match=r"cannot be read \(No such file"):
        files[0].read_group(0)


def test_a_time_that_python_cannot_hold_is_damage(features: Path) -> None:
    file = features / "features-000001.parquet"
    table = parquet.read_table(file)
    position = table.schema.names.index("captured_at")
    field = table.schema.field(position)
    times = array([2**63 - 1] * table.num_rows, int64()).cast(field.type)
    parquet.write_table(table.set_column(position, field, times), file)
    assert all(isinstance(row, DamagedRow) for row in FeatureFile(file).read_group(0))


def rows_in(folder: Path) -> dict[str, Row]:
    found = {}
    for file in sorted(folder.glob("*.parquet")):
        opened = FeatureFile(file)
        for at in range(len(opened.groups())):
            for row in opened.read_group(at):
                assert isinstance(row, Row)
                found[f"{row.path} {row.box}"] = row
    return found


@pytest.mark.skipif(not all(map(find_spec, ("ray", "pandas"))), reason="needs the extra scale")
def test_ray_computes_the_same(
    people: Path, embedded: Path, tiny_checkpoint: Path, tmp_path: Path, image: bytes,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, out = tmp_path / "people", tmp_path / "out"
    shutil.copytree(people, folder)
    no_text = os.fsdecode(b"cam1/caf\xe9.jpg")
    (folder / no_text).write_bytes(image)
    (folder / "cam1" / "broken.jpg").write_bytes(image[:2000])
    embed = ("embed-bulk", folder / "cam1", "--checkpoint", tiny_checkpoint, "--out", out)
    assert main([*map(str, embed), "--ray-address", "127.0.0.1:9"]) == 1
    printed, err = capfd.readouterr()
    assert printed == ""
    assert err.startswith("Error: no Ray cluster answers at 127.0.0.1:9")
    assert err.endswith("or leave out --engine ray\n")
    status = main([*map(str, embed), "--engine", "ray", "--rows-per-file", "2"])
    printed, err = capfd.readouterr()
    assert (status, printed.splitlines()[0]) == (1, "17 of 18 files are embedded."), err
    assert "broken.jpg: the image" in printed
    there = {f"cam1/{name}": row for name, row in rows_in(out).items()}
    # A box was cut in the manifest.
    same = there.keys() & rows_in(embedded).keys()
    assert len(same) == 15
    for name, row in rows_in(embedded).items():
        if name in same:
            assert row.crop == there[name].crop
            # Unit vectors; another process may compute in another precision that measured faster.
            both = (one.features.astype(np.float64) for one in (row, there[name]))
            assert np.dot(*both) > SAME


def test_without_pyarrow_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for command in (("embed-bulk", tmp_path, "--out", tmp_path / "out"), ("import", tmp_path)):
        status, _, err = run(capsys, *command)
        assert (status, "pip install pyarrow" in err) == (1, True)
