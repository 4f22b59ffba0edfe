"""Crops → features, and a query's γ, β: the network in the runtime that is fastest here.

Runtimes: torch on a GPU or a CPU, OpenVINO on a CPU. "auto" takes OpenVINO on a CPU if it is
installed and measures no slower than torch, and the checkpoint's int8 form (`model.int8`) where one
was checked on people whom the network does not know and measures faster. bf16, OpenVINO's or a
GPU's, and int8 are used only where they agree with torch's fp32 on a CPU on test pictures; trained
weights do, some random ones do not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model import CMT, Modality, Modulation, load_checkpoint
from model.blotches import smooth_pictures
from model.cmt import Modulator
from model.device import DeviceError, chosen_device
from model.int8 import LEAST_COSINE, Int8, Int8Error, int8_folder, read_int8
from model.pixels import pixels_of
from model.precision import Precision, PrecisionName, choose_precision
from service.embedding.torch_runtime import GpuBackend, TorchBackend
from service.embedding.verdict import Known, Runtime, Verdict, keep_verdict, known_network
from service.errors import MemoryExhausted, RuntimeUnavailable
from service.images.decode import Crop
from service.kit.memory import is_out_of_memory

log = logging.getLogger(__name__)

# What bf16 must reach against fp32 to be used, and int8 with a cosine of its own, LEAST_COSINE: see
# Embedder._agreement.
AGREEMENT = 0.998
ERROR_SHARE = 0.1
_TOO_COARSE = "bf16 is too coarse for these weights"
_SHOWN = 200  # characters of a library's message
# Longer lists are split. There is no gain on a CPU; on a GPU this is the setting max_batch's most.
_LONGEST = {"cpu": 32, "cuda": 1024}
_MODALITIES: tuple[Modality, Modality] = ("rgb", "ir")


class Backend(Protocol):
    """Pixels B×H×W×3 (uint8) of one modality → B×P×D fp32.

    A call that is alone has the whole device. streams: how many calls at once are useful.
    """

    streams: int

    def __call__(self, pixels: Tensor, modality: Modality, /) -> Tensor: ...


class Embedder:
    """One checkpoint on one device. Thread-safe.

    info: the checkpoint's metadata. device: "cpu", "cuda" or "cuda:1". runtime: "torch",
    "openvino" or "int8". precision: the number type and why it was chosen. backend: the network
    alone; `embed` gives it at most 32 crops at once on a CPU, and 1024 on a GPU. cache_dir: where
    converted graphs are kept, and what was chosen. known: gives what was chosen before, instead of
    looking there.
    Raises CheckpointError (the file), RuntimeUnavailable (device or runtime) or MemoryExhausted,
    one sentence.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: str = "auto",
        runtime: Runtime = "auto",
        cache_dir: Path | None = None,
        *,
        precision: PrecisionName = "auto",
        known: Callable[[], Known | None] | None = None,
    ) -> None:
        self.device = _device(device)
        self._checkpoint, self._longest = checkpoint, _LONGEST[torch.device(self.device).type]
        try:
            self._model, self.info = load_checkpoint(checkpoint, self.device)
            self._modulator = Modulator(self._model)
            probed = self.device == "cpu" and runtime != "torch" and precision == "auto"
            self.runtime, self.precision, self.backend = (
                self._once_chosen(runtime, cache_dir, known)
                if probed and cache_dir is not None
                else self._choose(runtime, precision, cache_dir)
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = "this machine" if self.device == "cpu" else "the GPU"
            raise MemoryExhausted(
                f"{what} has no memory for the network; stop what else uses it, or use another"
            ) from error

    def embed(self, crops: Sequence[Crop]) -> Tensor:
        """B crops of any modality → B×P×D, fp32 on the CPU, in their order."""
        config = self.info.config
        # In NumPy: PyTorch's indexing wakes its threads, which then keep cores from the network.
        features = np.empty((len(crops), config.parts, config.dim), np.float32)
        for modality in _MODALITIES:
            places = [i for i, crop in enumerate(crops) if crop.modality == modality]
            for start in range(0, len(places), self._longest):
                batch = places[start : start + self._longest]
                pixels = pixels_of([crops[i].image for i in batch], config)
                features[batch] = self.backend(pixels, modality).numpy()
        return torch.from_numpy(features)

    def modulation(self, x: Tensor) -> Modulation:
        """Equation (12) for embeddings B×P×D → γ, β of B×D, on the CPU."""
        return self._modulator(x)

    def close(self) -> None:
        """Release the network and its memory."""
        del self.backend, self._model, self._modulator

    def _once_chosen(
        self, runtime: Runtime, cache: Path, known: Callable[[], Known | None] | None
    ) -> tuple[str, str, Backend]:
        """As an earlier start has chosen; else choose, and keep it for the next one."""
        found = known_network(self._checkpoint, runtime, cache) if known is None else known()
        if found is not None and found.fingerprint == self.info.fingerprint:
            from service.embedding.openvino_runtime import OpenVINOBackend

            verdict = found.verdict
            quantised = verdict.runtime == "int8"
            backend = OpenVINOBackend(found.graphs, self.info.config, quantised=quantised)
            return verdict.runtime, f"{verdict.reason}, measured at an earlier start", backend
        name, reason, chosen = self._choose(runtime, "auto", cache)
        if (graphs := getattr(chosen, "graphs", None)) is not None:  # OpenVINO's
            taken = graphs.precision, graphs.views, graphs.number_type
            verdict = Verdict(name, *taken, reason)
            keep_verdict(verdict, self._checkpoint, self.info.fingerprint, runtime, cache)
        return name, reason, chosen

    def _choose(
        self, runtime: Runtime, precision: PrecisionName, cache_dir: Path | None
    ) -> tuple[str, str, Backend]:
        chosen = choose_precision(self.device, precision)
        if self.device != "cpu":
            if runtime in ("openvino", "int8"):
                raise RuntimeUnavailable(
                    "OpenVINO runs on the CPU here; use device cpu or runtime torch"
                )
            return "torch", *self._on_gpu(chosen, precision)
        if runtime == "int8":
            try:
                form = read_int8(self._checkpoint, self.info.fingerprint)
            except Int8Error as error:
                raise RuntimeUnavailable(str(error)) from error
            return "int8", *self._int8(form)
        usual = self._unquantised(chosen, runtime, precision, cache_dir)
        if runtime != "auto" or precision != "auto":
            return usual
        return self._faster_int8(usual[-1]) or usual

    def _unquantised(
        self,
        chosen: Precision,
        runtime: Runtime,
        precision: PrecisionName,
        cache_dir: Path | None,
    ) -> tuple[str, str, Backend]:
        eager = TorchBackend(self._model, self.device, chosen)
        if runtime == "torch":
            return "torch", chosen.reason, eager
        if find_spec("openvino") is None:
            if runtime == "openvino":
                raise RuntimeUnavailable(
                    "OpenVINO is not installed; install the extra 'cpu' or use runtime torch"
                )
            return "torch", f"{chosen.reason}; OpenVINO is not installed", eager
        try:
            converted, reason = self._openvino(precision, cache_dir)
            if runtime == "openvino":
                return "openvino", reason, converted
            pictures = _test_pictures(self._model)
            slower = _seconds(converted, pictures) / _seconds(eager, pictures)
        except Exception as error:  # too little memory, no compiler's temporary files, python -OO
            why = _why(error)
            if runtime == "openvino":
                raise RuntimeUnavailable(
                    f"OpenVINO cannot run this network here ({why}); give it memory and disk, or "
                    "use runtime torch"
                ) from error
            log.warning("OpenVINO cannot run this network here (%s): torch does", why)
            return "torch", f"{chosen.reason}; OpenVINO failed", eager
        if slower > 1:
            return "torch", f"{chosen.reason}; OpenVINO measured {slower:.2f}× slower", eager
        return "openvino", f"{reason}; {1 / slower:.1f}× as fast as torch here", converted

    def _int8(self, form: Int8) -> tuple[str, Backend]:
        """Raises RuntimeUnavailable where OpenVINO cannot run it, or it is too coarse here."""
        if find_spec("openvino") is None:
            raise RuntimeUnavailable(
                "OpenVINO, which runs int8, is not installed; install the extra 'cpu' or use "
                "runtime torch"
            )
        from service.embedding.openvino_graphs import compiled, read_graphs
        from service.embedding.openvino_runtime import OpenVINOBackend

        try:
            # Left to itself OpenVINO takes bf16 for the rest, which is no faster, and which some
            # CPUs cannot compile.
            graphs = compiled(read_graphs(form.graphs), "float32", 1)
            backend = OpenVINOBackend(graphs, self.info.config, quantised=True)
            agrees, measured = self._agreement(backend, LEAST_COSINE)
        except Exception as error:
            raise RuntimeUnavailable(
                f"OpenVINO cannot run the int8 form here ({_why(error)}); use another runtime"
            ) from error
        if not agrees:
            raise RuntimeUnavailable(
                f"int8 is too coarse for these weights on this machine ({measured}); use another "
                "runtime"
            )
        return f"int8, the rest f32: {measured}", backend

    def _faster_int8(self, usual: Backend) -> tuple[str, str, Backend] | None:
        """The int8 form, where a checked one is there and measures faster than `usual`."""
        if not int8_folder(self._checkpoint).exists():
            return None
        try:
            form = read_int8(self._checkpoint, self.info.fingerprint)
            if not form.held_out:
                log.info("int8 was not checked on held-out people: only runtime int8 takes it")
                return None
            reason, backend = self._int8(form)
        except (Int8Error, RuntimeUnavailable) as error:
            log.warning("%s", error)
            return None
        pictures = _test_pictures(self._model)
        faster = _seconds(usual, pictures) / _seconds(backend, pictures)
        if faster <= 1:
            log.info("int8 is not used: it measured %.1f× as fast as without", faster)
            return None
        return "int8", f"{reason}; {faster:.1f}× as fast as without here", backend

    def _on_gpu(self, chosen: Precision, asked: PrecisionName) -> tuple[str, Backend]:
        backend = GpuBackend(self._model, self.device, chosen)
        if asked != "auto" or not chosen.autocast:
            return chosen.reason, backend
        agrees, measured = self._agreement(backend)
        if agrees:
            return f"{chosen.reason}, {measured}", backend
        exact = Precision(torch.float32, f"float32: {_TOO_COARSE}, {measured}")
        return exact.reason, GpuBackend(self._model, self.device, exact)

    def _openvino(self, precision: PrecisionName, cache_dir: Path | None) -> tuple[Backend, str]:
        from service.embedding.openvino_graphs import compiled  # an optional dependency
        from service.embedding.openvino_runtime import OpenVINOBackend, converted

        def made(asked: PrecisionName) -> OpenVINOBackend:
            graphs = converted(self._model, self.info.fingerprint, cache_dir)
            views = 1 + self.info.config.mirror
            return OpenVINOBackend(compiled(graphs, asked, views), self.info.config)

        backend = made(precision)
        if precision != "auto":
            return backend, f"{backend.precision}: set by configuration"
        if backend.precision == "f32":
            return backend, "f32: OpenVINO's choice on this CPU"
        agrees, measured = self._agreement(backend)
        if agrees:
            return backend, f"{backend.precision}: OpenVINO's choice on this CPU, {measured}"
        return made("float32"), f"f32: {_TOO_COARSE}, {measured}"

    def _agreement(self, backend: Backend, least: float | None = None) -> tuple[bool, str]:
        """Whether it agrees with torch in fp32 on a CPU, and how well. least: cosine, AGREEMENT.

        By the lowest cosine, and the error over the distance between pictures. Untrained weights
        give all pictures nearly one feature: there the cosine is high and means nothing, while the
        rounding hides the pictures' differences.
        """
        here = self._model if self.device == "cpu" else load_checkpoint(self._checkpoint)[0]
        exact = TorchBackend(here, "cpu", Precision(torch.float32, "reference"))
        pictures = _test_pictures(self._model)
        cosines, errors = [], []
        for modality in _MODALITIES:
            given, true = (
                backend(pictures, modality).flatten(1),
                exact(pictures, modality).flatten(1),
            )
            cosines.append(float(functional.cosine_similarity(given, true).min()))
            errors.append(float((given - true).norm(dim=1).max() / torch.pdist(true).median()))
        cosine, error = min(cosines), max(errors)
        measured = f"cosine {cosine:.4f}, error {error:.1%} of the distance between pictures"
        return cosine > (least or AGREEMENT) and error < ERROR_SHARE, measured


def _why(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:_SHOWN]


def _device(device: str) -> str:
    try:
        return chosen_device(device)
    except DeviceError as error:
        raise RuntimeUnavailable(str(error)) from error


def _test_pictures(model: CMT) -> Tensor:
    return smooth_pictures(model.config, 4, seed=0)


def _seconds(backend: Backend, pictures: Tensor) -> float:
    """The best of four calls; the first one builds kernels."""

    def once() -> float:
        start = time.perf_counter()
        backend(pictures, "ir")
        return time.perf_counter() - start

    return min(once() for _ in range(4))
