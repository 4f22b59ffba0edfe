"""Parts as tasks of other processes and machines, and what became of them: JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.api.schemas import BatchItem
from service.bulk.embedding import BulkEmbedder, Done, Part, Planned
from service.client.stream import Entry, EntryResult
from service.settings import Settings

_CARRIED = (
    *("checkpoint", "data_dir", "device", "runtime", "max_batch", "batch_wait"),
    *("max_image_bytes", "max_image_pixels", "decode_timeout", "keep_image_metadata"),
)
_PARTS = 4  # of one task: while one file is finished, the next has begun


class Worker:
    """What does such tasks, on one device. settings: `carried`. stopping: whether to end soon."""

    def __init__(
        self, settings: str, out: str, root: str, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self._embedder = BulkEmbedder(Settings.model_validate_json(settings), Path(out), Path(root))
        self._stopping = stopping

    def __call__(self, task: str) -> str:
        done = Done()
        self._embedder.embed(
            _parts_of(task), done, advance=lambda count: None, stopping=self._stopping
        )
        refused = [
            {
                "file": str(one.entry.image),
                "item": one.entry.item.model_dump(mode="json", exclude_unset=True),
                "reason": one.reason,
                "status": one.status,
                "code": one.code,
            }
            for one in done.refused
        ]
        return json.dumps({"rows": done.rows, "refused": refused})


def carried(settings: Settings, **changed: Any) -> str:
    """The settings as JSON, without what only a service or this machine has."""
    there = settings.model_copy(update={"checkpoint": settings.checkpoint.absolute(), **changed})
    return there.model_dump_json(include={*_CARRIED, *changed})


def tasks_of(work: Sequence[Part]) -> list[str]:
    """A few parts each, with file names that need not be UTF-8."""
    starts = range(0, len(work), _PARTS)
    return [json.dumps([_described(part) for part in work[at : at + _PARTS]]) for at in starts]


def take(answer: str, done: Done) -> int:
    """Note in `done` what became of a task → how many pictures were tried."""
    found = json.loads(answer)
    done.rows += found["rows"]
    for one in found["refused"]:
        entry = _entry_of(one["file"], one["item"])
        done.refused.append(EntryResult(entry, None, one["reason"], one["status"], one["code"]))
    return int(found["rows"]) + len(found["refused"])


def _described(part: Part) -> dict[str, Any]:
    pictures = [
        {
            "file": str(Path(str(one.entry.image)).absolute()),
            "item": one.entry.item.model_dump(mode="json", exclude_unset=True),
            "path": one.path,
            "state": one.state.hex(),
        }
        for one in part.pictures
    ]
    return {"name": part.name, "pictures": pictures}


def _parts_of(task: str) -> list[Part]:
    return [Part(part["name"], list(map(_planned, part["pictures"]))) for part in json.loads(task)]


def _planned(one: dict[str, Any]) -> Planned:
    return Planned(_entry_of(one["file"], one["item"]), one["path"], bytes.fromhex(one["state"]))


def _entry_of(file: str, item: Any) -> Entry:
    return Entry(Path(file), BatchItem.model_validate(item))
