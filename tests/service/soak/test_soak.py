"""All kinds of load at once break no promise: some hundred calls of `tests/service/soak`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.service.soak.figures import memory_figures
from tests.service.soak.ledger import Known, Ledger
from tests.service.soak.run import soak

CALLS_EACH = 25


def test_a_short_soak_holds(tiny_checkpoint: Path, tmp_path: Path) -> None:
    report = soak(
        0, tiny_checkpoint, 0, tmp_path, runtime="torch", calls_each=CALLS_EACH, changes=2
    )
    assert report["violations"] == [] == report["notes"]
    assert json.loads(json.dumps(report))["calls"].keys() == report["calls"].keys()
    assert {"enroll", "batch", "query", "query several", "patch", "delete", "erase", "list",
            "malformed", "vanish", "backup", "reembed"} <= report["calls"].keys()  # fmt: skip
    assert report["enrolled"] == report["deleted"] + report["left"] > CALLS_EACH
    assert report["verified_items"] > report["left"]
    assert report["reembeddings"] >= 2
    assert report["memory"]["samples"] > 0
    assert report["machine"]["cpu"]


def test_the_ledger_notices_what_a_query_must_not_answer() -> None:
    ledger = Ledger({"a"})
    ledger.note("1", Known(1, "p", None), new=True)
    ledger.note("2", Known(2, "p", None), new=True)
    ledger.remove(["2"], answered=10.0)

    def answer(*ids: str, model: str = "a") -> dict[str, object]:
        results = [{"item": {"id": item_id, "model": model}} for item_id in ids]
        return {"results": results, "model": "a"}

    ledger.check_answer(answer("1"), asked=11.0)
    ledger.check_answer(answer("1", "2"), asked=9.0)  # asked before the deletion was answered
    assert ledger.violations == []
    ledger.check_answer(answer("1", "2"), asked=11.0)
    ledger.check_answer(answer("1", "1"), asked=11.0)
    ledger.check_answer(answer("1", model="b"), asked=11.0)
    assert len(ledger.violations) == 3


@pytest.mark.parametrize(("a_minute", "flat"), [(0.0, True), (1.0, True), (30.0, False)])
def test_memory_that_grows_is_not_flat(a_minute: float, flat: bool) -> None:
    samples = [(float(s), 500 + a_minute * s / 60, 100.0) for s in range(600)]
    figures = memory_figures(samples)
    assert figures["slope_mb_per_minute"] == pytest.approx(a_minute, abs=0.01)
    assert figures["flat"] == flat
    assert figures["start_mb"] == 600
