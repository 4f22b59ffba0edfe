"""The same on a Ray cluster: Ray Data hands files to actors, each of which has a device.

The pictures and the folder of features must be at the same paths on all machines.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from model import load_checkpoint
from model.cores import allowed_cores
from service.bulk.embedding import Advance, Done, Part
from service.bulk.features import BulkError
from service.bulk.tasks import Worker, carried, take, tasks_of
from service.scale.cluster import Cluster
from service.settings import Settings

_INSTEAD = "leave out --engine ray"


class RayEmbedder:
    """One checkpoint on the devices of a cluster: a GPU each for an actor, else a machine each.

    address: as of `Cluster`. Raises BulkError and RuntimeUnavailable where Ray is not installed or
    does not answer.
    """

    def __init__(self, settings: Settings, out: Path, root: Path, address: str | None) -> None:
        if find_spec("pandas") is None:
            raise BulkError(
                f"Ray Data needs pandas; run `pip install 'cmt-reid[scale]'`, or {_INSTEAD}"
            )
        self._arguments = (carried(settings), str(out.absolute()), str(root))
        self.fingerprint = load_checkpoint(settings.checkpoint, "cpu")[1].fingerprint
        self._cluster = Cluster(address or settings.ray_address, allowed_cores(), _INSTEAD)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.close()

    def embed(
        self, work: Sequence[Part], done: Done, *, advance: Advance, stopping: Callable[[], bool]
    ) -> None:
        """As `BulkEmbedder.embed`, in whole tasks."""
        if not work:
            return
        data: Any = importlib.import_module("ray.data")
        data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        tasks = [{"task": task} for task in tasks_of(work)]
        ray, gpus = self._cluster.ray, int(self._cluster.amount("GPU"))
        actors = gpus or len(self._cluster.nodes)
        free = int(ray.available_resources().get("CPU", 1)) // actors
        results = (
            data.from_items(tasks, override_num_blocks=len(tasks))
            .map(
                _Actor,
                fn_constructor_args=self._arguments,
                compute=data.ActorPoolStrategy(min_size=1, max_size=min(actors, len(tasks))),
                **({"num_gpus": 1} if gpus else {"num_cpus": max(1, free)}),
            )
            .iter_rows()
        )
        try:
            for row in results:
                advance(take(row["done"], done))
                if stopping():
                    break
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BulkError(
                f"an actor on the cluster failed ({lines[-1].strip()}); the same command goes on "
                "with what is missing"
            ) from error


class _Actor(Worker):
    """A worker as Ray Data calls it."""

    def __call__(self, row: Any) -> Any:
        return {"done": super().__call__(row["task"])}
