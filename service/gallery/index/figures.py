"""What the kinds of index took on a GPU, as `cmt bench recall --device cuda` wrote it there."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.gallery.records import IndexKind

_RECALL = 0.99  # of the ten nearest, that a kind must find
_SHORTLIST = 256  # rows; figures of the longest shortlist up to this are compared
_NEAR = 4.0  # a gallery up to this many times as large, or as small, is like the one measured
_PROBED = ("", "10% of lists")  # settings as the service has them


class FiguresError(ValueError):
    """A file that holds no such figures; the message says what to do."""


class _Seconds(BaseModel):
    median: float


class _Result(BaseModel):
    model_config = ConfigDict(populate_by_name=True)

    rows: int = Field(alias="N", ge=1)
    index: str
    setting: str
    modulation: str
    shortlist: int = Field(alias="C")
    found: float = Field(alias="recall@10")
    seconds: _Seconds = Field(alias="seconds per query")


class _Machine(BaseModel):
    gpu: str | None


class _Settings(BaseModel):
    device: str


class _Report(BaseModel):
    settings: _Settings
    machine: _Machine
    results: list[_Result]


# A kind that is forced, or figures to choose by; None: by the rule alone, see `choose_kind`.
IndexChoice: TypeAlias = "IndexKind | Figures | None"


@dataclass(frozen=True)
class Figures:
    """Medians of the kinds of index on one kind of GPU. gpu: its name."""

    gpu: str
    results: tuple[_Result, ...]

    @classmethod
    def read(cls, path: Path) -> Figures:
        """Raises FiguresError for a file that is not one of `cmt bench recall --device cuda`."""
        remedy = f"write it with `cmt bench recall --device cuda --json {path}` on this machine"
        try:
            report = _Report.model_validate(json.loads(path.read_text()))
        except OSError as error:
            raise FiguresError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
        except (ValueError, ValidationError) as error:
            raise FiguresError(f"{path} holds no figures of indexes; {remedy}") from error
        if report.machine.gpu is None or not report.settings.device.startswith("cuda"):
            raise FiguresError(f"the figures of {path} were not measured on a GPU; {remedy}")
        return cls(report.machine.gpu, tuple(report.results))

    def fastest(self, count: int) -> IndexKind:
        """The kind for so many rows; "SQfp16", the product of all, where nothing near was measured.

        Of equal ones the first measured, which is the product.
        """
        sizes = {result.rows for result in self.results}
        nearest = min(sizes, key=lambda rows: abs(math.log(rows / max(1, count))), default=None)
        if nearest is None or not 1 / _NEAR <= nearest / max(1, count) <= _NEAR:
            return "SQfp16"
        real = self.results[0].modulation  # others are for comparison
        here = [
            result
            for result in self.results
            if (result.rows, result.modulation) == (nearest, real) and result.setting in _PROBED
        ]
        length = max((r.shortlist for r in here if r.shortlist <= _SHORTLIST), default=None)
        fit = [r for r in here if r.shortlist == length and r.found >= _RECALL]
        best = min(fit, key=lambda result: result.seconds.median, default=None)
        kinds: tuple[IndexKind, ...] = get_args(IndexKind)
        return next((kind for kind in kinds if best is not None and kind == best.index), "SQfp16")
