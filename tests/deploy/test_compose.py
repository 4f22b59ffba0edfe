"""What docker-compose.yml promises. No container runs here: what it would run has its own tests."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from service.settings import Settings, load_settings
from tests.paths import ROOT
from tests.service.processes import ServiceProcess, is_up, kept_port, wait_for
from tests.test_project import PROJECT

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = ("gpu", "cpu", "ray")
# The image and the profile set these: the container would not work, or not safely, with others.
FIXED = {"api_keys_file", "data_dir", "device", "host", "port"}
EXAMPLE = (ROOT / ".env.example").read_text()
VARIABLE = re.compile(r"\$\{(\w+)(?::?-((?:[^{}$]|\$\{[^{}]*\})*))?\}")


def shown() -> dict[str, str]:
    """The variables of .env.example, with # before them or not."""
    return dict(re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))


def filled(text: str) -> str:
    """A text of the compose file as it is where no variable is set."""
    while VARIABLE.search(text):
        text = VARIABLE.sub(lambda found: found[2] or "", text)
    return text


def duration(text: str) -> int:
    """Seconds of a duration such as 40s."""
    return int(filled(text).removesuffix("s"))


def test_it_serves_on_a_gpu_unless_told_otherwise() -> None:
    (profile,) = re.findall(r"^COMPOSE_PROFILES=(\w+)$", (ROOT / ".env").read_text(), re.MULTILINE)
    started = [name for name, one in SERVICES.items() if profile in one["profiles"]]
    assert started == ["gpu"]
    (device,) = SERVICES["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert filled(device["device_ids"][0]) == "0"
    assert "deploy" not in SERVICES["cpu"]
    for name in OURS:
        build = SERVICES[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()
        assert build["args"]["EXTRA"] in PROJECT["project"]["optional-dependencies"]
        assert "data:/data" in map(filled, SERVICES[name]["volumes"])
        assert SERVICES[name]["environment"]["CMT_DEVICE"] == ("cuda" if name == "gpu" else "cpu")


def test_every_setting_can_be_made_in_the_env_file() -> None:
    settings = {f"CMT_{name.upper()}" for name in Settings.model_fields.keys() - FIXED}
    for name in OURS:
        passed = SERVICES[name]["environment"]
        assert passed.keys() == settings | {"CMT_DEVICE"}
        # Without a value: compose takes it from .env or the shell, and leaves it out otherwise.
        given = {key for key, value in passed.items() if value is not None}
        sharded = {"CMT_ENGINE", "CMT_SHARDS"} if name == "ray" else set()
        assert given == {"CMT_DEVICE", "CMT_TRUSTED_PROXIES"} | sharded
    assert {name for name in shown() if name.startswith("CMT_")} == settings | {"CMT_PUBLISH"}
    for name in FIXED:
        assert re.search(rf"^# .*\bCMT_{name.upper()}\b", EXAMPLE, re.MULTILINE), name


def test_the_example_shows_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = {"checkpoint": tmp_path / "c", "data_dir": tmp_path}
    own = {"CMT_PUBLISH", "CMT_CHECKPOINT", "CMT_DATABASE_URL", "CMT_TRUSTED_PROXIES"}
    before = load_settings(**needed)
    for name, value in shown().items():
        if name.startswith("CMT_") and value and name not in own:
            monkeypatch.setenv(name, value)
    assert load_settings(**needed) == before
    # And those of compose itself.
    text = (ROOT / "docker-compose.yml").read_text()
    uncommented = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    variables = {
        name: filled(default)
        for name, default in [
            *VARIABLE.findall(uncommented),
            ("TORCH_INDEX", "https://download.pytorch.org/whl/cpu"),
        ]
    }
    example = shown()
    assert variables.keys() == {
        name for name in example if not name.startswith("CMT_") and name != "COMPOSE_PROFILES"
    } | {"CMT_PUBLISH", "CMT_TRUSTED_PROXIES"}
    del variables["DATABASE_PASSWORD_FILE"]  # none, where the profile is off
    assert {name: example[name] for name in variables} == variables


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert len(service["profiles"]) == 1
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert re.fullmatch(r"\d+[mg]", filled(service["mem_limit"]))
    assert name in OURS or "healthcheck" in service  # the image's own
    for published in service.get("ports", []):
        assert name == "caddy" or filled(published).startswith("127.0.0.1:")
    for variable, value in service.get("environment", {}).items():
        if re.search("PASSWORD|SECRET|KEY", variable):
            assert variable.endswith("_FILE"), f"{variable} would be seen in docker inspect"
            assert value == f"/run/secrets/{service['secrets'][0]}"


def test_a_stop_gives_requests_the_time_that_they_may_take() -> None:
    timeout = Settings.model_fields["shutdown_timeout"].default
    for name in OURS:
        assert duration(SERVICES[name]["stop_grace_period"]) > timeout
        assert SERVICES[name]["init"] is True


def test_checkpoints_of_the_host_are_seen_and_not_changed() -> None:
    for name in OURS:
        assert "./models:/models:ro" in map(filled, SERVICES[name]["volumes"])


def test_postgres_has_its_password_from_a_file() -> None:
    postgres = SERVICES["postgres"]
    assert postgres["image"] == "postgres:17"
    assert "ports" not in postgres
    assert COMPOSE["networks"]["database"]["internal"] is True
    assert "database:/var/lib/postgresql/data" in postgres["volumes"]
    assert postgres["healthcheck"]["test"][1] == "pg_isready"
    url = shown()["CMT_DATABASE_URL"]
    user, database = (postgres["environment"][f"POSTGRES_{name}"] for name in ("USER", "DB"))
    file = postgres["environment"]["POSTGRES_PASSWORD_FILE"]
    assert url == f"postgresql+psycopg://{user}@postgres/{database}?password_file={file}"
    for name in OURS:
        assert [*postgres["secrets"], "crops-credentials"] == SERVICES[name]["secrets"]
        assert "database" in SERVICES[name]["networks"]
        assert SERVICES[name]["depends_on"]["postgres"] == {
            "condition": "service_healthy",
            "required": False,
        }


def test_only_the_proxy_can_have_the_address_that_is_trusted() -> None:
    address = ipaddress.ip_address(filled(SERVICES["caddy"]["networks"]["edge"]["ipv4_address"]))
    for name in OURS:
        trusted = json.loads(filled(SERVICES[name]["environment"]["CMT_TRUSTED_PROXIES"]))
        assert trusted == [str(address)]
        assert "edge" in SERVICES[name]["networks"]
    (network,) = COMPOSE["networks"]["edge"]["ipam"]["config"]
    given_out = ipaddress.ip_network(filled(network["ip_range"]))
    whole = ipaddress.ip_network(filled(network["subnet"]))
    assert given_out.subnet_of(whole)  # type: ignore[arg-type]
    assert address in whole
    assert address not in given_out
    assert str(address) != filled(network["gateway"])  # whom requests to a published port come from


def test_what_is_mounted_from_here_is_here() -> None:
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = filled(volume).partition(":")[0]
            if source.startswith("./") and source != "./models":  # the host's own
                assert (ROOT / source).exists(), source
            elif not source.startswith("."):
                assert source in COMPOSE["volumes"]


def test_secrets_are_made_once_and_in_a_private_folder(tmp_path: Path) -> None:
    shutil.copy(ROOT / "deploy/make-secrets", tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    docker = programs / "docker"  # stands for the service, which has to run
    docker.write_text('#!/bin/sh\nif [ "$4" = cpu ]; then echo "cmt_key of $7"; else exit 1; fi\n')
    docker.chmod(0o755)

    def make(*service: str) -> int:
        path = f"{programs}:{os.environ['PATH']}"
        command = ["sh", str(tmp_path / "make-secrets"), *service]
        return subprocess.run(command, env={"PATH": path}, capture_output=True).returncode

    folder = tmp_path / "secrets"
    assert make() == 0
    first = {file.name: file.read_text() for file in folder.iterdir()}
    assert first.keys() == {"database-password", "grafana-password"}
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in first.values())
    assert len(set(first.values())) == 2
    assert make("gpu") != 0  # it does not run
    assert make("cpu") == 0
    now = {file.name: file.read_text() for file in folder.iterdir()}
    assert now == first | {"metrics-key": "cmt_key of create\n"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o444}
    needed = {Path(filled(one["file"])).name for one in COMPOSE["secrets"].values()}
    assert needed - {"null"} <= now.keys()


def test_compose_itself_reads_it_so(tmp_path: Path) -> None:
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    version = [*compose, "version", "--short"]
    if not shutil.which(compose[0]) or not subprocess.run(version, capture_output=True).stdout:
        pytest.skip("docker compose is not installed; the other tests read the file as YAML")
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    chosen = {
        "COMPOSE_PROFILES": "gpu,tls,monitoring,postgres",
        "CMT_RETENTION_DAYS": "30",
        "CMT_CORS_ORIGINS": '["https://desk.example"]',
        "EDGE": "10.9.8",
        "GPU": "1",
        "MEMORY_LIMIT": "64m",
        "DATA": str(tmp_path),
    }
    assert chosen.keys() <= shown().keys()
    lines = "".join(f"{name}={value}\n" for name, value in chosen.items())
    (tmp_path / ".env").write_text(f"{EXAMPLE}\n{lines}")
    command = [*compose, "config", "--format", "json"]
    answer = subprocess.run(
        command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    read = json.loads(answer.stdout)
    assert read["services"].keys() == SERVICES.keys() - {"cpu"}
    gpu = read["services"]["gpu"]
    assert {name: value for name, value in gpu["environment"].items() if value is not None} == {
        "CMT_DEVICE": "cuda",
        "CMT_RETENTION_DAYS": "30",
        "CMT_CORS_ORIGINS": '["https://desk.example"]',
        "CMT_TRUSTED_PROXIES": '["10.9.8.2"]',
    }
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["1"]
    assert int(gpu["mem_limit"]) == int(gpu["memswap_limit"]) == 64 << 20
    mounts = {one["target"]: (one["type"], one["source"]) for one in gpu["volumes"]}
    assert mounts["/data"] == ("bind", str(tmp_path))
    (network,) = read["networks"]["edge"]["ipam"]["config"]
    assert network["subnet"] == "10.9.8.0/28"
    assert read["services"]["caddy"]["networks"]["edge"]["ipv4_address"] == "10.9.8.2"


# --- TLS ---


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    with kept_port() as one, kept_port() as other:
        yield one, other


@pytest.fixture
def site(tmp_path: Path, tiny_checkpoint: Path, ports: tuple[int, int]) -> Iterator[str]:
    """A service behind Caddy as the profile tls configures it → its address with TLS."""
    if shutil.which("caddy") is None:
        pytest.skip("caddy is not installed")
    port, probe = ports
    text = (ROOT / "deploy/caddy/Caddyfile").read_text()
    assert text.count("admin off") == text.count(":2020") == 1
    # Nothing of the machine's: neither its port 80, nor that of another test.
    text = text.replace("admin off", "admin off\n\tauto_https disable_redirects")
    (tmp_path / "Caddyfile").write_text(text.replace(":2020", f":{probe}"))
    with ServiceProcess(
        tmp_path / "data", tiny_checkpoint, trusted_proxies=["127.0.0.1"]
    ) as service:
        environment = {
            **os.environ,
            "SITE": f"https://localhost:{port}",
            "UPSTREAM": "{}:{}".format(*service.address),
            "XDG_DATA_HOME": str(tmp_path),
            "XDG_CONFIG_HOME": str(tmp_path),
        }
        command = ["caddy", "run", "--adapter", "caddyfile", "--config", "Caddyfile"]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=output, stderr=output
            )
        try:
            health, site = f"http://127.0.0.1:{probe}", f"https://localhost:{port}"
            with httpx.Client(verify=False, trust_env=False, timeout=60) as http:

                def up() -> bool:
                    assert process.poll() is None, (tmp_path / "output").read_text()
                    # It listens before its certificate authority has signed one for the site.
                    return is_up(http, health) and is_up(http, f"{site}/gallery")

                wait_for(up, "caddy does not start")
            yield site
        finally:
            process.terminate()
            process.wait(60)


def test_the_proxy_speaks_tls_and_forwards_only_what_it_saw(site: str) -> None:
    claims = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Prefix": "/evil", "Origin": site}
    with httpx.Client(
        base_url=site, headers=claims, verify=False, trust_env=False, timeout=60
    ) as http:
        # Its own page: that it came by https is known from the proxy alone.
        assert http.get("/gallery").is_success
        newest: Any = http.get("/admin/audit?limit=1").json()["entries"][0]
        assert newest["actor"] == "address:127.0.0.1"
        assert "servers" not in http.get("/openapi.json").json()
