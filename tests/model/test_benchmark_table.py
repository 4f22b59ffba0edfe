"""One table of what all benchmarks found: from files, into a document, and run now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.benchmark_table import (
    BEGIN,
    END,
    as_fast,
    duration,
    inverse,
    rate,
    ratio_of,
    reports,
    table_in_markdown,
)
from model.cli import main
from tests.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def spread(median: float, least: float, most: float) -> dict[str, float]:
    """Seconds or a ratio as a benchmark's JSON holds them."""
    return {"median": median, "least": least, "most": most}


def rerank_report(folder: Path) -> dict[str, Any]:
    """A report of `cmt bench rerank`, written into the folder."""
    report = {
        "benchmark": "rerank",
        "machine": {"cpu": "A CPU", "gpu": None},
        "settings": {},
        "results": [
            {
                "N": 10_000,
                "without": spread(0.002, 0.001, 0.004),
                "with": spread(0.004, 0.0025, 0.005),
            }
        ],
    }
    (folder / "mine.json").write_text(json.dumps(report))
    return report


def test_figures_have_the_unit_that_fits_and_three_digits() -> None:
    assert duration(spread(0.0123456, 0.01, 1.5)) == "12.3 (10.0–1,500) ms"
    assert duration(spread(2e-7, 1e-7, 3e-7)) == "0.200 (0.100–0.300) µs"
    assert rate(spread(1234.5, 999.4, 2000), "crops") == "1,234 (999–2,000) crops/s"
    assert as_fast(inverse(spread(0.5, 0.25, 2.0))) == "2.00 (0.500–4.00)"
    assert ratio_of(spread(6, 4, 8), spread(2, 1, 4)) == spread(3, 1, 8)


def test_the_documents_table_is_what_the_committed_files_hold() -> None:
    document = ROOT / "docs" / "benchmarks.md"
    written = document.read_text().partition(f"{BEGIN}\n")[2].partition(END)[0]
    assert written == table_in_markdown(RESULTS, document.parent), (
        "run: cmt bench all --from benchmarks/results --markdown docs/benchmarks.md"
    )


def test_every_committed_report_of_a_benchmark_in_the_table_gives_rows() -> None:
    files = {report["path"].name for report in reports(RESULTS)}
    assert {"rescore.json", "recall.json", "serve.json", "start.json", "train.json"} <= files
    for name in files:
        assert f"[{name}]" in table_in_markdown(RESULTS, ROOT / "docs"), name


def test_a_table_is_printed_from_files_and_written_between_the_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rerank_report(tmp_path)
    (tmp_path / "other.json").write_text('{"benchmark": "of somebody else"}')
    (tmp_path / "list.json").write_text("[]")
    assert main(["bench", "all", "--from", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "4.00 (2.50–5.00) ms" in printed
    assert "0.500 (0.200–1.60)" in printed

    document = tmp_path / "figures.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["bench", "all", "--from", str(tmp_path), "--markdown", str(document)]
    assert main(arguments) == 0
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| |")
    assert text.endswith(f" |\n{END}\nafter\n")
    assert "old" not in text
    assert "[mine.json](mine.json), A CPU" in text


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--markdown", "{folder}/figures.md"], 2, "--markdown with --from"),
        (["--quick", "--from", "{folder}"], 2, "--from goes with --markdown alone"),
        (["--from", "{folder}", "--markdown", "{folder}/figures.md"], 1, "has no lines"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "figures.md").write_text("no marks\n")
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["bench", "all", *given]) == status
    assert said in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "figures.md").read_text() == "no marks\n"


def test_a_benchmark_that_fails_is_named_and_the_others_are_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import service.bench.rerank
    import training.evaluation.bench
    from model import benchmark_table

    small = ("--queries", "4", "--identities", "3", "--parts", "1", "--dim", "4", "--rounds", "1")
    monkeypatch.setattr(training.evaluation.bench, "QUICK", small)
    monkeypatch.setattr(service.bench.rerank, "QUICK", ("--sizes", "none"))
    every = benchmark_table._benchmarks()
    two = {name: every[name] for name in ("evaluate", "rerank")}
    monkeypatch.setattr(benchmark_table, "_benchmarks", lambda: two)

    results = tmp_path / "kept"
    assert main(["bench", "all", "--quick", "--results", str(results)]) == 1
    told = capsys.readouterr()
    assert "rerank failed" in told.err
    assert "none" in told.err
    assert "loop over queries" in told.out
    assert [path.name for path in results.iterdir()] == ["evaluate.json"]
