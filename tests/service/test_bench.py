"""The benchmarks run at tiny sizes, agree with what they compare, and say on which machine."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from service.bench.embed import embed
from service.bench.recall import recall
from service.bench.rescore import rescore


def report(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text())
    machine = written["machine"]
    assert datetime.fromisoformat(machine["date"]).tzinfo is not None
    assert machine["packages"]["torch"]
    assert machine["cpu"]
    assert written["command"].startswith(f"cmt bench {written['benchmark']} --")
    return written


def test_rescore_gives_the_papers_distances(tmp_path: Path) -> None:
    rescore("300", "1,3", parts=2, dim=8, rounds=2, device="cpu", json=tmp_path / "r.json")
    results = report(tmp_path / "r.json")["results"]
    assert {(r["N"], r["Q"]) for r in results} == {(300, 1), (300, 3)}
    assert all(r["error"] < 1e-4 for r in results)
    for spread in (r["seconds"]["ratio"] for r in results):
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]


def test_recall_is_whole_with_the_flat_index(tmp_path: Path) -> None:
    recall(
        "2000", "20,400", queries=4, parts=2, dim=16, rounds=1, gamma=1.0, json=tmp_path / "r.json"
    )
    found = {(r["index"], r["C"]): r["recall@10"] for r in report(tmp_path / "r.json")["results"]}
    assert found["flat (the service's)", 20] == 1.0
    assert found["unmodulated", 20] < 1.0
    assert len({index for index, _ in found}) == 8


def test_embed_agrees_with_the_plain_module(tmp_path: Path, tiny_checkpoint: Path) -> None:
    embed(tiny_checkpoint, None, "1,3", 1, "cpu", "torch", json=tmp_path / "r.json")
    results = report(tmp_path / "r.json")["results"]
    assert [r["batch"] for r in results] == [1, 3]
    assert all(r["lowest cosine"] > 0.998 for r in results)
    assert all(r["images per second"]["median"] > 0 for r in results)
