"""How far a run is: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.terminal import Console


class RunProgress:
    """Shows steps and logged values; `shown=False` is silent (processes other than the first)."""

    def __init__(self, step: int, steps: int, *, shown: bool = True) -> None:
        self._console = Console(quiet=not shown, soft_wrap=True)
        self._steps = steps
        self._logged, self._since = step, time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            disable=not (shown and self._console.is_terminal),
            speed_estimate_period=120,
            refresh_per_second=1,  # drawing takes time from training
        )
        self._task = self._bar.add_task("", completed=step, total=steps, rate="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> float:
        """Print `values` of `step` → the steps per second since the last call."""
        rate = (step - self._logged) / max(time.monotonic() - self._since, 1e-9)
        self._logged, self._since = step, time.monotonic()
        text = f"step {step}/{self._steps} {in_words(values)}"
        if self._bar.disable:
            left = timedelta(seconds=round((self._steps - step) / rate)) if rate else "?"
            text += f" | {rate:.3g} steps/s, {left} left"
        self._bar.update(self._task, completed=step, rate=f"{rate:.3g} steps/s")
        self._console.print(text)
        return rate

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text)


def in_words(values: Mapping[str, float]) -> str:
    """ "loss 1.2 lr 0.0003", three significant digits each."""
    return " ".join(f"{name} {value:.3g}" for name, value in values.items())
