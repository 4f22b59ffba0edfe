"""RegDB, LLCM and plain folders through the whole evaluation, as library and as command."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor

from model import CMT, CheckpointInfo, load_checkpoint, modulate, save_checkpoint
from model.cli import main
from tests.paths import MINI
from training.datasets import LAYOUTS, DatasetError, DatasetName
from training.evaluation import protocol_splits, rank_metrics
from training.evaluation.embedding import embed_samples
from training.evaluation.figures import BORDER, CAPTION, RIGHT, THUMBNAIL, write_sheets
from training.evaluation.module_diagnostics import CompensationDiagnostics
from training.evaluation.published import PAPER, TITLES, published_rows
from training.evaluation.report import Evaluation, score_model, summarise
from training.recipe import load_recipe
from training.run import DEFAULT_RECIPES


def test_regdb_and_folder_search_everything_in_both_directions(
    regdb_root: Path, folder_root: Path
) -> None:
    for name, root in ((DatasetName.REGDB, regdb_root), (DatasetName.FOLDER, folder_root)):
        samples = LAYOUTS[name].test(root)
        splits = protocol_splits(name, samples)
        assert [split.title for split in splits] == ["visible-to-infrared", "infrared-to-visible"]
        for split, query, gallery in zip(splits, ("rgb", "ir"), ("ir", "rgb"), strict=True):
            assert (split.protocol, split.convention) == ("regdb", "whole")
            assert len(split.galleries) == 1
            for indices, modality in ((split.queries, query), (split.galleries[0], gallery)):
                expected = {s.path for s in samples if s.modality == modality}
                assert {samples[i].path for i in indices} == expected
                assert len(indices) == len(expected)


def test_llcm_galleries_are_the_draws_of_public_code(llcm_root: Path) -> None:
    samples = LAYOUTS[DatasetName.LLCM].test(llcm_root)
    splits = protocol_splits(DatasetName.LLCM, samples)
    assert [split.protocol for split in splits] == ["llcm", "llcm"]
    for split, word, cameras in zip(splits, ("nir", "vis"), ((1, 2), (1, 2, 3)), strict=True):
        assert len(split.galleries) == 10
        for trial, gallery in enumerate(split.galleries):
            random.seed(trial)  # as public code does, walking the folders
            expected = []
            for person in (5, 6, 7):
                for camera in cameras:
                    folder = llcm_root / f"test_{word}" / f"cam{camera}" / f"{person:04d}"
                    expected.append(random.choice(sorted(folder.iterdir())))
            assert [samples[i].path for i in gallery] == expected
        assert {samples[i].modality for i in split.queries} == {"rgb" if word == "nir" else "ir"}


def test_llcm_by_its_authors_scripts_is_their_matrix_transposed(
    tiny_model: CMT, llcm_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Visible to infrared: the drawn infrared images ask all visible ones, in ten trials."""
    samples = LAYOUTS[DatasetName.LLCM].test(llcm_root)
    stated = protocol_splits(DatasetName.LLCM, samples)
    splits = protocol_splits(DatasetName.LLCM, samples, authors=True)
    assert np.array_equal(splits[1].queries, stated[1].queries)
    assert (splits[1].convention, splits[0].convention) == ("seeded", "authors")
    people = np.array([s.person_id for s in samples])
    cameras = np.array([s.camera for s in samples])
    y = embed_samples(tiny_model, samples).embedding
    scores = score_model(tiny_model, samples, splits, rerank=True).splits[0]
    visible, ranks, precisions = stated[0].queries, [], []
    for trial, drawn in enumerate(stated[0].galleries):
        assert np.array_equal(splits[0].queries[splits[0].rows(trial)], drawn)
        with torch.no_grad():
            modulated = modulate(y[visible], tiny_model.modulation(y[drawn]))
        distance = (y[drawn][:, None] - modulated).flatten(2).norm(dim=2)
        plain = rank_metrics(
            *(distance, people[drawn], people[visible], cameras[drawn], cameras[visible], "llcm")
        )
        found = scores.modulated[trial].summary()
        assert found.mean_ap == pytest.approx(plain.mean_ap, abs=1e-6)
        assert found.cmc == pytest.approx(plain.cmc)
        ranks.append(plain.cmc[0])
        precisions.append(plain.mean_ap)
    evaluation = summarise(DatasetName.LLCM, [score_model(tiny_model, samples, splits)])
    figures = evaluation.splits[0].modulated
    assert figures.rank_1.mean == pytest.approx(np.mean(ranks))
    assert figures.mean_ap.std == pytest.approx(np.std(precisions), abs=1e-6)
    # Each query's gain is its mean over the trials that ask it.
    modulation = evaluation.splits[0].modulation
    assert modulation is not None
    assert np.isfinite(modulation.map_gain)

    file, out = tmp_path / "c.safetensors", tmp_path / "out.json"
    save(tiny_model, file)
    for choice, convention in (("authors", "authors"), ("seeded", "seeded"), ("auto", "seeded")):
        more = ("--convention", choice, "--json", out, "--sheets", tmp_path / choice)
        assert evaluate("llcm", llcm_root, file, *more) == 0
        printed = capsys.readouterr().out
        assert ("drawn infrared images ask all visible ones" in printed) == (choice == "authors")
        written = json.loads(out.read_text())["splits"]
        assert [split["convention"] for split in written] == [convention, "seeded"]
    assert evaluate("llcm", llcm_root, file, "--convention", "official") == 2


def test_one_modality_is_refused(folder_root: Path) -> None:
    visible = [s for s in LAYOUTS[DatasetName.FOLDER].test(folder_root) if s.modality == "rgb"]
    with pytest.raises(DatasetError, match="infrared images"):
        protocol_splits(DatasetName.FOLDER, visible)


def compensated(evaluation: Evaluation) -> CompensationDiagnostics:
    """What it says of compensated infrared features."""
    assert evaluation.compensation is not None
    figures = evaluation.compensation["ir"]
    assert figures is not None
    return figures


def test_ten_models_are_averaged_and_each_is_the_plain_loop(
    tiny_model: CMT, regdb_root: Path
) -> None:
    """Two trials: figures are the mean and deviation of what the paper's test loop gives."""
    layout, plain, scores = LAYOUTS[DatasetName.REGDB], [], []
    for trial in (1, 2):
        samples = layout.test(regdb_root, trial)
        splits = protocol_splits(DatasetName.REGDB, samples)
        scores.append(score_model(tiny_model, samples, splits, batch_size=5))
        people = np.array([s.person_id for s in samples])
        y = embed_samples(tiny_model, samples).embedding
        queries, gallery = splits[0].queries, splits[0].galleries[0]
        with torch.no_grad():
            modulated = modulate(y[gallery], tiny_model.modulation(y[queries]))
        distance = (y[queries][:, None] - modulated).flatten(2).norm(dim=2)
        zeros = np.zeros(12)
        plain.append(
            rank_metrics(distance, people[queries], people[gallery], zeros, zeros, "regdb")
        )
    evaluation = summarise(DatasetName.REGDB, scores)
    split = evaluation.splits[0]
    assert (evaluation.models, split.trials, split.queries, split.gallery) == (2, 2, 12, 12)
    for field in ("mean_ap", "mean_inp"):
        values = [getattr(metrics, field) for metrics in plain]
        assert getattr(split.modulated, field).mean == pytest.approx(np.mean(values), abs=1e-3)
        assert getattr(split.modulated, field).std == pytest.approx(np.std(values), abs=1e-3)
    assert split.modulated.rank_1.mean == pytest.approx(np.mean([m.cmc[0] for m in plain]))
    gain = split.modulated.mean_ap.mean - split.unmodulated.mean_ap.mean
    assert split.modulation is not None
    assert split.modulation.map_gain == pytest.approx(gain)
    single = [compensated(summarise(DatasetName.REGDB, [s])).rank_1 for s in scores]
    assert compensated(evaluation).rank_1 == pytest.approx(np.mean(single))


def evaluate(name: str, root: Path, checkpoint: str | Path, *more: object) -> int:
    where = ("--dataset", name, "--root", str(root), "--checkpoint", str(checkpoint))
    return main(["evaluate", *where, "--device", "cpu", *map(str, more)])


def save(model: CMT, path: Path, **training: object) -> CheckpointInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(path, model, training=training)


def test_the_command_takes_ten_checkpoints_by_a_pattern(
    tiny_model: CMT, regdb_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = LAYOUTS[DatasetName.REGDB]
    for trial in range(1, 11):
        ids = sorted(layout.train_ids(regdb_root, trial))
        save(tiny_model, tmp_path / f"{trial}.safetensors", dataset="regdb", identities=ids)
    pattern, out = tmp_path / "{trial}.safetensors", tmp_path / "out.json"
    assert evaluate("regdb", regdb_root, pattern, "--json", out) == 0
    printed = capsys.readouterr().out
    assert "10 trials (the whole gallery)" in printed
    assert "Table 2 of the paper (RegDB)" in printed
    words = " ".join(printed.split())
    row = "CMT ECCV-22 95.17 98.82 99.51 87.30 91.97 97.92 99.07 84.46"
    assert words.index(row) < words.index("measured ours, modulated")
    written = json.loads(out.read_text())
    assert written["models"] == 10
    assert [c["trial"] for c in written["checkpoints"]] == list(range(1, 11))
    (tmp_path / "4.safetensors").unlink()
    assert evaluate("regdb", regdb_root, pattern) == 1
    error = capsys.readouterr().err
    assert "4.safetensors (1 missing" in error
    assert "docs/training.md#regdb" in error
    assert evaluate("regdb", regdb_root, pattern, "--trial", 3, "--json", out) == 0
    assert json.loads(out.read_text())["models"] == 1
    assert evaluate("sysu", MINI, pattern) == 1
    assert "without {trial}" in capsys.readouterr().err


def test_a_checkpoint_of_regdb_is_tested_on_its_own_trial(
    tiny_model: CMT, regdb_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = sorted(LAYOUTS[DatasetName.REGDB].train_ids(regdb_root, 5))
    file = tmp_path / "five.safetensors"
    save(tiny_model, file, dataset="regdb", identities=ids, trial=5)
    assert evaluate("regdb", regdb_root, file, "--json", tmp_path / "out.json") == 0
    (entry,) = json.loads((tmp_path / "out.json").read_text())["checkpoints"]
    assert entry["trial"] == 5
    capsys.readouterr()
    assert evaluate("regdb", regdb_root, file, "--trial", 1) == 1
    assert "trained on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llcm", "folder", "sysu"])
def test_pictures_and_reranking_of_every_layout(
    request: pytest.FixtureRequest,
    name: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, more = (
        (MINI, ("--ids", MINI / "exp" / "val_id.txt"))
        if name == "sysu"
        else (
            request.getfixturevalue(f"{name}_root"),
            (),
        )
    )
    plot, sheets, out = tmp_path / "a" / "cmc.png", tmp_path / "sheets", tmp_path / "out.json"
    more = (*more, "--rerank", "--plot", plot, "--sheets", sheets, "--json", out)
    assert evaluate(name, root, tiny_checkpoint, *more) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 10_000
    splits = json.loads(out.read_text())["splits"]
    printed = capsys.readouterr().out
    assert "re-ranked" in printed
    for split in splits:
        assert split["reranked"]["mean_ap"]["mean"] > 0
        assert split["raw"]["mean_ap"]["mean"] > 0
        if name == "sysu":  # drawn people are told apart by either
            assert split["raw"] != split["unmodulated"]
        assert len(split["modulated"]["cmc"]) == 20
        title = split["title"].replace(" ", "_")
        best, worst = (sorted(sheets.glob(f"{title}_{k}_*.png")) for k in ("best", "worst"))
        assert len(best) == len(worst) > 0
    assert ("Table 1, all-search of the paper" in printed) == (name == "sysu")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--plot", "cmc.xyz"), "cmc.xyz"),
        (("--convention", "seeded"), "--convention seeded does not go with folder: SYSU-MM01"),
        (("--convention", "authors"), "--convention authors does not go with folder: SYSU-MM01"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_work(
    folder_root: Path, more: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("folder", folder_root, "absent.safetensors", *more) == 2
    error = capsys.readouterr().err
    assert word in error
    assert error.count("\n") == 1


def test_checkpoints_that_were_selected_in_two_ways_share_no_table(
    tiny_model: CMT, regdb_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trial in range(1, 11):
        ids = sorted(LAYOUTS[DatasetName.REGDB].train_ids(regdb_root, trial))
        facts = {"dataset": "regdb", "identities": ids, "selection": "val" if trial > 1 else "last"}
        save(tiny_model, tmp_path / f"{trial}.safetensors", **facts)
    assert evaluate("regdb", regdb_root, tmp_path / "{trial}.safetensors") == 1
    assert "was selected by 'val' and 1.safetensors by 'last'" in capsys.readouterr().err
    assert evaluate("regdb", regdb_root, tmp_path / "2.safetensors", "--trial", "2") == 0
    assert "Checkpoint selection: val" in capsys.readouterr().out


def test_sheets_show_the_nearest_of_best_and_worst(
    tiny_model: CMT, regdb_root: Path, tmp_path: Path
) -> None:
    samples = LAYOUTS[DatasetName.REGDB].test(regdb_root)
    splits = protocol_splits(DatasetName.REGDB, samples)
    scores = score_model(tiny_model, samples, splits).splits[0]
    files = write_sheets(samples, scores, tmp_path, count=2)
    assert [file.name.split("_")[1:3] for file in files] == [
        ["best", "01"],
        ["best", "02"],
        ["worst", "01"],
        ["worst", "02"],
    ]
    precision = scores.modulated[0].average_precision
    row = int(precision.argmax())
    people = np.array([s.person_id for s in samples])
    assert f"person_{people[splits[0].queries[row]]}" in files[0].name
    right = people[scores.nearest[row]] == people[splits[0].queries[row]]
    width = THUMBNAIL[0] + 2 * BORDER
    with Image.open(files[0]) as sheet:
        frames = [
            sheet.getpixel((width // 4 + width * place, CAPTION + 1)) == ImageColor.getrgb(RIGHT)
            for place in range(1, 11)
        ]
    assert frames == right.tolist()


def test_a_damaged_image_is_named(
    folder_root: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(folder_root, tmp_path / "set"))
    (root / "ir" / "ann" / "1.png").write_bytes(b"nothing")
    for workers in (0, 1):
        assert evaluate("folder", root, tiny_checkpoint, "--workers", workers) == 1
        error = capsys.readouterr().err
        assert "ann/1.png cannot be decoded" in error
        assert error.count("\n") == 1


def test_published_rows_are_the_papers() -> None:
    sysu, regdb = published_rows("SYSU-MM01"), published_rows("RegDB")
    (cmt,) = (r for r in sysu if (r.method, r.setting, r.shots) == ("CMT", "indoor", "multi"))
    assert (cmt.rank_1, cmt.rank_10, cmt.rank_20, cmt.mean_ap) == (84.87, 99.41, 99.97, 74.1)
    (hi_cmd,) = (r for r in regdb if r.method == "Hi-CMD")
    assert hi_cmd.rank_20 is None
    assert [sum(r.source == PAPER for r in of_set) for of_set in (sysu, regdb)] == [49, 28]


@pytest.mark.parametrize("dataset", TITLES)
def test_later_rows_name_their_source_and_fit_the_tables(dataset: DatasetName) -> None:
    rows = published_rows(TITLES[dataset])
    known = {(way, shots) for way in ("all", "indoor") for shots in ("single", "multi")}
    if dataset is not DatasetName.SYSU:
        known = {("visible-to-infrared", ""), ("infrared-to-visible", "")}
    assert {(row.setting, row.shots) for row in rows} == known
    assert len({(r.method, r.venue, r.setting, r.shots) for r in rows}) == len(rows)
    first_later = next(place for place, row in enumerate(rows) if row.source != PAPER)
    for row in rows[first_later:]:
        assert row.source not in {"", PAPER}
        assert row.rank_1 is not None
        assert 0 < row.rank_1 <= (row.rank_10 or 100) <= (row.rank_20 or 100) <= 100
    assert {row.method for row in rows} >= {"DEEN", "BIT"}


def test_the_papers_recipe_for_regdb_differs_in_pooling_only() -> None:
    paper, regdb = load_recipe("paper"), load_recipe("paper-regdb")
    assert DEFAULT_RECIPES[DatasetName.REGDB] == "paper-regdb"
    assert regdb.model.gem_p == 10
    assert regdb == paper.model_copy(
        update={"model": paper.model.model_copy(update={"gem_p": 10.0})}
    )


def test_regdb_runs_end_to_end(
    regdb_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        "model": {
            "backbone": "resnet18",
            "width": 0.125,
            "dim": 16,
            "heads": 4,
            "input_height": 96,
            "input_width": 32,
        },
        "identities": 2,
        "images": 2,
        "precision": "float32",
        "stages": [{"steps": 2, "lr": 1e-3}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    run = ("--run", str(tmp_path / "run"), "--recipe", str(tmp_path / "small.yaml"))
    where = ("--dataset", "regdb", "--root", str(regdb_root), "--trial", "3")
    assert main(["train", *where, *run, "--device", "cpu"]) == 0
    file = tmp_path / "run" / "checkpoint.safetensors"
    facts = load_checkpoint(file)[1].training
    expected = sorted(LAYOUTS[DatasetName.REGDB].train_ids(regdb_root, 3))
    assert (facts["dataset"], facts["trial"], facts["identities"]) == ("regdb", 3, expected)
    assert evaluate("regdb", regdb_root, file) == 0
    printed = capsys.readouterr().out
    assert "visible-to-infrared: 4 identities, 12 queries" in printed
    assert "of a single trial" in printed
    assert "±" not in printed
