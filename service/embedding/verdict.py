"""What the probe of runtimes chose, kept on disk so that the next start need not probe again.

Comparing OpenVINO with torch takes longer than all else that a small network needs at a start. What
was chosen holds while the checkpoint, the graphs, the machine, the packages and the settings are
what they were. The graphs can then be compiled while torch is still being imported: nothing here
loads it. A choice of torch is not kept, since noise of the machine may have brought it about.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from model.atomic_file import PRIVATE, write_whole
from model.cores import allowed_cores
from model.int8 import DESCRIPTION_FILE, int8_folder, read_int8
from model.modalities import MODALITIES, Modality
from model.stored_fingerprint import stored_fingerprint
from model.strict_json import read_json

if TYPE_CHECKING:
    from service.embedding.openvino_graphs import Compiled

log = logging.getLogger(__name__)

Runtime = Literal["auto", "torch", "openvino", "int8"]

_FORMAT = 2
_PACKAGES = ("cmt-reid", "numpy", "openvino", "torch")
# Lines of /proc/cpuinfo that say what a processor can do, on x86 and on ARM.
_ABILITIES = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)


@dataclass(frozen=True)
class Verdict:
    """What the probe chose.

    runtime: "openvino" or "int8". precision: what OpenVINO was asked for, "auto" or "float32".
    views: the images of one crop. number_type: what it took. reason: why, a sentence for people.
    """

    runtime: str
    precision: str
    views: int
    number_type: str
    reason: str


class Known(NamedTuple):
    """A network that needs no probe: the fingerprint, what was chosen, and the compiled graphs."""

    fingerprint: str
    verdict: Verdict
    graphs: Compiled


class Ahead:
    """A network that is looked for in a thread; see `known_network`."""

    def __init__(self, found: Future[Known | None]) -> None:
        self._found: Future[Known | None] | None = found

    def take(self) -> Known | None:
        """Wait for it. Only the first call gets it: nothing here keeps a network in memory."""
        found, self._found = self._found, None
        return None if found is None else found.result()


@contextmanager
def ahead(checkpoint: Path, runtime: Runtime, cache: Path) -> Iterator[Ahead]:
    """Look for a network while the block runs; see `known_network`."""
    fingerprint = stored_fingerprint(checkpoint)
    if fingerprint is not None and _file(cache, fingerprint).exists():
        with suppress(Exception):  # which the probe meets again, and says
            # Here: two threads that import at the same time hold each other up.
            import_module("service.embedding.openvino_graphs")
    with ThreadPoolExecutor(1, "ahead") as thread:
        yield Ahead(thread.submit(known_network, checkpoint, runtime, cache))


def known_network(checkpoint: Path, runtime: Runtime, cache: Path) -> Known | None:
    """The network that an earlier probe chose, compiled for this machine's CPU.

    runtime: the setting. cache: the folder of graphs and verdicts.
    None where nothing was kept or something is not as it was then: it is to be probed.
    """
    try:
        fingerprint = stored_fingerprint(checkpoint)
        if fingerprint is None or not _file(cache, fingerprint).exists():
            return None
        from service.embedding.openvino_graphs import compiled, read_graphs

        verdict = _read(checkpoint, fingerprint, runtime, cache)
        files = _graphs(verdict, checkpoint, fingerprint, cache)
        graphs = compiled(read_graphs(files), verdict.precision, verdict.views)
        if graphs.number_type != verdict.number_type:
            raise _OutdatedError(f"OpenVINO takes {graphs.number_type} now")
    except Exception as error:  # what is wrong with OpenVINO or a file, the probe meets and tells
        log.info("the runtimes are compared again: %s", error)
        return None
    return Known(fingerprint, verdict, graphs)


def keep_verdict(
    verdict: Verdict, checkpoint: Path, fingerprint: str, runtime: Runtime, cache: Path
) -> None:
    """Write down what was chosen under the setting `runtime`, for `known_network`."""
    try:
        of = _circumstances(checkpoint, fingerprint, runtime, cache)
        if verdict.runtime == "openvino" and None in of["graphs"]:
            return  # they could not be kept, which the log says
        held = {"of": of, "verdict": asdict(verdict)}
        content = json.dumps({**held, "sha256": _digest(held)})
        write_whole(_file(cache, fingerprint), content, PRIVATE)
    except (OSError, PackageNotFoundError) as error:
        log.warning(
            "what was measured cannot be kept in %s (%s): it is measured again at every start "
            "until that is mended",
            cache,
            error,
        )


class _OutdatedError(Exception):
    """Something is not as it was when the verdict was written; the message says what."""


def _read(checkpoint: Path, fingerprint: str, runtime: Runtime, cache: Path) -> Verdict:
    """What was kept. Raises _OutdatedError, OSError, ValueError, KeyError or TypeError."""
    file = _file(cache, fingerprint)
    kept = read_json(file.read_text(encoding="utf-8"))
    held = {"of": kept["of"], "verdict": kept["verdict"]}
    if kept["sha256"] != _digest(held):
        raise _OutdatedError(f"{file} is damaged")
    now = _circumstances(checkpoint, fingerprint, runtime, cache)
    if different := [name for name in now if kept["of"].get(name) != now[name]]:
        raise _OutdatedError(f"{', '.join(different)} changed since they were")
    return Verdict(**kept["verdict"])


def _graphs(
    verdict: Verdict, checkpoint: Path, fingerprint: str, cache: Path
) -> dict[Modality, Path]:
    """The files to compile. Raises Int8Error."""
    from service.embedding.openvino_graphs import GraphFiles

    if verdict.runtime == "int8":
        return read_int8(checkpoint, fingerprint).graphs
    return {m: GraphFiles(cache, fingerprint, m).xml for m in MODALITIES}


def _circumstances(
    checkpoint: Path, fingerprint: str, runtime: Runtime, cache: Path
) -> dict[str, Any]:
    """All that a verdict depends on. graphs: digests, None for one that is not there or damaged."""
    from service.embedding.openvino_graphs import GraphFiles

    try:
        int8 = hashlib.sha256(
            (int8_folder(checkpoint) / DESCRIPTION_FILE).read_bytes()  # it has those of its graphs
        ).hexdigest()
    except OSError:
        int8 = None
    return {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "runtime": runtime,
        "graphs": [GraphFiles(cache, fingerprint, m).digest() for m in MODALITIES],
        "int8": int8,
        "processor": _processor(),
        "cores": [allowed_cores(), len(os.sched_getaffinity(0))],
        "packages": [f"{name} {version(name)}" for name in _PACKAGES],
    }


def _processor() -> str:
    """What the first processor is and can do."""
    lines = [platform.machine()]
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
        for line in file:
            if not line.strip():
                break
            if line.partition(":")[0].strip() in _ABILITIES:
                lines.append(line.strip())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file(cache: Path, fingerprint: str) -> Path:
    return cache / f"runtime-{fingerprint}.json"


def _digest(held: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()
