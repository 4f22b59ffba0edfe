"""What the host has no more of is answered with 503, not as a defect of the code."""

from __future__ import annotations

import asyncio
import errno
import os

import httpx
import pytest
import torch
from starlette.types import Receive, Scope, Send

from service.http.middleware import RequestLogMiddleware
from service.observability.metrics import Metrics
from service.observability.tracing import Tracing


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("can't start new thread"), "runtime_unavailable"),
        (ExceptionGroup("", [RuntimeError("can't start new thread")]), "runtime_unavailable"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "runtime_unavailable"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "runtime_unavailable"),
        (MemoryError(), "memory_exhausted"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "runtime_unavailable"),
    ],
)
def test_a_shortage_is_503_with_a_time_to_try_again(error: Exception, code: str) -> None:
    answer = asyncio.run(answer_to(error))
    assert (answer.status_code, answer.json()["code"]) == (503, code)
    assert int(answer.headers["retry-after"]) > 0


def test_any_other_error_is_a_defect() -> None:
    answer = asyncio.run(answer_to(RuntimeError("of the code")))
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "of the code" not in answer.text


async def answer_to(error: Exception) -> httpx.Response:
    async def raising(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    app = RequestLogMiddleware(raising, metrics=Metrics(), tracing=Tracing(None))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://localhost"
    ) as http:
        return await http.get("/gallery")
