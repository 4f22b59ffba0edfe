"""How much memory this process may still take, which in a container is less than the host has."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from model.cores import control_files

_ROOT = Path("/")
UNKNOWN = 1 << 62


def available_memory(root: Path = _ROOT) -> int:
    """Bytes: the machine's, or what its control groups leave where that is less.

    Pages that only repeat files count as available. root: where `proc` and `sys` are. UNKNOWN where
    nothing says it.
    """
    found = [UNKNOWN]
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail")]
    with suppress(OSError, ValueError):
        for limit in control_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
            if (text := limit.read_text().strip()) != "max":
                found.append(max(0, int(text) - _used(limit)))
    return min(found)


def total_memory(root: Path = _ROOT) -> int:
    """Bytes: the machine's, or its control groups' where that is less. 0 where nothing says it."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal")]
    with suppress(OSError, ValueError):
        for limit in control_files(root, "memory", "memory.max", "memory.limit_in_bytes"):
            if (text := limit.read_text().strip()) != "max":
                found.append(int(text))
    return min(found, default=0)


def _used(limit: Path) -> int:
    """Bytes that a control group holds and cannot give back at once."""
    new = limit.name == "memory.max"
    used = limit.with_name("memory.current" if new else "memory.usage_in_bytes")
    counts = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
    files = counts.get("inactive_file" if new else "total_inactive_file", 0)
    return int(used.read_text()) - int(files)
