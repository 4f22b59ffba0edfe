"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from service.kit.text import counted

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")
_CURVE = ("index", "setting")


def draw_recall(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw recall@10 over ms per query: one column per gallery, one row per modulation."""
    galleries = list(dict.fromkeys((r["features"], r["N"]) for r in results))
    modulations = list(dict.fromkeys(r["modulation"] for r in results))
    figure, axes = plt.subplots(
        *(len(modulations), len(galleries)),
        figsize=(1.8 + 3.4 * len(galleries), 0.6 + 2.9 * len(modulations)),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    curves = _styles(results)
    for column, gallery in enumerate(galleries):
        for row, modulation in enumerate(modulations):
            chosen = [
                r
                for r in results
                if (r["features"], r["N"]) == gallery and r["modulation"] == modulation
            ]
            axis = axes[row][column]
            _draw_curves(axis, chosen, curves)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
            if row == 0:
                axis.set_title(f"N = {gallery[1]:,}, {gallery[0]}", fontsize=10)
            if row == len(modulations) - 1:
                axis.set_xlabel("ms per query")
            if column == 0:
                axis.set_ylabel(f"recall@10\n{modulation}")
    lines: dict[str, Any] = {}
    for axis in axes.flat:  # some galleries have curves that others do not have
        handles, labels = axis.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    _save(figure, path)


def draw_scale(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw milliseconds and memory over N on log scales, with a line of proportional growth."""
    figure, (times, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    ways = list(results[0]["seconds"])
    for place, way in enumerate(ways):
        values = [1e3 * _median(r["seconds"][way]) for r in results]
        _draw_growth(times, results, values, way, _COLORS[place], _MARKERS[place])
    _draw_growth(
        memory, results, [r["bytes"] / 2**20 for r in results], "memory", _COLORS[0], _MARKERS[0]
    )
    times.set_ylabel("ms, all queries of the call")
    memory.set_ylabel("MiB")
    for axis in (times, memory):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("gallery size N")
        axis.grid(alpha=0.3, which="major", linewidth=0.5)
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    _save(figure, path)


def draw_serve(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw latency (p50 solid, p99 dotted) and requests per second over the number of clients."""
    figure, (latency, rate) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loads = [r for r in results if "clients" in r]
    for place, (side, route) in enumerate(dict.fromkeys((r["side"], r["route"]) for r in loads)):
        chosen = [r for r in loads if (r["side"], r["route"]) == (side, route)]
        clients = [r["clients"] for r in chosen]
        again = place // len(_COLORS)  # how often all colors were used before
        style = {
            "color": _COLORS[place % len(_COLORS)],
            "marker": _MARKERS[(place + again) % len(_MARKERS)],
        }
        for quantile, line, label in (("p50", "-", f"{side}, {route}"), ("p99", ":", None)):
            values = [_median(r[f"{quantile}, ms"]) for r in chosen]
            latency.plot(clients, values, line, **style, label=label)
        rates = [_median(r["requests per second, corrected"]) for r in chosen]
        rate.plot(clients, rates, **style)
    best = max(_median(r["images per second"]) for r in results if "batch" in r)
    rate.axhline(best, color="0.4", linestyle="--", label="bare model, best batch size")
    latency.set_ylabel("ms: p50, dotted p99")
    latency.set_yscale("log")
    rate.set_ylabel("requests/s, corrected")
    rate.set_ylim(bottom=0)
    for axis in (latency, rate):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("clients")
        axis.grid(alpha=0.3, which="major", linewidth=0.5)
    lines = dict(zip(*reversed(latency.get_legend_handles_labels()), strict=True))
    lines |= dict(zip(*reversed(rate.get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=8)
    _save(figure, path)


def draw_processes(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw requests per second over the number of processes: a panel for shards, one for replicas.

    Zero shards is one process without Ray.
    """
    kinds = list(dict.fromkeys(r["kind"] for r in results))
    figure, axes = plt.subplots(
        *(1, len(kinds)),
        figsize=(5 * len(kinds), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    curves = list(dict.fromkeys((r["route"], r["clients"]) for r in results))
    for kind, axis in zip(kinds, axes[0], strict=True):
        for place, (route, clients) in enumerate(curves):
            chosen = [
                r
                for r in results
                if (r["kind"], r["route"], r["clients"]) == (kind, route, clients)
            ]
            axis.plot(
                [r["processes"] for r in chosen],
                [_median(r["requests per second"]) for r in chosen],
                color=_COLORS[place],
                marker=_MARKERS[place],
                label=f"{route}, {counted(clients, 'client')} of each server",
            )
        axis.set_xlabel(kind if kind == "replicas" else "shards on Ray; 0: one process without it")
        axis.set_xticks(sorted({r["processes"] for r in results if r["kind"] == kind}))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3, linewidth=0.5)
    axes[0][0].set_ylabel("requests/s of all servers together")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", fontsize=8, ncols=2)
    _save(figure, path)


def _draw_curves(
    axis: Any, results: Sequence[dict[str, Any]], curves: dict[str, dict[str, str]]
) -> None:
    for name, style in curves.items():
        points = [r for r in results if _curve(r) == name]
        if not points:
            continue
        ms = [1e3 * _median(r["seconds per query"]) for r in points]
        axis.plot(ms, [r["recall@10"] for r in points], **style, ms=4, label=name)
    first = _curve(results[0])
    ours = [r for r in results if _curve(r) == first]
    axis.plot(
        [1e3 * _median(r["seconds per query"]) for r in ours],
        [r["recall@10 by unmodulated shortlist"] for r in ours],
        *("k:",),
        marker="x",
        ms=4,
        label="shortlist by unmodulated distance",
    )
    full = sorted(1e3 * _median(r["exhaustive seconds per query"]) for r in results)
    axis.axvline(full[len(full) // 2], color="0.4", linestyle="--", lw=1, label="exhaustive")


def _draw_growth(
    axis: Any,
    results: Sequence[dict[str, Any]],
    values: Sequence[float],
    name: str,
    color: str,
    marker: str,
) -> None:
    """Draw measured points filled, computed ones hollow, and growth in proportion to N."""
    sizes = [r["N"] for r in results]
    measured = [i for i, r in enumerate(results) if not r["computed"]]
    last = measured[-1]
    axis.plot(
        *([sizes[i] for i in measured], [values[i] for i in measured]),
        color=color,
        marker=marker,
        label=name,
    )
    for i in range(len(results)):
        if i not in measured:
            axis.plot(
                *(sizes[i], values[i]),
                color=color,
                marker=marker,
                markerfacecolor="white",
                linestyle="none",
                label="computed, not measured" if name == "exhaustive, Q = 1" else None,
            )
    axis.plot(
        *(sizes, [values[last] * size / sizes[last] for size in sizes]),
        color=color,
        linestyle=":",
        linewidth=1,
        label="in proportion to N" if name == "exhaustive, Q = 1" else None,
    )


def _curve(result: dict[str, Any]) -> str:
    return " ".join(str(result[name]) for name in _CURVE).strip()


def _styles(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The style of each curve: color by kind of index, line and marker by its setting."""
    kinds, settings = (list(dict.fromkeys(r[name] for r in results)) for name in _CURVE)
    return {
        _curve(r): {
            "color": _COLORS[kinds.index(r["index"])],
            "marker": _MARKERS[settings.index(r["setting"])],
            "linestyle": _LINES[settings.index(r["setting"]) % len(_LINES)],
        }
        for r in results
    }


def _median(spread: Any) -> float:
    return float(spread.median)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
