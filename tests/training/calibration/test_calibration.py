"""Curves recover known probabilities; the command fits, refuses and stores."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import CMT, Calibration, CMTConfig, load_checkpoint, save_checkpoint
from model.calibration import FloatArray
from model.cli import main
from model.training_facts import LearntPeople
from tests.paths import MINI
from training.calibration import Fit, fit_calibration
from training.calibration.curves import (
    CERTAINTY,
    Curve,
    accept_above,
    fit_isotonic,
    fit_logistic,
    log_loss,
    pair_weights,
    reliability,
)
from training.calibration.pairs import PairMaker, held_out_images, reference_count, spread_out
from training.calibration.people import together
from training.calibration.similarity import _halves, fit_curves
from training.datasets import DatasetError, DatasetName, Sample, read_sysu
from training.evaluation.checkpoints import calibrated_on
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.metrics import BoolArray


def known_pairs(
    count: int = 200_000, prior: float = 0.03, seed: int = 0
) -> tuple[FloatArray, BoolArray]:
    """Scores whose log-odds at a prior of ½ are exactly 1 − 2·score: two normal distributions."""
    generator = np.random.default_rng(seed)
    same = generator.random(count) < prior
    # ln N(s; m₁, σ²) − ln N(s; m₂, σ²) = s·(m₁ − m₂)/σ² − (m₁² − m₂²)/(2σ²)
    scores = np.where(same, -0.5, 1.5) + generator.normal(size=count)
    return scores, same


@pytest.mark.parametrize("fit", [fit_logistic, fit_isotonic])
def test_known_probabilities_are_recovered_whatever_share_the_set_holds(
    fit: Callable[[FloatArray, BoolArray, float], Curve],
) -> None:
    truth = np.linspace(-1, 2, 13)
    for share in (0.1, 0.4):
        scores, same = known_pairs(prior=share)
        found = fit(scores, same, 0.5)(truth)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(2 * truth - 1)), atol=0.06)
        held_out, labels = known_pairs(20_000, prior=share, seed=1)
        assert reliability(fit(scores, same, 0.5)(held_out), labels, 0.5).error < 0.03


def test_the_prior_shifts_the_log_odds_by_its_own() -> None:
    scores, same = known_pairs()
    even, rare = (fit_logistic(scores, same, prior) for prior in (0.5, 0.1))
    assert rare.intercept - even.intercept == pytest.approx(np.log(0.1 / 0.9), abs=0.05)
    assert rare.slope == pytest.approx(even.slope, abs=0.05)


def test_curves_never_rise_even_where_the_data_does() -> None:
    scores, same = known_pairs(5_000)
    for fit in (fit_logistic, fit_isotonic):
        backwards = fit(-scores, same, 0.5)(np.linspace(-5, 5, 50))
        np.testing.assert_allclose(backwards, 0.5, atol=0.05)
        assert (np.diff(backwards) <= 0).all()


def test_pairs_that_a_threshold_separates_stay_uncertain() -> None:
    scores, same = np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, False, False])
    logistic = fit_logistic(scores, same, 0.5)
    assert 0.5 < logistic(scores)[0] < 0.99
    isotonic = fit_isotonic(scores, same, 0.5)
    assert isotonic(np.array([-9.0, 9.0])).tolist() == pytest.approx([CERTAINTY, 1 - CERTAINTY])
    assert np.isfinite(log_loss(isotonic(scores), ~same, 0.5))


def test_log_loss_and_weights_by_hand() -> None:
    same = np.array([True, False, False, False])
    assert pair_weights(same, 0.4).tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])
    probabilities = np.array([0.8, 0.1, 0.5, 0.2])
    expected = -0.4 * np.log(0.8) - 0.2 * (np.log(0.9) + np.log(0.5) + np.log(0.8))
    assert log_loss(probabilities, same, 0.4) == pytest.approx(expected)
    assert log_loss(np.full(4, 0.4), same, 0.4) == pytest.approx(
        -0.4 * np.log(0.4) - 0.6 * np.log(0.6)
    )


def test_calibration_error_by_hand() -> None:
    # At a prior of ½ the two of one person weigh ¼ each, the others ½: in the bin of 0.2 a share of
    # (¼)/(¼ + ½) is of one person, in the bin of 0.9 all.
    same = np.array([True, True, False])
    diagram = reliability(np.array([0.95, 0.25, 0.25]), same, 0.5)
    assert diagram.observed[[2, 9]].tolist() == pytest.approx([1 / 3, 1.0])
    assert diagram.error == pytest.approx(0.75 * (1 / 3 - 0.25) + 0.25 * 0.05)
    assert (diagram.positives[2], diagram.negatives[2], diagram.positives[9]) == (1, 1, 1)
    assert np.isnan(diagram.predicted[0])


def test_accepted_pairs_are_never_more_than_asked_for() -> None:
    same = np.array([False] * 10 + [True] * 2)
    probabilities = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.95, 0.85])
    assert accept_above(probabilities, same, 0.1) == 0.8  # 0.9 is above it, one of ten
    assert accept_above(probabilities, same, 0.2) == 0.7
    assert accept_above(probabilities, same, 0.09) is None
    assert accept_above(np.full(12, 0.3), same, 0.1) == 0.3  # all are equal: none is accepted


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_sysu(MINI)


def fit_of(model: CMT, embedded: Embedded, prior: float = 0.5) -> Fit:
    """Of one set. The network is not the one that is given: it gets a strength."""
    people = LearntPeople(dataset="sysu", name="sysu", identities=[1])
    return fit_calibration(copy(model), [(embedded, people)], DatasetName.SYSU, prior=prior)


@pytest.fixture(scope="module")
def embedded(tiny_model: CMT, samples: list[Sample]) -> Embedded:
    return embed_samples(tiny_model, samples)


def test_pairs_leave_out_what_says_nothing(
    tiny_model: CMT, embedded: Embedded, samples: list[Sample]
) -> None:
    maker = PairMaker(tiny_model, together([embedded], DatasetName.SYSU))
    pairs = maker.pairs("rgb", "rgb", modulated=True)
    visible = [sample for sample in samples if sample.modality == "rgb"]
    for i, query in enumerate(visible):
        for j, image in enumerate(visible):
            same = query.person_id == image.person_id
            assert pairs.same[i, j] == same
            assert pairs.counted[i, j] == (not same or query.camera != image.camera)
    across = maker.pairs("ir", "rgb", modulated=True)
    infrared = [sample for sample in samples if sample.modality == "ir"]
    for i, query in enumerate(infrared):
        for j, image in enumerate(visible):
            assert across.counted[i, j] == (query.camera != 3 or image.camera != 2)


def test_nobody_is_on_both_sides_of_a_fit(tiny_model: CMT, embedded: Embedded) -> None:
    held_out = together([embedded], DatasetName.SYSU)
    pairs = PairMaker(tiny_model, held_out).pairs("ir", "rgb", modulated=False)
    halves = _halves(pairs, np.unique(pairs.query_people))
    assert len(halves) == 10
    for k, half in enumerate(halves):
        other = halves[k ^ 1]
        people = {*pairs.query_people[half.queries], *pairs.gallery_people[half.gallery]}
        others = {*pairs.query_people[other.queries], *pairs.gallery_people[other.gallery]}
        assert len(people) == len(others) == 4
        assert not people & others
        assert set(pairs.reference_people[half.references]) == others
        assert half.same.any()
        assert not half.same.all()


def test_images_are_spread_over_people_and_cameras(samples: list[Sample]) -> None:
    chosen = [samples[i] for i in spread_out(samples, "rgb", 16)]
    assert len(chosen) == 16
    assert {s.modality for s in chosen} == {"rgb"}
    assert set(Counter((s.person_id, s.camera) for s in chosen).values()) == {1}
    assert len({s.person_id for s in chosen}) > 5
    assert len(held_out_images(samples)) == len(samples)


def test_reference_embeddings_take_a_megabyte_at_most() -> None:
    for size in (96, 768, 1536, 6 * 2048):
        assert 1 <= reference_count(size) * size * 2 * 2 <= 1 << 20
    assert reference_count(768) == 128


def test_a_network_that_knows_people_is_told_from_one_that_does_not(
    tiny_model: CMT, samples: list[Sample]
) -> None:
    """Embeddings made up: people are far apart, or everything is noise."""
    generator = torch.Generator().manual_seed(0)
    size = tiny_model.config.parts, tiny_model.config.dim
    centers = {s.person_id: torch.randn(size, generator=generator) for s in samples}
    noise = torch.randn(len(samples), *size, generator=generator)
    maps = {}
    for name, signal in (("knows", 2.0), ("guesses", 0.0)):
        rows = torch.stack([signal * centers[s.person_id] for s in samples]) + noise
        made_up = Embedded(samples, rows, None, tiny_model.ranked_form(rows))
        held_out = together([made_up], DatasetName.SYSU)
        maps[name] = fit_curves(PairMaker(tiny_model, held_out), 0.5).maps
    assert len(maps["knows"]) == 8
    for known, guessed in zip(*maps.values(), strict=True):
        assert known.log_loss < 0.2 < 0.6 < guessed.log_loss
        assert len(known.candidates) == 8
        losses = [candidate.log_loss for candidate in known.candidates]
        assert losses == sorted(losses)
        assert losses[0] == known.log_loss
        kept = known.candidates[0]
        assert (kept.normalisation, kept.method) == (known.normalisation, known.curve.method)
        assert known.log_loss_of_prior == pytest.approx(np.log(2))


def command(
    checkpoint: Path, root: Path = MINI, ids: Path | None = None, *more: str | Path
) -> list[str]:
    ids = ids or root / "exp" / "available_id.txt"
    named = ["--checkpoint", checkpoint, "--dataset", "sysu", "--root", root, "--ids", ids]
    return [str(part) for part in ["calibrate", *named, "--device", "cpu", *more]]


@pytest.fixture(scope="module")
def calibrated(
    tiny_model: CMT, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path, Path]:
    """(the checkpoint, the calibrated one, what was printed, the JSON, the picture)."""
    folder = tmp_path_factory.mktemp("calibrate")
    checkpoint = folder / "plain.safetensors"
    save_checkpoint(checkpoint, tiny_model)
    files = folder / "calibrated.safetensors", folder / "deep" / "c.json", folder / "r.png"
    options = zip(("--output", "--json", "--plot"), files, strict=True)
    assert main(command(checkpoint, MINI, None, *(x for pair in options for x in pair))) == 0
    return checkpoint, *files


@pytest.fixture(scope="module")
def half(
    calibrated: tuple[Path, Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(a list of four of the people, the checkpoint calibrated on them): half of the work."""
    folder = tmp_path_factory.mktemp("half")
    people, output = folder / "half.txt", folder / "half.safetensors"
    people.write_text("7,12,18,21")
    assert main(command(calibrated[0], MINI, people, "--output", output)) == 0
    return people, output


def stored(checkpoint: Path) -> Calibration:
    calibration = load_checkpoint(checkpoint)[1].calibration
    assert calibration is not None
    return calibration


def test_the_command_stores_shows_and_draws(
    calibrated: tuple[Path, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output, json_file, plot = calibrated
    before, after = load_checkpoint(checkpoint)[1], load_checkpoint(output)[1]
    assert before.calibration is None
    assert after.fingerprint == before.fingerprint
    facts = stored(output).facts
    pairs = [(m.query, m.gallery, m.modulated) for m in facts.maps]
    assert len(set(pairs)) == 8
    (people,) = facts.people
    assert people.identities == sorted({s.person_id for s in read_sysu(MINI)})
    written = json.loads(json_file.read_text())["calibration"]
    assert [m["log_loss"] for m in written["maps"]] == [m.log_loss for m in facts.maps]
    assert len(written["maps"][0]["reliability"]["predicted"]) == 10
    assert len(stored(output).references["rgb"]) == written["references"]["rgb"] > 30
    with Image.open(plot) as picture:
        assert min(picture.size) > 800


def test_the_table_fits_a_terminal(
    half: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people, before = half
    output = tmp_path / "again.safetensors"
    shutil.copy(before, output)  # calibrating what is calibrated replaces it
    capsys.readouterr()
    assert main(command(output, MINI, people)) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "ir → rgb" in printed
    assert "fingerprint is unchanged" in printed
    facts = stored(output).facts
    for m in facts.maps:
        assert f"{m.log_loss:.4f}*" in printed
        assert f"{m.expected_calibration_error:.4f}" in printed
    assert facts == stored(before).facts  # no chance in it


def test_open_set_figures_are_by_distance_and_by_calibrated_score(
    calibrated: tuple[Path, Path, Path, Path],
    half: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def evaluate(
        checkpoint: Path, ids: Path | None = None
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The checkpoint's entry and its rates in the report."""
        written, named = tmp_path / "evaluation.json", ["--dataset", "sysu", "--root", str(MINI)]
        ids = ids or MINI / "exp" / "available_id.txt"
        options = ["--ids", str(ids), "--json", str(written), "--device", "cpu"]
        assert main(["evaluate", "--checkpoint", str(checkpoint), *named, *options]) == 0
        report = json.loads(written.read_text())
        return report["checkpoints"][0], report["splits"][0]["open_set"]["rates"]

    rest = tmp_path / "rest.txt"
    rest.write_text("23,30,218,370")
    capsys.readouterr()
    entry, rates = evaluate(half[1], rest)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "calibrated on" not in printed
    assert entry["calibrated_on_evaluated"] == 0
    assert [r["score"] for r in rates[::2]] == [
        "modulated distance",
        "unmodulated distance",
        "modulated calibrated",
        "unmodulated calibrated",
    ]
    # With references of its own people a score would know who looks like whom.
    entry, rates = evaluate(calibrated[1])
    printed = capsys.readouterr().out
    assert entry["calibrated_on_evaluated"] == 8
    assert "calibrated on 8 of these identities" in printed
    assert "left out" in printed
    assert len(rates) == 4
    # 16 non-mated queries: 10 % is one of them, 1 % is not.
    assert [r["rate"] is None for r in rates] == [True, False] * 2
    assert "1% needs at least 100 non-mated queries" in printed
    plain, same_rates = evaluate(calibrated[0])
    assert "calibrated_on_evaluated" not in plain
    assert plain["fingerprint"] == entry["fingerprint"]
    assert same_rates == rates


def refused(arguments: list[str], checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence of a refusal, after which the checkpoint is as it was."""
    before = checkpoint.read_bytes()
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert checkpoint.read_bytes() == before
    return error


def test_training_identities_are_refused(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "trained.safetensors"
    save_checkpoint(checkpoint, tiny_model, training={"dataset": "sysu", "identities": [7, 18]})
    error = refused(command(checkpoint), checkpoint, capsys)
    assert "was trained on 2 of these 8 identities (7, 18)" in error


def test_too_few_people_are_refused(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, ids = tmp_path / "c.safetensors", tmp_path / "ids.txt"
    save_checkpoint(checkpoint, tiny_model)
    ids.write_text("7")
    error = refused(command(checkpoint, MINI, ids), checkpoint, capsys)
    assert "needs at least 4 identities" in error
    assert "--ids" in error
    ids.write_text("7,12,18,99")
    assert "99" in refused(command(checkpoint, MINI, ids), checkpoint, capsys)


def test_a_missing_modality_is_refused(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "c.safetensors"
    save_checkpoint(checkpoint, tiny_model)
    for camera in (1, 2, 4, 5):
        shutil.copytree(MINI / f"cam{camera}", tmp_path / "set" / f"cam{camera}")
    shutil.copytree(MINI / "exp", tmp_path / "set" / "exp")
    for camera in (3, 6):
        (tmp_path / "set" / f"cam{camera}").mkdir()
    error = refused(command(checkpoint, tmp_path / "set"), checkpoint, capsys)
    assert "Expected infrared images" in error


def test_a_modality_without_pairs_of_its_own_gets_no_curve(
    tiny_model: CMT, embedded: Embedded, samples: list[Sample]
) -> None:
    """One infrared image each: nobody has two, and infrared to infrared cannot be fitted."""
    people = sorted({sample.person_id for sample in samples})[:4]
    seen: set[int] = set()
    rows: list[int] = []
    for i, sample in enumerate(samples):
        if sample.person_id not in people:
            continue
        if sample.modality == "rgb" or sample.person_id not in seen:
            rows.append(i)
        if sample.modality == "ir":
            seen.add(sample.person_id)
    few = [samples[i] for i in rows]
    fit = fit_of(tiny_model, Embedded(few, embedded.features[rows], None, embedded.embedding[rows]))
    sentence = fit.left_out[0]
    assert "No curve for ir → ir: only 0 of the 4 identities" in sentence
    assert fit.calibration.map_of("ir", "ir", modulated=True) is None
    assert fit.calibration.map_of("ir", "rgb", modulated=True) is not None


def test_people_of_one_modality_each_have_no_pairs(
    tiny_model: CMT, embedded: Embedded, samples: list[Sample]
) -> None:
    half = sorted({sample.person_id for sample in samples})[:4]
    rows = [i for i, s in enumerate(samples) if (s.person_id in half) == (s.modality == "rgb")]
    few = [samples[i] for i in rows]
    apart = Embedded(few, embedded.features[rows], None, embedded.embedding[rows])
    with pytest.raises(DatasetError, match="0 of the 8 identities have pairs of their own rgb"):
        fit_of(tiny_model, apart)


def test_a_cosine_checkpoint_can_be_calibrated(
    tiny_config: CMTConfig, samples: list[Sample]
) -> None:
    torch.manual_seed(3)
    model = CMT(tiny_config.model_copy(update={"metric": "cosine"})).eval()
    people = sorted({sample.person_id for sample in samples})[:4]
    some = [sample for sample in samples if sample.person_id in people]
    fit = fit_of(model, embed_samples(model, some), prior=0.2)
    assert fit.calibration.facts.ranking is not None
    assert fit.calibration.facts.ranking.agreements == ()  # parts are of the Euclidean distance
    x = fit.calibration.references["ir"][:1].float()
    similarities = fit.calibration.similarities(
        fit.calibration.measured(x, model.modulation(x)),
        [0.1, 0.5, 0.9],
        query="ir",
        gallery=["rgb"] * 3,
        modulated=True,
    )
    found = [value for value in similarities if value is not None]
    assert len(found) == 3
    assert all(0 <= value <= 1 for value in found)
    assert found == sorted(found, reverse=True)


def test_several_sets_are_fitted_together(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, halves = tmp_path / "c.safetensors", (tmp_path / "a.txt", tmp_path / "b.txt")
    save_checkpoint(checkpoint, tiny_model)
    for path, people in zip(halves, ("7,12,18,21", "23,30,218,370"), strict=True):
        path.write_text(people)
    second = "--root", MINI, "--ids", halves[1]
    written = tmp_path / "c.json"
    assert main(command(checkpoint, MINI, halves[0], *second, "--json", written)) == 0
    printed = capsys.readouterr().out
    assert "mAP set 2" in printed
    facts = stored(checkpoint).facts
    assert [one.identities for one in facts.people] == [[7, 12, 18, 21], [23, 30, 218, 370]]
    assert all(one.images for one in facts.people)
    assert load_checkpoint(checkpoint)[0].strength == facts.strength
    assert facts.strength is not None
    assert 0 < facts.strength.s <= 1
    assert facts.ranking is not None
    assert len(facts.ranking.posteriors) == 8
    content = json.loads(written.read_text())["calibration"]
    assert len(content["chosen"]["strength"][0]["mean_ap"]) == 2
    assert len(content["chosen"]["ranking"]["posteriors"]) == 8
    # Whoever is in one of the sets is one on whom the checkpoint was calibrated.
    samples = read_sysu(MINI)
    of_second = [s for s in samples if s.person_id in (23, 30)]
    _, info = load_checkpoint(checkpoint)
    assert calibrated_on(info, of_second, DatasetName.SYSU, None) == 2


def test_sets_that_do_not_fit_together_are_refused(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, ids = tmp_path / "c.safetensors", tmp_path / "ids.txt"
    save_checkpoint(checkpoint, tiny_model, training={"dataset": "sysu", "identities": [370]})
    ids.write_text("7,12,18,21")
    whole = command(checkpoint, MINI, ids)
    twice = [*whole, "--root", str(MINI), "--ids", str(ids)]
    assert "4 of the identities" in refused(twice, checkpoint, capsys)
    known = tmp_path / "known.txt"
    known.write_text("23,30,218,370")
    second = [*whole, "--root", str(MINI), "--ids", str(known)]
    assert "was trained on 1 of these 4 identities (370)" in refused(second, checkpoint, capsys)
    for odd in (["--root", str(MINI)], ["--dataset-name", "a", "--dataset-name", "b"]):
        assert main([*whole, *odd]) == 2
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "once for each --root" in error
