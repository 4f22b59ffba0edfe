"""The device that a command's --device or a setting names."""

from __future__ import annotations

import torch


class DeviceError(ValueError):
    """A device that this machine does not have; the message says what to do."""


def chosen_device(name: str) -> str:
    """The GPU for "auto" where there is one, else the CPU; "cpu", "cuda" and "cuda:1" are it.

    Raises DeviceError for a name of another kind and for a GPU that is not there, before anything
    is computed.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if name == "cpu":
        return name
    if kind != "cuda" or (name != kind and not (number.isascii() and number.isdecimal())):
        raise DeviceError(f"{name!r} is no device; use auto, cpu, cuda or, of several GPUs, cuda:1")
    if not torch.cuda.is_available():
        build = "" if torch.version.cuda else "is built without CUDA and "
        remedy = "install the extra gpu" if build else "check the driver with nvidia-smi"
        raise DeviceError(
            f"PyTorch {torch.__version__} {build}finds no CUDA device; {remedy}, or use device cpu"
        )
    if number and int(number) >= torch.cuda.device_count():
        raise DeviceError(
            f"there is no GPU {number}, only {torch.cuda.device_count()}, counted from 0; use "
            "another, or as many processes as there are GPUs"
        )
    return name
