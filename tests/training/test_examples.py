"""The committed example crops, and the script that picks them."""

import csv
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
MINI = ROOT / "tests" / "data" / "synth-sysu-mini"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (EXAMPLES / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_manifest_lists_exactly_the_crops(rows: list[dict[str, str]]) -> None:
    on_disk = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("*/*.jpg")}
    assert {row["file"] for row in rows} == on_disk
    assert len(rows) == len(on_disk) == 140
    assert Counter((row["role"], row["modality"]) for row in rows) == {
        ("gallery", "rgb"): 120,
        ("query", "ir"): 20,
    }
    assert sum((EXAMPLES / row["file"]).stat().st_size for row in rows) <= 3_000_000


def test_every_query_has_an_answer_that_the_protocol_counts(rows: list[dict[str, str]]) -> None:
    gallery = [row for row in rows if row["role"] == "gallery"]
    for query in (row for row in rows if row["role"] == "query"):
        cameras = {g["camera_id"] for g in gallery if g["person_id"] == query["person_id"]}
        if query["camera_id"] == "cam3":
            cameras.discard("cam2")
        assert cameras


def test_infrared_crops_have_no_chroma_and_visible_ones_do(rows: list[dict[str, str]]) -> None:
    spread: dict[str, list[int]] = {"rgb": [], "ir": []}
    for row in rows:
        with Image.open(EXAMPLES / row["file"]) as image:
            chroma = np.asarray(image.convert("YCbCr").getchannel("Cb"))
        spread[row["modality"]].append(int(chroma.max()) - int(chroma.min()))
    assert max(spread["ir"]) < 3 < 10 < min(spread["rgb"])


def test_credits_name_every_source() -> None:
    text = (EXAMPLES / "CREDITS.md").read_text(encoding="utf-8")
    for name in ("MakeHuman", "punkduck", "Mindfront", "DredNicolson", "Shortcomings"):
        assert name in text


def test_the_script_picks_the_same_crops_again(tmp_path: Path) -> None:
    def run(out: Path) -> dict[Path, bytes]:
        command: list[str | Path] = [
            sys.executable,
            ROOT / "scripts" / "select_examples.py",
            "--root",
            MINI,
        ]
        command += ["--ids", MINI / "exp" / "val_id.txt", "--out", out, "--queries", "3"]
        subprocess.run(command, check=True, cwd=ROOT)
        return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.*")}

    first = run(tmp_path / "first")
    assert run(tmp_path / "second") == first
    gallery = [path.name for path in first if path.parent.name == "gallery"]
    # Three images of each person, from three cameras where it was seen by three.
    assert len({name.rsplit("_", 1)[0] for name in gallery}) == len(gallery) == 9
    for path, content in first.items():
        if path.suffix == ".jpg":
            person, camera, frame = path.stem.split("_")
            assert content == (MINI / camera / person / f"{frame}.jpg").read_bytes()
