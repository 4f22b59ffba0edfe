"""The whole evaluation of a small network on a small set, and the figures of its two modules."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import (
    CMT,
    CMTConfig,
    Modality,
    Modulation,
    load_checkpoint,
    modulate,
    preprocess,
    save_checkpoint,
)
from model.cli import main
from tests.paths import MINI
from training.datasets import DatasetName, Sample, read_sysu
from training.evaluation import evaluate_model, protocol_splits, rank_metrics
from training.evaluation.embedding import embed_samples
from training.evaluation.module_diagnostics import (
    bootstrap_interval,
    diagnose_compensation,
    gamma_beta_figures,
    top_changes,
)
from training.evaluation.report import Evaluation, SplitEvaluation
from training.evaluation.sysu import seeded_galleries
from training.evaluation.tables import module_lines


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return read_sysu(MINI)


def evaluate_sysu(model: CMT, samples: list[Sample], batch_size: int = 64) -> Evaluation:
    splits = protocol_splits(DatasetName.SYSU, samples)
    return evaluate_model(DatasetName.SYSU, model, samples, splits, batch_size=batch_size)


@pytest.fixture(scope="module")
def whole(tiny_model: CMT, samples: list[Sample]) -> Evaluation:
    return evaluate_sysu(tiny_model, samples, batch_size=7)


@pytest.fixture(scope="module")
def evaluation(whole: Evaluation) -> SplitEvaluation:
    """All-search, single-shot."""
    return whole.splits[0]


def plain_embedding(model: CMT, samples: list[Sample]) -> torch.Tensor:
    """One image at a time, float64."""
    rows = []
    for sample in samples:
        image = preprocess(Image.open(sample.path), model.config)
        rows.append(model.embed(image[None], sample.modality)[0].double())
    return torch.stack(rows)


def test_figures_equal_modulating_the_gallery_image_by_image(
    tiny_model: CMT, samples: list[Sample], evaluation: SplitEvaluation
) -> None:
    """The paper's test loop: modulate every gallery image by every query, then measure."""
    y = plain_embedding(tiny_model, samples)
    queries = [i for i, s in enumerate(samples) if s.camera in (3, 6)]
    people = np.array([s.person_id for s in samples])
    cameras = np.array([s.camera for s in samples])
    with torch.no_grad():
        alive = Modulation(*(part.double() for part in tiny_model.modulation(y[queries].float())))
    identity = Modulation(torch.ones_like(alive.gamma), torch.zeros_like(alive.beta))
    for modulation, ranking in ((alive, evaluation.modulated), (identity, evaluation.unmodulated)):
        trials = []
        for gallery in seeded_galleries(samples):
            modulated = modulate(y[gallery], modulation)  # Q×N×P×D
            distance = (y[queries][:, None] - modulated).flatten(2).norm(dim=2)
            trials.append(
                rank_metrics(
                    distance, people[queries], people[gallery], cameras[queries], cameras[gallery]
                )
            )
        for field, values in (
            ("rank_1", [t.cmc[0] for t in trials]),
            ("rank_20", [t.cmc[19] for t in trials]),
            ("mean_ap", [t.mean_ap for t in trials]),
            ("mean_inp", [t.mean_inp for t in trials]),
        ):
            assert getattr(ranking, field).mean == pytest.approx(np.mean(values), abs=1e-3)
            assert getattr(ranking, field).std == pytest.approx(np.std(values), abs=1e-3)
    assert evaluation.modulated != evaluation.unmodulated


def test_sizes_and_convention(evaluation: SplitEvaluation) -> None:
    assert (evaluation.convention, evaluation.trials) == ("seeded", 10)
    assert (evaluation.identities, evaluation.queries, evaluation.gallery) == (8, 32, 31.0)


def test_the_gain_is_the_difference_of_the_two_rankings(evaluation: SplitEvaluation) -> None:
    modulation = evaluation.modulation
    assert modulation is not None
    difference = evaluation.modulated.mean_ap.mean - evaluation.unmodulated.mean_ap.mean
    assert modulation.map_gain == pytest.approx(difference)
    assert modulation.map_gain_low <= modulation.map_gain <= modulation.map_gain_high


def test_a_fresh_network_shows_that_its_modulation_does_nothing(
    tiny_config: CMTConfig, samples: list[Sample]
) -> None:
    torch.manual_seed(3)
    idle = evaluate_sysu(CMT(tiny_config), samples).splits[0]
    assert idle.modulation is not None
    assert (idle.modulation.gamma_mean, idle.modulation.gamma_std) == (1.0, 0.0)
    assert idle.modulation.beta_to_feature == 0.0
    assert idle.modulation.top10_reordered == 0.0
    assert idle.modulation.map_gain == 0.0
    assert idle.modulated == idle.unmodulated


def test_modules_that_are_switched_off_are_not_reported(
    tiny_config: CMTConfig, samples: list[Sample]
) -> None:
    config = tiny_config.model_copy(
        update={"modality_alignment": False, "instance_alignment": False, "metric": "cosine"}
    )
    base = evaluate_sysu(CMT(config), samples)
    assert base.compensation is None
    for split in base.splits:
        assert split.modulation is None
        assert split.modulated == split.unmodulated
    assert base.metric == "cosine"
    assert module_lines(base) == []


def test_the_network_goes_back_to_training(tiny_config: CMTConfig, samples: list[Sample]) -> None:
    model = CMT(tiny_config).train()
    before = model.backbone.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    embed_samples(model, samples[:4])
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.backbone.state_dict().items())


def test_decoding_in_workers_gives_the_same_features(
    tiny_model: CMT, samples: list[Sample]
) -> None:
    here = embed_samples(tiny_model, samples[:6])
    there = embed_samples(tiny_model, samples[:6], batch_size=3, workers=1)
    torch.testing.assert_close(here.embedding, there.embedding)


def test_gamma_and_beta_figures_by_hand() -> None:
    # γ of two queries: deviations 1 and 0 per channel. ‖β‖ is 5 and 0, over two parts √2 more.
    modulation = Modulation(
        torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    )
    gallery = torch.ones(4, 2, 2)  # ‖y‖ = 2
    mean, std, ratio = gamma_beta_figures(modulation, gallery)
    assert (mean, std) == (2.0, 0.5)
    assert ratio == pytest.approx(2.5 * 2**0.5 / 2)


def test_changed_and_reordered_tops_by_hand() -> None:
    unmodulated = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [9.0, 0.0, 1.0]])
    modulated = np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [0.0, 2.0, 1.0], [-1.0, 0.0, 1.0]])
    excluded = np.zeros((4, 3), dtype=bool)
    excluded[3, 0] = True  # the only difference of the last query is in an excluded image
    assert top_changes(modulated, unmodulated, excluded, top=2) == (1 / 4, 2 / 4)


def test_bootstrap_resamples_identities_and_not_queries() -> None:
    # One person gains 1 in a thousand queries, the other loses 1 in a thousand: two draws only.
    differences = np.repeat([1.0, -1.0], 1000)
    assert bootstrap_interval(differences, np.repeat([7, 9], 1000)) == (-1.0, 1.0)
    # As many persons as queries: close to the normal interval of the mean, ± 1.96 / √2000.
    low, high = bootstrap_interval(differences, np.arange(2000))
    assert (low, high) == pytest.approx((-0.0438, 0.0438), abs=0.008)
    assert bootstrap_interval(np.full(6, 0.25), np.array([1, 1, 2, 2, 3, 4])) == (0.25, 0.25)


def person(person_id: int, modality: Modality) -> Sample:
    return Sample(Path("unused.jpg"), person_id, 3 if modality == "ir" else 1, modality)


def test_compensation_by_hand() -> None:
    # Two persons with real visible features at 0 and 10; person 3 has no visible image.
    people: list[tuple[int, Modality]] = [
        (1, "rgb"),
        (1, "rgb"),
        (2, "rgb"),
        (1, "ir"),
        (2, "ir"),
        (2, "ir"),
        (3, "ir"),
    ]
    samples = [person(*p) for p in people]
    features = torch.tensor([-1.0, 1.0, 10.0, 50.0, 50.0, 50.0, 50.0]).view(-1, 1, 1)
    compensated = torch.tensor([9.0, 9.0, 9.0, 1.0, 9.0, 2.0, 0.0]).view(-1, 1, 1)
    figures = diagnose_compensation(samples, features, compensated, "rgb")
    # Judged are 1 → 0 (right), 9 → 10 (right), 2 → 0 (wrong); mean 4, variance (9 + 25 + 4) / 3.
    assert figures is not None
    assert figures.images == 3
    assert figures.rank_1 == pytest.approx(2 / 3)
    assert figures.chance == 0.5
    assert figures.variance_to_mean == pytest.approx((38 / 3) / 16)


def test_constant_compensation_is_exposed() -> None:
    samples = [person(p, m) for p in (1, 2) for m in ("rgb", "ir")]
    features = torch.arange(4.0).view(4, 1, 1)
    figures = diagnose_compensation(samples, features, torch.ones(4, 2, 3)[:, :1, :1], "rgb")
    assert figures is not None
    assert figures.variance_to_mean == 0.0
    assert figures.rank_1 == figures.chance == 0.5


def test_compensation_without_common_identities_is_not_judged() -> None:
    samples = [person(1, "rgb"), person(2, "ir")]
    assert diagnose_compensation(samples, torch.ones(2, 1, 1), torch.ones(2, 1, 1), "rgb") is None


def arguments(checkpoint: Path, root: Path = MINI, ids: str = "val_id.txt") -> list[str]:
    return [
        *("evaluate", "--dataset", "sysu", "--root", str(root)),
        *("--ids", str(MINI / "exp" / ids), "--checkpoint", str(checkpoint), "--device", "cpu"),
    ]


def test_the_command_prints_and_writes_what_the_library_computes(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "evaluation.json"
    assert main([*arguments(tiny_checkpoint), "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    model, info = load_checkpoint(tiny_checkpoint)
    expected = evaluate_sysu(model, read_sysu(MINI, [12, 218, 370]))
    assert written.pop("checkpoints") == [
        {"file": tiny_checkpoint.name, "fingerprint": info.fingerprint, "selection": "last"}
    ]
    assert written == json.loads(json.dumps(expected.to_json()))
    printed = capsys.readouterr().out
    assert "10 trials (drawn by the seeded convention)" in printed
    for split in expected.splits:
        assert str(split.modulated.mean_ap) in printed
        assert str(split.unmodulated.mean_inp) in printed
    assert "…" not in printed  # no figure is cut off in a terminal of 80 columns
    words = " ".join(printed.split())
    # The paper's own rows close the published part of both halves of Table 1; ours follow.
    for half in ("71.88 96.45 98.87 68.57 80.23 97.91 99.53 63.13", "76.90 97.68 99.64 79.91"):
        assert f"CMT ECCV-22 {half}" in words
    assert words.index("published Zero-Padding") < words.index("measured ours, modulated")
    assert words.count("is not the published test set") == 2
    for line in module_lines(expected):
        assert line in printed


def test_the_official_trial_file_is_used_where_it_lies(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scipy.io import savemat

    root = Path(shutil.copytree(MINI, tmp_path / "set"))
    cells = np.empty((6, 1), dtype=object)
    for camera in range(6):
        cells[camera, 0] = np.empty((400, 1), dtype=object)
        for index in range(400):
            cells[camera, 0][index, 0] = np.tile(np.array([2, 1], dtype=np.uint8), (10, 1))
    savemat(root / "exp" / "rand_perm_cam.mat", {"rand_perm_cam": cells})
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_checkpoint(checkpoint, tiny_model)
    out = tmp_path / "evaluation.json"
    assert main([*arguments(checkpoint, root), "--json", str(out)]) == 0
    assert "from the official trial file" in capsys.readouterr().out
    written = json.loads(out.read_text())["splits"]
    assert [split["convention"] for split in written] == ["official"] * 4
    assert written[0]["modulated"]["mean_ap"]["std"] == 0.0  # ten equal rows
    assert main([*arguments(checkpoint, root), "--convention", "seeded"]) == 0
    assert "from the official trial file" not in capsys.readouterr().out
    assert main([*arguments(checkpoint), "--convention", "official"]) == 1
    assert "rand_perm_cam.mat" in capsys.readouterr().err


def test_training_identities_are_refused(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    save_checkpoint(
        checkpoint, tiny_model, training={"dataset": "sysu", "identities": [7, 18, 370]}
    )
    assert main(arguments(checkpoint)) == 1
    error = capsys.readouterr().err
    assert "trained on 1 of these 3 identities (370)" in error
    assert "--ids" in error


def test_figures_are_printed_where_they_cannot_be_written(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = ["--json", "/dev/full", "--plot", str(tmp_path / "cmc.png")]
    assert main([*arguments(tiny_checkpoint), *written]) == 1
    said = capsys.readouterr()
    assert "Checkpoint selection: last" in said.out
    assert "all-search single-shot" in said.out
    assert said.err.startswith("Error: not written: /dev/full: No space left on device")
    assert said.err.count("\n") == 1
    assert (tmp_path / "cmc.png").is_file()


def test_errors_of_the_command_are_one_sentence(
    tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "none.safetensors")) == 1
    assert "no checkpoint at" in capsys.readouterr().err
    assert main(arguments(tiny_checkpoint, ids="test_id.txt")) == 1
    error = capsys.readouterr().err
    assert "test_id.txt" in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
