"""Answers of a calibrated checkpoint: similarities, probabilities, agreement of parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model import CMT, Calibration, Modulation, save_checkpoint, store_calibration
from model.calibration import CalibrationFacts, CalibrationMap, IsotonicCurve, LogisticCurve
from model.cli import main
from model.config import Modality
from model.training_facts import LearntPeople
from service.cli.answers import percent
from service.client import Client
from tests.service.conftest import Serve
from tests.service.rankings import ranking_facts

CURVE = LogisticCurve(slope=-2.0, intercept=0.5)
STEPS = IsotonicCurve(scores=(-30.0, 0.0, 30.0), probabilities=(0.9, 0.5, 0.1))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: CMT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated for infrared queries of both galleries, unmodulated only for the visible one.

    Probabilities and agreements there are for all.
    """
    facts: dict[str, Any] = {
        "positives": 10,
        "negatives": 90,
        "identities": 5,
        "log_loss": 0.3,
        "log_loss_of_prior": 0.69,
        "expected_calibration_error": 0.02,
        "thresholds": [{"false_accept_rate": 0.01, "similarity": 0.8}],
        "candidates": [{"normalisation": "z-score", "method": "logistic", "log_loss": 0.3}],
        "normalisation": "z-score",
        "query": "ir",
    }
    maps = (
        CalibrationMap(gallery="rgb", modulated=True, curve=CURVE, **facts),
        CalibrationMap(gallery="rgb", modulated=False, curve=CURVE, **facts),
        CalibrationMap(gallery="ir", modulated=True, curve=STEPS, **facts),
    )
    size = tiny_model.config.parts, tiny_model.config.dim
    noise = torch.randn(2, 30, *size, generator=torch.Generator().manual_seed(1))
    modalities: tuple[Modality, ...] = ("rgb", "ir")
    references = dict(zip(modalities, map(tiny_model.ranked_form, noise), strict=True))
    path = tmp_path_factory.mktemp("calibrated") / "tiny.safetensors"
    fingerprint = save_checkpoint(path, tiny_model).fingerprint
    learnt = LearntPeople(dataset="sysu", name="sysu", identities=[3, 5])
    ranking = ranking_facts(tiny_model.config.parts, between=(1.0, 0.3))
    people = CalibrationFacts(prior=0.5, people=(learnt,), maps=maps, ranking=ranking)
    store_calibration(
        path, path, Calibration(people, references, tiny_model.config.metric), fingerprint
    )
    return path


@pytest.fixture(scope="module")
def url(
    serve: Serve,
    checkpoint: Path,
    visible: list[Path],
    infrared: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A service with that checkpoint and a gallery of both modalities."""
    with serve(tmp_path_factory.mktemp("data"), checkpoint=checkpoint) as address:
        with Client(address) as client:
            for file in (*visible, *infrared[1:5]):
                client.enroll(file, person_id=file.parent.name)
        yield address


def answer_of(http: httpx.Client, *files: Path, **fields: Any) -> dict[str, Any]:
    parts = [("image", file.read_bytes()) for file in files]
    response = http.post("/query", files=parts, data=fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask(http: httpx.Client, *files: Path, **fields: Any) -> list[dict[str, Any]]:
    return list(answer_of(http, *files, **fields)["results"])


def test_similarity_falls_with_the_distance_within_each_modality(
    http: httpx.Client, infrared: list[Path]
) -> None:
    for file in infrared[:2]:
        results = ask(http, file)
        assert {result["item"]["modality"] for result in results} == {"rgb", "ir"}
        for modality in ("rgb", "ir"):
            found = [r["similarity"] for r in results if r["item"]["modality"] == modality]
            assert found == sorted(found, reverse=True)  # results come nearest first
            assert all(0 <= value <= 1 for value in found)
            assert found[0] > found[-1]


def test_each_query_is_judged_by_its_own_references(
    http: httpx.Client, infrared: list[Path], checkpoint: Path
) -> None:
    """The same numbers as the library's own call gives for the crop's embedding."""
    from PIL import Image

    from model import load_checkpoint, preprocess

    model, info = load_checkpoint(checkpoint)
    assert info.calibration is not None
    with Image.open(infrared[0]) as image:
        x = model.embed(preprocess(image, model.config)[None], "ir")
    with torch.inference_mode():
        modulation = model.modulation(x)
    for given, applied in (({}, modulation), ({"modulation": "false"}, None)):
        results = ask(http, infrared[0], gallery_modality="rgb", **given)
        expected = info.calibration.similarities(
            info.calibration.measured(x, applied or Modulation.identity(1, x.shape[2])),
            [result["distance"] for result in results],
            query="ir",
            gallery=["rgb"] * len(results),
            modulated=applied is not None,
        )
        assert [result["similarity"] for result in results] == pytest.approx(expected, abs=1e-4)
        assert None not in expected


def test_null_where_the_checkpoint_has_no_curve(
    http: httpx.Client, visible: list[Path], infrared: list[Path]
) -> None:
    assert {r["similarity"] for r in ask(http, visible[0])} == {None}
    assert {r["similarity"] for r in ask(http, visible[0], infrared[0])} == {None}  # both kinds
    for result in ask(http, infrared[0], modulation="false"):
        assert (result["similarity"] is None) == (result["item"]["modality"] == "ir")


def test_several_images_are_judged_as_the_one_query_they_are(
    http: httpx.Client, infrared: list[Path]
) -> None:
    once, twice = (ask(http, *[infrared[0]] * count) for count in (1, 2))
    assert [r["similarity"] for r in twice] == pytest.approx([r["similarity"] for r in once])


def test_the_model_card_shows_the_calibration(http: httpx.Client) -> None:
    calibration = http.get("/model").json()["calibration"]
    assert (calibration["prior"], calibration["identities"]) == (0.5, 2)
    assert calibration["references"] == {"rgb": 30, "ir": 30}
    assert [entry["curve"]["method"] for entry in calibration["maps"]] == [
        "logistic",
        "logistic",
        "isotonic",
    ]
    first = calibration["maps"][0]
    assert first["thresholds"][0]["similarity"] == 0.8
    assert first["candidates"][0]["log_loss"] == first["log_loss"] == 0.3
    described = http.get("/openapi.json").json()["components"]["schemas"]
    assert "prior" in described["Result"]["properties"]["similarity"]["description"]
    assert "thresholds" in described["ModelCard"]["properties"]["calibration"]["description"]


def probabilities(answer: dict[str, Any]) -> list[float]:
    found = [result["probability"] for result in answer["results"]]
    assert all(0 <= p <= answer["probability_enrolled"] <= 1 for p in found)
    return found


@pytest.mark.parametrize("modulation", ["true", "false"])
@pytest.mark.parametrize("rerank", ["none", "k_reciprocal"])
@pytest.mark.parametrize("exhaustive", ["true", "false"])
def test_probabilities_of_all_people_and_of_nobody_are_one(
    http: httpx.Client, visible: list[Path], infrared: list[Path], modulation: str, rerank: str,
    exhaustive: str,
) -> None:  # fmt: skip
    for files in ([visible[0]], infrared[:1], [visible[0], infrared[0]], infrared[:3]):
        answer = answer_of(
            http, *files, top_k="1000", modulation=modulation, rerank=rerank,
            exhaustive=exhaustive,
        )  # fmt: skip
        assert answer["rerank"] == rerank
        assert (answer["searched"], answer["people"]) == (12, 8)
        people = dict(
            zip((r["item"]["person_id"] for r in answer["results"]), probabilities(answer),
                strict=True)
        )  # fmt: skip
        assert len(people) == 8
        assert sum(people.values()) == pytest.approx(answer["probability_enrolled"], abs=1e-6)


def test_parts_agree_by_a_number_from_0_to_1(http: httpx.Client, infrared: list[Path]) -> None:
    """Whatever ranks: it is that of the parts without γ and β."""
    explained = ask(http, infrared[0], explain="true", rerank="k_reciprocal")
    assert sorted(r["rank_before_rerank"] for r in explained) == list(range(1, 13))
    for result in explained:
        assert len(result["agreement"]) == len(result["parts"])
        assert all(0 <= part <= 1 for part in result["agreement"])
    plain = ask(http, infrared[0], explain="true", modulation="false")
    of_item = {result["item"]["id"]: result for result in explained}
    for fields in ({}, {"exhaustive": "true"}, {"top_k": "2"}, {"group_by": "person_id"}):
        for result in ask(http, infrared[0], explain="true", **fields):
            same = of_item[result["item"]["id"]]
            assert result["agreement"] == pytest.approx(same["agreement"], abs=1e-6)
    for result in plain:
        same = of_item[result["item"]["id"]]
        assert result["agreement"] == pytest.approx(same["agreement"], abs=1e-6)
        assert result["parts"] != pytest.approx(same["parts"], rel=1e-3)
    for modality in ("rgb", "ir"):
        of = [r for r in plain if r["item"]["modality"] == modality]
        for part in range(len(of[0]["parts"])):
            nearest_first = sorted(of, key=lambda r: float(r["parts"][part]))
            agreement = [r["agreement"][part] for r in nearest_first]
            assert agreement == sorted(agreement, reverse=True)
            assert agreement[0] > agreement[-1]
    assert "agreement" not in ask(http, infrared[0])[0]


def test_the_prior_moves_the_odds_and_what_is_said(
    http: httpx.Client, infrared: list[Path]
) -> None:
    def odds(prior: float) -> float:
        p = answer_of(http, infrared[0], prior=str(prior))["probability_enrolled"]
        return float(p / (1 - p))

    assert odds(0.9) == pytest.approx(9 * odds(0.5), rel=1e-4)
    default = answer_of(http, infrared[0])
    assert default == answer_of(http, infrared[0], prior="0.5")
    rare = answer_of(http, infrared[0], prior="1e-9")
    assert (rare["match"], [r["item"] for r in rare["results"]]) == (
        "none", [r["item"] for r in default["results"]]
    )  # fmt: skip
    card = http.get("/model").json()
    assert (card["match"], card["prior"]) == ({"likely": 0.8, "none": 0.2}, 0.5)


def test_where_nobody_passes_the_answer_says_none(http: httpx.Client, infrared: list[Path]) -> None:
    for rerank in ("none", "k_reciprocal"):
        answer = answer_of(http, infrared[0], person_id="nobody", rerank=rerank)
        assert (answer["results"], answer["searched"], answer["people"]) == ([], 0, 0)
        assert (answer["probability_enrolled"], answer["match"]) == (0, "none")


@pytest.mark.parametrize(
    ("probability", "shown"),
    [
        (0, "0%"),
        (1e-9, "<1%"),
        (0.01, "1%"),
        (0.425, "42%"),
        (0.9901, ">99%"),
        (1, "100%"),
        (None, "-"),
    ],
)
def test_only_what_is_certain_is_shown_as_certain(probability: float | None, shown: str) -> None:
    assert percent(probability) == shown


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rerank", "yes"),
        ("rerank", "K_RECIPROCAL"),
        ("prior", "0"),
        ("prior", "1"),
        ("prior", "-0.1"),
        ("prior", "nan"),
        ("prior", "inf"),
        ("prior", "half"),
    ],
)
def test_what_is_no_reranking_or_prior_is_refused(
    http: httpx.Client, image: bytes, field: str, value: str
) -> None:
    response = http.post("/query", files={"image": image}, data={field: value})
    assert response.status_code == 422
    problem = response.json()
    assert [error["name"] for error in problem["errors"]] == [field]


def test_settings_say_how_answers_are_read(
    serve: Serve, checkpoint: Path, visible: list[Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "rerank": "k_reciprocal", "prior": 0.01, "match_likely": 0.0001, "match_none": 0.00001,
    }  # fmt: skip
    with (
        serve(tmp_path, checkpoint=checkpoint, **settings) as address,
        Client(address) as client,
    ):
        client.enroll(visible[0], person_id="ann")
        answer = client.query(visible[0])
        assert (answer.rerank, answer.match) == ("k_reciprocal", "likely")
        plain = client.query(visible[0], rerank="none", prior=0.5)
        assert plain.rerank == "none"
        assert plain.probability_enrolled is not None
        assert answer.probability_enrolled is not None
        assert plain.probability_enrolled > answer.probability_enrolled
        card = client.model()
        assert (card.prior, card.match.likely, card.match.none) == (0.01, 0.0001, 0.00001)


def test_the_command_line_and_the_contact_sheet_show_it(
    url: str, visible: list[Path], infrared: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sheet = tmp_path / "sheet.html"
    arguments = [str(infrared[0]), "--url", url, "--prior", "0.6", "--rerank", "k_reciprocal"]
    assert main(["query", *arguments, "--html", str(sheet)]) == 0
    printed, page = capsys.readouterr().out, sheet.read_text()
    assert main(["query", *arguments, "--json"]) == 0
    told = capsys.readouterr().out
    answer = json.loads(told)
    best = answer["results"][0]
    assert told.index('"probability_enrolled"') < told.index('"results"')
    assert list(best)[:2] == ["rank", "probability"]
    enrolled = f"the 8 people searched at all: {percent(answer['probability_enrolled'])}."
    said = {"likely": "Likely found: ", "possible": "Possible: ", "none": "Probably not enrolled. "}
    headline = printed.splitlines()[0]
    assert headline.startswith(said[answer["match"]])
    assert enrolled in headline
    assert escape(headline) in page
    assert "prob. same " in printed
    for result in answer["results"][:3]:
        assert f" {percent(result['probability'])} " in printed
        assert f"<strong>{escape(percent(result['probability']))}</strong>" in page
        assert f" {result['similarity']:.3f} " in printed
        assert f"similarity {result['similarity']:.3f}" in page
        assert f"width: {100 * result['agreement'][0]:.0f}%" in page
    assert "re-ranked" in printed
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 100
    again = ["query", str(visible[0]), "--url", url, "--html", str(sheet), "--force"]
    assert main(again) == 0
    assert "same" not in capsys.readouterr().out
    assert "similarity 0" not in sheet.read_text()


def test_without_a_fit_they_say_so_and_show_distances(
    serve: Serve, visible: list[Path], infrared: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sheet = tmp_path / "sheet.html"
    with serve(tmp_path / "data") as address:
        with Client(address) as client:
            client.enroll(visible[0])
            answer = client.query(infrared[0], rerank="k_reciprocal")
        assert (answer.match, answer.probability_enrolled, answer.rerank) == (
            None, None, "k_reciprocal"
        )  # fmt: skip
        assert main(["query", str(infrared[0]), "--url", address, "--html", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No probabilities: ")
    assert "dist." in printed
    assert f"{answer.results[0].distance:.4f}" in printed
    assert "prob." not in printed
    assert "No probabilities: " in sheet.read_text()
    assert "<strong>" not in sheet.read_text()
