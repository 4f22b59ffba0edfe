"""The Ray cluster: join it or start one for this process, and look whether the shards fit.

Ray is imported here when it is wanted, and nowhere before.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from service.errors import RuntimeUnavailable
from service.kit.text import counted

log = logging.getLogger(__name__)

# What one that is started here keeps of answers on their way: some megabytes for each query.
_OBJECT_BYTES = 200_000_000
_NAMESPACE = "cmt"
_PREFIX = "cmt-ray-"
_KNOCK_SECONDS = 5.0  # that an address may take to accept a connection
# Ray's own patience with what accepts connections and does not speak its language is seven minutes.
_PATIENCE = {"py_gcs_connect_timeout_s": "10", "gcs_server_port_wait_time_s": "1"}
_ACTION_BYTES = 256  # more than a `struct sigaction` of any C library takes


class Cluster:
    """A Ray cluster that this process is a driver of; `ray` is Ray itself.

    address: of its head, such as 10.0.0.5:6379, or `auto` for the one that runs here; None starts
    one for this process alone, on the loopback address. cores: that a new one uses. instead: what
    else there is to do. Raises RuntimeUnavailable where Ray is not installed or no cluster answers.
    """

    def __init__(
        self, address: str | None, cores: int, instead: str = "serve with --engine embedded"
    ) -> None:
        # Before Ray is imported, which reads them.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._folder: str | None = None
        if address is None:
            _stay_here()
        else:
            _knock(address, instead)
            for name, seconds in _PATIENCE.items():
                os.environ.setdefault(f"RAY_{name}", seconds)
        try:
            import ray
        except ModuleNotFoundError as error:
            raise RuntimeUnavailable(
                "the engine ray needs Ray, which is not installed; run `pip install "
                f"'cmt-reid[scale]'`, or {instead}"
            ) from error
        logger = logging.getLogger("ray")  # goes by our own format, and says no more than errors
        logger.propagate = True
        logger.setLevel(logging.ERROR)
        self.ray: Any = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            with _signals_kept():
                self._start(address, cores, instead)

    def close(self) -> None:
        """Leave the cluster, and end one that was started here."""
        if self._ours and self.ray.is_initialized():
            self.ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """Those that live, as Ray describes them."""
        return [node for node in self.ray.nodes() if node["Alive"]]

    def elsewhere(self) -> list[str]:
        """Names of the nodes that are not on this machine."""
        here = socket.gethostname()
        return sorted(
            node["NodeManagerHostname"]
            for node in self.nodes
            if node["NodeManagerHostname"] != here or not _is_ours(node["NodeManagerAddress"])
        )

    def amount(self, resource: str) -> float:
        """How much of a resource, such as CPU or GPU, all nodes have."""
        return float(sum(node["Resources"].get(resource, 0.0) for node in self.nodes))

    def free(self, resource: str) -> float:
        """How much of a resource nobody has now."""
        return float(self.ray.available_resources().get(resource, 0.0))

    def refuse_too_many(self, shards: int, memory: int) -> None:
        """Raise RuntimeUnavailable unless so many shards of so many bytes fit the nodes."""
        offered = [int(node["Resources"].get("memory", 0)) for node in self.nodes]
        room = sum(bytes // memory for bytes in offered)
        if room < shards:
            raise RuntimeUnavailable(
                f"{counted(shards, 'shard')} of {memory / 1e9:.1f} GB each do not fit the memory "
                f"of {counted(len(offered), 'Ray node')} ({sum(offered) / 1e9:.1f} GB, room for "
                f"{room} of them); give another number of shards, or add nodes"
            )

    def _start(self, address: str | None, cores: int, instead: str) -> None:
        usual = {
            "namespace": _NAMESPACE,
            "configure_logging": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        }
        try:
            if address is not None:
                self.ray.init(address=address, **usual)
                return
            # Below /tmp, since the names of its sockets may not be long.
            _remove_leftovers()
            self._folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")
            self.ray.init(
                address="local",
                num_cpus=cores,
                object_store_memory=_OBJECT_BYTES,
                include_dashboard=False,
                _temp_dir=self._folder,
                **usual,
            )
        except Exception as error:
            self.close()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason.startswith("Version mismatch"):
                raise RuntimeUnavailable(_other_versions(str(error), instead)) from error
            if address is None:
                raise RuntimeUnavailable(
                    f"Ray cannot be started here ({reason}); free memory and space in "
                    f"{tempfile.gettempdir()}, or {instead}"
                ) from error
            raise RuntimeUnavailable(
                _no_cluster(address, reason.partition(". ")[0], instead)
            ) from error


def _remove_leftovers() -> None:
    """Remove the folders of clusters whose process was killed: answers may lie in them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """What SIGTERM does stays: Ray prints where the process is, and aborts it in the end.

    By the C library, since Python sets handlers in its main thread only.
    """
    library = ctypes.CDLL(None)
    action = ctypes.create_string_buffer(_ACTION_BYTES)
    library.sigaction(signal.SIGTERM, None, action)
    try:
        yield
    finally:
        library.sigaction(signal.SIGTERM, action, None)


def _stay_here() -> None:
    """Have a cluster that is started here listen on the loopback address, and to nobody else."""
    # Where Ray holds clusters of several machines to be impossible, it uses that address alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Shards keep some memory free by themselves, and nobody waits for processes without work.
    unwanted = (
        "memory_monitor_refresh_ms",
        "enable_worker_prestart",
        "prestart_worker_first_driver",
    )
    for name in unwanted:
        os.environ.setdefault(f"RAY_{name}", "0")
    if not any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _knock(address: str, instead: str) -> None:
    """Raise RuntimeUnavailable where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise RuntimeUnavailable(
            f"{address!r} is no address of a Ray cluster; give HOST:PORT of its head, or auto for "
            "the one that runs on this machine"
        )
    try:
        socket.create_connection((host, int(port)), _KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RuntimeUnavailable(_no_cluster(address, reason, instead)) from error


def _no_cluster(address: str, reason: str, instead: str) -> str:
    return (
        f"no Ray cluster answers at {address} ({reason.rstrip('.')}); start a node on this machine "
        f"with `ray start`, check the setting ray_address and the cluster's token, or {instead}"
    )


def _other_versions(told: str, instead: str) -> str:
    theirs, their_python, ours, our_python = re.findall(r"(?:Ray|Python): (\S+)", told)
    return (
        f"the cluster has Ray {theirs} on Python {their_python}, and this process Ray {ours} on "
        f"Python {our_python}; install the same versions on all machines, or {instead}"
    )


def _is_ours(address: str) -> bool:
    """Whether this machine has an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
