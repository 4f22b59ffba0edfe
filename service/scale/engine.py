"""The engine ray: the gallery of one serving process in shards on a Ray cluster."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from model import CheckpointInfo
from service.errors import RuntimeUnavailable
from service.gallery.feed import Slice
from service.gallery.index.figures import IndexChoice
from service.gallery.storage.database import address_of
from service.gallery.storage.store import Store
from service.kit.text import counted
from service.scale.cluster import Cluster
from service.scale.follower import ShardedFollower
from service.scale.ray_crew import RayCrew
from service.scale.shards import Crew
from service.scale.slice import Plan

log = logging.getLogger(__name__)

_PROCESS_BYTES = 500_000_000  # of a shard without items: Python, torch and FAISS
_LABEL_BYTES = 41  # of an item beside its features
_GROWTH = 1.25  # of the features that are there at the start


class RayEngine:
    """Makes followers whose shards run on Ray.

    shards: how many. database_url: None for the SQLite file in the data folder. device: "cpu", or
    "cuda" for shards on GPUs. seconds: that a shard may take to answer. partial: answer also where
    some shards are missing. address, cores: as `Cluster` takes them. Raises RuntimeUnavailable.
    """

    def __init__(
        self,
        shards: int,
        *,
        database_url: str | None,
        device: str,
        kind: IndexChoice,
        address: str | None,
        cores: int,
        seconds: float,
        partial: bool,
    ) -> None:
        self._count, self._url, self._kind = shards, database_url, kind
        self._seconds, self._partial = seconds, partial
        self._cluster = Cluster(address, cores)
        self._on_gpus = device != "cpu" and self._cluster.amount("GPU") >= 1
        self._started = False

    def follow(self, store: Store, info: CheckpointInfo, folder: Path) -> ShardedFollower:
        """What `Gallery.open` takes. Raises RuntimeUnavailable where the shards do not fit."""

        def start(of: CheckpointInfo, items: int) -> Crew:
            return self._start(of, items, folder)

        return ShardedFollower(store, info, folder, start, partial=self._partial)

    def close(self) -> None:
        """Leave the cluster."""
        self._cluster.close()

    def _start(self, info: CheckpointInfo, items: int, folder: Path) -> Crew:
        address = address_of(folder, self._url)
        home = folder.absolute()
        if address.get_backend_name() == "sqlite":
            home = Path(str(address.database)).resolve().parent
            elsewhere = self._cluster.elsewhere()
            if elsewhere:
                raise RuntimeUnavailable(
                    f"{counted(len(elsewhere), 'node')} of the Ray cluster cannot read the SQLite "
                    f"file of this machine ({', '.join(elsewhere[:3])}); give a PostgreSQL "
                    "database by CMT_DATABASE_URL, or use a cluster of this machine alone"
                )
        share = -(-items // self._count)
        config = info.config
        row = 2 * (config.embedding_size + config.dim) + _LABEL_BYTES
        memory = _PROCESS_BYTES + int(_GROWTH * share * row)
        self._cluster.refuse_too_many(self._count, memory)
        cores = int(self._cluster.amount("CPU") // self._count)
        gpus = self._gpus()
        resources: dict[str, Any] = {
            "num_cpus": 0,  # a shard waits most of the time
            "num_gpus": gpus,
            "memory": memory,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, cores))}},
        }
        plans = [
            Plan(
                Slice(index, self._count),
                home,
                self._url,
                config.model_dump(mode="json"),
                info.fingerprint,
                "cuda" if gpus else "cpu",
                self._kind,
            )
            for index in range(self._count)
        ]
        crew = RayCrew(self._cluster.ray, plans, resources, self._seconds, _end)
        log.info(
            "%s of %d items on %s",
            counted(self._count, "shard"),
            items,
            counted(len(self._cluster.nodes), "Ray node"),
        )
        self._started = True
        return crew

    def _gpus(self) -> float:
        """Of a shard: one, or such a share that all have a place; 0 for the host.

        Shards of a new checkpoint begin while those of the old one hold theirs.
        """
        if not self._on_gpus:
            return 0.0
        free = self._cluster.free("GPU") if self._started else self._cluster.amount("GPU")
        if free < 1:
            log.warning(
                "the shards of the new checkpoint are on the host, since those of the old one have "
                "the GPUs; restart the service, and they are on the GPUs"
            )
            return 0.0
        return gpu_share(self._count, int(free))


def gpu_share(shards: int, gpus: int) -> float:
    """Of a GPU, for each of the shards: one lies on one GPU, with as few others as possible."""
    together = -(-shards // gpus)
    return int(1e4 / together) / 1e4


def _end() -> None:
    """End the process, as Ray itself does where the head of the cluster is lost for long."""
    sentence = "the Ray node of this process has died, without which it reaches no shard again"
    log.critical("%s: it ends to be started again", sentence)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(1)
