"""The benchmarks run at tiny sizes, agree with what they compare, and say on which machine."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import (
    CMT,
    CMTConfig,
    Modulation,
    load_checkpoint,
    modulated_distance,
    save_checkpoint,
)
from model.cli import main
from service.bench.crops import BenchmarkDataError, CropFeatures, embedded
from service.bench.data import Source, stronger
from service.bench.embed import embed
from service.bench.engine import Engine
from service.bench.enroll import enroll, headlines
from service.bench.features import features
from service.bench.population import CROPS_PER_PERSON, Population
from service.bench.recall import recall
from service.bench.rerank import rerank
from service.bench.rescore import rescore
from service.bench.scale import scale
from service.bench.start import headlines as start_headlines
from service.bench.start import start
from service.embedding.embedder import Embedder
from service.gallery.index.byte_codes import levels
from service.gallery.index.figures import Figures
from tests.paths import MINI


def report(path: Path) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(path.read_text())
    machine = written["machine"]
    assert datetime.fromisoformat(machine["date"]).tzinfo is not None
    assert machine["packages"]["torch"]
    assert machine["cpu"]
    assert written["command"].startswith(f"cmt bench {written['benchmark']} --")
    return written


def assert_ordered(spread: dict[str, float]) -> None:
    assert 0 < spread["least"] <= spread["median"] <= spread["most"]


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: what `cmt bench features` wrote of the real crops, and its report."""
    folder = tmp_path_factory.mktemp("features")
    features(
        [MINI], tiny_checkpoint, folder / "statistics.safetensors",
        cache=folder / "cache.safetensors", rank=24, queries=16, json=folder / "features.json",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def statistics(measured: Path) -> Path:
    return measured / "statistics.safetensors"


@pytest.fixture(scope="module")
def people() -> CropFeatures:
    """2,000 persons who differ in four directions, five crops of each modality; P 2, D 6."""
    generator = torch.Generator().manual_seed(1)
    persons = torch.arange(2000).repeat_interleave(5)
    b = torch.randn(2000, 4, generator=generator) @ mixing(4, 24)
    noise = [torch.randn(10_000, 12, generator=generator) @ mixing(12, 12) for _ in range(2)]
    both = [b[persons][:, 12 * m : 12 * (m + 1)] + m + noise[m] for m in range(2)]
    return CropFeatures(
        torch.cat(both).view(-1, 2, 6).half(),
        persons.repeat(2),
        torch.arange(20_000) >= 10_000,
    )


def mixing(directions: int, size: int) -> Tensor:
    """White numbers (N×directions) times this have the covariance mixingᵀ·mixing of size×size."""
    return torch.randn(directions, size, generator=torch.Generator().manual_seed(size)) / 4


def unscaled() -> CMT:
    """A network that leaves features as long as they are."""
    return CMT(CMTConfig(backbone="resnet18", width=0.125, parts=2, dim=6, heads=2,
                         input_height=32, input_width=16, normalise_test=False))  # fmt: skip


def relative_difference(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


def test_samples_have_the_measured_means_and_covariances(people: CropFeatures) -> None:
    population = Population.measure(people, "", rank=8)
    sample = population.sample(40_000, 10_000, unscaled())
    y = sample.gallery.float().flatten(1)
    mean = y.view(-1, CROPS_PER_PERSON, 12).mean(1)
    within = (y.view(-1, CROPS_PER_PERSON, 12) - mean[:, None]).flatten(0, 1)
    b, w = mixing(4, 24), mixing(12, 12)
    noise = w.T @ w
    assert relative_difference(within.T @ within / 30_000, noise) < 0.1
    assert relative_difference(torch.cov(mean.T) - noise / 4, (b.T @ b)[:12, :12]) < 0.1
    across = torch.cat([mean[sample.wanted], sample.queries.flatten(1)], 1)
    assert relative_difference(torch.cov(across.T)[:12, 12:], (b.T @ b)[:12, 12:]) < 0.1
    assert torch.allclose(mean.mean(0), torch.zeros(12), atol=0.1)
    assert torch.allclose(sample.queries.mean((0, 1)), torch.ones(6), atol=0.1)


def test_a_sample_is_the_same_every_time_and_another_with_another_seed(
    people: CropFeatures,
) -> None:
    population = Population.measure(people, "", rank=8)
    first, again, other = (population.sample(50, 3, unscaled(), seed=s) for s in (0, 0, 1))
    assert torch.equal(first.gallery, again.gallery)
    assert not torch.equal(first.gallery, other.gallery)
    assert torch.equal(first.wanted, other.wanted)
    assert first.persons.tolist() == [i // CROPS_PER_PERSON for i in range(50)]


def test_a_population_is_read_as_it_was_written(people: CropFeatures, tmp_path: Path) -> None:
    population = Population.measure(people, "fingerprint", rank=8)
    population.save(tmp_path / "p.safetensors")
    read = Population.load(tmp_path / "p.safetensors")
    assert (read.fingerprint, read.parts, read.dim, read.crops) == ("fingerprint", 2, 6, 20_000)
    assert torch.allclose(read.between.factor, population.between.factor, atol=1e-3)
    assert torch.allclose(read.people, population.people, atol=1e-2)
    (tmp_path / "bad.safetensors").write_bytes(b"no statistics")
    for name in ("bad", "missing"):
        with pytest.raises(BenchmarkDataError, match=f"{name}.safetensors"):
            Population.load(tmp_path / f"{name}.safetensors")


def test_statistics_of_another_checkpoint_are_refused(
    people: CropFeatures, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    Population.measure(people, "another", rank=8).save(tmp_path / "p.safetensors")
    with pytest.raises(BenchmarkDataError, match="another checkpoint"):
        Source.load(tmp_path / "p.safetensors", tiny_checkpoint)


def test_the_checkpoint_gives_gamma_and_beta_of_sampled_queries(
    statistics: Path, tiny_checkpoint: Path
) -> None:
    data = Source.load(statistics, tiny_checkpoint).sample(20, 5)
    network, _ = load_checkpoint(tiny_checkpoint)
    gamma, beta = network.modulation(data.queries)
    assert torch.allclose(data.modulation.gamma, gamma)
    assert torch.allclose(data.modulation.beta, beta)
    assert torch.allclose(data.queries.flatten(1).norm(dim=1), torch.ones(5))
    more = stronger(data.modulation, 0.5)
    assert torch.equal(more.beta, data.modulation.beta)
    assert (more.gamma / data.modulation.gamma).std() == pytest.approx(0.5, abs=0.15)


def test_wide_features_are_draws_side_by_side(statistics: Path, tiny_checkpoint: Path) -> None:
    source = Source.load(statistics, tiny_checkpoint)
    one, two = source.sample(20, 5), source.sample_wide(20, 5, 32)
    assert two.gallery.shape == (20, 6, 32)
    assert two.modulation.gamma.shape == (5, 32)
    assert torch.allclose(two.gallery[:, :, :16].float() * 2**0.5, one.gallery.float(), atol=1e-3)
    assert not torch.equal(two.gallery[:, :, :16], two.gallery[:, :, 16:])
    assert torch.allclose(two.queries.flatten(1).norm(dim=1), torch.ones(5))
    with pytest.raises(BenchmarkDataError, match="multiple"):
        source.sample_wide(20, 5, 24)


def test_crops_are_embedded_once(measured: Path, tiny_checkpoint: Path) -> None:
    embedder = Embedder(tiny_checkpoint, runtime="torch")
    cache = measured / "cache.safetensors"
    before = cache.stat().st_mtime_ns
    crops = embedded([MINI], embedder, cache)
    assert cache.stat().st_mtime_ns == before
    assert len(crops.features) == len(list(MINI.glob("cam*/*/*.jpg")))
    infrared = sum(1 for camera in ("cam3", "cam6") for _ in MINI.glob(f"{camera}/*/*.jpg"))
    assert int(crops.infrared.sum()) == infrared
    assert len(set(crops.persons.tolist())) == 8
    embedded([MINI, MINI / "cam1"], embedder, cache)  # other folders, the same crops
    assert cache.stat().st_mtime_ns == before
    with pytest.raises(BenchmarkDataError, match="no crop"):
        embedded([MINI / "cam1"], embedder, None)


def test_features_compares_samples_with_real_crops(measured: Path) -> None:
    real, sampled = report(measured / "features.json")["results"]
    assert (real["features"], sampled["features"]) == ("real", "sampled")
    assert real["N"] == sampled["N"] <= 8 * CROPS_PER_PERSON
    assert 0 < real["nearest / median distance"] < real["tenth / median distance"] < 1
    assert sampled["mean γ"] == pytest.approx(real["mean γ"], rel=0.1)


def test_rescore_gives_the_papers_distances(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rescore(
        "300", "1,3", dim=32, rounds=1, statistics=statistics, checkpoint=tiny_checkpoint,
        device="cpu", json=tmp_path / "r.json",
    )  # fmt: skip
    results = report(tmp_path / "r.json")["results"]
    assert {(r["N"], r["Q"]) for r in results} == {(300, 1), (300, 3)}
    assert all(r["error"] < 1e-4 for r in results)
    for result in results:
        assert_ordered(result["seconds"]["ratio"])


@pytest.mark.skipif(not levels(7 * 16), reason="no fast exact product of int8 here")
def test_rescore_says_what_codes_leave(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rescore(
        "6000", "1", dim=32, rounds=1, statistics=statistics, checkpoint=tiny_checkpoint,
        device="cpu", json=tmp_path / "r.json",
    )  # fmt: skip
    *_, last = report(tmp_path / "r.json")["results"]
    assert last["against"] == "fp16 features alone"
    assert last["error"] == 0  # the same rows
    assert 20 / 6000 <= last["rows left"] < 0.1


def test_rerank_times_queries_with_it_and_without(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rerank(
        "300", candidates=40, items="10,60", rounds=1, statistics=statistics,
        checkpoint=tiny_checkpoint, json=tmp_path / "r.json",
    )  # fmt: skip
    query, *alone = report(tmp_path / "r.json")["results"]
    assert query["N"] == 300
    assert_ordered(query["stage seconds"])  # 0 where nothing was re-ranked
    assert_ordered(query["without"])
    assert [one["items"] for one in alone] == [10, 60]


def test_the_engine_ranks_by_the_modulated_distance(
    statistics: Path, tiny_checkpoint: Path
) -> None:
    data = Source.load(statistics, tiny_checkpoint).sample(700, 3)
    engine = Engine(data.gallery)
    expected = modulated_distance(data.queries, data.gallery.float(), data.modulation)
    best = expected.topk(10, largest=False).indices
    found = engine.exhaustive(data.queries, data.modulation, 10)
    for q in range(3):
        one = Modulation(*(p[q : q + 1] for p in data.modulation))
        recalled = engine.two_stage(data.queries[q : q + 1], one, engine.searching(None), 50, 10)
        assert found[q].tolist() == best[q].tolist() == recalled.tolist()


def test_recall_is_whole_with_the_flat_index_and_grows_with_the_shortlist(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recall(
        "2000", "10,100,2000", queries=6, timed=2, rounds=1, gamma=1.0, statistics=statistics,
        checkpoint=tiny_checkpoint, root=[MINI], cache=tmp_path / "cache.safetensors",
        plot=tmp_path / "recall.png", json=tmp_path / "r.json",
    )  # fmt: skip
    results = report(tmp_path / "r.json")["results"]
    assert {r["features"]: r["N"] for r in results}["sampled"] == 2000
    visible = [f for f in MINI.glob("cam*/*/*.jpg") if f.parts[-3] not in ("cam3", "cam6")]
    assert {r["features"]: r["N"] for r in results}["unmodified"] == len(visible)
    curves: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in results:
        names = ("features", "index", "setting", "modulation")
        curves.setdefault(tuple(result[name] for name in names), []).append(result)
        assert_ordered(result["seconds per query"])
        assert_ordered(result["share of exhaustive time"])
    assert len({index for _, index, _, _ in curves}) >= 5
    for (_, index, _, modulation), curve in curves.items():
        assert [r["C"] for r in curve] == [10, 100, 2000]
        if not index.startswith("HNSW"):  # whose longer search is another one
            for name in ("recall@10", "recall@10 by unmodulated shortlist"):
                shares = [r[name] for r in curve]
                assert shares == sorted(shares)
        if index in ("SQfp16", "Flat"):
            # A shortlist of ten may miss the tenth: s is kept in fp16.
            assert curve[0]["recall@10"] > 0.9
            assert [r["recall@10"] for r in curve[1:]] == [1, 1]
            assert curve[-1]["recall@10 by unmodulated shortlist"] == 1
            if modulation.startswith("γ ×"):
                assert curve[0]["recall@10 by unmodulated shortlist"] < 1
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("faked")
def test_recall_on_a_gpu_writes_what_the_kind_is_chosen_by(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says which kinds could not be measured: this build of FAISS is for CPUs."""
    file = tmp_path / "r.json"
    recall(
        "1500", "20,200", queries=3, timed=1, rounds=1, statistics=statistics,
        checkpoint=tiny_checkpoint, device="cuda", json=file,
    )  # fmt: skip
    assert {result["index"] for result in report(file)["results"]} == {"SQfp16"}
    assert all(result["bytes per item"] == 0 for result in report(file)["results"])
    assert "not measured: the index GPU-CAGRA needs FAISS for GPUs" in capsys.readouterr().out
    figures = Figures.read(file)
    assert figures.gpu == "a faked GPU"
    assert figures.fastest(1500) == "SQfp16"


def test_scale_marks_what_it_computed(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    scale(
        "300,600", "6000", shortlist=20, dim=None, rounds=1, statistics=statistics,
        checkpoint=tiny_checkpoint, plot=tmp_path / "s.png", json=tmp_path / "r.json",
    )  # fmt: skip
    small, large, paper = report(tmp_path / "r.json")["results"]
    assert [r["N"] for r in (small, large, paper)] == [300, 600, 6000]
    assert [r["computed"] for r in (small, large, paper)] == [False, False, True]
    assert len(large["seconds"]) == 3
    for way, spread in large["seconds"].items():
        assert_ordered(spread)
        assert paper["seconds"][way]["median"] == pytest.approx(10 * spread["median"])
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_start_opens_all_items_and_fills_a_folder_once(
    statistics: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def run(items: int, starts: int = 0) -> list[dict[str, Any]]:
        start(
            items, tmp_path / "gallery", None, True, rounds=1, starts=starts,
            statistics=statistics, checkpoint=tiny_checkpoint, json=tmp_path / "r.json",
        )  # fmt: skip
        results: list[dict[str, Any]] = report(tmp_path / "r.json")["results"]
        return results

    *results, served, helped, listed = run(50, starts=1)
    for process in served, helped, listed:
        assert_ordered(process["seconds"])
        assert_ordered(process["seconds beside"])
    whats = [row.what for row in start_headlines(report(tmp_path / "r.json"))]
    assert len(whats) == len(set(whats)) == 7
    flat = tmp_path / "gallery" / "bench-features.f16"
    assert flat.stat().st_size == 50 * 6 * 16 * 2
    assert {r["page cache"] for r in results} == {"warm", "cold"}
    for result in results:
        ratio = result["open seconds"]["median"] / result["read seconds"]["median"]
        assert result["times the reading"]["median"] == pytest.approx(ratio)
    filled = flat.stat().st_mtime_ns
    run(50)
    assert flat.stat().st_mtime_ns == filled
    with pytest.raises(BenchmarkDataError, match="holds 50 items, not 51"):
        run(51)


def test_enroll_stores_every_image_on_both_ways(tiny_checkpoint: Path, tmp_path: Path) -> None:
    enroll(
        tiny_checkpoint, None, MINI / "cam1", count=5, batch=2, rounds=1, device="cpu",
        runtime="torch", json=tmp_path / "r.json",
    )  # fmt: skip
    results = {r["side"]: r for r in report(tmp_path / "r.json")["results"]}
    assert list(results) == ["embedding alone", "offline", "through the service"]
    alone = results["embedding alone"]["images per second"]["median"]
    for result in results.values():
        assert_ordered(result["images per second"])
        share = result["images per second"]["median"] / alone
        assert result["share of embedding alone"]["median"] == pytest.approx(share)
        corrected = result["share of embedding alone, corrected"]["median"]
        if result["side"] == "through the service":  # without what the client computed
            assert corrected > share
        else:
            assert corrected == pytest.approx(share)


def test_enroll_to_replicas_is_compared_with_as_many_processes_that_embed(
    tiny_checkpoint: Path,
    tmp_path: Path,
    postgres_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    enroll(
        tiny_checkpoint, None, MINI / "cam1", count=5, batch=2, rounds=1, device="cpu",
        runtime="torch", replicas="2", database_url=postgres_url, json=tmp_path / "r.json",
    )  # fmt: skip
    found = report(tmp_path / "r.json")
    alone, ours = found["results"]
    assert (alone["side"], alone["images"], ours["side"], ours["images"]) == (
        *("embedding alone, 2 processes at the same time", 10),
        *("cmt enroll to 2 replicas", 10),
    )
    rates = [result["images per second"]["median"] for result in (ours, alone)]
    assert ours["share of embedding alone"]["median"] == pytest.approx(rates[0] / rates[1])
    assert postgres_url not in json.dumps(found)
    [row] = headlines(found)
    assert row.rival == alone["side"]
    assert main(["bench", "enroll", "--replicas", "2"]) == 2
    assert "give --database-url" in capsys.readouterr().err


def test_embed_agrees_with_the_plain_module(tmp_path: Path, tiny_checkpoint: Path) -> None:
    embed(tiny_checkpoint, None, MINI / "cam1", "1,3", 1, "cpu", "torch", tmp_path / "r.json")
    results = report(tmp_path / "r.json")["results"]
    assert [r["batch"] for r in results] == [1, 3]
    assert all(r["lowest cosine"] > 0.998 for r in results)
    assert all(r["images per second"]["median"] > 0 for r in results)


def test_embed_times_a_mirrored_crop_with_both_views_and_with_one(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    model, _ = load_checkpoint(tiny_checkpoint)
    mirrored = CMT(model.config.model_copy(update={"mirror": True}))
    mirrored.load_state_dict(model.state_dict())
    save_checkpoint(tmp_path / "mirrored.safetensors", mirrored)
    file = tmp_path / "mirrored.safetensors"
    embed(file, None, MINI / "cam1", "2", 1, "cpu", "torch", tmp_path / "r.json")
    *results, cost = report(tmp_path / "r.json")["results"]
    assert [(r["batch"], r["views"]) for r in results] == [(2, 2), (2, 1)]
    assert all(r["lowest cosine"] > 0.998 for r in results)
    assert (cost["views"], cost["runtime"]) == ("2 to 1", "torch")
    assert cost["times as long"]["median"] > 0
