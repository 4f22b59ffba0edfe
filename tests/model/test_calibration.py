"""A calibration gives what its formulas say, never rises with the distance, and keeps its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import (
    CMT,
    Calibration,
    CheckpointError,
    CMTConfig,
    Modality,
    Modulation,
    load_checkpoint,
    modulated_distance,
    save_checkpoint,
    store_calibration,
)
from model.calibration import (
    CalibrationFacts,
    CalibrationMap,
    IsotonicCurve,
    LogisticCurve,
    Normalisation,
    Threshold,
    normalised,
)
from model.config import MODALITIES
from model.ranking import AgreementFit, RankingFacts
from model.training_facts import LearntPeople

LOGISTIC = LogisticCurve(slope=-2.0, intercept=1.0)
STEPS = IsotonicCurve(scores=(0.5, 1.0, 1.5), probabilities=(0.9, 0.4, 0.4))

# What may be done to a file's metadata and tensors.
Change = Callable[[dict[str, str], dict[str, Tensor]], object]


def curve_of(
    query: Modality,
    gallery: Modality,
    modulated: bool,
    curve: LogisticCurve | IsotonicCurve = LOGISTIC,
    normalisation: Normalisation = "z-score",
) -> CalibrationMap:
    return CalibrationMap(
        query=query,
        gallery=gallery,
        modulated=modulated,
        normalisation=normalisation,
        curve=curve,
        positives=10,
        negatives=90,
        identities=5,
        log_loss=0.3,
        log_loss_of_prior=0.69,
        expected_calibration_error=0.02,
        thresholds=(Threshold(false_accept_rate=0.01, similarity=0.8),),
        candidates=(),
    )


def calibration_of(model: CMT, *maps: CalibrationMap) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    size = model.config.parts, model.config.dim
    references = {
        modality: model.ranked_form(torch.randn(12, *size, generator=generator)).half()
        for modality in MODALITIES
    }
    people = (LearntPeople(dataset="sysu", name="sysu", identities=[3, 5]),)
    facts = CalibrationFacts(prior=0.5, people=people, maps=maps)
    return Calibration(facts, references, model.config.metric)


@pytest.fixture
def calibration(tiny_model: CMT) -> Calibration:
    return calibration_of(
        tiny_model, curve_of("ir", "rgb", True), curve_of("ir", "ir", True, STEPS, "ratio")
    )


@pytest.fixture
def query(tiny_model: CMT) -> tuple[Tensor, Modulation]:
    x = tiny_model.ranked_form(
        torch.randn(
            *(1, tiny_model.config.parts, tiny_model.config.dim),
            generator=torch.Generator().manual_seed(6),
        )
    )
    with torch.inference_mode():
        return x[0], tiny_model.modulation(x)


def test_what_is_fitted_to_references_needs_them_and_their_parts(calibration: Calibration) -> None:
    def agreeing(parts: int, references: dict[Modality, Tensor]) -> Calibration:
        fit = AgreementFit(
            query="ir", gallery="rgb", slopes=(1.0,) * parts, intercepts=(0.0,) * parts
        )
        ranking = RankingFacts(prior_items=30, agreements=(fit,))
        facts = calibration.facts.model_copy(update={"maps": (), "ranking": ranking})
        return Calibration(facts, references, calibration.metric)

    references = dict(calibration.references)
    parts = references["rgb"].shape[1]
    x = references["rgb"][0].float()
    assert agreeing(parts, references).agreements(
        x, [[1e9] * parts], query="ir", gallery=["rgb"]
    ) == [[0.0] * parts]
    with pytest.raises(ValueError, match=f"not that of {parts} parts"):
        agreeing(parts + 1, references)
    with pytest.raises(ValueError, match="no reference embeddings of rgb"):
        agreeing(parts, {"ir": references["ir"]})
    with pytest.raises(ValueError, match="no reference embeddings of rgb"):
        Calibration(calibration.facts, {"ir": references["ir"]}, calibration.metric)


def test_scores_by_hand() -> None:
    distance = np.array([[1.0, 2.0, 4.0]])
    reference = np.array([[1.0, 2.0, 6.0]])  # median 2, mean 3, deviation √(14/3)
    assert normalised(distance, reference, "raw") is distance
    np.testing.assert_allclose(normalised(distance, reference, "ratio"), [[0.5, 1, 2]])
    np.testing.assert_allclose(normalised(distance, reference, "log-ratio"), np.log([[0.5, 1, 2]]))
    np.testing.assert_allclose(
        normalised(distance, reference, "z-score"), (distance - 3) / np.sqrt(14 / 3)
    )


@pytest.mark.parametrize("how", ["raw", "ratio", "log-ratio", "z-score"])
def test_scores_stay_finite_where_everything_is_at_zero(how: Normalisation) -> None:
    zero = np.zeros((1, 2))
    assert np.isfinite(normalised(zero, zero, how)).all()


def test_curves_by_hand() -> None:
    np.testing.assert_allclose(LOGISTIC(np.array([0.5, -1e9, 1e9])), [0.5, 1, 0], atol=1e-12)
    np.testing.assert_allclose(STEPS(np.array([-3, 0.75, 1.2, 9])), [0.9, 0.65, 0.4, 0.4])


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": (1.0, 0.5), "probabilities": (0.9, 0.4)},
        {"scores": (0.5, 1.0), "probabilities": (0.4, 0.9)},
        {"scores": (0.5, 1.0), "probabilities": (0.9,)},
        {"scores": (0.5,), "probabilities": (1.1,)},
    ],
)
def test_curves_that_could_rise_are_refused(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValidationError):
        IsotonicCurve.model_validate(wrong)
    with pytest.raises(ValidationError):
        LogisticCurve(slope=0.1, intercept=0)


def known(similarities: list[float | None]) -> list[float]:
    """The same, none of which is missing."""
    values = [value for value in similarities if value is not None]
    assert len(values) == len(similarities)
    return values


def test_similarities_follow_each_items_modality(
    calibration: Calibration, query: tuple[Tensor, Modulation]
) -> None:
    x, modulation = query
    found = known(
        calibration.similarities(
            calibration.measured(x[None], modulation),
            [1.0, 1.0, 1.4, 1.4],
            query="ir",
            gallery=["rgb", "ir", "rgb", "ir"],
            modulated=True,
        )
    )
    references = {
        m: modulated_distance(x[None], rows.float(), modulation)[0].double().numpy()
        for m, rows in calibration.references.items()
    }
    visible = (np.array([1.0, 1.4]) - references["rgb"].mean()) / references["rgb"].std()
    np.testing.assert_allclose(found[0::2], LOGISTIC(visible), rtol=1e-4)
    infrared = np.array([1.0, 1.4]) / np.median(references["ir"])
    np.testing.assert_allclose(found[1::2], STEPS(infrared), rtol=1e-4)


def test_similarity_never_rises_with_the_distance(
    calibration: Calibration, query: tuple[Tensor, Modulation]
) -> None:
    distances = np.linspace(0, 5, 200).tolist()
    x, modulation = query
    measured = calibration.measured(x[None], modulation)
    for modality in MODALITIES:
        gallery = [modality] * len(distances)
        found = known(
            calibration.similarities(
                measured, distances, query="ir", gallery=gallery, modulated=True
            )
        )
        assert all(0 <= value <= 1 for value in found)
        assert (np.diff(found) <= 0).all()
        assert found[0] > found[-1]


def test_where_there_is_no_curve_there_is_no_similarity(
    calibration: Calibration, query: tuple[Tensor, Modulation]
) -> None:
    x, modulation = query
    both: list[Modality] = ["rgb", "ir"]
    measured = calibration.measured(x[None], modulation)
    for of, modulated in (("ir", False), ("rgb", True), ("mixed", True)):
        found = calibration.similarities(
            measured, [1, 1], query=of, gallery=both, modulated=modulated
        )
        assert found == [None, None]
    assert calibration.similarities(measured, [], query="ir", gallery=[], modulated=True) == []


def test_it_comes_back_from_the_checkpoint_and_the_fingerprint_stays(
    tiny_model: CMT, calibration: Calibration, query: tuple[Tensor, Modulation], tmp_path: Path
) -> None:
    file, output = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    # Half precision: the weights must be carried over as they are stored, not as they are loaded.
    saved = save_checkpoint(file, tiny_model, training={"seed": 3}, dtype=torch.float16)
    assert saved.calibration is None
    before = file.read_bytes()
    store_calibration(file, output, calibration, saved.fingerprint)
    assert file.read_bytes() == before
    model, info = load_checkpoint(output)
    assert (info.fingerprint, info.training) == (saved.fingerprint, {"seed": 3})
    assert info.calibration is not None
    assert info.calibration.facts == calibration.facts
    for modality, rows in calibration.references.items():
        assert torch.equal(info.calibration.references[modality], rows)
    x, gamma_beta = query
    again = [
        c.similarities(
            c.measured(x[None], gamma_beta), [1.2], query="ir", gallery=["rgb"], modulated=True
        )
        for c in (calibration, info.calibration)
    ]
    assert again[0] == again[1]
    # A network that is saved again has other weights, of which the calibration says nothing.
    assert save_checkpoint(tmp_path / "c.safetensors", model).calibration is None
    assert load_checkpoint(tmp_path / "c.safetensors")[1].calibration is None


def test_a_calibration_is_replaced_in_place(
    tiny_model: CMT, calibration: Calibration, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    fingerprint = save_checkpoint(file, tiny_model).fingerprint
    store_calibration(file, file, calibration, fingerprint)
    size = file.stat().st_size
    store_calibration(
        file, file, calibration_of(tiny_model, curve_of("rgb", "ir", False)), fingerprint
    )
    assert file.stat().st_size < size
    stored = load_checkpoint(file)[1].calibration
    assert stored is not None
    (only,) = stored.facts.maps
    assert (only.query, only.gallery, only.modulated) == ("rgb", "ir", False)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_checkpoint_that_was_replaced_meanwhile_is_left_alone(
    tiny_config: CMTConfig, tiny_model: CMT, calibration: Calibration, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    fingerprint = save_checkpoint(file, tiny_model).fingerprint
    save_checkpoint(file, CMT(tiny_config))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="replaced meanwhile; calibrate again"):
        store_calibration(file, file, calibration, fingerprint)
    assert file.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(
    tiny_model: CMT, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    fingerprint = save_checkpoint(file, tiny_model).fingerprint
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store_calibration(file, file, calibration, fingerprint)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def altered(path: Path, change: Change) -> Path:
    """The file with its metadata and tensors changed by `change(metadata, tensors)`."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(metadata, tensors)
    other = path.with_name("altered.safetensors")
    save_file(tensors, other, metadata=metadata)
    return other


def other_prior(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    facts = json.loads(metadata["calibration"])
    metadata["calibration"] = json.dumps(facts | {"prior": 0.9})


def other_references(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["calibration.references.rgb"][0, 0, 0] += 0.5


@pytest.mark.parametrize(
    "change",
    [
        other_prior,
        other_references,
        lambda metadata, tensors: metadata.update(calibration="null"),
        lambda metadata, tensors: metadata.pop("calibration_digest"),
        lambda metadata, tensors: tensors.pop("calibration.references.ir"),
    ],
)
def test_a_calibration_that_was_altered_is_refused(
    tiny_model: CMT, calibration: Calibration, tmp_path: Path, change: Change
) -> None:
    file = tmp_path / "a.safetensors"
    store_calibration(file, file, calibration, save_checkpoint(file, tiny_model).fingerprint)
    with pytest.raises(CheckpointError, match=r"calibration in .* was altered or damaged"):
        load_checkpoint(altered(file, change))


def test_a_calibration_of_other_weights_is_refused(
    tiny_config: CMTConfig, tiny_model: CMT, calibration: Calibration, tmp_path: Path
) -> None:
    file, foreign = tmp_path / "a.safetensors", tmp_path / "other.safetensors"
    store_calibration(file, file, calibration, save_checkpoint(file, tiny_model).fingerprint)
    save_checkpoint(foreign, CMT(tiny_config))
    with safe_open(file, framework="pt") as calibrated:
        metadata = calibrated.metadata()
    stolen = {name: rows for name, rows in load_file(file).items() if "calibration" in name}

    def transplant(target: dict[str, str], tensors: dict[str, Tensor]) -> None:
        target |= {k: metadata[k] for k in ("calibration", "calibration_digest")}
        tensors |= stolen

    with pytest.raises(CheckpointError, match="altered or damaged"):
        load_checkpoint(altered(foreign, transplant))


def test_facts_of_an_earlier_release_name_their_one_set(calibration: Calibration) -> None:
    facts = json.loads(calibration.facts.model_dump_json(exclude={"people"}))
    kept = {"dataset": "sysu", "identities": [3, 5], "name": "mine", "images": "AAAAAAAA"}
    read = CalibrationFacts.model_validate_json(json.dumps(facts | kept))
    assert read.people == (LearntPeople.model_validate(kept),)
    assert CalibrationFacts.model_validate_json(read.model_dump_json()) == read
    # Before there were digests, a number of the layout was a person.
    oldest = {"dataset": "sysu", "identities": [3, 5]}
    (people,) = CalibrationFacts.model_validate_json(json.dumps(facts | oldest)).people
    assert people == LearntPeople(dataset="sysu", name="sysu", identities=[3, 5])
    for damaged in ({"identities": 5}, {"dataset": None}, {"images": "?"}):
        with pytest.raises(ValidationError):
            CalibrationFacts.model_validate_json(json.dumps(facts | kept | damaged))
