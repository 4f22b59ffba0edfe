"""What a probe chose is taken over at the next start, and only while everything is as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import CMT, save_checkpoint
from model.int8 import int8_folder
from service.embedding.embedder import Embedder
from service.embedding.verdict import Runtime, ahead, known_network

AGAIN = ", measured at an earlier start"


def started(checkpoint: Path, cache: Path, runtime: Runtime = "openvino") -> Embedder:
    return Embedder(checkpoint, device="cpu", runtime=runtime, cache_dir=cache)


def features(embedder: Embedder) -> torch.Tensor:
    config = embedder.info.config
    pixels = torch.arange(config.input_height * config.input_width * 3, dtype=torch.int32) % 251
    shape = (1, config.input_height, config.input_width, 3)
    return embedder.backend(pixels.to(torch.uint8).reshape(shape), "ir")


@pytest.fixture(scope="module")
def first(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Path]:
    """A first start, which probes, and its folder."""
    cache = tmp_path_factory.mktemp("verdict") / "cache"
    return started(tiny_checkpoint, cache), cache


@pytest.fixture
def cache(first: tuple[Embedder, Path], tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(first[1], tmp_path / "cache"))


def kept(cache: Path) -> Path:
    (file,) = cache.glob("runtime-*.json")
    return file


def test_the_next_start_takes_over_what_was_chosen(
    first: tuple[Embedder, Path], cache: Path, tiny_checkpoint: Path
) -> None:
    probed, again = first[0], started(tiny_checkpoint, cache)
    assert again.precision == probed.precision + AGAIN
    assert again.runtime == probed.runtime == "openvino"
    torch.testing.assert_close(features(again), features(probed), rtol=0, atol=0)
    third = started(tiny_checkpoint, cache)
    assert third.precision == again.precision  # said once, however often it is taken over
    assert kept(cache).stat().st_mode & 0o077 == 0


def test_it_is_looked_for_in_a_thread_and_handed_out_once(
    cache: Path, tiny_checkpoint: Path
) -> None:
    with ahead(tiny_checkpoint, "openvino", cache) as found:
        embedder = Embedder(tiny_checkpoint, "cpu", "openvino", cache_dir=cache, known=found.take)
        assert embedder.precision.endswith(AGAIN)
        assert found.take() is None


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "no JSON", "no text", "another reason", "a list", "a folder"]
)
def test_a_damaged_file_is_not_believed(damage: str, cache: Path, tiny_checkpoint: Path) -> None:
    file = kept(cache)
    good = file.read_text()
    if damage == "another reason":
        content = json.loads(good)
        content["verdict"]["number_type"] = "f16"
        file.write_text(json.dumps(content))
    elif damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        changed = {
            "empty": b"",
            "truncated": good[: len(good) // 2].encode(),
            "no JSON": b"probed",
            "no text": b"\xff" + good.encode(),
            "a list": b"[]",
        }
        file.write_bytes(changed[damage])
    assert known_network(tiny_checkpoint, "openvino", cache) is None
    if damage != "a folder":
        assert not started(tiny_checkpoint, cache).precision.endswith(AGAIN)
        assert started(tiny_checkpoint, cache).precision.endswith(AGAIN)  # it was written again


@pytest.fixture
def one_core() -> Iterator[None]:
    """The thread may use one core."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core only")
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("one_core")
def test_other_cores_are_probed_again(cache: Path, tiny_checkpoint: Path) -> None:
    assert known_network(tiny_checkpoint, "openvino", cache) is None


def test_another_setting_checkpoint_or_graph_is_probed_again(
    cache: Path, tiny_checkpoint: Path, tiny_model: CMT, tmp_path: Path
) -> None:
    assert known_network(tiny_checkpoint, "auto", cache) is None
    other = tmp_path / "other.safetensors"
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    network = CMT(tiny_model.config)
    network.load_state_dict({n: w * 2 if n.endswith("bias") else w for n, w in weights.items()})
    info = save_checkpoint(other, network.eval())
    assert known_network(other, "openvino", cache) is None
    # The file of one network under the name of another's.
    shutil.copy(kept(cache), cache / f"runtime-{info.fingerprint}.json")
    assert known_network(other, "openvino", cache) is None
    (cache / f"runtime-{info.fingerprint}.json").unlink()
    (weights_file,) = cache.glob("*-ir.bin")
    good = weights_file.read_bytes()
    weights_file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert known_network(tiny_checkpoint, "openvino", cache) is None
    assert not started(tiny_checkpoint, cache).precision.endswith(AGAIN)
    assert weights_file.read_bytes() == good


def test_a_checkpoint_that_says_another_fingerprint_gets_no_network(
    cache: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The header alone is read ahead: what counts is what the weights turn out to be."""
    altered = tmp_path / "altered.safetensors"
    content = bytearray(tiny_checkpoint.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    assert known_network(altered, "openvino", cache) is not None
    with pytest.raises(Exception, match="does not match its fingerprint"):
        started(altered, cache)


def test_an_int8_form_that_appears_is_looked_at(tiny_int8: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copy(tiny_int8, tmp_path))
    cache = tmp_path / "cache"
    started(checkpoint, cache, "openvino")
    assert known_network(checkpoint, "openvino", cache) is not None
    shutil.copytree(int8_folder(tiny_int8), int8_folder(checkpoint))
    assert known_network(checkpoint, "openvino", cache) is None


def test_torch_is_not_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    started(tiny_checkpoint, tmp_path / "cache", "torch")
    assert list(tmp_path.rglob("runtime-*")) == []


def test_where_nothing_can_be_kept_the_network_runs(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    first = started(tiny_checkpoint, cache)
    kept(cache).unlink()
    name = f"runtime-{first.info.fingerprint}.json"
    (cache / f"{name}.partial").mkdir()
    assert started(tiny_checkpoint, cache).runtime == "openvino"
    assert "what was measured cannot be kept in" in caplog.text
