"""What deploy/ has for Prometheus and Grafana, against a real Prometheus that scrapes a service.

Where no GPU is, its gauges are scraped beside the service: NVML is replaced by a small stand-in
then, which gives values and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from service.auth.keys import KeyFile
from service.observability import gpu
from service.observability.metrics import Metrics
from tests.paths import ROOT
from tests.service.conftest import Serve
from tests.service.processes import wait_for

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
ALERTS = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/cmt.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
QUERIES = [target["expr"].replace("$__rate_interval", "1m") for target in TARGETS]
# What an alert compares, which is there also while all is well, and with what.
THRESHOLD = re.compile(r"\s(?:==|>)\s[\d.]+$")
_MISSING = (
    "Prometheus is not installed, and rules and dashboard are tested with it; install it (Debian, "
    "Ubuntu: apt-get install prometheus)"
)


def program(name: str) -> str:
    """The path of a program of Prometheus. Without it the test is skipped, and fails in CI."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(_MISSING)
        pytest.skip(_MISSING)
    return found


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in: one GPU, whose values a test may change."""
    real = pytest.importorskip("pynvml")
    fake: Any = ModuleType("pynvml")
    fake.NVMLError, fake.NVMLError_NotSupported = real.NVMLError, real.NVMLError_NotSupported
    fake.used, fake.failing = 60 << 30, False
    fake.uuids = ["GPU-6ba7b810-9dad-11d1-80b4-00c04fd430c8"]

    def told(value: Any) -> Any:
        if fake.failing:
            raise real.NVMLError(real.NVML_ERROR_GPU_IS_LOST)
        return value

    def by_uuid(uuid: str) -> str:
        if uuid not in fake.uuids:
            raise real.NVMLError(real.NVML_ERROR_NOT_FOUND)
        return uuid

    fake.nvmlInit = lambda: None
    fake.nvmlDeviceGetHandleByUUID = by_uuid
    fake.nvmlDeviceGetMemoryInfo = lambda _: told(SimpleNamespace(used=fake.used, total=80 << 30))
    fake.nvmlDeviceGetUtilizationRates = lambda _: told(SimpleNamespace(gpu=37, memory=5))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    monkeypatch.setattr(gpu, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    return fake


def values(metrics: Metrics) -> dict[str, float]:
    """The gauges of a GPU as they are scraped."""
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name.startswith("cmt_gpu_")
    }


def test_a_gpu_tells_its_memory_and_utilisation(nvml: Any) -> None:
    metrics = Metrics()
    assert gpu.watch_gpu(metrics, "cuda")
    told = {
        "cmt_gpu_memory_used_bytes": float(60 << 30),
        "cmt_gpu_memory_total_bytes": float(80 << 30),
        "cmt_gpu_utilization_ratio": 0.37,
    }
    assert values(metrics) == told
    nvml.used = 1
    assert values(metrics) == told | {"cmt_gpu_memory_used_bytes": 1.0}
    nvml.failing = True  # a scrape goes on where the driver does not
    assert [value == value for value in values(metrics).values()] == [False] * 3


@pytest.mark.parametrize("told", ["by torch", "by the environment"])
def test_a_part_of_a_gpu_tells_its_own_memory(
    nvml: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MIG: what is there of the whole GPU says nothing about it."""

    def unsupported(_: object) -> None:
        raise nvml.NVMLError(3)  # NVML_ERROR_NOT_SUPPORTED

    nvml.nvmlDeviceGetUtilizationRates = unsupported
    if told == "by torch":
        nvml.uuids.append("MIG-6ba7b810-9dad-11d1-80b4-00c04fd430c8")
    else:
        nvml.uuids = ["MIG-of-the-second"]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-of-the-first, MIG-of-the-second")
    handles: list[str] = []

    def memory(handle: str) -> SimpleNamespace:
        handles.append(handle)
        return SimpleNamespace(used=1 << 30, total=10 << 30)

    nvml.nvmlDeviceGetMemoryInfo = memory
    metrics = Metrics()
    assert gpu.watch_gpu(metrics, "cuda:1")
    assert values(metrics) == {
        "cmt_gpu_memory_used_bytes": float(1 << 30),
        "cmt_gpu_memory_total_bytes": float(10 << 30),
    }
    assert {handle.partition("-")[0] for handle in handles} == {"MIG"}


def test_each_process_watches_its_own_gpu(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(
        gpu, "get_device_properties", lambda name: SimpleNamespace(uuid=f"of-{name}")
    )
    nvml.uuids = ["GPU-of-cuda:0", "GPU-of-cuda:1"]
    watched: list[str] = []

    def memory(handle: str) -> SimpleNamespace:
        watched.append(handle)
        return SimpleNamespace(used=1, total=2)

    nvml.nvmlDeviceGetMemoryInfo = memory
    assert gpu.watch_gpu(Metrics(), "cuda:1")
    assert {*watched} == {"GPU-of-cuda:1"}


def test_without_a_gpu_its_metrics_are_absent(
    nvml: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    monkeypatch.setattr(gpu, "get_device_properties", lambda _: SimpleNamespace(uuid="another"))
    assert not gpu.watch_gpu(metrics, "cuda")
    monkeypatch.undo()  # what is installed here
    monkeypatch.setattr(gpu, "get_device_properties", lambda _: SimpleNamespace(uuid="another"))
    assert not gpu.watch_gpu(metrics, "cuda")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert not gpu.watch_gpu(metrics, "cuda")
    assert values(metrics) == {}
    assert [line.message.partition(":")[0] for line in caplog.records] == [
        "no metrics of the GPU"
    ] * 3


def names() -> set[str]:
    """Metrics that dashboard and alerts speak of."""
    text = " ".join([*QUERIES, *(alert["expr"] for alert in ALERTS)])
    return set(re.findall(r"\b(cmt_\w+)", text))


def test_the_files_of_grafana_belong_together() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards/cmt.yml").read_text())["providers"]
    assert {target["datasource"]["uid"] for target in TARGETS} == {source["uid"]}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    described = (ROOT / "docs/operations.md").read_text()
    for name in names():
        metric = re.sub(r"_(bucket|sum|count)$", "", name)
        assert re.search(rf"`{metric}[`{{]", described), f"{name} is in no table of metrics"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for alert in ALERTS:
        assert alert["annotations"]["summary"].endswith(".")
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["alert"] in (ROOT / "docs/deploy.md").read_text()


def test_each_alert_is_raised_by_what_it_is_for(tmp_path: Path) -> None:
    bad = {
        "CmtDown": ['up{job="cmt"} 0'],
        "CmtRestarts": ["cmt_start_time_seconds 1x45 2x4 3x4 4x6"],
        "CmtNotReady": ['cmt_http_requests_total{route="/readyz",status="503"} 0+4x60'],
        "CmtErrors": [
            'cmt_http_requests_total{route="/query",status="500"} 0+1x60',
            'cmt_http_requests_total{route="/query",status="200"} 0+9x60',
        ],
        "CmtOverloaded": ['cmt_rejections_total{code="overloaded"} 0+1x60'],
        "CmtSlowQueue": [
            'cmt_stage_seconds_bucket{stage="queue",le="1"} 0+1x60',
            'cmt_stage_seconds_bucket{stage="queue",le="5"} 0+9x60',
            'cmt_stage_seconds_bucket{stage="queue",le="+Inf"} 0+9x60',
        ],
        "CmtShardsMissing": ["cmt_shards 2x60", "cmt_shards_ok 1x60"],
        "CmtGalleryLacksMemory": ["cmt_gallery_lacks_memory 1x60"],
        "CmtReplicaStale": ["cmt_replica_lag_seconds 0+1x60"],
        "CmtClocksDiffer": ["cmt_clock_ahead_seconds -9x60"],
        "CmtStorageFull": ['cmt_rejections_total{code="storage_full"} 0x58 1x2'],
        "CmtMemoryExhausted": ['cmt_rejections_total{code="memory_exhausted"} 0x58 1x2'],
        "CmtKeysUnreadable": ['cmt_rejections_total{code="keys_unreadable"} 0x58 1x2'],
        "CmtKeysGuessed": ['cmt_rejections_total{code="unauthorized"} 0+20x60'],
        "CmtAuditWaits": ["cmt_audit_failures_total 0x58 1x2"],
        "CmtRetentionWaits": ["cmt_retention_waits 1x60"],
        "CmtCropsUnavailable": ["cmt_crops_unavailable 1x60"],
        "CmtErasuresWait": ["cmt_objects_pending 1x60"],
        "CmtLogLost": ["cmt_log_lines_dropped 0x58 7x2"],
        "CmtGpuMemoryFull": [
            "cmt_gpu_memory_used_bytes 79x60",
            "cmt_gpu_memory_total_bytes 80x60",
        ],
        "CmtGallerySpilled": ["cmt_gallery_spilled_items 1x60"],
    }
    assert bad.keys() == {alert["alert"] for alert in ALERTS}
    tests = []
    for alert in ALERTS:
        raised = {"exp_labels": {**alert["labels"]}, "exp_annotations": alert["annotations"]}
        series = []
        for line in bad[alert["alert"]]:
            name, _, told = line.partition(" ")
            series.append({"series": name, "values": told if "x" in told else f"{told}x60"})
        labels = re.findall(r'(\w+)="([^"]+)"', series[0]["series"])
        if alert["alert"] not in ("CmtErrors", "CmtSlowQueue"):  # which add over labels
            raised["exp_labels"] |= dict(labels)
        rule = {"eval_time": "60m", "alertname": alert["alert"], "exp_alerts": [raised]}
        tests.append({"interval": "1m", "input_series": series, "alert_rule_test": [rule]})
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": tests}))
    command = [program("promtool"), "test", "rules", str(file)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    config = tmp_path / "prometheus" / "prometheus.yml"
    key = tmp_path / "key"
    key.write_text("cmt_key")
    text = config.read_text()
    assert text.count("/run/secrets/metrics-key") == 1
    config.write_text(text.replace("/run/secrets/metrics-key", str(key)))
    command = [program("promtool"), "check", "config", str(config)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in answer.stdout


@pytest.fixture
def gpu_target(nvml: Any) -> Iterator[str]:
    """The gauges of a GPU where Prometheus can scrape them → host:port."""
    metrics = Metrics()
    assert gpu.watch_gpu(metrics, "cuda")
    registry: CollectorRegistry = metrics._registry
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def prometheus(
    serve: Serve, port: int, tmp_path: Path, gpu_target: str, visible: list[Path]
) -> Iterator[httpx.Client]:
    """Prometheus with the files of deploy/, after several scrapes of a service that is used.

    Changed are only addresses, the place of the key, and how often it scrapes and evaluates.
    """
    keys = tmp_path / "keys.json"
    _, token = KeyFile(keys).create("prometheus", ["query"])
    _, own = KeyFile(keys).create("desk", ["query", "enroll"])
    shutil.copytree(DEPLOY / "prometheus", tmp_path / "prometheus")
    (tmp_path / "key").write_text(f"{token}\n")
    file = tmp_path / "prometheus" / "prometheus.yml"
    config = yaml.safe_load(file.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "/run/secrets/metrics-key"}
    assert job["static_configs"] == [{"targets": ["cmt:8000"]}]
    job["authorization"] = {"credentials_file": str(tmp_path / "key")}
    listen = f"127.0.0.1:{port}"
    options = {
        "config.file": file,
        "storage.tsdb.path": tmp_path / "tsdb",
        "web.listen-address": listen,
    }
    with serve(tmp_path / "data", api_keys_file=keys) as url:
        target = url.removeprefix("http://")
        job["static_configs"] = [{"targets": [target, gpu_target]}]
        file.write_text(yaml.safe_dump(config))
        command = [program("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
        with (tmp_path / "output").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        bearer = {"Authorization": f"Bearer {own}"}
        errors = f'cmt_http_requests_total{{instance="{target}",status="503",route="/gallery"}}'
        grown = f"changes({errors}[1m])"
        client = partial(httpx.Client, trust_env=False, timeout=60)
        try:
            api = f"http://{listen}/api/v1"
            with client(base_url=url, headers=bearer) as http, client(base_url=api) as asked:

                def used() -> bool:
                    """Use the service until there are rates of all of it."""
                    assert process.poll() is None, (tmp_path / "output").read_text()
                    image = {"image": visible[0].read_bytes()}
                    assert http.post("/gallery", files=image).is_success
                    assert http.post("/query", files=image).is_success
                    assert http.post("/query", files={"image": b"x"}).status_code == 415
                    keys.rename(tmp_path / "away")  # an error of the service, and a real one
                    assert http.get("/gallery").status_code == 503
                    (tmp_path / "away").rename(keys)
                    try:
                        return bool(series(asked, f"{grown} > 2"))
                    except httpx.TransportError:
                        return False

                wait_for(used, "Prometheus does not scrape it")
                yield asked
        finally:
            process.terminate()
            process.wait(60)


def series(prometheus: httpx.Client, query: str) -> list[Any]:
    """What an instant query returns."""
    answer = prometheus.get("/query", params={"query": query})
    if answer.status_code == 503:  # it is starting
        return []
    assert answer.is_success, (query, answer.text)
    found: list[Any] = answer.json()["data"]["result"]
    return found


def test_every_query_returns_series_of_a_service_that_is_scraped(
    prometheus: httpx.Client,
) -> None:
    assert len(QUERIES) > 15
    assert [query for query in QUERIES if not series(prometheus, query)] == []
    for alert in ALERTS:
        compared = THRESHOLD.sub("", alert["expr"])
        assert compared != alert["expr"]
        assert series(prometheus, compared), alert["alert"]
    known = set(prometheus.get("/label/__name__/values").json()["data"])
    assert names() <= known

    def firing() -> set[str]:
        (group,) = prometheus.get("/rules").json()["data"]["groups"]
        assert len(group["rules"]) == len(ALERTS)
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
        if any(rule["health"] != "ok" for rule in group["rules"]):
            return set()  # not evaluated yet
        return {rule["name"] for rule in group["rules"] if rule["state"] == "firing"}

    # What happened to the service, as soon as it is evaluated, and nothing else.
    assert wait_for(firing, "no alert is raised") == {"CmtKeysUnreadable"}
