"""What the image runs, as the user that it runs as: the entry point and the health check."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from tests.paths import ROOT
from tests.service.processes import STARTING_SECONDS, is_up, wait_for

USER = 10001
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
COMMANDS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder that the service's user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="cmt-volume-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data").mkdir(0o700)
        (folder / "home").mkdir()
        give(folder / "data", USER)
        give(folder / "home", USER)
        yield folder


def give(path: Path, user: int, group: int | None = None) -> None:
    """Change the owner, where that can be done."""
    if os.geteuid() == 0:
        os.chown(path, user, user if group is None else group)


def arguments(folder: Path, **settings: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of the container, with the volume at `folder`/data."""
    environment = {
        "PATH": COMMANDS,
        "HOME": str(folder / "home"),
        "CMT_DATA_DIR": str(folder / "data"),
        "CMT_API_KEYS_FILE": str(folder / "data" / "api-keys.json"),
        "CMT_HOST": "0.0.0.0",
        "CMT_PORT": "0",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    user = f"--reuid={USER} --regid={USER} --groups={USER} --no-new-privs"
    # It may read everything, for this machine's interpreter may be at home in a private folder.
    reading = "--inh-caps=-all,+dac_read_search --ambient-caps=+dac_read_search"
    drop = ["setpriv", *user.split(), *reading.split()] if os.geteuid() == 0 else []
    return [*drop, "sh", str(ROOT / "docker/entrypoint"), "serve"], environment


def start(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """A start that ends by itself, at the latest because no checkpoint is configured."""
    command, environment = arguments(folder, **settings)
    answer = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert answer.returncode == 1, answer
    return answer


@contextmanager
def serving(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The service with the demo's checkpoint, until it is ready; killed in the end."""
    checkpoint = next((ROOT / "examples").glob("*.safetensors"))
    command, environment = arguments(
        folder, CMT_CHECKPOINT=str(checkpoint), CMT_RUNTIME="torch", CMT_LOG_FORMAT="json"
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def port(folder: Path) -> int:
    """Where a service answers, once it does."""

    def ready() -> int | None:
        found = re.search(r"serving on http://0\.0\.0\.0:(\d+)", (folder / "log").read_text())
        if found is None:
            return None
        url = f"http://127.0.0.1:{found[1]}"
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            return int(found[1]) if is_up(http, "/readyz") else None

    return int(wait_for(ready, "it does not become ready", STARTING_SECONDS))


def test_the_first_key_is_in_a_private_file_and_in_no_log(volume: Path) -> None:
    keys, first = volume / "data" / "api-keys.json", volume / "data" / "first-key"
    answer = start(volume)
    assert "checkpoint is missing" in answer.stderr
    assert str(first) in answer.stdout
    assert "cmt_" not in answer.stdout + answer.stderr
    key = first.read_text().strip()
    assert hashlib.sha256(key.encode()).hexdigest() in keys.read_text()
    for file in (keys, first):
        assert file.stat().st_mode & 0o777 == 0o600
    assert {file.name for file in (volume / "data").iterdir()} == {keys.name, first.name}
    stored = keys.read_text()
    first.unlink()
    again = start(volume)
    assert again.stdout == ""
    assert keys.read_text() == stored
    assert not first.exists()


def test_a_first_key_that_nobody_could_read_is_made_again(volume: Path) -> None:
    programs = volume / "programs"
    programs.mkdir()
    broken = programs / "cmt"  # stores the key and fails to print it, as on a full disk
    broken.write_text('#!/bin/sh\nprintf "{}" > "$4"\nexit 1\n')
    broken.chmod(0o755)
    start(volume, PATH=f"{programs}:{os.environ['PATH']}")
    assert not (volume / "data" / "api-keys.json").exists()
    start(volume)
    key = (volume / "data" / "first-key").read_text().strip()
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert digest in (volume / "data" / "api-keys.json").read_text()


@pytest.mark.parametrize("foreign", ["data", "data/gallery.sqlite3", "data/index"])
@ROOT_ONLY
def test_a_folder_of_somebody_else_is_one_sentence_and_no_key(volume: Path, foreign: str) -> None:
    place = volume / foreign
    if place.suffix:
        place.write_bytes(b"")
    else:
        place.mkdir(exist_ok=True)
    place.chmod(0o755 if place.is_dir() else 0o600)
    give(place, 0)
    before = sorted((volume / "data").iterdir())
    answer = start(volume)
    [sentence] = answer.stderr.splitlines()
    assert str(place) in sentence
    assert "belongs to user 0" in sentence
    assert "sudo chown -R 10001:10001 FOLDER" in sentence
    assert answer.stdout == ""
    assert sorted((volume / "data").iterdir()) == before


def test_a_place_that_is_no_folder_is_one_sentence(volume: Path) -> None:
    (volume / "data").rmdir()
    (volume / "data").write_bytes(b"")
    [sentence] = start(volume).stderr.splitlines()
    assert f"{volume / 'data'} cannot be written (Not a directory)" in sentence


@ROOT_ONLY
def test_a_volume_whose_mode_stays_is_a_warning_and_what_hangs_is_ended(volume: Path) -> None:
    (volume / "data").chmod(0o2770)  # as fsGroup leaves it
    give(volume / "data", 0, USER)
    with serving(volume) as process:
        answering = port(volume)
        log = (volume / "log").read_text()
        assert "others may use" in log
        assert "mount it so that only the service's user can enter it" in log
        key = (volume / "data" / "first-key").read_text().strip()
        assert key not in log
        address = f"http://127.0.0.1:{answering}/gallery"
        bearer = {"Authorization": f"Bearer {key}"}
        answer = httpx.get(address, headers=bearer, trust_env=False, timeout=60)
        assert answer.status_code == 200

        assert health(volume, answering).returncode == 0
        process.send_signal(signal.SIGSTOP)
        (volume / "home" / ".health").write_text("7")
        assert "ended by SIGTERM" in health(volume, answering).stderr
        assert process.poll() is None  # it is stopped, as one that hangs, and cannot hear it
        (volume / "home" / ".health").write_text("11")
        assert "ended by SIGKILL" in health(volume, answering).stderr
        assert process.wait(60) == -signal.SIGKILL
        assert "the service is ended by SIGKILL" in (volume / "log").read_text()


# --- the health check ---


def health(folder: Path, number: int) -> subprocess.CompletedProcess[str]:
    """One health check of a service at a port, as the image runs it."""
    environment = {"PATH": COMMANDS, "HOME": str(folder / "home"), "CMT_PORT": str(number)}
    command = [sys.executable, str(ROOT / "docker/health")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@contextmanager
def answers(status: int, code: str) -> Iterator[int]:
    """Something whose every answer is this problem → its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readyz"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"code": code, "detail": f"told: {code}"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def victim(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that the health check takes for the service."""
    with subprocess.Popen(["sleep", "600"], stderr=subprocess.DEVNULL) as process:
        (folder / "home" / ".serve.pid").write_text(str(process.pid))
        try:
            yield process
        finally:
            process.kill()


def test_only_what_hangs_again_and_again_is_ended(volume: Path) -> None:
    with victim(volume) as process:
        with answers(503, "not_ready") as number:  # it was never ready: a start takes its time
            assert [health(volume, number).returncode for _ in range(9)] == [1] * 9
        with answers(200, "") as number:
            assert health(volume, number).returncode == 0
        with answers(503, "database_unavailable") as number:  # which a restart would not mend
            told = [health(volume, number) for _ in range(9)]
            assert {(one.returncode, one.stderr) for one in told} == {
                (1, "told: database_unavailable\n")
            }
        with answers(503, "not_ready") as number:
            assert [health(volume, number).returncode for _ in range(5)] == [1] * 5
        with answers(200, "") as number:  # and the count begins again
            assert health(volume, number).returncode == 0
        with answers(503, "not_ready") as number:
            for _ in range(7):
                assert health(volume, number).stderr == "told: not_ready\n"
            assert process.poll() is None
            assert "ended by SIGTERM" in health(volume, number).stderr
        assert process.wait(60) == -signal.SIGTERM


def test_one_that_nobody_answers_for_is_unhealthy(volume: Path) -> None:
    with answers(200, "") as number:
        pass
    with victim(volume) as process:
        (volume / "home" / ".health").write_text("7")
        checked = health(volume, number)
        assert checked.returncode == 1
        assert "no answer" in checked.stderr
        assert process.wait(60) == -signal.SIGTERM
