"""What `cmt serve` writes to standard error: JSON, the settings, and never a secret."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from model import load_checkpoint
from service.auth.keys import KeyFile
from service.errors import DatabaseUnavailable
from service.gallery import Gallery
from service.settings import load_settings
from tests.service.processes import STARTING_SECONDS, ServiceProcess, assert_no_defect


@pytest.fixture(scope="module")
def talkative(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, visible: list[Path]
) -> tuple[ServiceProcess, str]:
    """A service that has ended after all kinds of requests with a secret in them, and its key."""
    folder = tmp_path_factory.mktemp("talkative")
    file = KeyFile(folder / "keys.json")
    _, token = file.create("Key of Ms Secret", ["query", "enroll", "admin"])
    image = visible[0].read_bytes()
    service = ServiceProcess(
        folder / "data", tiny_checkpoint, api_keys_file=file.path, log_level="debug"
    )
    with service, service.client(token) as http:
        files = {"image": ("secret.jpg", image)}
        labels = {"person_id": "Ms Secret", "metadata": '{"secret": "secret"}'}
        item = http.post("/gallery", files=files, data=labels).json()["id"]
        http.post("/query", files=files, data={"person_id": "Ms Secret"})
        http.post("/gallery", files={"image": ("secret.jpg", b"no image")}, data=labels)
        http.post("/gallery", files=files, data={"secret": "secret", "top_k": "secret"})
        http.patch(f"/gallery/{item}", json={"camera_id": "secret"})
        http.patch(f"/gallery/{item}", json={"secret": "secret\0"})
        for path in ("/gallery?person_id=Ms+Secret", "/secret/Ms%20Secret", "/gallery/secret"):
            http.get(path)
            http.get(path, headers={"Authorization": "Bearer cmt_of-secret"})
            http.get(path, headers={"X-Request-ID": "secret <secret>"})
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
        upgrade |= {"Sec-WebSocket-Key": "c2VjcmV0LXNlY3JldA=="}
        http.get("/gallery?person_id=Ms+Secret", headers=upgrade)
        with socket.create_connection(service.address, timeout=60) as connection:
            connection.sendall(b"GET /secret\xff\xfe HTTP/1.1\r\nsecret: \x00secret\r\n\r\n")
            connection.recv(1000)
        http.delete("/gallery?person_id=Ms+Secret")
    return service, token


def test_every_line_of_the_log_is_json(talkative: tuple[ServiceProcess, str]) -> None:
    service, _ = talkative
    log = service.log()
    assert all({"event", "level", "timestamp"} <= one.keys() for one in log)
    requests = [one for one in log if one["event"] == "request"]
    assert len(requests) > 15
    assert {"method", "route", "status", "ms", "client", "actor"} <= requests[0].keys()
    assert_no_defect(service)


def test_the_log_names_no_person_no_query_string_and_no_key(
    talkative: tuple[ServiceProcess, str],
) -> None:
    service, token = talkative
    text = service.text()
    assert "secret" not in text.lower()
    assert "person_id" not in text
    assert token not in text
    assert token.removeprefix("cmt_") not in text


def test_the_log_says_the_settings(talkative: tuple[ServiceProcess, str]) -> None:
    service, _ = talkative
    [line] = [one["event"] for one in service.log() if one["event"].startswith("settings: ")]
    settings = json.loads(line.removeprefix("settings: "))
    assert (settings["log_level"], settings["max_pending"]) == ("debug", 64)


COLLECTOR = "http://cmt:geheim@127.0.0.1:9/v1/traces"
DATABASES = (
    "postgresql+psycopg://cmt:geheim@127.0.0.1:9/none",
    "postgresql+psycopg://127.0.0.1:9/none?user=cmt&password=geheim",
)


@pytest.mark.parametrize("url", DATABASES)
def test_a_password_is_neither_in_the_settings_nor_in_an_error(
    url: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = load_settings(
        data_dir=tmp_path, checkpoint=tiny_checkpoint, database_url=url, otlp_endpoint=COLLECTOR
    )
    told = json.dumps(settings.redacted())
    with pytest.raises(DatabaseUnavailable) as caught:
        Gallery.open(tmp_path, load_checkpoint(tiny_checkpoint)[1], database_url=url)
    for text in (told, caught.value.detail):
        assert "127.0.0.1:9/none" in text
        assert "geheim" not in text


def test_the_password_of_a_database_is_never_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    service = ServiceProcess(
        tmp_path, tiny_checkpoint, database_url=DATABASES[1], otlp_endpoint=COLLECTOR
    )
    assert service.ended(STARTING_SECONDS) == 1  # there is no database
    assert "127.0.0.1:9/none" in service.text()
    assert "geheim" not in service.text()
