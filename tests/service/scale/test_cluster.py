"""What keeps a start with Ray from going on: one sentence with the remedy each."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import RuntimeUnavailable
from service.scale.cluster import Cluster
from service.settings import SettingsError, load_settings

JOINING = "from service.scale.cluster import Cluster\n"
NOT_INSTALLED = f"""
import sys
sys.modules["ray"] = None  # as where it is not installed
{JOINING}Cluster(None, 1)
"""


def test_ray_that_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOT_INSTALLED], capture_output=True, text=True, check=False
    )
    assert "RuntimeUnavailable: the engine ray needs Ray, which is not installed" in done.stderr
    assert "pip install 'cmt-reid[scale]'" in done.stderr


@pytest.mark.parametrize("address", ["", "localhost", "nonsense:port", "127.0.0.1:99999", ":6379"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"HOST:PORT|no Ray cluster answers"):
        Cluster(address, 1)


def test_no_cluster_at_an_address() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: nobody else gets the port meanwhile
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(RuntimeUnavailable, match=f"no Ray cluster answers at {address} ") as no:
            Cluster(address, 1)
    assert "ray start" in str(no.value)
    assert "--engine embedded" in str(no.value)


def test_an_address_where_something_else_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", f"{JOINING}Cluster({address!r}, 1)"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RAY_py_gcs_connect_timeout_s": "1"},
            timeout=120,
        )
    assert f"RuntimeUnavailable: no Ray cluster answers at {address} (Failed to" in done.stderr


def test_shards_are_of_the_engine_ray(tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = {"checkpoint": tiny_checkpoint, "data_dir": tmp_path}
    with pytest.raises(SettingsError, match="give --engine ray"):
        load_settings(**given, shards=2)
    for shards in (0, -1, 5000):
        with pytest.raises(SettingsError, match=re.escape("setting shards:")):
            load_settings(**given, engine="ray", shards=shards)
