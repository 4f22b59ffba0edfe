"""An S3 server for tests, moto's, as a process of its own; what it holds is in its memory."""

from __future__ import annotations

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import boto3
import httpx
import pytest

# As moto's own command serves, and without its log.
_SERVE = """
import logging, sys
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
app = DomainDispatcherApplication(create_backend_app)
server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
print(server.port, flush=True)
server.serve_forever()
"""


class ObjectServer:
    """The server. Stopped, nothing answers at its address; paused, nothing ends."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def stop(self) -> None:
        """End it: connections are refused from now on."""
        self._process.kill()
        self._process.communicate()

    def pause(self) -> None:
        """Let it take connections and answer nothing, until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        self._process.send_signal(signal.SIGCONT)

    def client(self, service: str = "s3") -> Any:
        """boto3, to look at what is there."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def demand_rights(self, free: float) -> None:
        """Check who is allowed what, after so many more requests; infinity: never."""
        url = f"{self.endpoint}/moto-api/reset-auth"
        httpx.post(url, content=str(free), trust_env=False, timeout=60).raise_for_status()


class Bucket(NamedTuple):
    """A bucket of a test's own. url: as CMT_CROPS_URL, with a file of credentials."""

    server: ObjectServer
    name: str
    url: str

    @property
    def s3(self) -> Any:
        return self.server.client()

    def objects(self) -> dict[str, bytes]:
        """Everything that it holds of crops: key → bytes."""
        s3, found = self.s3, {}
        listed = s3.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        for key in [one["Key"] for page in listed for one in page.get("Contents", [])]:
            if not key.endswith("/gallery"):
                with suppress(s3.exceptions.NoSuchKey):  # deleted since
                    found[key] = s3.get_object(Bucket=self.name, Key=key)["Body"].read()
        return found


@pytest.fixture(scope="session")
def object_server() -> Iterator[ObjectServer]:
    """One for all tests of a run."""
    server = ObjectServer()
    yield server
    server.stop()


@pytest.fixture
def bucket(object_server: ObjectServer, tmp_path: Path) -> Bucket:
    """A new, empty one."""
    name = f"crops-{uuid.uuid4().hex[:12]}"
    object_server.client().create_bucket(Bucket=name)
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    return Bucket(object_server, name, address(object_server, name, file))


def address(server: ObjectServer, name: str, credentials: Path) -> str:
    """CMT_CROPS_URL of a bucket."""
    parameters = {"endpoint": server.endpoint, "credentials_file": str(credentials)}
    return f"s3://{name}/gate?{urlencode(parameters)}"
