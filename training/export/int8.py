"""A checkpoint's int8 form: calibrated on images, compared with PyTorch, and only then written."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model import CMT, CheckpointInfo, Modality
from model.blotches import smooth_pictures
from model.fixed_batch import ANY_SIZE, IN_FP32, fixed_batch
from model.graphs import embedding_graph, to_openvino
from model.int8 import DESCRIPTION_FILE, FORMAT, LEAST_COSINE, VERSION, digests
from model.machine import machine
from model.modalities import MODALITIES, embedding_name
from model.pixels import normalise
from training.datasets import Sample
from training.evaluation.embedding import Embedded
from training.evaluation.report import RankingFigures
from training.evaluation.scoring import score_splits
from training.evaluation.splits import Split
from training.export.folder import ExportError, replaced
from training.export.images import preprocessed
from training.files import write_report

MOST = 400  # images of a modality to calibrate and compare on; more took longer, to no avail
_CHECKED = 4  # one image in so many is compared on, and not calibrated on
# How much worse than fp32 any search of the protocol may be on held-out people.
MOST_RANK_1, MOST_MAP = 0.003, 0.002
_BLOCK = 16
# Convolutions hold nearly all of the time; in int8 the others, above all what brings features to
# unit length, cost accuracy. By type: names differ between conversions.
_EXACT = (
    *("MatMul", "ScaledDotProductAttention", "MVN", "Multiply", "Power", "ReduceMean"),
    *("ReduceSum", "ReduceL2", "Divide", "Maximum", "Sqrt", "Concat", "Reshape", "Clamp"),
    *("AvgPool", "Subtract"),
)

Runner = Callable[[Tensor], Tensor]  # images N×3×H×W of one modality → embedding N×P×D


@dataclass(frozen=True)
class HeldOut:
    """People whom the network does not know. source: where they are, in words for the record."""

    source: str
    samples: Sequence[Sample]
    splits: Sequence[Split]


@dataclass(frozen=True)
class Ranked:
    """A search on held-out people, in fp32 and in int8; fractions."""

    search: str
    rank_1: tuple[float, float]
    mean_ap: tuple[float, float]

    @property
    def passed(self) -> bool:
        """Whether int8 is hardly worse."""
        lost = [fp32 - int8 for fp32, int8 in (self.rank_1, self.mean_ap)]
        return lost[0] <= MOST_RANK_1 and lost[1] <= MOST_MAP


@dataclass(frozen=True)
class Verdict:
    """How an int8 form compares with PyTorch in fp32.

    method: how it was quantised. cosines: the lowest of an image's features, by modality. ranked:
    the searches; None without held-out people.
    """

    method: str
    cosines: dict[Modality, float]
    ranked: list[Ranked] | None

    def problem(self) -> str | None:
        """The first check that failed, in words."""
        for modality, cosine in self.cosines.items():
            if not cosine >= LEAST_COSINE:
                return f"{modality} features have a cosine of {cosine:.4f}, below {LEAST_COSINE}"
        for search in self.ranked or ():
            if not search.passed:
                (rank_1, rank_1_int8), (mean_ap, mean_ap_int8) = search.rank_1, search.mean_ap
                return (
                    f"{search.search} has rank-1 {100 * rank_1_int8:.2f} instead of "
                    f"{100 * rank_1:.2f} and mAP {100 * mean_ap_int8:.2f} instead of "
                    f"{100 * mean_ap:.2f}"
                )
        return None


def require_nncf() -> None:
    """Raises ExportError without what quantises."""
    if find_spec("nncf") is None:
        raise ExportError(
            "NNCF, which quantises, is not installed; run pip install 'cmt-reid[int8]'"
        )


def write_int8(
    model: CMT,
    info: CheckpointInfo,
    images: Mapping[Modality, Sequence[Sample]],
    output: Path,
    held_out: HeldOut | None = None,
) -> Verdict:
    """Quantise, compare, and only then put the graphs and `int8.json` into `output`.

    images: of each modality; three of four set the ranges, the fourth is compared on. Where plain
    quantisation falls short, NNCF's accuracy-aware one is tried.
    Raises ExportError where both fall short, or an image is one of the held-out people's; `output`
    is then as it was. DatasetError for an image that cannot be decoded.
    """
    from model.quiet_openvino import openvino

    require_nncf()
    _refuse_shared(images, held_out)
    pictures = {modality: preprocessed(images[modality], info.config) for modality in MODALITIES}
    compared = {modality: of[::_CHECKED] for modality, of in pictures.items()}
    fp32: dict[Modality, Runner] = {m: partial(model.embed, modality=m) for m in MODALITIES}
    exact = {m: _in_blocks(fp32[m], compared[m]) for m in MODALITIES}
    known = None if held_out is None else _embedded(fp32, held_out.samples, info)
    problems = []
    for method, quantise in (("plain", _plain), ("accuracy-aware", _accuracy_aware)):
        graphs = {}
        for modality in MODALITIES:
            kept = torch.arange(len(pictures[modality])) % _CHECKED != 0
            calibrating = torch.cat([pictures[modality][kept], _blotches(info)])
            graph = fixed_batch(to_openvino(embedding_graph(model, modality)), 1)
            quantised = quantise(graph, calibrating, compared[modality], exact[modality])
            graphs[modality] = fixed_batch(quantised, ANY_SIZE)
        runners = {m: _runner(graph) for m, graph in graphs.items()}
        given = {m: _in_blocks(runners[m], compared[m]) for m in MODALITIES}
        pairs = [(m, given[m], exact[m]) for m in MODALITIES]
        ranked = None
        if held_out is not None and known is not None:
            ours = _embedded(runners, held_out.samples, info)
            ranked = _ranked(model, held_out, known, ours)
            for m in MODALITIES:
                of = torch.tensor([sample.modality == m for sample in held_out.samples])
                pairs.append((m, ours[of], known[of]))
        cosines = {m: min(_lowest(*two) for of, *two in pairs if of == m) for m in MODALITIES}
        verdict = Verdict(method, cosines, ranked)
        problem = verdict.problem()
        if problem is None:
            break
        problems.append(f"{method}: {problem}")
    else:
        raise ExportError(
            f"int8 is too coarse for this checkpoint ({'; '.join(problems)}); nothing was written: "
            "give other or more --images, of the kind that the cameras take, or go without int8"
        )
    with replaced(output) as folder:
        for modality, graph in graphs.items():
            openvino.save_model(
                graph, folder / f"{embedding_name(modality)}.xml", compress_to_fp16=False
            )
        content = _describe(info, images, held_out, verdict, digests(folder))
        write_report(folder / DESCRIPTION_FILE, content)
    return verdict


def _blotches(info: CheckpointInfo) -> Tensor:
    """Pictures like those that a service compares number types on when it starts, but not the same.

    With ranges from crops alone, infrared features of what is no crop were off by a cosine of 0.04;
    these widen them, and cost crops nothing that is measurable.
    """
    pictures = smooth_pictures(info.config, 8, seed=1)
    return normalise(pictures.permute(0, 3, 1, 2)).contiguous()


def _plain(graph: Any, calibrating: Tensor, _compared: Tensor, _exact: Tensor) -> Any:
    nncf = _nncf()
    advanced, settings = _settings(len(calibrating))
    return nncf.quantize(graph, _dataset(calibrating), advanced_parameters=advanced, **settings)


def _accuracy_aware(graph: Any, calibrating: Tensor, compared: Tensor, exact: Tensor) -> Any:
    """Takes back to fp32 what costs most, until the images compared on pass."""
    nncf = _nncf()

    def accuracy(compiled: Any, batches: Any) -> tuple[float, list[float]]:
        cosines = [
            _lowest(torch.from_numpy(np.array(compiled(batch)[0])), exact[place : place + 1])
            for place, batch in batches
        ]
        return min(cosines), cosines

    advanced, settings = _settings(len(calibrating))
    checks = [(place, image[None].numpy()) for place, image in enumerate(compared)]
    return nncf.quantize_with_accuracy_control(
        graph,
        calibration_dataset=_dataset(calibrating),
        validation_dataset=nncf.Dataset(checks, lambda check: check[1]),
        validation_fn=accuracy,
        # Half of what is allowed: images that are not compared on may do a little worse.
        max_drop=(1 - LEAST_COSINE) / 2,
        advanced_quantization_parameters=advanced,
        **settings,
    )


def _nncf() -> Any:
    import model.quiet_openvino  # noqa: F401, I001 - first, so that NNCF reports to nobody
    import nncf

    nncf.set_log_level(logging.ERROR)
    return nncf


def _dataset(images: Tensor) -> Any:
    return _nncf().Dataset([image[None].numpy() for image in images])


def _settings(images: int) -> tuple[Any, dict[str, Any]]:
    """Ranges from the least to the largest value, not from quantiles, and each bias corrected by
    what the layers before it make of the images: the usual, faster ways cost half a point."""
    nncf = _nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    advanced = AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    return advanced, {
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": images,
        "fast_bias_correction": False,
        "ignored_scope": nncf.IgnoredScope(types=list(_EXACT), validate=False),
    }


def _runner(graph: Any) -> Runner:
    from model.quiet_openvino import openvino

    # As the service computes what is not in int8.
    compiled = openvino.Core().compile_model(fixed_batch(graph, _BLOCK), "CPU", IN_FP32)

    def run(images: Tensor) -> Tensor:
        padded = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, _BLOCK - len(images)))
        return torch.from_numpy(np.array(compiled(padded.contiguous().numpy())[0]))[: len(images)]

    return run


def _in_blocks(run: Runner, images: Tensor) -> Tensor:
    return torch.cat([run(part) for part in torch.split(images, _BLOCK)])


def _embedded(
    runners: Mapping[Modality, Runner], samples: Sequence[Sample], info: CheckpointInfo
) -> Tensor:
    """Embeddings of samples of any modality, in their order, a part of them in memory at once."""
    features = torch.empty(len(samples), info.config.parts, info.config.dim)
    for modality in MODALITIES:
        places = [i for i, sample in enumerate(samples) if sample.modality == modality]
        for start in range(0, len(places), MOST):
            some = places[start : start + MOST]
            images = preprocessed([samples[i] for i in some], info.config)
            features[some] = _in_blocks(runners[modality], images)
    return features


def _ranked(model: CMT, held_out: HeldOut, fp32: Tensor, int8: Tensor) -> list[Ranked]:
    both = [
        score_splits(model, Embedded(held_out.samples, of, None, of), held_out.splits)
        for of in (fp32, int8)
    ]
    searches = []
    for split, *scores in zip(held_out.splits, *both, strict=True):
        exact, ours = (RankingFigures.over(one.modulated) for one in scores)
        searches.append(
            Ranked(
                search=split.title,
                rank_1=(exact.rank_1.mean, ours.rank_1.mean),
                mean_ap=(exact.mean_ap.mean, ours.mean_ap.mean),
            )
        )
    return searches


def _lowest(ours: Tensor, theirs: Tensor) -> float:
    return float(functional.cosine_similarity(ours.flatten(1), theirs.flatten(1)).min())


def _refuse_shared(images: Mapping[Modality, Sequence[Sample]], held_out: HeldOut | None) -> None:
    if held_out is None:
        return
    known = {_digest(sample) for sample in held_out.samples}
    shared = [s.path for of in images.values() for s in of if _digest(s) in known]
    if shared:
        raise ExportError(
            f"{len(shared)} of the images to calibrate on are of the people that int8 is compared "
            f"on, such as {shared[0]}; give others with --images or --ids"
        )


def _digest(sample: Sample) -> bytes:
    return hashlib.sha256(sample.path.read_bytes()).digest()


def _describe(
    info: CheckpointInfo,
    images: Mapping[Modality, Sequence[Sample]],
    held_out: HeldOut | None,
    verdict: Verdict,
    files: Mapping[str, str],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": info.fingerprint,
        "graphs": [
            {"name": name, "files": [file for file in files if file.startswith(f"{name}.")]}
            for name in map(embedding_name, MODALITIES)
        ],
        "sha256": files,
        "method": verdict.method,
        "images": {
            modality: {
                "count": len(samples),
                "sha256": hashlib.sha256(b"".join(map(_digest, samples))).hexdigest(),
            }
            for modality, samples in images.items()
        },
        "limits": {"cosine": LEAST_COSINE, "rank_1": MOST_RANK_1, "mean_ap": MOST_MAP},
        "lowest_cosine": verdict.cosines,
        "held_out": None
        if held_out is None
        else {
            "source": held_out.source,
            "people": len({sample.person_id for sample in held_out.samples}),
            "images": len(held_out.samples),
            "searches": [asdict(search) for search in verdict.ranked or ()],
        },
        "machine": machine(),
    }
