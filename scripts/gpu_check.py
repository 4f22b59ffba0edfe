"""Run what only a GPU can show, in eight minutes: tests marked `gpu`, and benchmarks.

    python -m scripts.gpu_check --out FOLDER

Each part is a process with a limit of time, and leaves a JSON file with the device's own rates of
copying and multiplying, measured right before it; `summary.json` says how all of them ended. It
needs an NVIDIA GPU, torch 2.11 or newer, Python 3.12 and the packages of pyproject.toml, but no
network, and the project need not be installed. A part that meets a missing package, such as faiss,
is "not run", with its name. Without a GPU it says what it would run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "service", "training")
SECONDS = 480.0
_RESERVE = 10.0  # to write down how a part ended
_CMT = (sys.executable, "-c", "import sys; from model.cli import main; sys.exit(main())")
# As Python says it, and as `cmt` does.
_MISSING = re.compile(r"(?:No module named|the module) '([\w.]+)'")
_GIB = 1 << 30
# A million rows of 1,792 numbers: in fp16, and the other side's fp32 with what it needs meanwhile.
_MEMORY_OF_A_MILLION = 20 * _GIB
_COPIED = _GIB  # bytes
_ORDER = 8192  # of the matrices


@dataclass(frozen=True)
class Part:
    """One process. seconds: its limit."""

    name: str
    seconds: float
    command: tuple[str, ...]


def parts(out: Path, rows: int) -> list[Part]:
    """What is run, in order. rows: of the gallery of `rescore`."""

    def bench(part: str, seconds: float, options: str) -> Part:
        words = f"bench {part.partition('-')[0]} --device cuda {options} --json".split()
        return Part(part, seconds, (*_CMT, *words, str(out / f"{part}.json")))

    def tests(room: str) -> Part:
        part = f"tests-{room}"
        files = [str(file.relative_to(ROOT)) for file in marked_files(room)]
        options = ("-m", "gpu", "--continue-on-collection-errors", f"--junitxml={out / part}.xml")
        return Part(part, 50, (sys.executable, "-m", "pytest", *options, *files))

    serve = (
        "--network resnet50 --clients 1,64 --seconds 2.5 --rounds 1 --against naive "
        "--batching 64:0.005"
    )
    return [
        # A process for each room: where one's packages are missing, the others' tests still run.
        *(tests(room) for room in ROOMS if marked_files(room)),
        bench("rescore", 105, f"--sizes {rows} --queries 1,32"),
        bench("recall", 45, "--sizes 200000 --shortlists 200 --queries 20 --timed 20"),
        bench("embed", 50, "--network resnet50 --batches 1,32,128,256"),
        bench("train-paper", 45, "--recipe paper"),
        bench("train-compact", 35, "--recipe compact"),
        bench("serve", 90, serve),
    ]


def marked_files(room: str) -> list[Path]:
    """A room's files with a test that is marked `gpu`: the others need not be collected."""
    files = sorted((ROOT / "tests" / room).rglob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text()]


def rates() -> dict[str, float]:
    """What the device does at best: bytes read and written by a copy, and products, a second."""
    source = torch.empty(_COPIED // 2, dtype=torch.float16, device="cuda").normal_()
    target = torch.empty_like(source)
    shape = (_ORDER, _ORDER)
    left, right = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copied = 2 * _COPIED / _median(lambda: target.copy_(source))
    multiplied = 2 * _ORDER**3 / _median(lambda: left @ right)
    return {"copy, GB/s": copied / 1e9, f"bf16 product of {_ORDER}, TFLOP/s": multiplied / 1e12}


def _median(call: Callable[[], object]) -> float:
    """Seconds of a call on the device, after some that are not counted."""
    taken = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(float(start.elapsed_time(end)) / 1000)
    return statistics.median(taken[5:])


def run(part: Part, out: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part for `seconds` at most → how it ended."""
    began = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its servers too
            process.wait()
            return {"ended": f"cut off after {seconds:.0f} seconds; see {log.name}"}
    ended = "ok" if status == 0 else f"failed with status {status}; see {log.name}"
    said = log.read_text(errors="replace")
    missing = set(_MISSING.findall(said))
    if status == 0 and "not measured: " in said:
        ended = f"ok, but for what is not measured; see {log.name}"
    if status != 0 and missing:
        ended = f"not run: {', '.join(sorted(missing))} not installed"
    return {"ended": ended, "seconds": round(time.monotonic() - began, 1)}


def tests_of(file: Path) -> dict[str, Any]:
    """What pytest's XML says: how many passed, and of each other why not."""
    passed, others = 0, {}
    for case in ET.parse(file).iter("testcase") if file.exists() else ():
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        outcome = next((one for one in case if one.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            passed += 1
            continue
        told = outcome.get("message") or ""
        missing = _MISSING.search(told + (outcome.text or ""))
        others[name] = f"not run: {missing[1]}" if missing else f"{outcome.tag}: {told}"
    return {"passed": passed, "others": others}


def of_tests(ended: str, found: dict[str, Any]) -> str:
    """How the tests ended: a file that lacks a package hides no failure of another."""
    kinds = {told.partition(":")[0] for told in found["others"].values()}
    if not ended.startswith("not run"):
        return ended
    if kinds & {"failure", "error"}:
        return "failed; see the log"
    return f"ok for {found['passed']} tests; {ended}" if found["passed"] else ended


def with_project(folder: Path) -> dict[str, str]:
    """The environment in which `cmt` runs from this tree, also where it is not installed."""
    paths = [str(ROOT)]
    try:
        version("cmt-reid")
    except PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        facts = folder / f"cmt_reid-{project['version']}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        lines = []
        for group, commands in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{name} = {target}" for name, target in commands.items())]
        (facts / "entry_points.txt").write_text("\n".join(lines) + "\n")
        paths.append(str(folder))
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def say_what_would_run(planned: Sequence[Part]) -> None:
    """The plan, for a machine without a GPU."""
    print(f"torch {torch.__version__} finds no CUDA device here, so nothing was run. On a GPU:")
    for part in planned:
        bench = part.command[: len(_CMT)] == _CMT
        words = ("cmt", *part.command[len(_CMT) :]) if bench else ("python", *part.command[1:])
        print(f"\n{part.name}, {part.seconds:.0f} s at most:\n  {' '.join(words)}")
    print(f"\nAll of it ends within {SECONDS:.0f} s.")


def check(out: Path) -> bool:
    """Run all parts → whether nothing failed."""
    began = time.monotonic()
    memory = torch.cuda.get_device_properties(0).total_memory
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "memory, GiB": round(memory / _GIB, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "parts": {},
    }
    rows = 1_000_000 if memory >= _MEMORY_OF_A_MILLION else 250_000
    with tempfile.TemporaryDirectory() as folder:
        environment = with_project(Path(folder))
        for part in parts(out, rows):
            measured = rates()
            torch.cuda.empty_cache()
            left = SECONDS - _RESERVE - (time.monotonic() - began)
            if left < _RESERVE:
                entry: dict[str, Any] = {"ended": "cut off before it began: the time is over"}
            else:
                entry = run(part, out, min(part.seconds, left), environment)
            entry["rates of the device"] = measured
            if part.name.startswith("tests"):
                entry |= tests_of(out / f"{part.name}.xml")
                entry["ended"] = of_tests(entry["ended"], entry)
            elif (file := out / f"{part.name}.json").exists():
                result = {"rates of the device": measured, **json.loads(file.read_text())}
                file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            summary["parts"][part.name] = entry
            print(f"{part.name}: {entry['ended']}", flush=True)
            (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"written to {out}")
    ends = [entry["ended"] for entry in summary["parts"].values()]
    return all(ended.startswith(("ok", "not run")) for ended in ends)


def main() -> int:
    """Run it → the exit status: 1 where a part failed or was cut off."""
    parser = argparse.ArgumentParser(description="Run the tests and benchmarks that need a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    out: Path = parser.parse_args().out.absolute()
    if not torch.cuda.is_available():
        say_what_would_run(parts(out, 1_000_000))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    return 0 if check(out) else 1


if __name__ == "__main__":
    sys.exit(main())
