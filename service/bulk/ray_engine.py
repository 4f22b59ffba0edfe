"""The same on a Ray cluster: Ray Data hands files to actors, each of which has a device.

The pictures and the folder of features must be at the same paths on all machines.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from model import load_checkpoint
from service.api.schemas import BatchItem
from service.bulk.embedding import Advance, BulkEmbedder, Done, Part, Planned
from service.bulk.features import BulkError
from service.client.stream import Entry, EntryResult
from service.settings import Settings

_CARRIED = (
    *("checkpoint", "data_dir", "device", "runtime", "max_batch", "batch_wait"),
    *("max_image_bytes", "max_image_pixels", "decode_timeout", "keep_image_metadata"),
)
_PARTS = 4  # of one task: while one file is finished, the next has begun


class RayEmbedder:
    """One checkpoint on the devices of a cluster: a GPU each for an actor, else a machine each.

    address: of the cluster; None takes RAY_ADDRESS, one that runs here, or a new one. Raises
    BulkError where Ray is not installed or does not answer.
    """

    def __init__(self, settings: Settings, out: Path, root: Path, address: str | None) -> None:
        try:
            import pandas  # noqa: F401 (Ray Data needs it)
            import ray
        except ModuleNotFoundError as error:
            raise BulkError(
                f"Ray Data needs {error.name}; run `pip install 'cmt-reid[scale]'`, or leave out "
                "--engine ray"
            ) from error
        self._ray: Any = ray
        self._arguments = (_carried(settings), str(out.absolute()), os.fspath(root))
        self.fingerprint = load_checkpoint(settings.checkpoint, "cpu")[1].fingerprint
        self._ours = not ray.is_initialized()
        if self._ours:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise BulkError(
                    f"no Ray cluster answers at {address or 'RAY_ADDRESS'} ({error}); start one "
                    "with `ray start --head`, or leave out --engine ray"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()

    def embed(
        self, work: Sequence[Part], done: Done, *, advance: Advance, stopping: Callable[[], bool]
    ) -> None:
        """As `BulkEmbedder.embed`, in whole tasks."""
        if not work:
            return
        from ray.data import ActorPoolStrategy, DataContext, from_items

        DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        tasks = [work[start : start + _PARTS] for start in range(0, len(work), _PARTS)]
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        actors = gpus or len(nodes)
        free = int(self._ray.available_resources().get("CPU", 1)) // actors
        results = (
            from_items([{"task": _task_of(task)} for task in tasks], override_num_blocks=len(tasks))
            .map(
                _Actor,
                fn_constructor_args=self._arguments,
                compute=ActorPoolStrategy(min_size=1, max_size=min(actors, len(tasks))),
                **({"num_gpus": 1} if gpus else {"num_cpus": max(1, free)}),
            )
            .iter_rows()
        )
        try:
            for row in results:
                found = json.loads(row["done"])
                done.rows += found["rows"]
                done.refused += [_result_of(one) for one in found["refused"]]
                advance(found["rows"] + len(found["refused"]))
                if stopping():
                    break
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BulkError(
                f"an actor on the cluster failed ({lines[-1].strip()}); the same command goes on "
                "with what is missing"
            ) from error


class _Actor:
    """What embeds on one device."""

    def __init__(self, settings: str, out: str, root: str) -> None:
        self._embedder = BulkEmbedder(Settings.model_validate_json(settings), Path(out), Path(root))

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        done = Done()
        self._embedder.embed(
            _parts_of(row["task"]), done, advance=lambda count: None, stopping=lambda: False
        )
        refused = [
            {
                "file": os.fspath(one.entry.image),  # type: ignore[arg-type]
                "item": one.entry.item.model_dump(mode="json", exclude_unset=True),
                "reason": one.reason,
                "status": one.status,
                "code": one.code,
            }
            for one in done.refused
        ]
        return {"done": json.dumps({"rows": done.rows, "refused": refused})}


def _carried(settings: Settings) -> str:
    """The settings as JSON, without what only a service or this machine has."""
    there = settings.model_copy(update={"checkpoint": settings.checkpoint.absolute()})
    return there.model_dump_json(include={*_CARRIED})


def _task_of(task: Sequence[Part]) -> str:
    """Parts as JSON, which keeps file names that are no UTF-8."""
    return json.dumps(
        [
            {
                "name": part.name,
                "pictures": [
                    {
                        "file": str(Path(str(one.entry.image)).absolute()),
                        "item": one.entry.item.model_dump(mode="json", exclude_unset=True),
                        "path": one.path,
                        "state": one.state.hex(),
                    }
                    for one in part.pictures
                ],
            }
            for part in task
        ]
    )


def _parts_of(task: str) -> list[Part]:
    return [
        Part(
            part["name"],
            [
                Planned(
                    _entry_of(one["file"], one["item"]), one["path"], bytes.fromhex(one["state"])
                )
                for one in part["pictures"]
            ],
        )
        for part in json.loads(task)
    ]


def _result_of(one: dict[str, Any]) -> EntryResult:
    entry = _entry_of(one["file"], one["item"])
    return EntryResult(entry, None, one["reason"], one["status"], one["code"])


def _entry_of(file: str, item: dict[str, Any]) -> Entry:
    return Entry(Path(file), BatchItem.model_validate(item))
