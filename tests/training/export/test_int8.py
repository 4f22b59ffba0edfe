"""The int8 form of a checkpoint is written only where it passes, and says how."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import openvino
import pytest
import torch
from torch.nn import functional

from model import CMT, load_checkpoint
from model.cli import main
from model.config import MODALITIES
from model.fixed_batch import IN_FP32_AT_ANY_SIZE
from model.int8 import LEAST_COSINE, Int8Error, int8_folder, read_int8
from tests.paths import MINI, ROOT
from training.datasets import LAYOUTS, DatasetName
from training.evaluation.protocols import protocol_splits
from training.export import int8
from training.export.folder import ExportError
from training.export.images import chosen_images, preprocessed
from training.export.int8 import HeldOut, write_int8


@pytest.fixture
def checkpoint(tiny_int8: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, with its int8 form beside it."""
    copied = Path(shutil.copy(tiny_int8, tmp_path))
    shutil.copytree(int8_folder(tiny_int8), int8_folder(copied))
    return copied


def quantise(checkpoint: Path, *options: str) -> int:
    return main(["export", "--checkpoint", str(checkpoint), "--format", "int8", *options])


@pytest.fixture
def held_out(tiny_int8: Path) -> HeldOut:
    """Those that the fixture's form was compared on."""
    sysu = LAYOUTS[DatasetName.SYSU]
    samples = sysu.test(MINI, 1, sysu.read_ids(tiny_int8.with_name("people.txt")))
    return HeldOut("sysu mini", samples, protocol_splits(DatasetName.SYSU, samples))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_graphs_are_int8_and_give_pytorchs_features(tiny_int8: Path, tiny_model: CMT) -> None:
    form = read_int8(tiny_int8, load_checkpoint(tiny_int8)[1].fingerprint)
    assert form.held_out
    samples = [s for s in LAYOUTS[DatasetName.SYSU].images(MINI) if s.camera in (1, 3)]
    core = openvino.Core()
    for modality in MODALITIES:
        graph = core.read_model(form.graphs[modality])
        kinds = [op.get_type_name() for op in graph.get_ordered_ops()]
        assert kinds.count("FakeQuantize") > kinds.count("Convolution") > 0
        compiled = core.compile_model(graph, "CPU", IN_FP32_AT_ANY_SIZE)
        seen = [sample for sample in samples if sample.modality == modality][:8]
        images = preprocessed(seen, tiny_model.config)
        for batch in (1, 8):
            given = torch.from_numpy(compiled(images[:batch].numpy())[0])
            true = tiny_model.embed(images[:batch], modality)
            cosines = functional.cosine_similarity(given.flatten(1), true.flatten(1))
            assert float(cosines.min()) >= LEAST_COSINE
            torch.testing.assert_close(given.flatten(1).norm(dim=1), torch.ones(batch))


def test_the_record_says_of_what_and_how(tiny_int8: Path, held_out: HeldOut) -> None:
    facts = json.loads((int8_folder(tiny_int8) / "int8.json").read_text())
    assert facts["fingerprint"] == load_checkpoint(tiny_int8)[1].fingerprint
    assert {"nncf", "openvino"} <= facts["machine"]["packages"].keys()
    assert {modality: of["count"] for modality, of in facts["images"].items()} == {
        "rgb": 120,
        "ir": 20,
    }
    assert all(cosine >= LEAST_COSINE for cosine in facts["lowest_cosine"].values())
    assert facts["method"] == "plain"
    compared = facts["held_out"]
    assert (compared["source"], compared["images"]) == (f"sysu {MINI.name}", len(held_out.samples))
    titles = [split.title for split in held_out.splits]
    assert [search["search"] for search in compared["searches"]] == titles
    figures = [search["mean_ap"] for search in compared["searches"]]
    assert all(0 < value <= 1 for both in figures for value in both)


def test_what_ranks_worse_is_refused_and_an_earlier_form_kept(
    checkpoint: Path, held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With limits that nothing meets: random weights rank by chance."""
    monkeypatch.setattr(int8, "MOST_RANK_1", -1)
    model, info = load_checkpoint(checkpoint)
    before = contents(checkpoint.parent)
    with pytest.raises(ExportError, match=r"plain: .* rank-1 .*accuracy-aware: .* rank-1 "):
        write_int8(model, info, chosen_images(None, 12), int8_folder(checkpoint), held_out)
    assert contents(checkpoint.parent) == before


def test_nothing_is_calibrated_on_the_people_that_it_is_compared_on(
    checkpoint: Path, held_out: HeldOut
) -> None:
    model, info = load_checkpoint(checkpoint)
    samples = held_out.samples
    images = {m: [s for s in samples if s.modality == m][:12] for m in MODALITIES}
    with pytest.raises(ExportError, match="of the images to calibrate on are of the people"):
        write_int8(model, info, images, int8_folder(checkpoint), held_out)


def test_what_is_missing_is_a_sentence(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(checkpoint.parent)
    assert quantise(checkpoint, "--root", str(MINI)) == 2
    assert "--dataset and --root go together" in capsys.readouterr().err
    (int8_folder(checkpoint) / "notes.txt").write_text("mine")
    assert quantise(checkpoint) == 1
    assert "holds notes.txt beside an export" in capsys.readouterr().err
    (int8_folder(checkpoint) / "notes.txt").unlink()
    assert main(["export", "--checkpoint", str(checkpoint)]) == 2
    assert "--output FOLDER is missing" in capsys.readouterr().err
    monkeypatch.setattr(int8, "find_spec", lambda _: None)
    assert quantise(checkpoint) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "pip install 'cmt-reid[int8]'" in error
    assert contents(checkpoint.parent) == before


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("none", "there is no int8 form of the checkpoint in"),
        ("flipped", "is damaged"),
        ("a graph missing", "there is no int8 form"),
        ("no json", "cannot be read"),
        ("another release", "is of another release"),
        ("another checkpoint", "is of another checkpoint"),
    ],
)
def test_only_whole_files_of_the_same_checkpoint_are_used(
    damage: str, sentence: str, checkpoint: Path
) -> None:
    folder, fingerprint = int8_folder(checkpoint), load_checkpoint(checkpoint)[1].fingerprint
    record = folder / "int8.json"
    if damage == "none":
        shutil.rmtree(folder)
    elif damage == "flipped":
        weights = folder / "embedding-ir.bin"
        weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    elif damage == "a graph missing":
        (folder / "embedding-rgb.xml").unlink()
    elif damage == "no json":
        record.write_text("{")
    elif damage == "another release":
        record.write_text(record.read_text().replace('"version": 1', '"version": 2', 1))
    else:
        fingerprint = "0" * 64
    with pytest.raises(Int8Error, match=re.escape(sentence)):
        read_int8(checkpoint, fingerprint)


def test_the_documents_name_the_limits() -> None:
    text = " ".join((ROOT / "docs" / "export.md").read_text().split())
    assert f"cosine of {LEAST_COSINE}" in text
    assert f"{100 * int8.MOST_RANK_1:g} points" in text
    assert f"{100 * int8.MOST_MAP:g} points" in text
