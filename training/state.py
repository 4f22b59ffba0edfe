"""What an interrupted run goes on from: one file, replaced atomically, read without unpickling."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.atomic_file import SHARED, whole_file

STATE_FILE = "state.pt"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to change."""


def save_state(folder: Path, run: dict[str, Any], state: dict[str, Any]) -> None:
    """Write `state` of the run that `run` describes (see `read_state`).

    Raises TrainingError where it cannot be written; the state saved before stays.
    """
    with writing(folder), whole_file(folder / STATE_FILE, SHARED) as file:
        torch.save({"run": json.dumps(run), **state}, file)


def read_state(
    folder: Path,
    run: dict[str, Any],
    brought_up: Callable[[dict[str, Any]], dict[str, Any]] = lambda saved: saved,
) -> dict[str, Any] | None:
    """The state in `folder`, on the CPU; None where there is none.

    run: what must be the same for the state to be resumed, as plain values. brought_up: what an
    earlier release saved of it → as this one would have.
    Raises TrainingError, naming what differs, for the state of another run, and for a damaged file.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = json.loads(state["run"])
    except Exception as error:
        raise TrainingError(
            f"{path} is no readable state of a run; remove it to start anew, or choose another "
            "run folder"
        ) from error
    differing = list(_differences(brought_up(saved), json.loads(json.dumps(run))))
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise TrainingError(
            f"{folder} holds a run with {', '.join(differing[:3])}{more}; resume with the same, "
            "or choose another run folder"
        )
    return state


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write a run's files into a TrainingError that names the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        remedy = "free some space" if cause.errno in _FULL else "make it writable"
        raise TrainingError(
            f"{folder} cannot be written ({cause.strerror}); {remedy} and go on with --resume: "
            "what was saved before is intact"
        ) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """torch.save buries the system's error under its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[str]:
    """ "margin 0.3, here 0.5" for every value that differs, keys dotted."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in {**saved, **given}:
            yield from _differences(saved.get(key), given.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        for number, (one, other) in enumerate(zip(saved, given, strict=True)):
            yield from _differences(one, other, f"{name}.{number}")
    elif isinstance(saved, list) and isinstance(given, list):
        yield f"{len(saved)} {name}, here {len(given)}"
    elif saved != given:
        yield f"{name} {saved}, here {given}"
