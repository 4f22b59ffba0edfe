"""Cores that this process may use: by affinity and by control groups of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.cores import allowed_cores, limit_threads

HERE = len(os.sched_getaffinity(0))


def host(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A folder with the files of a host's `proc` and `sys`."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {}, HERE),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, HERE),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, min(HERE, 2)),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, HERE),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
        ("0::/docker/7f\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            "4:memory:/\n2:cpu,cpuacct:/x\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        ("1:cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, HERE),
        ("nonsense", {}, HERE),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "nonsense\n"}, HERE),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], cores: int
) -> None:
    assert allowed_cores(host(tmp_path, cgroup, files)) == cores


def test_without_proc_the_affinity_counts(tmp_path: Path) -> None:
    assert allowed_cores(tmp_path) == HERE


def test_affinity_is_followed() -> None:
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(own)})
    try:
        assert allowed_cores() == 1
    finally:
        os.sched_setaffinity(0, own)


def test_threads_are_limited_only_by_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr("model.cores.allowed_cores", lambda: HERE)
    limit_threads(environment)
    assert "OMP_NUM_THREADS" not in environment
    monkeypatch.setattr("model.cores.allowed_cores", lambda: HERE - 1)
    limit_threads(environment)
    assert environment["OMP_NUM_THREADS"] == str(HERE - 1)
    environment["OMP_NUM_THREADS"] = "7"
    limit_threads(environment)
    assert environment["OMP_NUM_THREADS"] == "7"


def test_idle_threads_leave_the_cores_to_others_soon() -> None:
    """GNU's OpenMP, when it is loaded, says by what it goes on."""
    code = (
        "from model.cores import limit_threads; limit_threads(); "
        "import torch; torch.arange(100_000).float().exp()"
    )
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}

    def spins(**given: str) -> str:
        asked = {**inherited, "OMP_DISPLAY_ENV": "verbose", **given}
        run = [sys.executable, "-c", code]
        shown = subprocess.run(run, env=asked, capture_output=True, text=True, check=True).stderr
        (line,) = {line.strip() for line in shown.splitlines() if "GOMP_SPINCOUNT" in line}
        return line

    assert "'10000'" in spins()
    assert "'77'" in spins(GOMP_SPINCOUNT="77")
    assert "'0'" in spins(OMP_WAIT_POLICY="passive")
