"""Cores that this process may use: by affinity and by control groups of both versions."""

import os
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
    assert environment == {}
    monkeypatch.setattr("model.cores.allowed_cores", lambda: HERE - 1)
    limit_threads(environment)
    assert environment == {"OMP_NUM_THREADS": str(HERE - 1)}
    environment["OMP_NUM_THREADS"] = "7"
    limit_threads(environment)
    assert environment == {"OMP_NUM_THREADS": "7"}
