"""The OpenAPI document against the service: Schemathesis, every check on, all phases."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from schemathesis.checks import CHECKS
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.engine import events, from_schema
from schemathesis.generation import GenerationMode

from model import load_checkpoint
from model.labels import cleaned_label
from service.api.fields import MetadataObject, Timestamp
from service.auth.keys import KeyFile
from service.gallery import Camera, Gallery
from tests.paths import ROOT
from tests.service.conftest import Serve

EXAMPLES = 30  # of the fuzzing and stateful phase, for each operation
FORM = "multipart/form-data"
PHASES = {"examples", "coverage", "fuzzing", "stateful"}
# Fingerprints of model versions that may be dropped.
SPARE = ["a" * 64, "b" * 64, "c" * 64]
CAMERAS = ["gate", "north/gate 4", "50%", "Höf"]
LABELS = ("person_id", "camera_id", "exclude_camera_id", "query_camera_id")
# Not for this service: no time is promised, and there are no owners of single items.
UNUSED = {"max_response_time", "object_level_authorization"}
AnyCase = schemathesis.Case[Any]
_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(MetadataObject)
_TIME: TypeAdapter[datetime] = TypeAdapter(Timestamp)


@dataclass
class Outcome:
    """What a run came to. answers: operation → status → how many. checks: name → how many."""

    answers: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    checks: Counter[str] = field(default_factory=Counter)
    phases: dict[str, str] = field(default_factory=dict)
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def note(self, event: events.EngineEvent) -> None:
        """Take over what the engine tells."""
        if isinstance(event, events.PhaseFinished):
            self.phases[event.phase.name.value] = event.status.value
        elif isinstance(event, events.NonFatalError):
            self.errors.append(f"{event.label}: {event.info.title} {event.info.message}")
        elif isinstance(event, events.FatalError):
            self.errors.append(repr(event.exception))
        elif isinstance(event, events.ScenarioFinished):
            self._note_scenario(event.recorder)

    def _note_scenario(self, recorder: Any) -> None:
        for case_id, node in recorder.cases.items():
            response = recorder.interactions[case_id].response
            self.answers[node.value.operation.label][response.status_code] += 1
        for case_id, checks in recorder.checks.items():
            label = recorder.cases[case_id].value.operation.label
            for check in checks:
                self.checks[check.name] += 1
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    told = f"{failure.message}\n{check.failure_info.code_sample}"
                    self.failures.setdefault((label, check.name, failure.title), told)

    def summary(self) -> str:
        """A line for each operation."""
        lines = [
            f"{label:26} {sum(statuses.values()):4} cases  "
            + ", ".join(f"{count}× {status}" for status, count in sorted(statuses.items()))
            for label, statuses in sorted(self.answers.items())
        ]
        total = sum(sum(statuses.values()) for statuses in self.answers.values())
        return "\n".join([*lines, f"{total} cases in all; checks: {dict(self.checks)}"])


@pytest.fixture(scope="module")
def guarded(
    serve: Serve, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A service with one key that may do everything, and a client that has it."""
    folder = tmp_path_factory.mktemp("contract")
    checkpoint = folder / "present.safetensors"
    shutil.copy(tiny_checkpoint, checkpoint)
    _, info = load_checkpoint(checkpoint)
    for fingerprint in (info.fingerprint, *SPARE):  # the first one is in use, the others can go
        with closing(
            Gallery.open(folder / "data", replace(info, fingerprint=fingerprint))
        ) as gallery:
            for camera_id in CAMERAS:
                gallery.put_camera(Camera(camera_id, "ir"))
    keys = KeyFile(folder / "keys.json")
    _, token = keys.create("all", ["query", "enroll", "admin"])
    with (
        serve(folder / "data", checkpoint=checkpoint, api_keys_file=keys.path) as url,
        httpx.Client(
            base_url=url, trust_env=False, headers={"Authorization": f"Bearer {token}"}, timeout=60
        ) as http,
    ):
        yield http


@pytest.fixture(scope="module")
def outcome(guarded: httpx.Client, visible: list[Path], infrared: list[Path]) -> Outcome:
    """One run over all operations; the claims below are about it."""
    crops = [file.read_bytes() for file in (*visible[:4], *infrared[:4])]
    schemathesis.openapi.format("binary", st.sampled_from(crops))
    generation = {
        "max-examples": EXAMPLES, "deterministic": True, "no-shrink": True, "database": "none"
    }  # fmt: skip
    config = schemathesis.Config.from_dict(
        {
            "seed": 11,
            "headers": {"Authorization": guarded.headers["authorization"]},
            "continue-on-failure": True,
            "request-timeout": 120,  # on a busy machine ten seconds are too few
            "generation": generation,
            "phases": {"stateful": {"max-steps": 6}},
        }
    )
    schemathesis.hook("before_load_schema")(without_haste)
    schema = schemathesis.openapi.from_url(f"{guarded.base_url}/openapi.json", config=config)
    schema.hook("map_case")(sensible)
    schema.hook("filter_failure")(seen_on_the_wire)
    outcome = Outcome()
    for event in from_schema(schema).execute():
        outcome.note(event)
    print(f"\n{outcome.summary()}")
    return outcome


def sensible(_context: schemathesis.HookContext, case: AnyCase) -> AnyCase:
    """A case that the schema allows, made to be what only the descriptions demand: a cursor that
    was given out, a box inside of the image, JSON in a text field, a checkpoint that is there, a
    model version that there was, a camera that is known, labels that can be seen, a range of times
    that ends after it begins."""
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return case
    if isinstance(case.query, dict):
        case.query.pop("cursor", None)
        seen(case.query)
        ordered(case.query)
    if case.path_parameters and "fingerprint" in case.path_parameters:
        case.path_parameters["fingerprint"] = random.choice(SPARE)
    if case.path_parameters and "camera_id" in case.path_parameters:
        case.path_parameters["camera_id"] = random.choice(CAMERAS)
    body = case.body
    if not isinstance(body, dict):
        return case
    seen(body)
    ordered(body)
    images = body.get("image")
    count = len(images) if isinstance(images, list) else 1
    if body.get("box"):
        body["box"] = "1,2,40,100" if count == 1 else ""
    if body.get("items"):
        labels = {"person_id": "batch", "box": "0,0,40,100", "metadata": {"text": body["items"]}}
        body["items"] = json.dumps([portable(labels, "metadata")] * count)
    if body.get("checkpoint"):
        body["checkpoint"] = "present.safetensors"
    if isinstance(body.get("metadata"), dict):
        portable(body, "metadata")
    elif body.get("metadata"):
        text = portable({"metadata": {"text": body["metadata"]}}, "metadata")
        body["metadata"] = json.dumps(text["metadata"], ensure_ascii=False)
    return case


def without_haste(_context: schemathesis.HookContext, document: dict[str, Any]) -> None:
    """Leave out how long a request may take: with too little, a 504 is what is promised.

    Larger values cannot be put in place of small ones: once a case was changed, Schemathesis judges
    it anew, and badly. The text of a number in a header counts as a violation; a request that lacks
    the key, no parameter of the document, counts as allowed and is sent with that of the session.
    `tests/service/http/test_overload.py` sends this header, good and bad.
    """
    for operations in document["paths"].values():
        for operation in operations.values():
            parameters = operation.get("parameters", [])
            parameters[:] = [one for one in parameters if one["name"] != "X-Request-Timeout"]


def seen(fields: dict[str, Any]) -> None:
    """Make labels of texts that are none for what a schema cannot express."""
    for name in LABELS:
        value = fields.get(name)
        if isinstance(value, list):
            fields[name] = [cleaned_label(text) or "x" for text in value]
        elif value:  # an empty text of a form counts as not given
            fields[name] = cleaned_label(value) or "x"


def ordered(fields: dict[str, Any]) -> None:
    """Let a range of times end after it begins."""
    ends = ("captured_from", "captured_to")
    if all(isinstance(fields.get(name), str) and fields[name] for name in ends):
        times = sorted((fields[name] for name in ends), key=_TIME.validate_python)
        fields.update(zip(ends, times, strict=True))


def portable(labels: dict[str, Any], name: str) -> dict[str, Any]:
    """Metadata within the limits on size, depth and numbers that a schema cannot express."""
    try:
        _METADATA.validate_python(labels[name])
    except ValidationError:
        labels[name] = {"note": "too long, too deep or with a NUL"}
    return labels


def seen_on_the_wire(
    _context: schemathesis.HookContext,
    failure: Failure,
    case: AnyCase,
    _response: schemathesis.Response,
) -> bool:
    """Whether a violation that was accepted could be told from what is allowed.

    A form has only text: the number 5 is sent as the text "5" is, one text as a list of one, and
    an empty field, which counts as not given, as null is.
    """
    if not isinstance(failure, AcceptedNegativeData) or case.media_type != FORM:
        return True
    assert case.meta is not None
    assert isinstance(case.body, dict)
    place = f"{case.meta.phase.data.location} {case.meta.phase.data.description}"
    kind_of_value = "/type" in place or "violates `type`" in place
    empty = any(f"/properties/{name}" in place for name, v in case.body.items() if v == "")
    return not kind_of_value and not empty


def test_every_operation_keeps_its_contract(outcome: Outcome) -> None:
    assert not outcome.errors
    assert not outcome.failures, "\n\n".join(
        f"{' · '.join(key)}\n{told}" for key, told in outcome.failures.items()
    )


def test_every_phase_and_every_check_ran(outcome: Outcome) -> None:
    assert {name for name, status in outcome.phases.items() if status == "success"} >= PHASES
    missing = set(CHECKS.get_all_names()) - set(outcome.checks) - UNUSED
    assert not missing


def test_every_operation_of_the_document_succeeded_at_least_once(
    outcome: Outcome, guarded: httpx.Client
) -> None:
    operations = {
        f"{method.upper()} {path}"
        for path, methods in guarded.get("/openapi.json").json()["paths"].items()
        for method in methods
    }
    succeeded = {
        label
        for label, statuses in outcome.answers.items()
        if any(200 <= status < 300 for status in statuses)
    }
    assert succeeded == operations


def test_the_service_is_whole_afterwards(
    outcome: Outcome, guarded: httpx.Client, visible: list[Path]
) -> None:
    assert guarded.get("/readyz").status_code == 200
    total = guarded.get("/gallery").json()["total"]
    answer = guarded.post("/query", files={"image": visible[0].read_bytes()})
    assert answer.json()["searched"] == total


def test_references_of_the_document_lead_somewhere(guarded: httpx.Client) -> None:
    document = guarded.get("/openapi.json").json()

    def check(part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                target = document
                for name in part["$ref"].removeprefix("#/").split("/"):
                    target = target[name]
            for value in part.values():
                check(value)
        elif isinstance(part, list):
            for value in part:
                check(value)

    check(document)


def test_the_document_in_the_repository_is_that_of_the_service(guarded: httpx.Client) -> None:
    kept = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert kept == guarded.get("/openapi.json").json(), "renew it with: make openapi"


def test_an_empty_text_is_a_default_only_where_it_is_of_the_kind(guarded: httpx.Client) -> None:
    """A generator of clients leaves out a whole operation for a default that is not."""
    found: list[Any] = []

    def check(part: Any) -> None:
        if isinstance(part, dict):
            if part.get("default") == "":
                found.append(part)
                assert not {"format", "minLength"} & part.keys(), part
                assert re.search(part.get("pattern", ""), ""), part
            for value in part.values():
                check(value)
        elif isinstance(part, list):
            for value in part:
                check(value)

    check(guarded.get("/openapi.json").json())
    assert len(found) > 3
