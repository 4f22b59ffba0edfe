"""What `make image-check` holds the images to. It needs a container engine; its rules do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scripts.image_check import NOT_OF_THE_CONTAINER, Mount, Promises, differences
from tests.deploy.test_compose import OURS, SERVICES

NONE = "0000000000000000"
# A container as it should be, in the engine's words and the kernel's.
HELD = Promises(
    seen={
        "Config": {"Env": ["PATH=/bin", "CMT_DEVICE=cpu"], "StopTimeout": 40},
        "HostConfig": {
            "DeviceRequests": None,
            "Memory": 64,
            "MemorySwap": 64,
            "RestartPolicy": {"Name": "unless-stopped"},
        },
        "NetworkSettings": {
            "Networks": {"cmt-image-check_default": {}},
            "Ports": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "4711"}], "9/tcp": None},
        },
    },
    status={"Name": "init", "NoNewPrivs": "1", "CapPrm": NONE, "CapEff": NONE, "CapBnd": NONE},
    mounts={
        "/": Mount(["ro"], "overlay"),
        "/tmp": Mount(["rw"], "tmpfs"),
        "/data": Mount(["rw"], "ext4"),
        "/models": Mount(["ro"], "ext4"),
        "/run/secrets/one": Mount(["ro"], "ext4"),
    },
)
ASKED: dict[str, Any] = {
    "cap_drop": ["ALL"],
    "environment": {"CMT_DEVICE": "cpu", "CMT_INDEX": None},
    "init": True,
    "mem_limit": "64",
    "memswap_limit": "64",
    "networks": {"default": None},
    "ports": [{"target": 8000, "host_ip": "127.0.0.1", "published": "0"}],
    "read_only": True,
    "restart": "unless-stopped",
    "secrets": [{"source": "one", "target": "/run/secrets/one"}],
    "security_opt": ["no-new-privileges:true"],
    "stop_grace_period": "40s",
    "tmpfs": ["/tmp"],
    "volumes": [{"target": "/data"}, {"target": "/models", "read_only": True}],
}


@pytest.mark.parametrize("name", OURS)
def test_it_knows_every_key_of_the_compose_file(name: str) -> None:
    unknown = [
        key
        for key in SERVICES[name].keys() - NOT_OF_THE_CONTAINER
        if not hasattr(Promises, key) or key not in ASKED.keys() | {"deploy"}
    ]
    assert unknown == []


@pytest.mark.parametrize("key", ASKED)
def test_what_is_as_asked_is_held(key: str) -> None:
    assert getattr(HELD, key)(ASKED[key])[0] is True


def changed(part: str, **values: Any) -> Promises:
    """The container with other values in one part of what the engine says."""
    return replace(HELD, seen=HELD.seen | {part: HELD.seen[part] | values})


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("cap_drop", replace(HELD, status=HELD.status | {"CapBnd": "0000000000000400"})),
        ("environment", changed("Config", Env=["CMT_DEVICE=cuda"])),
        ("init", replace(HELD, status=HELD.status | {"Name": "cmt"})),
        ("mem_limit", changed("HostConfig", Memory=0)),
        ("memswap_limit", changed("HostConfig", MemorySwap=-1)),
        ("networks", changed("NetworkSettings", Networks={"host": {}})),
        ("ports", changed("NetworkSettings", Ports={"8000/tcp": [{"HostIp": "0.0.0.0"}]})),
        ("read_only", replace(HELD, mounts=HELD.mounts | {"/": Mount(["rw"], "overlay")})),
        ("restart", changed("HostConfig", RestartPolicy={"Name": "no"})),
        ("security_opt", replace(HELD, status=HELD.status | {"NoNewPrivs": "0"})),
        ("stop_grace_period", changed("Config", StopTimeout=10)),
        ("tmpfs", replace(HELD, mounts=HELD.mounts | {"/tmp": Mount(["rw"], "ext4")})),
        ("volumes", replace(HELD, mounts=HELD.mounts | {"/models": Mount(["rw"], "ext4")})),
    ],
)
def test_what_is_not_as_asked_is_not_held(key: str, other: Promises) -> None:
    assert getattr(other, key)(ASKED[key])[0] is False


def test_a_gpu_that_is_not_passed_in_is_noticed() -> None:
    asked = SERVICES["gpu"]["deploy"]
    assert HELD.deploy(asked)[0] is False
    assert changed("HostConfig", DeviceRequests=[{"Driver": "nvidia"}]).deploy(asked)[0] is True


def test_what_a_further_file_changes_is_told() -> None:
    plain = {"logging": {"driver": "local"}, "tmpfs": ["/tmp"], "init": True}
    now = {"logging": {"driver": "json-file"}, "tmpfs": ["/tmp"], "init": True}
    assert list(differences(plain, now)) == ['logging.driver: "json-file" instead of "local"']
    assert list(differences(plain, plain)) == []
