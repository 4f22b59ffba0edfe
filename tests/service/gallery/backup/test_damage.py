"""Whatever is wrong with a backup, it is said in a sentence and nothing is changed."""

from __future__ import annotations

import hashlib
import io
import json
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from model import CheckpointInfo, CMTConfig
from service.errors import BackupInvalid
from service.gallery import Filters, Gallery, NewItem
from service.gallery.backup.archive import MANIFEST
from service.gallery.backup.restore import restore
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from tests.service.places import EARLIER_RELEASE, KINDS, MakePlace
from tests.service.stores import crop

INFO = CheckpointInfo("a" * 64, CMTConfig(parts=2, dim=16, heads=2))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of a small gallery."""
    folder = tmp_path_factory.mktemp("source")
    with closing(Gallery.open(folder / "data", INFO)) as gallery:
        new = [NewItem(crop(i), person_id=str(i)) for i in range(6)]
        gallery.add(new, torch.randn(6, 2, 16))
        gallery.backup(folder / "backup.zip")
    return folder / "backup.zip"


def refused(backup: Path, match: str, root: Path) -> None:
    """No folder is made, and one that exists gets nothing but its lock."""
    there = root / "there"
    there.mkdir(exist_ok=True)
    for folder in (root / "new", there):
        with pytest.raises(BackupInvalid, match=match) as caught:
            restore(backup, folder)
        assert caught.value.status == 422
        assert "\n" not in caught.value.detail
    assert not (root / "new").exists()
    assert {path.name for path in there.iterdir()} == {"lock"}


def members(backup: Path) -> dict[str, bytes]:
    with ZipFile(backup) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, parts: dict[str, bytes], compression: int = 0) -> Path:
    with ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def with_manifest(parts: dict[str, bytes], change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(parts[MANIFEST])
    change(manifest)
    parts[MANIFEST] = json.dumps(manifest).encode()


def with_database(parts: dict[str, bytes], statement: str, folder: Path) -> None:
    """Change the database as somebody would who also sets the checksum right."""
    file = folder / "changed.sqlite3"
    file.write_bytes(parts[FILE_NAME])
    with closing(sqlite3.connect(file)) as database:
        database.executescript(statement)
    data = parts[FILE_NAME] = file.read_bytes()
    told = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with_manifest(parts, lambda manifest: manifest["members"].update({FILE_NAME: told}))


def test_what_these_tests_write_is_a_backup(good: Path, tmp_path: Path) -> None:
    parts = members(good)
    with_manifest(parts, lambda manifest: None)
    with_database(parts, "VACUUM", tmp_path)
    assert restore(written(tmp_path / "x.zip", parts), tmp_path / "d").counts["items"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_of_an_earlier_release_gets_the_newest_tables(
    kind: str, make_place: MakePlace, good: Path, tmp_path: Path
) -> None:
    parts, place = members(good), make_place(kind)
    old = "UPDATE items SET person_id = 'zoe\u0308 ' WHERE number < 4;"
    with_database(parts, EARLIER_RELEASE + old, tmp_path)

    def earlier(manifest: dict[str, Any]) -> None:
        manifest["revision"] = "0002"
        later = ("cameras", "clock", "undated", "objects", "loose_objects", "object_owner")
        for table in later:
            manifest["counts"].pop(table, None)

    with_manifest(parts, earlier)
    restore(written(tmp_path / "x.zip", parts), place.folder, place.url)
    with closing(place.open()) as gallery:
        assert gallery.list(Filters(person_id=("zo\u00eb",)), 9).total == 3
        entries = gallery.audit(9).entries
        assert [entry.action for entry in entries[:2]] == ["restore", "respell"]
        assert gallery.cameras() == []


def test_cut_off_anywhere(good: Path, tmp_path: Path) -> None:
    data, backup = good.read_bytes(), tmp_path / "cut.zip"
    for length in [4, 5, 100, *(len(data) * n // 10 for n in range(1, 10)), len(data) - 1]:
        backup.write_bytes(data[:length])
        refused(backup, "damaged or cut off", tmp_path)
    for length in (0, 3):
        backup.write_bytes(data[:length])
        refused(backup, "is no backup", tmp_path)


@pytest.mark.parametrize("name", [FILE_NAME, KEY_FILE, MANIFEST])
def test_a_flipped_byte_in_any_member(name: str, good: Path, tmp_path: Path) -> None:
    data, backup = bytearray(good.read_bytes()), tmp_path / "flipped.zip"
    with ZipFile(good) as archive:
        entry = archive.getinfo(name)
    start = data.index(members(good)[name], entry.header_offset)
    for place in random.Random(1).sample(range(entry.file_size), 12):
        data[start + place] ^= 0x10
        backup.write_bytes(data)
        refused(backup, "damaged", tmp_path)
        data[start + place] ^= 0x10


def test_a_flipped_byte_anywhere_is_noticed_or_harmless(good: Path, tmp_path: Path) -> None:
    """Also in the archive's own tables, of which some fields say nothing that matters."""
    data, backup = bytearray(good.read_bytes()), tmp_path / "flipped.zip"
    tail = data.index(b"PK\x01\x02")
    places = [*range(60), *range(tail, len(data))]
    noticed = 0
    for turn, place in enumerate(places):
        data[place] ^= 1 << turn % 8
        backup.write_bytes(data)
        data[place] ^= 1 << turn % 8
        try:
            restored = restore(backup, tmp_path / f"{place}")
        except BackupInvalid:
            noticed += 1
            assert not (tmp_path / f"{place}").exists()
        else:
            assert restored.counts["items"] == 6
    assert noticed > len(places) // 3


@pytest.mark.parametrize("name", [FILE_NAME, KEY_FILE, MANIFEST])
def test_a_missing_member(name: str, good: Path, tmp_path: Path) -> None:
    parts = members(good)
    del parts[name]
    match = "ZIP file and no backup" if name == MANIFEST else "missing"
    refused(written(tmp_path / "less.zip", parts), match, tmp_path)


def test_files_of_others(good: Path, tmp_path: Path) -> None:
    foreign = written(tmp_path / "foreign.zip", {"word/document.xml": b"<x/>"})
    refused(foreign, "ZIP file and no backup", tmp_path)
    other = written(tmp_path / "other.zip", {MANIFEST: b'{"name": "a web page"}'})
    refused(other, "is no backup", tmp_path)
    for nonsense in (b"\xff", b"[1]", b"null", b"{", b'{"format": "cmt-backup"}'):
        refused(written(tmp_path / "n.zip", {MANIFEST: nonsense}), "backup", tmp_path)
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(1000))
    refused(tmp_path / "image.jpg", "is no backup", tmp_path)
    refused(tmp_path / "nowhere.zip", "check the path", tmp_path)
    refused(tmp_path, "cannot be read", tmp_path)
    # Unpacked and packed again by a program that compresses.
    packed = written(tmp_path / "packed.zip", members(good), ZIP_DEFLATED)
    refused(packed, "damaged", tmp_path)
    more = written(tmp_path / "more.zip", {**members(good), "../../escaped": b"x"})
    refused(more, "unknown", tmp_path)


def test_a_manifest_that_says_two_things(good: Path, tmp_path: Path) -> None:
    parts = members(good)
    active = json.loads(parts[MANIFEST])["active"]
    mine = f'"active": {json.dumps(active)}'.encode()
    assert parts[MANIFEST].count(mine) == 1
    for other, reason in ((b'"active": null', "'active' is there twice"), (b'"x": NaN', "damaged")):
        twice = parts | {MANIFEST: parts[MANIFEST].replace(mine, mine + b", " + other)}
        refused(written(tmp_path / "x.zip", twice), reason, tmp_path)


def test_of_a_newer_release(good: Path, tmp_path: Path) -> None:
    parts = members(good)
    with_manifest(parts, lambda manifest: manifest.update(version=2, compressed="zstd"))
    newer = written(tmp_path / "newer.zip", parts)
    refused(newer, "has format 2 and this release reads 1; restore it with the newer", tmp_path)
    parts = members(good)
    with_database(parts, "UPDATE alembic_version SET version_num = '9999'", tmp_path)
    with_manifest(parts, lambda manifest: manifest.update(revision="9999"))
    newer = written(tmp_path / "tables.zip", parts)
    refused(newer, "newer release, with tables of revision 9999", tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM items WHERE number = 3",
        "DELETE FROM crops WHERE number = 3",
        "DELETE FROM features WHERE number = 3",
        "UPDATE models SET state = 'retired'",
        "UPDATE alembic_version SET version_num = '0001'",
        "DROP TABLE audit",
        "CREATE TABLE more (x)",
        "CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM audit; END",
        "CREATE VIEW v AS SELECT 1",
        "DROP TRIGGER audit_no_delete",
        "DROP TRIGGER audit_no_delete; CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
        "BEGIN SELECT 1; END",
    ],
)
def test_a_database_that_is_not_the_manifests(statement: str, good: Path, tmp_path: Path) -> None:
    parts = members(good)
    with_database(parts, statement, tmp_path)
    refused(written(tmp_path / "x.zip", parts), "damaged", tmp_path)


@pytest.mark.parametrize("data", [b"", b"SQLite format 3\0", bytes(4096), b"x" * 9000])
def test_something_else_than_a_database(data: bytes, good: Path, tmp_path: Path) -> None:
    parts = members(good)
    parts[FILE_NAME] = data
    told = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with_manifest(parts, lambda manifest: manifest["members"].update({FILE_NAME: told}))
    refused(written(tmp_path / "x.zip", parts), "damaged", tmp_path)


def test_a_checksum_or_size_that_is_another(good: Path, tmp_path: Path) -> None:
    for member in (FILE_NAME, KEY_FILE):
        for told in ({"sha256": "0" * 64}, {"size": 5}):
            parts = members(good)
            with_manifest(parts, lambda m, n=member, t=told: m["members"][n].update(t))  # type: ignore[misc]
            refused(written(tmp_path / "x.zip", parts), "damaged", tmp_path)


def test_a_member_twice(good: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO(good.read_bytes())
    with ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(KEY_FILE, b"another key")
    (tmp_path / "twice.zip").write_bytes(buffer.getvalue())
    refused(tmp_path / "twice.zip", "damaged", tmp_path)
