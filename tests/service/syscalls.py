"""The system calls of a running process, by ptrace: what strace does, without strace."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

_SYSCALL, _DETACH, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 24, 17, 0x4206, 0x4207, 0x420E
_MARK_SYSCALL_STOPS = 1  # PTRACE_O_TRACESYSGOOD: they are SIGTRAP | 0x80
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1
_NUMBERS = {
    "x86_64": {1: "write", 18: "pwrite64", 74: "fsync", 75: "fdatasync"},
    "aarch64": {64: "write", 68: "pwrite64", 82: "fsync", 83: "fdatasync"},
}


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info, at the entry of a call."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("rest", ctypes.c_uint64),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int, address: int = 0, data: object = None) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace request {request:#x}: {os.strerror(error)}")


def _file(pid: int, descriptor: int) -> str:
    return str(Path(f"/proc/{pid}/fd/{descriptor}").readlink())


def writes_and_syncs(pid: int, go: Callable[[], object]) -> Iterator[tuple[str, str]]:
    """Follow the main thread of a child process from `go` on → (call, file), until it exits.

    The child must be waiting when this starts, and `go` must let it go on.
    """
    names = _NUMBERS[platform.machine()]
    _ptrace(_SEIZE, pid, 0, _MARK_SYSCALL_STOPS)
    _ptrace(_INTERRUPT, pid)
    os.waitpid(pid, 0)
    go()
    pending = 0
    while True:
        _ptrace(_SYSCALL, pid, 0, pending)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return
        stop = os.WSTOPSIG(status)
        pending = 0 if status >> 16 or stop == _SYSCALL_STOP else stop
        if stop != _SYSCALL_STOP:
            continue
        info = _Info()
        _ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.byref(info))
        if info.op == _ENTRY and info.number in names:
            yield names[info.number], _file(pid, info.arguments[0])
