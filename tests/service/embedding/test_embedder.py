"""The runtimes agree, modalities stay apart, and threads share one embedder."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from model import CMT, CheckpointError, Modality, preprocess, save_checkpoint
from model.int8 import LEAST_COSINE, int8_folder
from model.pixels import normalise, pixels_of
from service.embedding import embedder as embedding
from service.embedding.batcher import Embedded
from service.embedding.embedder import Embedder
from service.embedding.engine import EmbeddingEngine
from service.embedding.openvino_runtime import OpenVINOBackend
from service.errors import MemoryExhausted, RuntimeUnavailable
from service.images.decode import Crop, decode
from service.settings import load_settings
from tests.faked_device import FakedDevice
from tests.paths import MINI


def crops(count: int, modality: str = "auto") -> list[Crop]:
    """Random blocks of colour, every second one gray."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        blocks = rng.integers(0, 255, (8, 4, 1 if i % 2 else 3))
        pixels = np.kron(np.broadcast_to(blocks, (8, 4, 3)), np.ones((12, 12, 1)))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        made.append(decode(buffer.getvalue(), modality=modality))  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def eager(tiny_checkpoint: Path) -> Embedder:
    return Embedder(tiny_checkpoint, device="cpu", runtime="torch", precision="float32")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def converted(tiny_checkpoint: Path, graphs: Path) -> Embedder:
    return start(tiny_checkpoint, graphs)


def test_torch_embeds_as_the_model_does(eager: Embedder, tiny_model: CMT) -> None:
    batch = crops(6)
    images = torch.stack([preprocess(crop.image, tiny_model.config) for crop in batch])
    expected = tiny_model.embed(images, [crop.modality for crop in batch])
    torch.testing.assert_close(eager.embed(batch), expected, rtol=1e-4, atol=1e-5)
    assert {crop.modality for crop in batch} == {"rgb", "ir"}


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_openvino_agrees_with_torch_at_any_batch(
    eager: Embedder, converted: Embedder, count: int
) -> None:
    """Also in what tells pictures apart: random weights give all of them similar features."""
    batch = crops(count)
    ours, theirs = converted.embed(batch).flatten(1), eager.embed(batch).flatten(1)
    assert float(functional.cosine_similarity(ours, theirs).min()) > 0.998
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (converted.runtime, eager.runtime) == ("openvino", "torch")
    assert converted.precision.startswith("f32")


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_openvino_computes_every_form_of_the_network(
    mirror: bool, unit: bool, tiny_model: CMT, tmp_path: Path
) -> None:
    """A lone crop and more, at the same time too; later ones leave earlier answers alone."""
    form = {"mirror": mirror, "normalise_test": unit}
    model = CMT(tiny_model.config.model_copy(update=form)).eval()
    model.load_state_dict(tiny_model.state_dict())
    save_checkpoint(tmp_path / "form.safetensors", model)
    backend = start(tmp_path / "form.safetensors", tmp_path).backend
    pixels = pixels_of([crop.image for crop in crops(5)], model.config)
    expected = model.embed(normalise(pixels.permute(0, 3, 1, 2)), "ir")
    places = [slice(0, 1), slice(0, 5), slice(1, 3), slice(4, 5)]
    with ThreadPoolExecutor(4) as threads:  # what comes while others are computed, too
        given = [backend(pixels[at], "ir") for at in places]
        given += threads.map(lambda at: backend(pixels[at], "ir"), 4 * places)
    for at, features in zip(5 * places, given, strict=True):
        torch.testing.assert_close(features, expected[at], rtol=1e-3, atol=1e-4)


def test_the_given_modality_decides_the_stem(eager: Embedder, converted: Embedder) -> None:
    as_rgb, as_ir = crops(4, "rgb"), crops(4, "ir")
    for embedder in (eager, converted):
        assert not torch.allclose(embedder.embed(as_rgb), embedder.embed(as_ir), atol=1e-3)


def test_modulation_is_the_models(eager: Embedder, converted: Embedder, tiny_model: CMT) -> None:
    x = eager.embed(crops(5))
    expected = tiny_model.modulation(x)
    assert expected.gamma.std(dim=0).max().item() > 0
    for embedder in (eager, converted):
        gamma, beta = embedder.modulation(x)
        torch.testing.assert_close(gamma, expected.gamma)
        torch.testing.assert_close(beta, expected.beta)


def test_no_crops_give_no_features(eager: Embedder) -> None:
    assert eager.embed([]).shape == (0, 6, 16)


@pytest.mark.parametrize("runtime", ["eager", "converted"])
def test_threads_get_their_own_answers(runtime: str, request: pytest.FixtureRequest) -> None:
    embedder: Embedder = request.getfixturevalue(runtime)
    batch = crops(12)
    alone = [embedder.embed([crop]) for crop in batch]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: embedder.embed([batch[i % 12]]), range(48)))
    for i, features in enumerate(together):
        torch.testing.assert_close(features, alone[i % 12], rtol=1e-3, atol=1e-5)


def start(checkpoint: Path, graphs: Path) -> Embedder:
    return Embedder(
        checkpoint, device="cpu", runtime="openvino", cache_dir=graphs, precision="float32"
    )


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "missing", "no digest", "no text", "a folder"]
)
def test_a_damaged_graph_on_disk_is_converted_again(
    damage: str,
    tiny_checkpoint: Path,
    eager: Embedder,
    converted: Embedder,
    graphs: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(graphs, tmp_path, dirs_exist_ok=True)
    (weights,) = tmp_path.glob("*-rgb.bin")
    good = weights.read_bytes()
    if damage == "flipped":
        weights.write_bytes(good[:100] + bytes([good[100] ^ 0xFF]) + good[101:])
    elif damage == "truncated":
        weights.write_bytes(good[: len(good) // 2])
    elif damage == "missing":
        weights.unlink()
    else:
        (digest,) = tmp_path.glob("*-rgb.sha256")
        digest.unlink()
        if damage == "no text":
            digest.write_bytes(b"\xff")
        elif damage == "a folder":
            (digest / "with something in it").mkdir(parents=True)
    batch = crops(4)
    repaired = start(tiny_checkpoint, tmp_path)
    torch.testing.assert_close(repaired.embed(batch), eager.embed(batch), rtol=1e-3, atol=1e-4)
    assert weights.read_bytes() == good


def test_a_good_graph_on_disk_is_not_converted_again(
    tiny_checkpoint: Path, eager: Embedder, converted: Embedder, graphs: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in graphs.iterdir()}
    again = start(tiny_checkpoint, graphs)
    assert {path.name: path.stat().st_mtime_ns for path in graphs.iterdir()} == before
    assert len(before) == 6
    batch = crops(4)
    torch.testing.assert_close(again.embed(batch), eager.embed(batch), rtol=1e-3, atol=1e-4)


def test_what_is_kept_in_a_data_folder_is_its_owners(tiny_checkpoint: Path, tmp_path: Path) -> None:
    start(tiny_checkpoint, tmp_path / "cache").close()
    kept = [tmp_path / "cache", *(tmp_path / "cache").iterdir()]
    assert len(kept) == 7
    assert [path for path in kept if path.stat().st_mode & 0o077] == []


def test_without_a_place_for_graphs_the_network_runs(
    tiny_checkpoint: Path, eager: Embedder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    embedder = start(tiny_checkpoint, tmp_path / "file" / "cache")
    assert embedder.runtime == "openvino"
    assert "cannot be kept in" in caplog.text
    batch = crops(4)
    torch.testing.assert_close(embedder.embed(batch), eager.embed(batch), rtol=1e-3, atol=1e-4)


def test_where_openvino_fails_torch_runs(
    tiny_checkpoint: Path,
    eager: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr("service.embedding.openvino_runtime.to_openvino", fail)
    embedder = Embedder(tiny_checkpoint, device="cpu", precision="float32")
    assert embedder.runtime == "torch"
    assert "std::bad_alloc" in caplog.text
    batch = crops(4)
    torch.testing.assert_close(embedder.embed(batch), eager.embed(batch), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeUnavailable, match=r"std::bad_alloc.*use runtime torch"):
        Embedder(tiny_checkpoint, device="cpu", runtime="openvino", precision="float32")


def test_auto_measures_and_says_why(
    tiny_checkpoint: Path, eager: Embedder, converted: Embedder, graphs: Path
) -> None:
    embedder = Embedder(tiny_checkpoint, device="cpu", cache_dir=graphs, precision="float32")
    assert embedder.runtime in ("torch", "openvino")
    assert "as fast as torch" in embedder.precision or "slower" in embedder.precision
    batch = crops(4)
    torch.testing.assert_close(embedder.embed(batch), eager.embed(batch), rtol=1e-3, atol=1e-4)


@pytest.fixture
def quantised(tiny_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny checkpoint with its int8 form.

    Random weights give all pictures nearly one feature, beside which int8's error is not small.
    """
    monkeypatch.setattr(embedding, "ERROR_SHARE", torch.inf)
    copied = Path(shutil.copy(tiny_int8, tmp_path))
    shutil.copytree(int8_folder(tiny_int8), int8_folder(copied))
    return copied


def test_int8_embeds_as_fp32_does(eager: Embedder, quantised: Path) -> None:
    embedder = Embedder(quantised, device="cpu", runtime="int8")
    assert embedder.runtime == "int8"
    assert embedder.precision.startswith("int8, the rest f32: cosine 0.99")
    # Crops, of which it was made: what is none, and sharp, may lie outside its ranges.
    files = [f for cam in ("cam1", "cam3") for f in sorted((MINI / cam).glob("*/*.jpg"))[:4]]
    seen = [decode(file.read_bytes(), modality="auto") for file in files]
    assert {crop.modality for crop in seen} == {"rgb", "ir"}
    for batch in (seen[:1], seen):
        ours, theirs = embedder.embed(batch).flatten(1), eager.embed(batch).flatten(1)
        assert float(functional.cosine_similarity(ours, theirs).min()) >= LEAST_COSINE
        assert not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)  # it is another network


def overwritten(folder: Path) -> None:
    """Every file's content replaced in its place, as a copy from elsewhere does."""
    files = sorted(folder.rglob("*.bin"))
    assert len(files) == 2
    for file in files:
        with file.open("r+b") as open_file:
            open_file.write(bytes(file.stat().st_size))


def test_files_that_are_overwritten_later_change_nothing(quantised: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    start(quantised, kept)  # converted
    runs = {
        int8_folder(quantised): Embedder(quantised, device="cpu", runtime="int8"),
        kept: start(quantised, kept),
    }
    for folder, embedder in runs.items():
        before = embedder.embed(crops(4))
        overwritten(folder)
        assert torch.equal(embedder.embed(crops(4)), before)


def test_auto_takes_int8_where_it_is_checked_and_faster(
    quantised: Path, monkeypatch: pytest.MonkeyPatch, graphs: Path
) -> None:
    """The clock is a stand-in: which is faster on this machine is not for a test to know."""
    faster = True

    def seconds(backend: object, _: torch.Tensor) -> float:
        int8 = isinstance(backend, OpenVINOBackend) and backend.quantised
        return (0.5 if faster else 2.0) if int8 else 1.0

    def auto() -> Embedder:
        for kept in graphs.glob("runtime-*.json"):  # what an earlier start has chosen
            kept.unlink()
        return Embedder(quantised, device="cpu", cache_dir=graphs)

    monkeypatch.setattr(embedding, "_seconds", seconds)
    chosen = auto()
    assert chosen.runtime == "int8"
    assert "2.0× as fast as without here" in chosen.precision
    faster = False
    assert auto().runtime == "openvino"
    faster = True
    given = Embedder(quantised, device="cpu", precision="float32", cache_dir=graphs)
    assert given.runtime == "openvino"  # somebody asked for a number type
    monkeypatch.setattr(embedding, "ERROR_SHARE", 0)
    assert auto().runtime != "int8"
    monkeypatch.setattr(embedding, "ERROR_SHARE", torch.inf)
    record = int8_folder(quantised) / "int8.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"held_out": None}))
    assert auto().runtime == "openvino"
    assert Embedder(quantised, device="cpu", runtime="int8").runtime == "int8"


def test_int8_that_may_not_be_used_is_a_sentence(
    quantised: Path,
    graphs: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused() -> str:
        with pytest.raises(RuntimeUnavailable) as caught:
            Embedder(quantised, device="cpu", runtime="int8")
        return str(caught.value)

    monkeypatch.setattr(embedding, "ERROR_SHARE", 0)
    assert "int8 is too coarse for these weights on this machine" in refused()
    monkeypatch.setattr(embedding, "ERROR_SHARE", torch.inf)
    weights = int8_folder(quantised) / "embedding-ir.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged; write it with cmt export --format int8" in refused()
    assert Embedder(quantised, device="cpu", cache_dir=graphs).runtime != "int8"
    assert "is damaged" in caplog.text
    shutil.rmtree(int8_folder(quantised))
    assert "there is no int8 form of the checkpoint in" in refused()


def test_bad_settings_are_sentences(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Embedder(tmp_path / "none.safetensors", device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeUnavailable, match="no CUDA device"):
            Embedder(tiny_checkpoint, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.99)])
def test_a_gpu_embeds_as_the_cpu_does(
    eager: Embedder, tiny_checkpoint: Path, device: str, precision: str, least: float
) -> None:
    there = Embedder(tiny_checkpoint, device=device, precision=precision)  # type: ignore[arg-type]
    try:
        for count in (1, 7, 40):
            batch = crops(count)
            found = functional.cosine_similarity(
                there.embed(batch).flatten(1), eager.embed(batch).flatten(1)
            )
            assert float(found.min()) > least
        x = eager.embed(crops(3))
        for ours, theirs in zip(there.modulation(x), eager.modulation(x), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
    finally:
        there.close()


@pytest.mark.gpu
@pytest.mark.parametrize("agreeing", [True, False])
def test_a_gpu_uses_bf16_only_where_it_agrees_with_fp32(
    agreeing: bool, tiny_checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no units for bf16")
    # Random weights agree badly; here it is the rule that is looked at.
    monkeypatch.setattr(embedding, "AGREEMENT", -1.0 if agreeing else 2.0)
    monkeypatch.setattr(embedding, "ERROR_SHARE", torch.inf)
    there = Embedder(tiny_checkpoint, device=device)
    try:
        kind = "bfloat16: the GPU has units for it" if agreeing else "float32: bf16 is too coarse"
        assert there.precision.startswith(kind)
        assert "cosine" in there.precision
        assert there.embed(crops(3)).dtype == torch.float32
    finally:
        there.close()


@pytest.mark.gpu
def test_a_gpu_embeds_whole_batches_of_the_setting(tiny_checkpoint: Path, device: str) -> None:
    there = Embedder(tiny_checkpoint, device=device, precision="float32")
    settings = load_settings(checkpoint=tiny_checkpoint, data_dir=Path("unused"), max_batch=256)
    usual = load_settings(checkpoint=tiny_checkpoint, data_dir=Path("unused"))
    sizes: list[int] = []
    network = there.backend

    def counting(pixels: torch.Tensor, modality: Modality) -> torch.Tensor:
        sizes.append(len(pixels))
        return network(pixels, modality)

    try:
        assert EmbeddingEngine(there, settings, print).batcher.max_batch == 256
        assert EmbeddingEngine(there, usual, print).batcher.max_batch == 32
        there.backend = counting  # type: ignore[assignment]
        batch = crops(1, "rgb") * 70 + crops(1, "ir") * 50
        features = there.embed(batch)
    finally:
        there.close()
    assert sizes == [70, 50]
    torch.testing.assert_close(features[:1].expand(70, -1, -1), features[:70], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_threads_share_a_gpu_and_get_their_own_answers(tiny_checkpoint: Path, device: str) -> None:
    there = Embedder(tiny_checkpoint, device=f"{device}:0", precision="float32")
    batch = crops(12)
    try:
        alone = there.embed(batch)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda i: there.embed(batch[: i % 12 + 1]), range(24)))
    finally:
        there.close()
    for i, features in enumerate(together):
        torch.testing.assert_close(features, alone[: i % 12 + 1], rtol=1e-3, atol=1e-4)


def test_a_gpu_without_room_for_the_network_is_a_sentence(
    faked: FakedDevice, tiny_checkpoint: Path
) -> None:
    faked.budget = 10_000
    with pytest.raises(MemoryExhausted, match="the GPU has no memory for the network; stop what"):
        Embedder(tiny_checkpoint, device="cuda")


def test_a_gpu_is_fed_from_pinned_memory_on_a_stream_of_its_own(
    faked: FakedDevice, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Embedder(tiny_checkpoint, device="cuda", precision="float32")
    pinned: list[torch.Size] = []
    on_stream = 0

    def pin(pixels: torch.Tensor) -> torch.Tensor:
        pinned.append(pixels.shape)
        return pixels.clone()

    @contextmanager
    def stream(_: object) -> Iterator[None]:
        nonlocal on_stream
        before = faked.launches.total()
        yield
        on_stream += faked.launches.total() - before

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    faked.reset()
    there.embed(crops(7))
    config = there.info.config
    size = (config.input_height, config.input_width, 3)
    assert pinned == [(4, *size), (3, *size)]
    assert on_stream == faked.launches.total() > 0
    there.close()


def test_a_batch_is_prepared_while_a_gpu_works_on_another(tiny_checkpoint: Path) -> None:
    """On any of several GPUs; the network is a stand-in, which waits until it is called twice."""
    both = threading.Barrier(2)

    def embed(batch: Sequence[Crop]) -> torch.Tensor:
        both.wait(60)
        return torch.zeros(len(batch), 1, 1)

    network = SimpleNamespace(device="cuda:1", embed=embed, backend=SimpleNamespace(streams=1))
    settings = load_settings(checkpoint=tiny_checkpoint, data_dir=Path("unused"), max_batch=1)
    engine = EmbeddingEngine(network, settings, print)  # type: ignore[arg-type]

    async def work() -> list[Embedded]:
        running = asyncio.create_task(engine.run())
        try:
            calls = [engine.batcher.embed(crop, query=True) for crop in crops(2)]
            return await asyncio.wait_for(asyncio.gather(*calls), 60)
        finally:
            running.cancel()

    assert len(asyncio.run(work())) == 2
