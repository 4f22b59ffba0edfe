"""Open-set searches judged by their probabilities: figures by hand, and galleries as described."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model import CMT, Calibration, Modality, load_checkpoint, save_checkpoint, store_calibration
from model.calibration import CalibrationFacts
from model.cli import main
from model.config import MODALITIES
from model.ranking import PosteriorFit, RankingFacts, Reranking
from model.training_facts import LearntPeople
from tests.paths import MINI
from training.datasets import Sample, read_sysu
from training.evaluation.embedding import Embedded, embed_samples
from training.evaluation.identification import (
    Answers,
    Kind,
    calibration_error,
    identification,
    identifications,
    open_set_answers,
    reliability,
)

FITS = tuple(
    PosteriorFit(
        modulated=modulated, reranked=reranked, labelled=labelled, slope=2.0, offset=2, size=1
    )
    for modulated in (True, False)
    for reranked in (True, False)
    for labelled in (True, False)
)
BETWEEN = {f"{a} {b}": (1.0, 0.2) for a in MODALITIES for b in MODALITIES}


def calibration(embedded: Embedded, **changes: object) -> Calibration:
    facts = {
        "prior_items": 30,
        "between": BETWEEN,
        "reranking": Reranking(weight=1),
        "posteriors": FITS,
    }
    people = LearntPeople(dataset="sysu", name="sysu", identities=[7, 12])
    rows = {m: [i for i, s in enumerate(embedded.samples) if s.modality == m] for m in MODALITIES}
    return Calibration(
        CalibrationFacts(
            prior=0.5,
            people=(people,),
            maps=(),
            ranking=RankingFacts.model_validate(facts | changes),
        ),
        {m: embedded.embedding[rows[m][:8]].half() for m in MODALITIES},
        "euclidean",
    )


def test_reliability_and_its_error_by_hand() -> None:
    predicted = np.array([0.0, 0.05, 0.31, 0.39, 1.0, 0.95])
    observed = np.array([False, False, True, False, True, False])
    bins = reliability(predicted, observed)
    assert [b.searches for b in bins] == [2, 0, 0, 2, 0, 0, 0, 0, 0, 2]
    assert (bins[0].predicted, bins[0].observed) == (0.025, 0.0)
    assert (bins[1].predicted, bins[1].observed) == (None, None)
    assert bins[3].predicted == pytest.approx(0.35)
    assert bins[9].predicted == pytest.approx(0.975)
    assert calibration_error(bins) == pytest.approx((0.025 + 0.15 + 0.475) / 3)


def answers(
    first: list[float], right: list[bool], enrolled: list[float], present: list[bool]
) -> Answers:
    count = len(first)
    return Answers(
        np.array(first),
        np.array(right),
        np.array(enrolled),
        np.array(present),
        np.full(count, 5),
        np.full(count, 9),
    )


def test_error_rates_by_hand() -> None:
    found = identification(
        Kind("mixed", small=True, labelled=False),
        answers(
            [0.9, 0.85, 0.5, 0.1, 0.82, 0.3, 0.05],
            [True, False, True, True, False, False, False],
            [0.95, 0.9, 0.6, 0.15, 0.9, 0.3, 0.05],
            [True, True, True, True, False, False, False],
        ),
    )
    assert found.title == "mixed, small, unlabelled"
    assert (found.searches, found.mated, found.people, found.items) == (7, 4, 5, 9)
    # One of three strangers is taken for somebody; one of four who are there is found.
    assert (found.likely.fpir, found.likely.fnir) == (1 / 3, 3 / 4)
    # Two of three strangers are answered; one of four who are there is said not to be.
    assert (found.none.fpir, found.none.fnir) == (2 / 3, 1 / 4)
    assert found.right == pytest.approx(3 / 7)
    wrong = [0.1, 0.85, 0.5, 0.9, 0.82, 0.3, 0.05]
    assert found.brier == pytest.approx(np.mean(np.square(wrong)))


def test_rates_that_no_search_can_tell_are_none() -> None:
    found = identification(
        Kind("visible", small=False, labelled=True), answers([0.9], [True], [0.9], [True])
    )
    assert (found.likely.fpir, found.likely.fnir) == (None, 0.0)


def test_several_models_are_pooled_and_a_kind_that_one_lacks_is_left_out() -> None:
    both, one = Kind("visible", True, True), Kind("mixed", True, True)
    part = answers([0.9], [True], [0.9], [True])
    (found,) = identifications([{both: part, one: part}, {both: part}])
    assert (found.title, found.searches) == ("visible, small, labelled", 2)
    assert identifications([{}]) == []


class Crowd:
    """People as points: every crop of a person is at the person's place, with a little noise."""

    def __init__(self, people: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.samples: list[Sample] = []
        rows = []
        for person in range(people):
            place = torch.randn(6, 16, generator=generator)
            streams: list[tuple[int, Modality]] = [
                (1, "rgb"), (2, "rgb"), (4, "rgb"), (3, "ir"), (6, "ir")
            ]  # fmt: skip
            for camera, modality in streams:
                path = Path(f"cam{camera}/{person}/1.jpg")
                self.samples.append(Sample(path, person, camera, modality))
                rows.append(place + 0.4 * torch.randn(6, 16, generator=generator))
        embedding = torch.nn.functional.normalize(torch.stack(rows).flatten(1)).view(-1, 6, 16)
        self.embedded = Embedded(self.samples, embedding, None, embedding)


@pytest.fixture(scope="module")
def crowd() -> Crowd:
    return Crowd(24)


def test_every_kind_of_gallery_is_searched_for_people_half_of_whom_are_there(
    tiny_model: CMT, crowd: Crowd
) -> None:
    known = calibration(crowd.embedded)
    found = open_set_answers(tiny_model, crowd.embedded, "sysu", known)
    assert set(found) == {
        Kind(gallery, small, labelled)
        for gallery in ("visible", "infrared", "mixed")
        for small in (True, False)
        for labelled in (True, False)
    }
    for kind, said in found.items():
        assert said.first.size == {"visible": 480, "infrared": 720, "mixed": 1200}[kind.gallery]
        assert ((said.first >= 0) & (said.first <= said.enrolled + 1e-12)).all()
        assert (said.enrolled <= 1).all()
        assert 0.3 < said.present.mean() < 0.6  # camera 3 does not see what camera 2 took
        assert said.people.max() <= (6 if kind.small else 12)
        assert said.people.min() >= (3 if kind.small else 6)
        # Nobody has more than four crops, all of different cameras or modalities.
        assert (said.items <= 4 * said.people).all()
        assert not (said.right & ~said.present).any()
        # Such people are easily told apart, and by probability too.
        assert said.right[said.present].mean() > 0.9
        assert said.first[said.right].mean() > 0.3 + said.first[~said.present].mean()
    labelled = found[Kind("mixed", False, True)]
    assert (labelled.items > labelled.people).any()


def test_nobody_is_found_by_crops_of_the_camera_that_asks(tiny_model: CMT) -> None:
    crowd = Crowd(6)
    kept = [i for i, s in enumerate(crowd.samples) if s.camera == 3]  # nothing else is there
    embedded = Embedded(
        [crowd.samples[i] for i in kept],
        crowd.embedded.embedding[kept],
        None,
        crowd.embedded.embedding[kept],
    )
    known = calibration(crowd.embedded)
    found = open_set_answers(tiny_model, embedded, "sysu", known)
    assert set(found) == {Kind("mixed", True, True), Kind("mixed", True, False)}
    assert not found[Kind("mixed", True, True)].present.any()
    again = open_set_answers(tiny_model, embedded, "sysu", known)
    assert all(np.array_equal(found[kind].first, again[kind].first) for kind in found)


def test_without_fits_nothing_is_said(tiny_model: CMT, crowd: Crowd) -> None:
    assert open_set_answers(tiny_model, crowd.embedded, "sysu", None) == {}
    for changes in ({"posteriors": ()}, {"posteriors": FITS[:1]}):
        known = calibration(crowd.embedded, **changes)
        assert open_set_answers(tiny_model, crowd.embedded, "sysu", known) == {}


def test_the_command_says_whether_probabilities_come_true(
    tiny_model: CMT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, plain = tmp_path / "with.safetensors", tmp_path / "plain.safetensors"
    info = save_checkpoint(plain, tiny_model)
    embedded = embed_samples(tiny_model, read_sysu(MINI))
    store_calibration(plain, checkpoint, calibration(embedded), info.fingerprint)
    assert load_checkpoint(checkpoint)[1].calibration is not None
    out, picture = tmp_path / "out.json", tmp_path / "reliability.png"
    ids = ["--ids", str(MINI / "exp" / "available_id.txt"), "--device", "cpu"]
    where = ["evaluate", "--dataset", "sysu", "--root", str(MINI), *ids]
    asked = ["--json", str(out), "--reliability", str(picture)]
    assert main([*where, "--checkpoint", str(checkpoint), *asked]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "\\n" not in printed
    assert "FITTED ON 2 OF THESE PEOPLE" in printed
    assert "re-ranked, served" in printed
    report = json.loads(out.read_text())
    assert report["cut_offs"] == {"likely": 0.8, "none": 0.2}
    assert len(report["identification"]) == 6  # eight people make small galleries only
    for kind in report["identification"]:
        assert kind["small"]
        assert len(kind["bins"]) == 10
        title = str(Kind(kind["gallery"], kind["small"], kind["labelled"]))
        assert f"\n{title} " in printed
        assert f"{kind['calibration_error']:.3f}" in printed
    with Image.open(picture) as image:
        assert min(image.size) > 500
    picture.unlink()
    assert main([*where, "--checkpoint", str(plain), *asked]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a checkpoint has no probabilities" in printed
    assert not picture.exists()
    assert json.loads(out.read_text())["identification"] == []
