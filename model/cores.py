"""How many cores this process may use, which in a container is fewer than the host has.

Loads nothing beyond the standard library: it is asked before numerical libraries start threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
# How often a thread of OpenMP looks for more work before it sleeps: a fifth of a millisecond.
_SPINS = "10000"


def allowed_cores(root: Path = _ROOT) -> int:
    """The cores of this process: its affinity, or its control groups' quota where that is less.

    A quota of a core and a half counts as two. root: where `proc` and `sys` are.
    """
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        cores = min([cores, *(max(1, math.ceil(quota)) for quota in _quotas(root))])
    return cores


def limit_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make numerical libraries that load later start one thread for each allowed core.

    They count the cores of the affinity on their own, but no quota. Left to themselves their idle
    threads keep cores busy for milliseconds after each step, too, which OpenVINO needs then.
    What is set already holds.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
    cores = allowed_cores()
    if cores < len(os.sched_getaffinity(0)):
        environment.setdefault("OMP_NUM_THREADS", str(cores))


def control_files(root: Path, controller: str, new: str, old: str) -> Iterator[Path]:
    """Files of this process's control groups and those around them, where they exist.

    new, old: the file's name in version 2 and 1. root: where `proc` and `sys` are. Raises OSError
    and ValueError where there are no control groups.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folders: tuple[str, ...] = ("", "unified")
            name = new
        elif controller in controllers.split(","):
            folders, name = (controllers, controller), old
        else:
            continue
        for folder in folders:
            mount = root / "sys/fs/cgroup" / folder
            # In a container the path may be that of the host, and the mount the group itself.
            path = PurePosixPath(group.lstrip("/"))
            for place in (path, *path.parents):
                if (mount / place / name).is_file():
                    yield mount / place / name


def _quotas(root: Path) -> Iterator[float]:
    """Quotas in cores of this process's control groups and those around them, of both versions."""
    for file in control_files(root, "cpu", "cpu.max", "cpu.cfs_quota_us"):
        if (quota := _quota(file)) is not None:
            yield quota


def _quota(file: Path) -> float | None:
    """Cores by `cpu.max` ("quota period") or `cpu.cfs_quota_us`; None without a limit."""
    quota, *period = file.read_text().split()
    if quota in ("max", "-1"):
        return None
    if not period:
        period = file.with_name("cpu.cfs_period_us").read_text().split()
    return int(quota) / int(period[0])
