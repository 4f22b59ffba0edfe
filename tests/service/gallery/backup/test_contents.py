"""A backup with a row that no gallery has written is refused, and the sentence names it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.errors import BackupInvalid
from service.gallery import Filters, Gallery, NewItem
from service.gallery.backup.restore import restore
from service.gallery.metadata import METADATA_BYTES
from service.gallery.storage.audit import KEY_FILE
from service.gallery.storage.database import FILE_NAME
from tests.service.gallery.backup.test_damage import (  # noqa: F401 - one is a fixture
    INFO,
    good,
    members,
    refused,
    with_database,
    written,
)
from tests.service.stores import crop

NAN, INFINITY = (np.float16(text).tobytes().hex() for text in ("nan", "-inf"))
ROW = "UPDATE items SET {} WHERE number = 3"


def picture(kind: str, size: tuple[int, int] = (16, 32), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def with_crop(data: bytes, media_type: str = "image/png") -> str:
    return f"UPDATE crops SET data = x'{data.hex()}', media_type = '{media_type}' WHERE number = 3"


def with_features(change: str) -> str:
    return f"UPDATE features SET data = CAST({change} AS BLOB) WHERE number = 3"


WRONG = {
    # features: 32 numbers of 2 bytes each
    "not a number": (with_features(f"substr(data, 1, 20) || x'{NAN}' || substr(data, 23)"), "num"),
    "infinite": (with_features(f"x'{INFINITY}' || substr(data, 3)"), "infinite"),
    "short": (with_features("substr(data, 1, 62)"), "another length"),
    "long": (with_features("data || x'0000'"), "another length"),
    "all short": ("UPDATE features SET data = substr(data, 1, 62)", "another length"),
    "half a number": (with_features("substr(data, 1, 63)"), "another length"),
    "features as text": ("UPDATE features SET data = 'x' WHERE number = 3", "another length"),
    "of an unknown checkpoint": (f"UPDATE features SET model = '{'c' * 64}' WHERE number = 3",
                                 "does not know"),
    "of another item": ("UPDATE features SET number = 99 WHERE number = 3", "no row"),
    # metadata
    "metadata cut": (ROW.format("""details = '{"a": 1'"""), "JSON object"),
    "a list": (ROW.format("details = '[1]'"), "JSON object"),
    "too large": (ROW.format(f"""details = '{{"a": "{"x" * METADATA_BYTES}"}}'"""), "bytes"),
    "too deep": (ROW.format(f"""details = '{'{"a":' * 99_999}1{"}" * 99_999}'"""), "details"),
    "no number": (ROW.format("""details = '{"a": NaN}'"""), "details"),
    "not text": (ROW.format("details = x'ff'"), "details"),
    # crops
    "no image": (with_crop(b"no image at all"), "no image"),
    "a program": (with_crop(b"\x7fELF" + bytes(400)), "no image"),
    "a page": (with_crop(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "no image"),
    "an animation": (with_crop(picture("GIF"), "image/gif"), "no image"),
    "header only": (with_crop(b"\x89PNG\r\n\x1a\n"), "no image"),
    "nothing": (with_crop(b""), "no image"),
    "crop as text": ("UPDATE crops SET data = 'text' WHERE number = 3", "no crop"),
    "another kind": (with_crop(picture("JPEG")), "is image/jpeg"),
    "another size": (with_crop(picture("PNG", (16, 33))), "16×33 pixels, and its row says 16×32"),
    "another size, WebP": (with_crop(picture("WEBP", (17, 32)), "image/webp"), "17×32"),
    "row of another size": (ROW.format("height = 3200"), "16×32 pixels, and its row says 16×3200"),
    "no crop": ("INSERT INTO crops SELECT 99, media_type, data FROM crops WHERE number = 3; "
                "DELETE FROM crops WHERE number = 3", "no row"),
    # facts
    "no UUID": (ROW.format("id = '../../etc/passwd'"), "UUID"),
    "a short UUID": (ROW.format("id = substr(id, 1, 35)"), "UUID"),
    "no digest": (ROW.format("sha256 = 'abc'"), "sha256"),
    "another light": (ROW.format("modality = 'uv'"), "modality"),
    "no depth": (ROW.format("bit_depth = 0"), "bit_depth"),
    "a time beyond": (ROW.format("captured_at = 9000000000000000000"), "captured_at"),
    "a time as text": (ROW.format("enrolled_at = 'yesterday'"), "enrolled_at"),
    "a polarity": (ROW.format("polarity = 'cold'"), "polarity"),
    # labels
    "another form": (ROW.format("person_id = 'zoe\u0308'"), "person_id"),
    "white space": (ROW.format("camera_id = 'gate '"), "camera_id"),
    "invisible": (ROW.format("person_id = 'an\u200bna'"), "person_id"),
    "control characters": (ROW.format("person_id = char(7)"), "person_id"),
    "NUL": (ROW.format("person_id = 'a' || char(0)"), "person_id"),
    "no UTF-8": (ROW.format("person_id = CAST(x'7aff' AS TEXT)"), "person_id"),
    "bytes": (ROW.format("person_id = x'7a'"), "person_id"),
    "without end": (ROW.format(f"person_id = '{'x' * 2000}'"), "person_id"),
    "empty": (ROW.format("person_id = ''"), "person_id"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_no_gallery_has(name: str, good: Path, tmp_path: Path) -> None:  # noqa: F811
    statement, problem = WRONG[name]
    parts = members(good)
    with_database(parts, statement, tmp_path)
    with closing(sqlite3.connect(tmp_path / "changed.sqlite3")) as database:
        database.text_factory = bytes
        (item,) = database.execute("SELECT id FROM items WHERE number = 3").fetchone()
    backup = written(tmp_path / "x.zip", parts)
    refused(backup, re.escape(problem), tmp_path)
    with pytest.raises(BackupInvalid) as caught:
        restore(backup, tmp_path / "new")
    if name == "all short":  # the first one is named
        assert re.search("item [0-9a-f-]{36} ", caught.value.detail)
    elif name in ("no UUID", "a short UUID"):
        assert "item 3 " in caught.value.detail
    elif name in ("of another item", "no crop"):
        assert "item number 99 " in caught.value.detail
    else:
        assert f"item {item.decode()} " in caught.value.detail


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO cameras VALUES ('gate ', NULL, NULL)",
        "INSERT INTO cameras VALUES ('gate', 'uv', NULL)",
        "INSERT INTO audit (moment, actor, action, details) VALUES (1, 'a', 'b', '[')",
        "UPDATE models SET configuration = 'no JSON'",
        "INSERT INTO changes (item, kind, moment) VALUES (1, 'other', 1)",
        "UPDATE sqlite_sequence SET seq = 'many' WHERE name = 'items'",
    ],
)
def test_a_row_of_another_table(statement: str, good: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = members(good)
    with_database(parts, statement, tmp_path)
    manifest = json.loads(parts["manifest.json"])
    with closing(sqlite3.connect(tmp_path / "changed.sqlite3")) as database:
        for table in manifest["counts"]:
            (manifest["counts"][table],) = database.execute(
                f"SELECT count(*) FROM {table}"
            ).fetchone()
    parts["manifest.json"] = json.dumps(manifest).encode()
    refused(written(tmp_path / "x.zip", parts), "no gallery writes such a row", tmp_path)


def test_features_that_the_checkpoint_in_use_lacks(good: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = members(good)
    with_database(parts, "DELETE FROM features WHERE number = 3", tmp_path)
    manifest = json.loads(parts["manifest.json"])
    manifest["counts"]["features"] -= 1
    parts["manifest.json"] = json.dumps(manifest).encode()
    refused(written(tmp_path / "x.zip", parts), "no features of the checkpoint in use", tmp_path)


@pytest.mark.parametrize("key", [b"", bytes(range(31)), bytes(range(33)), bytes(32)])
def test_what_is_no_key(key: bytes, good: Path, tmp_path: Path) -> None:  # noqa: F811
    parts = members(good)
    parts[KEY_FILE] = key
    manifest = json.loads(parts["manifest.json"])
    facts = {"size": len(key), "sha256": hashlib.sha256(key).hexdigest()}
    manifest["members"][KEY_FILE] = facts
    parts["manifest.json"] = json.dumps(manifest).encode()
    refused(written(tmp_path / "x.zip", parts), f"{KEY_FILE} (has|is no key)", tmp_path)


def test_every_kind_of_picture_comes_back(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6  # it lies on its side in the file
    pictures = {
        "progressive": ("jpeg", picture("JPEG", quality=50, progressive=True)),
        "turned": ("jpeg", picture("JPEG", (32, 16), exif=turned)),
        "lossless": ("webp", picture("WEBP", lossless=True)),
        "lossy": ("webp", picture("WEBP", quality=50)),
        "profile": ("webp", picture("WEBP", icc_profile=b"profile")),
        "packed": ("tiff", picture("TIFF", compression="tiff_lzw")),
        "png": ("png", picture("PNG")),
        "bmp": ("bmp", picture("BMP")),
    }
    new = [
        NewItem(replace(crop(), data=data, media_type=f"image/{kind}"), camera_id=name)
        for name, (kind, data) in pictures.items()
    ]
    with closing(Gallery.open(tmp_path / "data", INFO)) as gallery:
        gallery.add(new, torch.randn(len(new), 2, 16))
        gallery.backup(tmp_path / "backup.zip")
    restore(tmp_path / "backup.zip", tmp_path / "there")
    with closing(Gallery.open(tmp_path / "there", INFO)) as gallery:
        for item in gallery.list(Filters(), 100).items:
            assert gallery.image(item.id)[0] == pictures[str(item.camera_id)][1]


def test_labels_of_older_releases_come_back(good: Path, tmp_path: Path) -> None:  # noqa: F811
    """A migration leaves those of which nothing can be left; they can still be erased."""
    parts = members(good)
    with_database(parts, "UPDATE items SET person_id = '\u200b' WHERE number = 3", tmp_path)
    restore(written(tmp_path / "x.zip", parts), tmp_path / "there")
    with closing(Gallery.open(tmp_path / "there", INFO)) as gallery:
        assert gallery.delete_where("\u200b") == 1
    assert (tmp_path / "there" / FILE_NAME).exists()
