"""A Ray cluster of several node processes, on the loopback address alone."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Before anything imports Ray, which reads them then: see `service.scale.cluster`.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# Processes that nobody waits for, which take as long as the tests themselves.
os.environ.setdefault("RAY_enable_worker_prestart", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

_NEW_NAMES = 0x04000000  # CLONE_NEWUTS
NODE_BYTES = 4_000_000_000
_LOSS = {  # a node that is silent for two seconds is lost
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    "health_check_initial_delay_ms": 1000,
}


class Nodes:
    """A head without room for shards, and two nodes that have it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        usual: dict[str, Any] = {
            "num_cpus": 1,
            "object_store_memory": 100_000_000,
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
            "node_ip_address": "127.0.0.1",
        }
        self._add: Callable[[], Any] = lambda: self.cluster.add_node(memory=NODE_BYTES, **usual)
        # Below /tmp, since the names of its sockets may not be long.
        self._folder = tempfile.mkdtemp(prefix="cmt-nodes-")
        head = {**usual, "memory": 100_000_000, "_system_config": _LOSS, "temp_dir": self._folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._add(), self._add()]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def close(self) -> None:
        self.cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self, place: int) -> None:
        """SIGKILL the process of a node."""
        self.cluster.remove_node(self.nodes.pop(place), allow_graceful=False)

    @contextmanager
    def on_another_machine(self) -> Iterator[None]:
        """With a third node that has another host name, as in a container of its own."""
        library = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/uts").open() as ours:
            if library.unshare(_NEW_NAMES):
                pytest.skip(f"no other host name can be had: {os.strerror(ctypes.get_errno())}")
            try:
                socket.sethostname("elsewhere")
                node = self._add()
            finally:
                assert library.setns(ours.fileno(), _NEW_NAMES) == 0
        try:
            yield
        finally:
            self.cluster.remove_node(node)

    def heal(self) -> None:
        """As many nodes as at first."""
        while len(self.nodes) < 2:
            self.nodes.append(self._add())


@pytest.fixture(scope="module")
def _nodes() -> Iterator[Nodes]:
    started = Nodes()
    yield started
    import ray

    ray.shutdown()
    started.close()


@pytest.fixture
def nodes(_nodes: Nodes) -> Nodes:
    """The cluster, whole."""
    _nodes.heal()
    return _nodes
