"""The torchvision shim on both kinds of torch, and the measured precision."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model import torchvision_compat
from model.device import DeviceError, chosen_device
from model.precision import choose_precision
from tests.faked_device import FakedDevice


def test_torchvision_models_work_beside_this_torch() -> None:
    code = (
        "from model import torchvision_compat; torchvision_compat.prepare();"
        "from torchvision.models import resnet18; from torchvision.transforms import v2;"
        "import torch; print(tuple(resnet18().eval()(torch.zeros(1, 3, 64, 64)).shape))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "(1, 1000)"


def anew(module: ModuleType) -> ModuleType:
    """Another copy of a module, as it is after its first import."""
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_where_torch_has_cuda_or_the_extension_loads_nothing_is_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declared: list[object] = []
    fresh = anew(torchvision_compat)  # this process may have declared it already
    monkeypatch.setattr(torch.library, "Library", lambda *args: declared.append(args))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert fresh.prepare() is False
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(fresh, "extension_loads", lambda: True)
    assert fresh.prepare() is False
    assert not declared


@pytest.mark.parametrize(
    ("bf16_seconds", "expected"), [(0.5, torch.bfloat16), (1.0, torch.float32), (90, torch.float32)]
)
def test_bf16_is_chosen_only_where_it_wins_clearly(
    monkeypatch: pytest.MonkeyPatch, bf16_seconds: float, expected: torch.dtype
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
    now = [0.0]

    def convolve(_: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        now[0] += seconds[images.dtype]
        return images

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.Conv2d, "forward", convolve)
    choose_precision.cache_clear()
    chosen = choose_precision("cpu")
    choose_precision.cache_clear()
    assert chosen.dtype == expected
    assert "measured" in chosen.reason
    assert chosen.autocast == (expected == torch.bfloat16)


def test_a_setting_overrides_the_measurement_and_the_real_probe_answers() -> None:
    assert choose_precision("cpu", "float32").dtype == torch.float32
    assert choose_precision("cpu", "bfloat16").reason == "bfloat16: set by configuration"
    assert choose_precision("cpu").dtype in (torch.float32, torch.bfloat16)


def test_openvino_reports_its_use_to_nobody() -> None:
    code = (
        "import sys; from model.quiet_openvino import openvino\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "print(telemetry_utils.tm.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("telemetry_stub")


def test_openvino_is_imported_in_one_place() -> None:
    root = Path(__file__).parents[2]
    importing = re.compile(r"^\s*(import openvino\b|from openvino\b)", re.MULTILINE)
    found = {
        str(file.relative_to(root))
        for room in ("model", "service", "training")
        for file in (root / room).rglob("*.py")
        if importing.search(file.read_text().replace("if TYPE_CHECKING:\n    import openvino", ""))
    }
    assert found == {"model/quiet_openvino.py"}


@pytest.mark.parametrize(
    "name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "CUDA", "mps", "cuda:²", "cuda:01"]
)
def test_names_of_no_device_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="is no device; use auto, cpu, cuda"):
        chosen_device(name)


def test_a_gpu_that_is_not_there_is_a_sentence_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert chosen_device("cpu") == "cpu"
    assert chosen_device("auto") in ("cpu", "cuda")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(DeviceError, match="use device cpu" if not there else f"no GPU {there},"):
        chosen_device(f"cuda:{there}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for build, remedy in (("12.4", "check the driver"), (None, "install the extra gpu")):
        monkeypatch.setattr(torch.version, "cuda", build)
        with pytest.raises(DeviceError, match=f"finds no CUDA device; {remedy}.*use device cpu"):
            chosen_device("cuda")
    assert chosen_device("auto") == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="nvidia-smi and CUDA_VISIBLE_DEVICES, which is ''"):
        chosen_device("cuda")


def test_a_gpu_is_counted_among_those_that_are_visible(
    faked: FakedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [chosen_device(name) for name in ("auto", "cuda", "cuda:0")] == [
        "cuda",
        "cuda",
        "cuda:0",
    ]
    with pytest.raises(DeviceError, match="there is no GPU 1, only 1, counted from 0"):
        chosen_device("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(DeviceError, match="no GPU 3, only 1 among CUDA_VISIBLE_DEVICES=3"):
        chosen_device("cuda:3")
