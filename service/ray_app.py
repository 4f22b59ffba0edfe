"""The same application behind Ray Serve, with replicas of the network that Ray starts as needed.

`serve run service.ray_app:build …`, or a RayService of Kubernetes, calls `build`. One replica of
the application opens the gallery; it decodes, searches and writes as under `cmt serve`, and sends
the pixels of its batches to the replicas of the network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send
from torch import Tensor

from model import Modality
from service.app import create_app
from service.embedding.embedder import Embedder
from service.observability.logs import configure_logs
from service.settings import Settings, load_settings

_HOST = "0.0.0.0"  # Ray Serve's own unless told otherwise, so that keys are needed
_SECONDS = 60.0  # that a batch may take, the start of a replica included
_PATIENCE = 5.0  # that more batches are under way than wanted, before another replica is started
_QUEUED = 2  # batches at a replica: the next one is there when one is done


class Network:
    """A replica of the network: pixels of a batch to features."""

    def __init__(self, values: dict[str, Any]) -> None:
        settings = load_settings(**values)
        self._embedder = Embedder(settings.checkpoint, settings.device, settings.runtime)

    def embed(self, pixels: npt.NDArray[np.uint8], modality: Modality) -> npt.NDArray[np.float32]:
        """B×H×W×3 of one modality → B×P×D."""
        rows = self._embedder.backend(torch.from_numpy(np.array(pixels)), modality)
        features: npt.NDArray[np.float32] = rows.numpy()
        return features


class ReplicaBackend:
    """A `Backend` that computes in the replicas behind `handle`, in `streams` of them at most."""

    def __init__(self, handle: Any, streams: int) -> None:
        self._handle, self.streams = handle, streams

    def __call__(self, pixels: Tensor, modality: Modality, /) -> Tensor:
        response = self._handle.embed.remote(pixels.numpy(), modality)
        return torch.from_numpy(np.array(response.result(timeout_s=_SECONDS)))


class WithState:
    """An application whose requests get the state that its lifespan has made, as uvicorn has it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._state = scope.setdefault("state", {})
            await self._app(scope, receive, send)
        else:
            await self._app({**scope, "state": dict(self._state)}, receive, send)


@serve.ingress()
class Ingress:
    """The application. values: its settings. network: a handle of the replicas."""

    def __init__(self, values: dict[str, Any], network: Any, streams: int) -> None:
        self._values, self._backend = values, ReplicaBackend(network, streams)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        settings: Settings = load_settings(**self._values)
        configure_logs(settings.log_format, settings.log_level)
        return WithState(create_app(settings, backend=self._backend))


def build(arguments: dict[str, str]) -> serve.Application:
    """The application for Ray Serve.

    arguments: settings of the service by name, over the environment's CMT_<NAME>, where `host` says
    whether Ray Serve listens on the loopback address alone and needs no keys; and
    `least_networks`, `most_networks` (1 and 4): between how many replicas of the network Ray
    chooses, `network_cpus`, `network_gpus` (1 and 0): what each has.
    """
    given: dict[str, Any] = {"host": _HOST, **arguments}
    least, most = (int(given.pop(f"{name}_networks", n)) for name, n in (("least", 1), ("most", 4)))
    cpus, gpus = (float(given.pop(f"network_{name}", n)) for name, n in (("cpus", 1), ("gpus", 0)))
    values = load_settings(**given).model_dump(mode="json", exclude_unset=True)
    networks = serve.deployment(Network).options(  # type: ignore[attr-defined]
        name="network",
        max_ongoing_requests=_QUEUED,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": 1,
            "upscale_delay_s": _PATIENCE,
            "look_back_period_s": _PATIENCE,
            "metrics_interval_s": 1.0,
        },
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    application = serve.deployment(Ingress).options(  # type: ignore[attr-defined]
        name="service",
        num_replicas=1,  # it alone has the data folder's lock
        max_ongoing_requests=1000,  # it refuses what is too much by itself
        ray_actor_options={"num_cpus": 0},
    )
    bound: serve.Application = application.bind(values, networks.bind(values), most)
    return bound
