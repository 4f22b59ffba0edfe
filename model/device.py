"""The device that a command's --device or a setting names."""

from __future__ import annotations

import os
import re

DEVICES = "auto, cpu, cuda or, of several GPUs, cuda:1"  # of an option's help
_NAME = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?")


class DeviceError(ValueError):
    """A device that this machine does not have; the message says what to do."""


def checked_name(name: str) -> str:
    """The name of a device, whether this machine has it or not. Raises DeviceError for others."""
    if _NAME.fullmatch(name) is None:
        raise DeviceError(f"{name!r} is no device; use {DEVICES}")
    return name


def chosen_device(name: str) -> str:
    """The GPU for "auto" where there is one, else the CPU; "cpu", "cuda" and "cuda:1" are it.

    A GPU with a number becomes this thread's current one, which is meant where none is named.
    Raises DeviceError for a name of another kind and for a GPU that is not there, before anything
    is computed.
    """
    import torch  # here: settings are checked before torch is loaded

    checked_name(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else "is built without CUDA and "
        remedy = "install the extra gpu" if build else "check the driver with nvidia-smi"
        if not build and visible is not None:
            remedy += f" and CUDA_VISIBLE_DEVICES, which is {visible!r}"
        raise DeviceError(
            f"PyTorch {torch.__version__} {build}finds no CUDA device; {remedy}, or use device cpu"
        )
    _, _, number = name.partition(":")
    if number and int(number) >= torch.cuda.device_count():
        among = "" if visible is None else f" among CUDA_VISIBLE_DEVICES={visible}"
        raise DeviceError(
            f"there is no GPU {number}, only {torch.cuda.device_count()}{among}, counted from 0; "
            "use another, or as many processes as there are GPUs"
        )
    if number:
        torch.cuda.set_device(int(number))
    return name
