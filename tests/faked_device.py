"""A CUDA device for machines without one: the CPU computes, and the rules of a device hold.

Tensors say that they lie on cuda:0 and refuse to be mixed with the CPU's. Their memory comes out of
a budget, and torch.OutOfMemoryError is raised where that is spent. All threads see the device. It
shows where things lie, what is copied and what memory is needed, not how a GPU rounds or how fast
it is; there is no backward pass on it. It needs a torch that is built without CUDA.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

GIB = 1 << 30
_PAGE = 512  # bytes; torch's allocator gives memory in such pieces
_DEVICE, _HOST = torch.device("cuda", 0), torch.device("cpu")
_aten = torch.ops.aten
# They have no tensor among their arguments; the other factories are made of these by torch itself.
_FACTORIES = (
    *("arange", "arange.start", "arange.start_step", "empty.memory_format", "empty_strided"),
    *("eye", "eye.m", "linspace", "randperm", "randperm.generator"),
)
_FREE = {"empty", "empty_strided", "_local_scalar_dense"}  # launch nothing
# A device reads tensors of the host as indices, which it copies first, and in copies.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_PRODUCTS = {_aten.mm.dtype: torch.mm, _aten.bmm.dtype: torch.bmm}  # a CPU has none of them


class FakedDevice:
    """What happens on the device.

    budget: bytes of its memory; it may be changed at any time. used, most_used: bytes. launches:
    operations that compute or copy, by name. uploads, downloads: copies from the host, and to it.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = self.most_used = 0
        self.launches: Counter[str] = Counter()
        self.uploads = self.downloads = 0
        self._blocks: WeakValueDictionary[int, _Block] = WeakValueDictionary()
        self._lock = threading.RLock()

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return self.budget - self.used

    def reset(self) -> None:
        """Count from 0 again."""
        self.launches.clear()
        self.uploads = self.downloads = 0
        self.most_used = self.used

    def block_of(self, values: Tensor) -> _Block:
        """The memory of a tensor. Raises torch.OutOfMemoryError where it is new and too large."""
        storage = values.untyped_storage()
        with self._lock:
            block = self._blocks.get(storage._cdata)
            if block is None:
                size = -(-storage.nbytes() // _PAGE) * _PAGE
                if size > self.free:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a total "
                        f"capacity of {self.budget} bytes of which {self.free} are free."
                    )
                block = self._blocks[storage._cdata] = _Block(self, storage, size)
            return block

    def take(self, size: int) -> None:
        """Count memory as used, or with a negative size as given back."""
        with self._lock:
            self.used += size
            self.most_used = max(self.most_used, self.used)

    def count(self, name: str, *, uploads: int, downloads: int) -> None:
        """Count an operation."""
        with self._lock:
            self.launches[name] += 1
            self.uploads += uploads
            self.downloads += downloads


class _Block:
    """Memory that a tensor and its views share; it is given back when the last of them is gone."""

    def __init__(self, device: FakedDevice, storage: torch.UntypedStorage, size: int) -> None:
        self.device, self._size = device, size
        self._storage = storage  # while it lives, no other gets its address
        device.take(size)

    def __del__(self) -> None:
        self.device.take(-self._size)


class _OnDevice(Tensor):
    """A tensor of the device. on_cpu: the tensor behind it."""

    on_cpu: Tensor
    block: _Block

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, device: FakedDevice) -> _OnDevice:
        block = device.block_of(values)
        with torch.inference_mode(values.is_inference()):  # a view is what its base is
            made: _OnDevice = Tensor._make_wrapper_subclass(
                cls,
                values.shape,
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=_DEVICE,
            )
        made.on_cpu, made.block = values, block
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """The address behind it, for kernels that find rows by their addresses."""
        return self.on_cpu.data_ptr()

    # With both of these, `Module.to` replaces a parameter by another object.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["on_cpu"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Tensor:
        return tensors["on_cpu"].to(_DEVICE)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.on_cpu!r} on {_DEVICE}"

    def __format__(self, spec: str) -> str:
        return format(self.on_cpu, spec)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)

    def numpy(self, **_: Any) -> Any:
        """What a tensor on a GPU says to this."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def record_stream(self, stream: Any) -> None:
        """Nothing: there is one stream."""


def _as_tensors(index: Any) -> Any:
    """Lists in an index as tensors of the host; torch would have a kernel make them."""
    if isinstance(index, tuple):
        return tuple(map(_as_tensors, index))
    return torch.tensor(index) if isinstance(index, list) else index


_active: FakedDevice | None = None


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what the device would, or refuse what it would."""
    originals: dict[int, _OnDevice] = {}
    foreign = 0

    def unwrapped(value: Any) -> Any:
        nonlocal foreign
        if isinstance(value, _OnDevice):
            originals[id(value.on_cpu)] = value
            return value.on_cpu
        foreign += isinstance(value, Tensor) and value.dim() > 0
        return _HOST if isinstance(value, torch.device) else value

    inner, options = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    device = next((one.block.device for one in originals.values()), _active)
    assert device is not None
    name = func.overloadpacket.__name__
    copies = name in ("copy_", "_to_copy")
    if foreign and not copies and name not in _INDEXING:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu! ({func})"
        )
    to_host = torch.device(kwargs.get("device") or _DEVICE).type == "cpu"
    if not func.is_view and name not in _FREE:
        onto_host = to_host or (name == "copy_" and not isinstance(args[0], _OnDevice))
        uploads = 0 if onto_host else foreign
        device.count(name, uploads=uploads, downloads=int(onto_host))
    if name == "_fused_sdp_choice":
        return 0  # by plain products
    options.pop("pin_memory", None)
    if func in _PRODUCTS:
        *factors, dtype = inner
        result = _PRODUCTS[func](*(one.to(dtype) for one in factors))
    else:
        result = func(*inner, **options)

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or to_host:
            return value
        if isinstance(args[0] if args else None, Tensor) and value is args[0]:
            return value  # a copy into a tensor of the host
        original = originals.get(id(value))
        return _OnDevice(value, device) if original is None else original

    return tree_map(wrapped, result)


class _Moment:
    """A stream or an event: everything on it has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> _Moment:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, other: _Moment) -> float:
        """Milliseconds between two events."""
        return 0.0

    def record_event(self, event: _Moment | None = None) -> _Moment:
        """An event after all that is on the stream."""
        return event or _Moment()

    def nothing(self, *_: Any, **__: Any) -> None:
        """Wait for what has happened."""

    record = synchronize = wait = wait_event = wait_stream = nothing


@contextmanager
def faked_device(budget: int = 8 * GIB) -> Iterator[FakedDevice]:
    """Make `torch.cuda` find one device of so many bytes. For one test at a time."""
    global _active
    device = FakedDevice(budget)
    names = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "a faked GPU",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            name="a faked GPU", total_memory=device.budget, multi_processor_count=1, uuid="none"
        ),
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (device.free, device.budget),
        "memory_allocated": lambda *_: device.used,
        "memory_reserved": lambda *_: device.used,
        "max_memory_allocated": lambda *_: device.most_used,
        "reset_peak_memory_stats": lambda *_: device.reset(),
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "Stream": _Moment,
        "Event": _Moment,
        "current_stream": _Moment,
        "default_stream": _Moment,
        "stream": nullcontext,
        "device": nullcontext,
    }
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda self, *_: self.clone()))
        for name in ("empty", "zeros", "ones", "full", "empty_like"):
            stack.enter_context(patch.object(torch, name, _unpinned(getattr(torch, name))))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, _made_here(getattr(torch, name))))
        stack.enter_context(_linked())
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        stack.callback(library._destroy)
        for name in _FACTORIES:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(_aten, packet), overload or "default")
            library.impl(name, partial(_factory, func), "CUDA")  # type: ignore[no-untyped-call]
        _active = device
        try:
            yield device
        finally:
            _active = None


def _factory(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _compute(func, args, kwargs)


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, but pinned memory is memory like any other."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs)

    return made


def _made_here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same, but what it makes is made on the host and copied."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor if device is None else tensor.to(device)

    return made


@contextmanager
def _linked() -> Iterator[None]:
    """Give torch a guard of current devices and streams, which its builds for the CPU lack.

    It has one itself, and puts it in place of a guard that knows of 0 devices: ours answers 0 to
    everything.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    register = (
        library._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    )
    register.argtypes = (ctypes.c_int8, ctypes.c_void_p)
    register.restype = None
    none = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(none, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(methods))
    cuda = 1  # torch's number of this type of device
    register(cuda, ctypes.addressof(guard))
    try:
        torch._C._ensureCUDADeviceGuardSet()
        yield
    finally:
        register(cuda, None)
