"""Fixtures that every room's tests share: a small network with every module alive."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import CMT, CMTConfig, save_checkpoint
from tests.faked_device import FakedDevice, faked_device
from tests.paths import MINI, ROOT

# Without a GPU, Triton's interpreter runs its kernels, if it is told so before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The networks here are too small for more: threads would only wait for one another.
torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_config() -> CMTConfig:
    """Few channels, six parts, normalised embeddings, both modules on."""
    return CMTConfig(
        backbone="resnet18",
        width=0.125,
        input_height=96,
        input_width=48,
        dim=16,
        heads=4,
        normalise_test=True,
    )


def alive(model: CMT, seed: int = 7) -> CMT:
    """Give the modulation generators weights: they start as the identity, which proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (model.generator_gamma, model.generator_beta):
            if part is not None:
                part.outer.weight.add_(
                    0.3 * torch.randn(part.outer.weight.shape, generator=generator)
                )
    return model


@pytest.fixture(scope="session")
def tiny_model(tiny_config: CMTConfig) -> CMT:
    """A randomly initialised network in eval mode, its γ and β depending on the query."""
    torch.manual_seed(3)
    return alive(CMT(tiny_config)).eval()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model: CMT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of `tiny_model` saved as a checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_checkpoint(path, tiny_model, training={"dataset": "none", "identities": [1, 2]})
    return path


# In a process of its own: see `make test` on NNCF.
_QUANTISE = """
import sys
from model.cli import main
from training.export import int8
int8.MOST_RANK_1 = int8.MOST_MAP = 1
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def tiny_int8(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `tiny_checkpoint` with its int8 form beside it.

    Compared on held-out people, by limits that random weights, which rank by chance, can meet.
    """
    path = Path(shutil.copy(tiny_checkpoint, tmp_path_factory.mktemp("int8")))
    people = path.with_name("people.txt")
    known = (MINI / "exp" / "val_id.txt").read_text().strip().split(",")
    people.write_text(",".join(person for person in known if int(person) != 218))  # in examples/
    of = ("--dataset", "sysu", "--root", str(MINI), "--ids", str(people))
    arguments = ["export", "--checkpoint", str(path), "--format", "int8", *of]
    subprocess.run([sys.executable, "-c", _QUANTISE, *arguments], cwd=ROOT, check=True)
    return path


@pytest.fixture
def faked() -> Iterator[FakedDevice]:
    """A CUDA device that the CPU computes for, whose memory and launches a test can look at."""
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        pytest.skip("this torch is built for CUDA, beside which none can be faked")
    with faked_device() as device:
        yield device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The GPU's name for torch, or a faked one's where there is none.

    Tests that take it are marked `gpu`: `make gpu-check` runs them on a GPU.
    """
    if not torch.cuda.is_available():
        request.getfixturevalue("faked")
    return "cuda"
