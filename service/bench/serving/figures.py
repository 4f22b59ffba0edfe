"""Rates and percentiles of a load."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

CORRECTION = "requests / (seconds − CPU seconds of the load generator / cores)"
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def cores() -> int:
    """Cores that this process, and so the servers and the generator, may use."""
    return len(os.sched_getaffinity(0))


def corrected_rate(requests: int, seconds: float, cpu_seconds: float, cores: int) -> float:
    """Requests a second as if the load came from another machine: `CORRECTION`.

    cpu_seconds: what the generator took of the cores that it shares with the server. The server
    would have had them where it keeps all cores busy, and only there: with few clients, when cores
    are idle anyway, this is more than another machine would measure, and the raw rate is the one
    to believe.
    """
    return requests / (seconds - cpu_seconds / cores)


def percentiles(latencies: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99, linear between the two nearest latencies."""
    values = np.quantile(latencies, list(_QUANTILES.values()))
    return dict(zip(_QUANTILES, values.tolist(), strict=True))
