"""The whole service: `cmt serve`'s process, spoken to over HTTP."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from service.server import run
from service.settings import load_settings
from tests.service.crash.subject import (
    CONTEXT,
    STARTING_SECONDS,
    TOGETHER,
    Listed,
    ProcessGone,
    Session,
    Subject,
    crop_bytes,
    die_at_write,
)


class ServiceProcess(Subject):
    """A service on a data folder, with the network of one checkpoint."""

    def __init__(self, data_dir: Path, database_url: str | None, checkpoint: Path) -> None:
        super().__init__()
        self._options: dict[str, Any] = {
            "data_dir": data_dir,
            "database_url": database_url,
            "checkpoint": checkpoint,
            "runtime": "torch",
            "device": "cpu",
        }

    def start(self, dies_at_write: int | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._process = CONTEXT.Process(
            target=_serve, args=({**self._options, "port": self._port}, dies_at_write), daemon=True
        )
        self._process.start()

    def sessions(self) -> list[Session]:
        sessions = [_HttpSession(self._port) for _ in range(TOGETHER)]
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                sessions[0].ready()
                return [*sessions]
            except ProcessGone:
                assert self._process is not None
                assert time.monotonic() < deadline
                if not self._process.is_alive():
                    raise
                time.sleep(0.02)

    def begin_close(self) -> None:
        assert self._process is not None
        self._process.terminate()


class _HttpSession:
    """Plain HTTP: a client that retries would send what was cut off a second time."""

    def __init__(self, port: int) -> None:
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=STARTING_SECONDS
        )

    def ready(self) -> None:
        self._call("GET", "/readyz")

    def add(self, person_id: str, keys: list[int]) -> list[str]:
        (key,) = keys
        form = {"person_id": person_id, "metadata": f'{{"key": {key}}}'}
        answer = self._call("POST", "/gallery", data=form, files={"image": crop_bytes(key)})
        return [answer.json()["id"]]

    def delete(self, item_id: str) -> None:
        self._call("DELETE", f"/gallery/{item_id}")

    def erase(self, person_id: str) -> int:
        return int(
            self._call("DELETE", "/gallery", params={"person_id": person_id}).json()["deleted"]
        )

    def nearest(self, key: int) -> tuple[str, float]:
        form = {"top_k": "1", "modulation": "false"}
        answer = self._call("POST", "/query", data=form, files={"image": crop_bytes(key)})
        (hit,) = answer.json()["results"]
        return hit["item"]["id"], hit["distance"]

    def list(self) -> list[Listed]:
        listed: list[Listed] = []
        page = {"limit": "1000"}
        while True:
            answer = self._call("GET", "/gallery", params=page).json()
            listed += [
                Listed(item["id"], item["person_id"], item["metadata"]["key"])
                for item in answer["items"]
            ]
            if answer["next_cursor"] is None:
                return listed
            page["cursor"] = answer["next_cursor"]

    def image(self, item_id: str) -> bytes:
        return self._call("GET", f"/gallery/{item_id}/image").content

    def _call(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise ProcessGone from error
        answer.raise_for_status()
        return answer


def _serve(options: dict[str, Any], dies_at_write: int | None) -> None:
    torch.set_num_threads(1)
    if dies_at_write is not None:
        die_at_write(dies_at_write)
    run(load_settings(**options))
