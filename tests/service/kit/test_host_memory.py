"""Memory that this process may still take: the machine's, or less where control groups say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.kit.host_memory import UNKNOWN, available_memory, total_memory

_MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


def host(root: Path, files: dict[str, str]) -> Path:
    """A folder with the files of a host's `proc` and `sys`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group(limit: str, used: int, files: int, folder: str = "") -> dict[str, str]:
    """A control group of version 2."""
    return {
        f"sys/fs/cgroup{folder}/memory.max": f"{limit}\n",
        f"sys/fs/cgroup{folder}/memory.current": f"{used}\n",
        f"sys/fs/cgroup{folder}/memory.stat": f"anon {used - files}\ninactive_file {files}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "available"),
    [
        ("0::/\n", {}, 8000 * 1024),
        ("0::/\n", group("max", 500, 0), 8000 * 1024),
        ("0::/\n", group("100000", 70_000, 20_000), 50_000),
        ("0::/\n", group("100000", 120_000, 0), 0),
        ("0::/a/b\n", group("90000", 0, 0, "/a/b") | group("80000", 10_000, 0, "/a"), 70_000),
        (
            "3:memory:/x\n",
            {
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "50000\n",
                "sys/fs/cgroup/memory/x/memory.stat": "cache 9\ntotal_inactive_file 4000\n",
            },
            14_000,
        ),
        ("nonsense", {}, 8000 * 1024),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "100\n"}, 8000 * 1024),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], available: int
) -> None:
    root = host(tmp_path, _MACHINE | {"proc/self/cgroup": cgroup} | files)
    assert available_memory(root) == available


def test_where_nothing_says_it_there_is_no_limit(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == UNKNOWN
    assert 0 < available_memory() < UNKNOWN


def test_all_memory_is_what_the_tightest_limit_lets_be_used(tmp_path: Path) -> None:
    assert total_memory(tmp_path) == 0
    root = host(tmp_path, _MACHINE | {"proc/self/cgroup": "0::/a\n"} | group("max", 0, 0))
    assert total_memory(root) == 9000 * 1024
    host(tmp_path, group("70000", 69_000, 0, "/a"))
    assert total_memory(root) == 70_000
