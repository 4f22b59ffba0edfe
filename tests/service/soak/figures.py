"""What a soak came to, as numbers and as text."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.service.processes import ServiceProcess
from tests.service.soak.workload import Calls

MB = 1e6
WARM_UP = 0.25  # of the time: the slope is of what comes after
_WITHIN = 0.10, 50.0  # of the middle third, or megabytes
_SERIES = 60  # samples that the report keeps


class Memory(threading.Thread):
    """Resident memory of a service and of its children, every second until it is stopped."""

    def __init__(self, service: ServiceProcess, every: float = 1.0) -> None:
        super().__init__(daemon=True)
        self._service, self._every = service, every
        self._began = time.monotonic()
        self.samples: list[tuple[float, float, float]] = []
        """Seconds since the start; megabytes of the service, and of its children."""
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(self._every):
            memory = self._service.memory()
            passed = time.monotonic() - self._began
            self.samples.append((passed, memory["service"] / MB, memory["children"] / MB))

    def stop(self) -> None:
        """Take no more samples."""
        self._stopping.set()
        self.join()


def memory_figures(samples: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Slope after the warm-up and means of thirds, in MB; flat: the last third is as the middle.

    series: seconds, megabytes of the service and of its children.
    """
    seconds, service, children = np.array(samples, dtype=float).T
    both = service + children
    after = seconds > seconds[0] + WARM_UP * (seconds[-1] - seconds[0])
    slope = 60 * np.polyfit(seconds[after], both[after], 1)[0]
    first, middle, last = (float(third.mean()) for third in np.array_split(both, 3))
    return {
        "samples": len(samples),
        "start_mb": round(float(both[0]), 1),
        "peak_mb": round(float(both.max()), 1),
        "service_end_mb": round(float(service[-1]), 1),
        "children_end_mb": round(float(children[-1]), 1),
        "first_third_mb": round(first, 1),
        "middle_third_mb": round(middle, 1),
        "last_third_mb": round(last, 1),
        "slope_mb_per_minute": round(float(slope), 2),
        "series": [
            [round(value, 1) for value in sample]
            for sample in samples[:: max(1, len(samples) // _SERIES)]
        ],
        "flat": last - middle <= max(_WITHIN[0] * middle, _WITHIN[1]),
    }


def call_figures(calls: Calls) -> dict[str, Any]:
    """Percentiles in milliseconds and counts by status, for each kind of call."""
    figures: dict[str, Any] = {}
    for kind in sorted(calls.statuses):
        p50, p95, p99 = np.percentile(calls.seconds[kind], [50, 95, 99]) * 1000
        figures[kind] = {
            "count": len(calls.seconds[kind]),
            "p50_ms": round(p50, 1),
            "p95_ms": round(p95, 1),
            "p99_ms": round(p99, 1),
            "statuses": {str(status): n for status, n in sorted(calls.statuses[kind].items())},
        }
    return figures


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{'call':14} {'count':>7} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8}  by status",
        *(
            f"{kind:14} {one['count']:7} {one['p50_ms']:8} {one['p95_ms']:8} {one['p99_ms']:8}  "
            + ", ".join(f"{status}: {count}" for status, count in one["statuses"].items())
            for kind, one in report["calls"].items()
        ),
    ]
    memory = report["memory"]
    lines += [
        "",
        f"memory: {memory['start_mb']} MB at the start, at most {memory['peak_mb']} MB; means of "
        f"the thirds {memory['first_third_mb']}, {memory['middle_third_mb']} and "
        f"{memory['last_third_mb']} MB; {memory['slope_mb_per_minute']:+} MB a minute after the "
        f"warm-up: {'flat' if memory['flat'] else 'NOT flat'}",
        f"{report['enrolled']} items enrolled, {report['deleted']} deleted, {report['left']} left; "
        f"{report['verified_items']} compared in {report['verifications']} rounds; "
        f"{report['reembeddings']} times embedded again, {report['backups']} backups",
        *(f"note: {note}" for note in report["notes"]),
        *(f"VIOLATION: {violation}" for violation in report["violations"]),
    ]
    return "\n".join(lines)
