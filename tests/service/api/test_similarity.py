"""Similarities in answers: probabilities that fall with the distance, null where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model import CMT, Calibration, save_checkpoint, store_calibration
from model.calibration import CalibrationFacts, CalibrationMap, IsotonicCurve, LogisticCurve
from model.cli import main
from model.config import Modality
from model.training_facts import LearntPeople
from service.client import Client
from tests.service.conftest import Serve

CURVE = LogisticCurve(slope=-2.0, intercept=0.5)
STEPS = IsotonicCurve(scores=(-30.0, 0.0, 30.0), probabilities=(0.9, 0.5, 0.1))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: CMT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated for infrared queries of both galleries, unmodulated only for the visible one."""
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
    people = CalibrationFacts(prior=0.5, people=(learnt,), maps=maps)
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


def ask(http: httpx.Client, *files: Path, **fields: str) -> list[dict[str, Any]]:
    parts = [("image", file.read_bytes()) for file in files]
    response = http.post("/query", files=parts, data=fields)
    assert response.status_code == 200, response.text
    return list(response.json()["results"])


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
            x[0],
            applied,
            [result["distance"] for result in results],
            query="ir",
            gallery=["rgb"] * len(results),
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


def test_the_command_line_and_the_contact_sheet_show_it(
    url: str, visible: list[Path], infrared: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sheet = tmp_path / "sheet.html"
    assert main(["query", str(infrared[0]), "--url", url, "--html", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert main(["query", str(infrared[0]), "--url", url, "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["results"][0]
    assert "same" in printed
    assert f" {best['similarity']:.3f} " in printed
    assert "…" not in printed
    assert f"similarity {best['similarity']:.3f}" in sheet.read_text()
    again = ["query", str(visible[0]), "--url", url, "--html", str(sheet), "--force"]
    assert main(again) == 0
    assert "same" not in capsys.readouterr().out
    assert "similarity 0" not in sheet.read_text()
