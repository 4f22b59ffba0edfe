"""`cmt ablate` on the mini set: cells alike but for one thing, restartable; their arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model import CMT, Modality, Modulation, load_checkpoint
from model.cli import main
from tests.paths import MINI
from tests.training.conftest import draw
from training.ablation.cells import (
    AblationData,
    AblationError,
    Budget,
    CellRunner,
    Start,
    changed_model,
    read_data,
)
from training.ablation.controls import ranking_under
from training.ablation.generators import LowRankGenerators, Setting, fit_generators
from training.ablation.paired import SeedSpread, compare_paired
from training.ablation.results import (
    CellResult,
    RankingResult,
    SearchResult,
    TrialFigures,
    write_json,
)
from training.ablation.sweep import (
    possible_parts,
    start_of_parts,
    summarise_sweep,
    sweep_lambda,
    sweep_parts,
)
from training.ablation.table3 import (
    BASE,
    MAM,
    ROWS,
    comparable,
    row_recipe,
    summarise_table3,
    table3_cells,
)
from training.ablation.tsne import Cloud, align
from training.datasets import LAYOUTS, DatasetName, Sample
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.metrics import FloatArray, IntArray
from training.evaluation.protocols import protocol_splits
from training.evaluation.report import score_model
from training.evaluation.scoring import mean_modulation
from training.evaluation.splits import Split
from training.recipe import Recipe, load_recipe
from training.trainer import CHECKPOINT_FILE

METRICS_FILE = "metrics.jsonl"
IDENTITY = {"identity": 1, "triplet": 0, "consistency": 0, "modulation": 0}
MODEL = {
    "backbone": "resnet18",
    "width": 0.125,
    "dim": 16,
    "heads": 4,
    "input_height": 96,
    "input_width": 32,
    "normalise_test": True,
}
STAGES = [
    {"steps": 1, "lr": 3e-3, "warmup_steps": 1, "weights": IDENTITY},
    {"steps": 3, "lr": 3e-3, "weights": {"consistency": 0.1, "triplet_parts": 0.5}},
]
TINY = {
    "model": MODEL,
    "identities": 4,
    "images": 1,
    "modulation_form": "softmax",
    "label_smoothing": 0.1,
    "ema": 0.5,
    "precision": "float32",
    "stages": STAGES,
}
PRETRAINING = TINY | {"stages": STAGES[:1]}


def recipe() -> Recipe:
    return Recipe.model_validate(TINY)


def data() -> AblationData:
    ids = MINI / "exp"
    return read_data(DatasetName.SYSU, [MINI], [ids / "train_id.txt"], MINI, ids / "val_id.txt")


def arguments(folder: Path, *more: str) -> list[str]:
    """`cmt ablate …` of the mini set, with the recipes written to `folder`."""
    for name, content in (("tiny", TINY), ("start", PRETRAINING)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [
        *("--root", str(MINI), "--train-ids", str(MINI / "exp" / "train_id.txt")),
        *("--eval-root", str(MINI), "--eval-ids", str(MINI / "exp" / "val_id.txt")),
        *("--recipe", str(folder / "tiny.yaml"), "--run", str(folder / "run"), *more),
    ]


def other_people(folder: Path, side: str = "select", first: int = 901) -> list[str]:
    """Three people more, drawn to `folder`, as the options that make them a side of an ablation."""
    people = range(first, first + 3)
    for person in people:
        for camera in range(1, 7):
            draw(folder / f"cam{camera}" / f"{person:04d}" / "0001.jpg", person, camera)
    ids = folder / "ids.txt"
    ids.write_text(",".join(map(str, people)))
    root = "--root" if side == "train" else f"--{side}-root"
    return [root, str(folder), f"--{side}-ids", str(ids)]


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which Table 3 was made in two calls, two seeds, with its JSON and Markdown."""
    folder = tmp_path_factory.mktemp("ablation")
    command = table3_command(folder)
    command += ["--json", str(folder / "table3.json"), "--markdown", str(folder / "table3.md")]
    assert main([*command, "--cells", "7"]) == 0
    one_seed = json.loads((folder / "table3.json").read_text())
    assert (one_seed["seeds"], one_seed["complete"]) == ([0], False)
    assert not (folder / "run" / "mam-seed1").exists()  # seed by seed: base came first
    assert main(command) == 0
    return folder


def table3_command(folder: Path) -> list[str]:
    """`cmt ablate table3`, two seeds, from a start that it makes, as in the fixture `ablation`."""
    command = ["ablate", "table3", *arguments(folder, "--seeds", "0,1")]
    return [*command, "--pretrain", str(folder / "start.yaml"), *other_people(folder / "others")]


def result_of(folder: Path, cell: str) -> CellResult:
    return CellResult.model_validate_json((folder / "run" / cell / "result.json").read_text())


def modulated(search: SearchResult) -> RankingResult:
    """The ranking with γ, β, which is there."""
    assert search.modulated is not None
    return search.modulated


def test_table_3_has_every_row_beside_the_published_ones(ablation: Path) -> None:
    content = json.loads((ablation / "table3.json").read_text())
    assert (content["seeds"], content["complete"]) == ([0, 1], True)
    assert content["base"] == {
        "triplet_parts_weight": 0.5,
        "normalise_test": True,
        "label_smoothing": 0.1,
        "warmup_steps": 1,
    }
    assert content["machine"]["packages"]["torch"]
    assert Recipe.model_validate(content["recipe"]) == recipe()
    first = "all-search single-shot"
    rows = {(r["row"], r["ranking"]): r for r in content["rows"] if r["search"] == first}
    ways = ["modulated", "strength s", "mean γ, β", "unmodulated"]
    assert list(rows) == [
        ("base", "unmodulated"),
        ("base+MAM", "unmodulated"),
        *(("base+IAM", way) for way in ways),
        *(("base+MAM+IAM", way) for way in ways),
        ("base, L_mod with γ = 1, β = 0", "unmodulated"),
        ("base+MAM, L_mod with γ = 1, β = 0", "unmodulated"),
    ]
    seeds = [result_of(ablation, f"iam-seed{seed}").first for seed in (0, 1)]
    means = [sum(t.mean_ap for t in modulated(s).trials) / 10 for s in seeds]
    measured = rows["base+IAM", "modulated"]["mean_ap"]
    assert measured["mean"] == pytest.approx(sum(means) / 2)
    assert measured["std"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    text = (ablation / "table3.md").read_text()
    assert "| base+IAM | modulated |" in text
    assert f"{100 * measured['mean']:.2f} ± {100 * measured['std']:.2f}" in text
    measured_rows, published = text.split("| *published* |")
    assert "| base+MAM+IAM |  | 71.88 | 96.45 | 98.87 | 68.57 |  |" in published
    assert "71.88" not in measured_rows
    settings = "triplet_parts_weight 0.5, normalise_test true, label_smoothing 0.1, warmup_steps 1"
    assert f"base*: {settings} (where" in text
    assert "published figures do not compare in height" in text


def test_the_rows_of_a_seed_differ_in_the_switches_only(ablation: Path) -> None:
    start = json.loads((ablation / "run" / "pretrain" / "result.json").read_text())["fingerprint"]
    recipes = {}
    for row in ROWS[:4]:
        _, info = load_checkpoint(ablation / "run" / f"{row.name}-seed1" / CHECKPOINT_FILE)
        assert info.training["start"] == start
        assert info.training["seed"] == 1
        switches = (info.config.modality_alignment, info.config.instance_alignment)
        assert switches == (row.modality_alignment, row.instance_alignment)
        plain = Recipe.model_validate(info.training["recipe"])
        recipes[row.name] = changed_model(plain, modality_alignment=True, instance_alignment=True)
        last = (ablation / "run" / f"{row.name}-seed1" / METRICS_FILE).read_text().splitlines()[-1]
        losses = json.loads(last).keys()
        assert ("consistency" in losses, "modulation" in losses) == switches
    assert set(recipes.values()) == {recipe()}
    for row in ROWS[4:]:  # L_mod as the only difference to the row without it
        _, info = load_checkpoint(ablation / "run" / f"{row.name}-seed1" / CHECKPOINT_FILE)
        assert not info.config.instance_alignment
        plain = Recipe.model_validate(info.training["recipe"])
        assert plain.modulation_without_generators
        without = plain.model_copy(update={"modulation_without_generators": False})
        assert without == row_recipe(recipe(), MAM if row.modality_alignment else BASE)
        last = (ablation / "run" / f"{row.name}-seed1" / METRICS_FILE).read_text().splitlines()[-1]
        losses = json.loads(last)
        assert (losses["gamma_mean"], losses["gamma_std"], losses["beta_share"]) == (1, 0, 0)
        assert "modulation" in losses
    _, pretrained = load_checkpoint(ablation / "run" / "pretrain" / CHECKPOINT_FILE)
    assert not pretrained.config.modality_alignment
    assert not pretrained.config.instance_alignment


def test_a_result_holds_what_a_paired_test_needs(ablation: Path) -> None:
    base, both = (result_of(ablation, f"{row}-seed0") for row in ("base", "mam-iam"))
    assert base.first.modulated is None
    assert base.compensation is None
    assert both.first.modulation is not None
    assert both.compensation is not None
    assert set(both.compensation) == {"rgb", "ir"}
    assert both.first.title == "all-search single-shot"
    for search in both.searches:
        assert search.rankings.keys() == {"modulated", "strength s", "mean γ, β", "unmodulated"}
        for ranking in search.rankings.values():
            assert len(ranking.average_precision) == len(search.query_people)
            mean = sum(ranking.average_precision) / len(ranking.average_precision)
            assert mean == pytest.approx(ranking.mean("mean_ap"), abs=1e-6)
    assert base.first.query_people == both.first.query_people
    assert not comparable(base)
    gains = json.loads((ablation / "table3.json").read_text())["comparisons"]
    gain = next(c for c in gains if c["title"] == "base+MAM+IAM − base")
    own, other = (r.first.own.average_precision for r in (both, base))
    expected = sum(a - b for a, b in zip(own, other, strict=True)) / len(own)
    assert gain["map_gain_of_seeds"][0] == pytest.approx(expected)
    assert gain["low"] <= gain["map_gain"] <= gain["high"]


def test_finished_cells_are_not_made_again(
    ablation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = ablation / "run" / "base-seed0" / CHECKPOINT_FILE
    before = checkpoint.stat().st_mtime_ns
    # An earlier release did not know this field of a recipe.
    stated = checkpoint.with_name("settings.json")
    settings = json.loads(stated.read_text())
    del settings["recipe"]["modulation_without_generators"]
    stated.write_text(json.dumps(settings))
    assert "name" not in settings["data"]
    assert main([*table3_command(ablation), "--dataset-name", "sysu"]) == 0  # as without a name
    assert checkpoint.stat().st_mtime_ns == before
    assert "step" not in capsys.readouterr().out.split("Table 3", 1)[0]


def test_the_controls_rank_by_the_mean_and_by_a_strength_of_other_people(ablation: Path) -> None:
    result = result_of(ablation, "iam-seed0")
    model, _ = load_checkpoint(ablation / "run" / "iam-seed0" / CHECKPOINT_FILE)
    layout = LAYOUTS[DatasetName.SYSU]

    def first_search(root: Path, ids: Path) -> tuple[Embedded, Split, Modulation]:
        samples = layout.test(root, 1, layout.read_ids(ids))
        embedded = embed_samples(model, samples)
        split = protocol_splits(DatasetName.SYSU, samples)[0]
        x = embedded.embedding[torch.from_numpy(split.queries)]
        with torch.inference_mode():
            return embedded, split, model.modulation(x)

    others, search, own = first_search(ablation / "others", ablation / "others" / "ids.txt")
    chosen = result.strength
    assert chosen is not None
    assert chosen.centre == pytest.approx(own.gamma.mean().item(), rel=1e-5)
    assert chosen.strength == chosen.tried[chosen.mean_ap.index(max(chosen.mean_ap))]
    assert chosen.tried[-1] == 1
    at_full = ranking_under(model, others, search, own)
    assert chosen.mean_ap[-1] == pytest.approx(at_full.mean("mean_ap"))

    tested, search, own = first_search(MINI, MINI / "exp" / "val_id.txt")
    everyone = Modulation(*(part.mean(0).repeat(len(part), 1) for part in own))
    drawn_back = Modulation(
        chosen.centre + chosen.strength * (own.gamma - chosen.centre), chosen.strength * own.beta
    )
    for way, modulation in (
        ("modulated", own),
        ("mean γ, β", everyone),
        ("strength s", drawn_back),
        ("unmodulated", Modulation.identity(*own.gamma.shape)),
    ):
        assert result.first.rankings[way] == ranking_under(model, tested, search, modulation)
    text = (ablation / "table3.md").read_text()
    assert f"base+IAM, seed 0: s {chosen.strength:g}, c {chosen.centre:.3f}" in text
    assert "| base+IAM: modulated − mean γ, β |" in text
    assert "| base, L_mod with γ = 1, β = 0 − base |" in text


def test_without_other_people_no_strength_is_chosen(ablation: Path, tmp_path: Path) -> None:
    start = Start(checkpoint=ablation / "run" / "pretrain" / CHECKPOINT_FILE)
    cell = next(c for c in table3_cells(recipe(), start, [0]) if c.row == "iam")
    (result,) = CellRunner(data(), tmp_path).run([cell])
    assert result.strength is None
    assert list(result.first.rankings) == ["modulated", "mean γ, β", "unmodulated"]
    earlier = result.model_dump(mode="json")
    del earlier["strength"]
    for found in earlier["searches"]:
        del found["mean_modulation"], found["weakened"]
    assert CellResult.model_validate(earlier).first.own == result.first.own


class _Looks(Budget):
    """Time that is up after so many looks at the clock."""

    def __init__(self, looks: int) -> None:
        super().__init__(minutes=1.0)
        self.looks = looks

    def out_of_time(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_cell_stopped_in_the_middle_ends_as_an_undisturbed_one(
    ablation: Path, tmp_path: Path
) -> None:
    start = Start(checkpoint=ablation / "run" / "pretrain" / CHECKPOINT_FILE)
    cells = table3_cells(recipe(), start, [0])[:1]
    # The first look lets the cell begin, each further one a step: two of its four.
    assert CellRunner(data(), tmp_path, budget=_Looks(3), save_every=1).run(cells) == []
    last = (tmp_path / "base-seed0" / METRICS_FILE).read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 2
    assert not (tmp_path / "base-seed0" / "result.json").exists()
    (result,) = CellRunner(data(), tmp_path).run(cells)
    undisturbed = result_of(ablation, "base-seed0")
    assert result.fingerprint == undisturbed.fingerprint
    assert result.searches == undisturbed.searches


def test_a_folder_of_other_settings_is_refused(
    ablation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = table3_command(ablation)
    other = ablation / "other.yaml"
    other.write_text(yaml.safe_dump(TINY | {"margin": 0.5}))
    command[command.index("--recipe") + 1] = str(other)
    assert main(command) == 1
    assert "holds a cell of another recipe, start or data" in capsys.readouterr().err
    assert main([*table3_command(ablation), "--dataset-name", "another"]) == 1
    assert "holds a cell of another recipe, start or data" in capsys.readouterr().err


def test_a_start_must_be_bare_and_must_not_know_the_test_people(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ablation / "run"
    command = ["ablate", "table3", *arguments(tmp_path), "--start"]
    assert main([*command, str(run / "mam-seed0" / CHECKPOINT_FILE)]) == 1
    assert "already has modality or instance alignment" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    swapped = [*command, str(run / "base-seed0" / CHECKPOINT_FILE)]
    train, test = (swapped.index(name) + 1 for name in ("--train-ids", "--eval-ids"))
    swapped[train], swapped[test] = swapped[test], swapped[train]
    assert main(swapped) == 1
    assert "was trained on 5 of these 5 identities" in capsys.readouterr().err


def test_what_cannot_be_compared_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ablate", "table3", *arguments(tmp_path)]
    assert main(command) == 2
    assert "exactly one of --start, --pretrain and --weights" in capsys.readouterr().err
    start = ["--pretrain", str(tmp_path / "start.yaml")]
    assert main([*command, *start, "--seeds", "0,0"]) == 2
    assert "no comma-separated list of different numbers" in capsys.readouterr().err
    both = list(command)
    both[both.index("--eval-ids") + 1] = str(MINI / "exp" / "available_id.txt")
    assert main([*both, *start]) == 1
    assert "correct --train-ids or --eval-ids" in capsys.readouterr().err
    chosen = [*command, "--select-ids", str(MINI / "exp" / "val_id.txt")]
    assert main([*chosen, *start]) == 2
    assert "people of --select-root; give both" in capsys.readouterr().err
    assert main([*chosen, "--select-root", str(MINI), *start]) == 1
    assert "correct --eval-ids or --select-ids" in capsys.readouterr().err
    sweep = ["ablate", "sweep", "lambda", *command[2:], *start, "--plot", "curve.txt"]
    assert main(sweep) == 2
    assert "ends in none of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_damaged_result_is_named(ablation: Path, tmp_path: Path) -> None:
    start = Start(checkpoint=ablation / "run" / "pretrain" / CHECKPOINT_FILE)
    cells = table3_cells(recipe(), start, [0])[:1]
    (tmp_path / "base-seed0").mkdir()
    (tmp_path / "base-seed0" / "result.json").write_text("{")
    with pytest.raises(AblationError, match=r"result\.json is damaged .* remove its folder"):
        CellRunner(data(), tmp_path).run(cells)


def test_the_lambda_sweep_plots_what_it_measured(ablation: Path) -> None:
    command = ["ablate", "sweep", "lambda", *arguments(ablation), "--values", "0,0.2"]
    command += ["--pretrain", str(ablation / "start.yaml"), "--json", str(ablation / "l.json")]
    assert main([*command, "--plot", str(ablation / "lambda.png")]) == 0
    content = json.loads((ablation / "l.json").read_text())
    assert [curve["title"] for curve in content["curves"]] == ["CMT, modulated", "CMT, unmodulated"]
    modulated, unmodulated = content["curves"]
    assert modulated["lambda"] == [0.0, 0.2]
    # Without L_mod the generators stay where they start: modulation is the identity.
    assert modulated["mean_ap"][0] == unmodulated["mean_ap"][0]
    assert modulated["mean_ap"][0]["std"] is None
    assert content["published"]["lambda"] == 0.2
    assert content["published"]["rank_1"] == 71.88
    # λ = 0.2 is the recipe's own: the very cell of Table 3.
    both, swept = result_of(ablation, "mam-iam-seed0"), result_of(ablation, "lambda-0.2-seed0")
    assert both.fingerprint == swept.fingerprint
    with Image.open(ablation / "lambda.png") as picture:
        assert picture.width > 1000


def test_the_parts_sweep_starts_each_p_from_its_own_network(
    regdb_root: Path, tmp_path: Path
) -> None:
    small = {**TINY, "model": {**MODEL, "input_height": 32, "input_width": 16, "parts": 2}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    command = ["ablate", "sweep", "parts", "--root", str(regdb_root), "--run", str(tmp_path / "r")]
    command += ["--eval-root", str(regdb_root), "--recipe", str(tmp_path / "small.yaml")]
    command += ["--pretrain", str(tmp_path / "small.yaml"), "--trial", "2", "--values", "1"]
    command += ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    assert main(command) == 0
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["data"]["trial"] == 2
    titles = ["CMT, modulated", "CMT, unmodulated", "base*"]
    assert [curve["title"] for curve in content["curves"]] == titles
    assert [curve["parts"] for curve in content["curves"]] == [[1], [1], [1]]
    for cell in content["cells"]:
        assert cell["start"]["pretraining"] == "pretrain-parts-1"
        _, info = load_checkpoint(tmp_path / "r" / cell["name"] / CHECKPOINT_FILE)
        assert info.config.parts == 1
    assert [cell["name"] for cell in content["cells"]] == [
        "parts-1-cmt-seed0",
        "parts-1-base-seed0",
    ]
    assert content["published"]["method"] == "CMT"
    assert content["published"]["dataset"] == "RegDB"
    assert (tmp_path / "p.png").stat().st_size > 0


def test_a_sweep_changes_one_thing() -> None:
    swept = sweep_lambda(recipe(), Start(weights="w"), [0, 3])
    for point, value in zip(swept.points, (0, 3), strict=True):
        (changed,) = point.recipes.values()
        assert [s.weights.modulation for s in changed.stages] == [0, value]
        assert changed.model == recipe().model
    assert [cell.name for cell in swept.cells([0, 1])] == [
        *("lambda-0-seed0", "lambda-3-seed0"),
        *("lambda-0-seed1", "lambda-3-seed1"),
    ]
    bare = Recipe.model_validate(PRETRAINING)
    with pytest.raises(AblationError, match="last stage has no weight"):
        sweep_lambda(bare, Start(weights="w"), [0, 3])
    assert summarise_sweep(swept, [], DatasetName.SYSU) is None


def test_parts_must_divide_every_feature_map() -> None:
    assert possible_parts([recipe()]) == [1, 2, 3, 6]
    assert possible_parts([load_recipe("paper")]) == [1, 2, 3, 4, 6, 8, 12]
    with pytest.raises(AblationError, match="does not allow parts 4: input_height 96"):
        sweep_parts(recipe(), Start(weights="w"), [4])
    pretraining = Start(pretraining=Recipe.model_validate(PRETRAINING))
    names = [point.start.name for point in sweep_parts(recipe(), pretraining, [1, 3]).points]
    assert names == ["pretrain-parts-1", "pretrain-parts-3"]
    given = Start(checkpoint=Path("start-{parts}.safetensors"))
    assert start_of_parts(given, 3).checkpoint == Path("start-3.safetensors")


def test_the_recipes_of_the_ablation_fit_each_other() -> None:
    cell, start = load_recipe("ablation"), load_recipe("ablation-pretrain")
    assert (
        changed_model(start, modality_alignment=True, instance_alignment=True).model == cell.model
    )
    assert {s.weights.triplet for s in start.stages} == {0}
    # What reads F is fitted to a still F first, L_mod with it; the full λ comes when F moves.
    assert [stage.features_frozen for stage in cell.stages] == [True, False]
    first, last = (stage.weights.modulation for stage in cell.stages)
    assert 0 < first < last


def ranking(*precisions: float) -> RankingResult:
    mean = sum(precisions) / len(precisions)
    ranks = {f"rank_{k}": mean for k in (1, 5, 10, 20)}
    trial = TrialFigures(**ranks, mean_ap=mean, mean_inp=mean)
    return RankingResult(trials=[trial], average_precision=list(precisions))


def test_a_paired_comparison_by_hand() -> None:
    found = compare_paired(
        "one − other",
        [ranking(0.5, 1.0, 0.2), ranking(0.7, 0.8, 0.4)],
        [ranking(0.4, 0.9, 0.2), ranking(0.5, 0.8, 0.1)],
        [1, 1, 2],
    )
    # Seed 0: +.1 +.1 0, seed 1: +.2 0 +.3; averaged: .15, .05 (person 1) and .15 (person 2).
    assert found.map_gain == pytest.approx(0.35 / 3)
    assert found.map_gain_of_seeds == pytest.approx([0.2 / 3, 0.5 / 3])
    assert found.rank_1_gain_of_seeds == pytest.approx([0.2 / 3, 0.5 / 3])
    # Two people drawn twice: both 1 (mean .1), both 2 (.15), one each (.35/3), at 1/4, 1/4, 1/2.
    assert (found.low, found.high) == pytest.approx((0.1, 0.15))


def test_deviation_over_seeds_is_the_samples() -> None:
    spread = SeedSpread.over([0.5, 0.6, 0.7])
    assert (spread.mean, spread.std) == pytest.approx((0.6, 0.1))
    assert str(spread) == "60.00 ± 10.00"
    assert str(SeedSpread.over([0.5])) == "50.00"


def test_the_order_of_the_paper_is_judged_by_mean_map(ablation: Path) -> None:
    cells = {row.name: result_of(ablation, f"{row.name}-seed0") for row in ROWS}
    controls = {row.name: 0.5 for row in ROWS[4:]}

    def with_precision(values: dict[str, float]) -> list[CellResult]:
        changed = []
        for name, cell in cells.items():
            made = ranking(*[values[name]] * len(cell.first.query_people))
            search = cell.first.model_copy(update={"modulated": None, "unmodulated": made})
            if cell.first.modulated is not None:
                search = search.model_copy(update={"modulated": made})
            changed.append(cell.model_copy(update={"searches": [search]}))
        return changed

    def in_order(values: dict[str, float]) -> bool:
        table = summarise_table3(with_precision(controls | values))
        assert table is not None
        return table.in_order

    paper = {"base": 0.4, "mam": 0.5, "iam": 0.6, "mam-iam": 0.7}
    assert in_order(paper)
    assert not in_order(paper | {"mam": 0.8})
    assert not in_order(paper | {"base": 0.55})
    assert summarise_table3(with_precision(controls | paper)[:5]) is None


def test_alignment_of_two_clouds_by_hand() -> None:
    one = Cloud("F rgb", features=_column(0, 10), people=_people(1, 2))
    other = Cloud("F̂ rgb", features=_column(1, 12), people=_people(1, 2))
    found = align("both", one, other)
    assert found.distance_ratio == pytest.approx(((1 + 2) / 2) / ((12 + 9) / 2))
    # Per point (b − a)/max: 0: (11−1)/11, 10: (9.5−2)/9.5, 1: (10−1)/10, 12: (11.5−2)/11.5.
    expected = (10 / 11 + 7.5 / 9.5 + 9 / 10 + 9.5 / 11.5) / 4
    assert found.silhouette == pytest.approx(expected)


def _column(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float64)[:, None]


def _people(*numbers: int) -> IntArray:
    return np.array(numbers, dtype=np.int64)


def test_figure_4_shows_what_it_counts(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["ablate", "tsne", "--checkpoint", str(tiny_checkpoint), "--root", str(MINI)]
    command += ["--ids", str(MINI / "exp" / "val_id.txt"), "--plot", str(tmp_path / "plane.png")]
    assert main([*command, "--people", "3", "--json", str(tmp_path / "plane.json")]) == 0
    content = json.loads((tmp_path / "plane.json").read_text())
    assert content["people"] == [12, 218, 370]
    assert content["features"]["F rgb"] == content["features"]["F̂ ir"]
    assert content["features"]["F ir"] == content["features"]["F̂ rgb"]
    assert len(content["alignments"]) == 3
    assert f"{content['alignments'][1]['distance_ratio']:.3f}" in capsys.readouterr().out
    with Image.open(tmp_path / "plane.png") as picture:
        assert picture.width > picture.height
    assert main([*command, "--people", "4"]) == 1
    assert "choose 2 to 3 with --people" in capsys.readouterr().err


def test_figure_4_needs_modality_alignment(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ablation / "run" / "iam-seed0" / CHECKPOINT_FILE
    command = ["ablate", "tsne", "--checkpoint", str(bare), "--root", str(MINI), "--people", "2"]
    command += ["--ids", str(MINI / "exp" / "val_id.txt"), "--plot", str(tmp_path / "p.png")]
    assert main(command) == 1
    assert "no modality alignment" in capsys.readouterr().err


def test_lists_of_numbers_take_one_line(tmp_path: Path) -> None:
    content = {"a": [1.5, -2, 3e-7], "b": [{"c": [1]}], "d": ["1", "x"], "e": []}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert '"a": [1.5, -2, 3e-07]' in text
    assert json.loads(text) == content


def test_generators_for_new_people_are_fitted_chosen_and_reported_apart(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = ablation / "run" / "pretrain" / CHECKPOINT_FILE
    command = ["ablate", "generators", "--checkpoint", str(backbone), "--steps", "3"]
    command += ["--ranks", "1", "--decays", "0,2", "--seeds", "0,1"]
    command += other_people(tmp_path / "others")
    command += ["--eval-root", str(MINI), "--eval-ids", str(MINI / "exp" / "val_id.txt")]
    fitted = other_people(tmp_path / "new", "train", first=951)
    assert main([*command, *fitted, "--json", str(tmp_path / "found.json")]) == 0
    content = json.loads((tmp_path / "found.json").read_text())
    assert [content["data"][side]["identities"] for side in ("training", "selection", "test")] == [
        *(3, 3, 3)
    ]
    means = {
        (one["setting"]["rank"], one["setting"]["decay"]): sum(one["own"]) / 2
        for one in content["tried"]
    }
    assert means.keys() == {(1, 0), (1, 2)}
    chosen = (content["chosen"]["rank"], content["chosen"]["decay"])
    assert means[chosen] == max(means.values())
    own, mean, plain = (
        [RankingResult.model_validate(one) for one in content["rankings"][way]]
        for way in ("own γ, β", "mean γ, β", "unmodulated")
    )
    start, _ = load_checkpoint(backbone)
    samples = LAYOUTS[DatasetName.SYSU].test(MINI, 1, [12, 218, 370])
    (scores, *_) = score_model(start, samples, protocol_splits(DatasetName.SYSU, samples)).splits
    assert plain == [RankingResult.over(scores.unmodulated)] * 2
    gain = content["comparisons"][0]
    assert gain["title"] == "own γ, β − mean γ, β"
    assert gain["map_gain_of_seeds"] == pytest.approx(
        [one.mean("mean_ap") - two.mean("mean_ap") for one, two in zip(own, mean, strict=True)],
        abs=1e-6,
    )
    assert "Generators for new people, all-search single-shot" in capsys.readouterr().out
    known = ["--root", str(MINI), "--train-ids", str(MINI / "exp" / "train_id.txt")]
    assert main([*command, *known]) == 1
    assert "was trained on 5 of these 5 identities" in capsys.readouterr().err
    assert main([*command, *fitted, "--ranks", "0"]) == 2
    assert "with 0 nothing is the query's own" in capsys.readouterr().err


def people_of_two_kinds(first: int, seed: int) -> Embedded:
    """Forty people, four images each, one part of eight channels, of unit norm.

    Channels 6 and 7 say which kind a person is of. One kind is told apart by channels 0 to 2 while
    3 to 5 are noise, the other the other way round: no weights are right for both.
    """
    generator = np.random.default_rng(seed)
    samples, rows = [], []
    for number in range(40):
        of_kind = number % 2
        own = generator.normal(size=3)
        for modality, camera in (("rgb", 1), ("rgb", 4), ("ir", 3), ("ir", 6)):
            noise = 2 * generator.normal(size=3)
            told = own + 0.1 * generator.normal(size=3)
            kind = np.array([3.0, 0.0] if of_kind else [0.0, 3.0])
            parts = [noise, told] if of_kind else [told, noise]
            rows.append(np.concatenate([*parts, kind]))
            name = Path(f"{first + number}-{camera}.png")
            samples.append(Sample(name, first + number, camera, cast(Modality, modality)))
    embedding = torch.from_numpy(np.array(rows, dtype=np.float32))[:, None]
    unit = torch.nn.functional.normalize(embedding, dim=2)
    return Embedded(samples, unit, None, unit)


def test_low_rank_generators_find_what_depends_on_the_query_and_decay_undoes_it() -> None:
    fitted, tested = people_of_two_kinds(1, seed=0), people_of_two_kinds(101, seed=1)
    sizes = MODEL | {"dim": 8, "parts": 1, "instance_alignment": False}
    model = CMT(Recipe.model_validate(TINY | {"model": sizes}).model)
    split = protocol_splits(DatasetName.SYSU, tested.samples)[0]
    rows = torch.from_numpy(split.queries)
    is_ir = torch.ones(len(rows), dtype=torch.bool)

    def ranked(modulation: Modulation) -> float:
        return ranking_under(model, tested, split, modulation).mean("mean_ap")

    plain = ranked(Modulation.identity(len(rows), 8))
    loose, tight = (
        fit_generators(fitted, Setting(2, decay), steps=150, seed=0) for decay in (0.01, 1e6)
    )
    with torch.no_grad():
        start, offsets = LowRankGenerators(fitted, 2)(tested.embedding[rows], is_ir)
        assert offsets.count_nonzero() == 0
        assert ranked(start) == plain
        own, _ = loose(tested.embedding[rows], is_ir)
        held, offsets = tight(tested.embedding[rows], is_ir)
    assert ranked(own) > ranked(mean_modulation(own)) + 0.1
    assert ranked(own) > plain + 0.1
    assert offsets.abs().max() < 0.05
    assert ranked(held) == pytest.approx(plain, abs=0.02)
