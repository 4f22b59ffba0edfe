"""The manifests: known to Kubernetes, nothing real in them, and what they start comes up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.auth.authorization import ROUTE_SCOPES
from service.auth.keys import KeyFile
from service.settings import Settings, SettingsError
from tests.deploy import pod as pods
from tests.deploy.kustomize import Manifest, build, documents
from tests.deploy.pod import Pod, Volume, running
from tests.paths import MINI, ROOT
from tests.service.postgres import postgres, postgres_url  # noqa: F401 - fixtures
from tests.service.processes import wait_for

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ["cpu", "gpu", "postgresql"]
# The oldest that README.md names, and the newest that the checker knows.
KUBERNETES = ("1.31", kubernetes_validate.latest_version())
USER = 10001
IMAGE = sorted((MINI / "cam1").glob("*/0001.jpg"))[0].read_bytes()

cannot = pods.why_not()
as_a_pod = pytest.mark.skipif(cannot is not None, reason=str(cannot))


def overlay(name: str) -> list[Manifest]:
    return build(FOLDER / "overlays" / name)


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (one for one in manifests if one["kind"] == kind)
    return found


def pod_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = only(overlay(name), "Deployment")["spec"]["template"]["spec"]
    return spec


def container_of(name: str) -> dict[str, Any]:
    (container,) = pod_of(name)["containers"]
    assert isinstance(container, dict)
    return container


def environment_of(name: str) -> dict[str, Any]:
    return {one["name"]: one for one in container_of(name)["env"]}


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    manifests = overlay(name)
    assert len(manifests) >= 6
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    manifest = only(overlay("cpu"), "Deployment")
    manifest["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)


def test_every_file_is_in_a_kustomization_or_stands_for_itself() -> None:
    files = {path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"}
    named = {
        customization.parent / name
        for customization in FOLDER.rglob("kustomization.yaml")
        for name in re.findall(r"^  - (\S+\.yaml)$", customization.read_text(), re.MULTILINE)
    }
    alone = {"secrets.example.yaml", "maintenance.yaml", "ray/rayservice.yaml"}
    assert files - named == {FOLDER / name for name in alone}


def test_the_ray_service_starts_pods_and_an_application_that_exist(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    (manifest,) = documents(FOLDER / "ray" / "rayservice.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}}
        for kubernetes in KUBERNETES:
            kubernetes_validate.validate(pod | group["template"], kubernetes, strict=True)
        (container,) = group["template"]["spec"]["containers"]
        assert container["securityContext"] == container_of("cpu")["securityContext"]
        names = {one["name"] for one in container["env"]}
        assert {"CMT_API_KEYS_FILE", "CMT_DATABASE_URL"} <= names
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    made = {"checkpoint": str(tiny_checkpoint), "data_dir": "data"}
    build_application = getattr(import_module(module), name)
    with pytest.raises(SettingsError, match="there is no API key"):  # for other machines, too
        build_application(application["args"] | made)
    local = {"host": "127.0.0.1"}
    assert build_application(application["args"] | made | local) is not None


def test_the_pod_for_restoring_has_the_volume_and_no_more_rights() -> None:
    (pod,) = documents(FOLDER / "maintenance.yaml")
    kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["securityContext"] == pod_of("cpu")["securityContext"]
    assert container["securityContext"] == container_of("cpu")["securityContext"]
    assert container["image"] == container_of("cpu")["image"]
    assert pod["spec"]["volumes"][0] == pod_of("cpu")["volumes"][0]
    assert container["volumeMounts"] == container_of("cpu")["volumeMounts"][:2]
    # The Service must not send requests to it.
    selector = only(overlay("cpu"), "Service")["spec"]["selector"]
    assert not selector.items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_all_that_belongs_together_has_one_namespace_and_finds_the_pods(name: str) -> None:
    manifests = overlay(name)
    namespace = only(manifests, "Namespace")["metadata"]["name"]
    others = [one for one in manifests if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in others} == {namespace}
    deployment = only(manifests, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    for selector in (
        deployment["selector"]["matchLabels"],
        only(manifests, "Service")["spec"]["selector"],
        only(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        only(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector
        assert selector.items() <= labels


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_setting_exists_and_no_service_link_can_change_one(name: str) -> None:
    known = {f"CMT_{setting.upper()}" for setting in Settings.model_fields}
    assert environment_of(name).keys() <= known
    assert pod_of(name)["enableServiceLinks"] is False


def test_the_overlays_differ_in_device_and_database() -> None:
    assert environment_of("cpu")["CMT_DEVICE"]["value"] == "cpu"
    assert environment_of("gpu")["CMT_DEVICE"]["value"] == "cuda"
    assert container_of("gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in container_of("cpu")["resources"]["limits"]
    assert "CMT_DATABASE_URL" not in environment_of("cpu")
    assert "value" not in environment_of("postgresql")["CMT_DATABASE_URL"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_sqlite_gallery_has_one_pod_at_a_time_on_its_volume(name: str) -> None:
    manifests = overlay(name)
    deployment = only(manifests, "Deployment")["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}
    (data,) = (one for one in pod_of(name)["volumes"] if one["name"] == "data")
    claim = only(manifests, "PersistentVolumeClaim")
    assert data["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert only(manifests, "NetworkPolicy")["spec"]["egress"] == []


def test_on_postgresql_pods_share_no_volume_and_no_two_releases_run() -> None:
    manifests = overlay("postgresql")
    assert not [one for one in manifests if one["kind"] == "PersistentVolumeClaim"]
    assert {"name": "data", "emptyDir": {}} in pod_of("postgresql")["volumes"]
    assert only(manifests, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    (egress,) = only(manifests, "NetworkPolicy")["spec"]["egress"]
    assert {one["port"] for one in egress["ports"]} == {53, 5432}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_has_no_more_rights_than_compose_gives(name: str) -> None:
    pod, container = pod_of(name), container_of(name)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert {security[one] for one in ("runAsUser", "runAsGroup", "fsGroup")} == {USER}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert only(overlay(name), "ServiceAccount")["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= container["resources"][kind].keys()


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_what_is_open_and_the_end_has_the_time_it_may_take(name: str) -> None:
    container = container_of(name)
    (port,) = container["ports"]
    assert str(port["containerPort"]) == pods.image_environment()["CMT_PORT"]
    for probe, path in {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}.items():
        asked = container[f"{probe}Probe"]["httpGet"]
        assert asked == {"path": path, "port": port["name"]}
        assert ROUTE_SCOPES["GET", path] is None
    defaults = Settings.model_fields
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    stopping = defaults["shutdown_timeout"].default + defaults["shutdown_linger"].default
    assert pod_of(name)["terminationGracePeriodSeconds"] > pause + stopping


def test_secrets_are_named_where_the_example_says_and_have_no_value() -> None:
    example = documents(FOLDER / "secrets.example.yaml")
    for secret in example:
        kubernetes_validate.validate(secret, KUBERNETES[-1], strict=True)
        assert set(secret["stringData"].values()) == {""}
    there = {secret["metadata"]["name"]: set(secret["stringData"]) for secret in example}
    named: dict[str, set[str]] = {}
    keys = Path(environment_of("cpu")["CMT_API_KEYS_FILE"]["value"])
    for name in OVERLAYS:
        pod = pod_of(name)
        for volume in pod["volumes"]:
            if "secret" in volume:
                named[volume["secret"]["secretName"]] = {keys.name}
                (mount,) = (
                    one
                    for one in container_of(name)["volumeMounts"]
                    if one["name"] == volume["name"]
                )
                assert mount["mountPath"] == str(keys.parent)
                assert mount["readOnly"] is True
                assert "subPath" not in mount
        for variable in environment_of(name).values():
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                named.setdefault(reference["name"], set()).add(reference["key"])
    (endpoint,) = only(build(FOLDER / "monitoring"), "ServiceMonitor")["spec"]["endpoints"]
    credentials = endpoint["authorization"]["credentials"]
    named[credentials["name"]] = {credentials["key"]}
    assert named == there
    every = chain.from_iterable(overlay(name) for name in OVERLAYS)
    assert not [one for one in every if one["kind"] == "Secret"]


def test_the_service_monitor_scrapes_the_service() -> None:
    """Its CRD is not Kubernetes': what the operator's schema asks for is written out here."""
    monitor = only(build(FOLDER / "monitoring"), "ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert monitor["spec"].keys() == {"selector", "endpoints"}  # both required
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint.keys() == {
        *("port", "path", "interval", "scrapeTimeout", "authorization", "relabelings")
    }
    (relabeling,) = endpoint["relabelings"]
    assert relabeling.keys() == {"targetLabel", "replacement"}
    assert relabeling["targetLabel"] == "job"
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    assert set(re.findall(r'job="(\w+)"', alerts)) == {relabeling["replacement"]}
    assert endpoint["authorization"].keys() == {"type", "credentials"}
    assert endpoint["authorization"]["type"] == "Bearer"
    durations = [endpoint[name] for name in ("scrapeTimeout", "interval")]
    assert all(re.fullmatch(r"\d+s", one) for one in durations)
    assert int(durations[0][:-1]) <= int(durations[1][:-1])
    assert ROUTE_SCOPES["GET", endpoint["path"]] == "query"
    service = only(overlay("cpu"), "Service")
    labels = monitor["spec"]["selector"]["matchLabels"].items()
    assert labels <= service["metadata"]["labels"].items()
    assert service["metadata"]["namespace"] == monitor["metadata"]["namespace"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


def secret_volume(folder: Path, name: str, content: str, number: int = 1) -> None:
    """Write a secret as the kubelet does: a new folder, to which one link is turned at once."""
    folder.mkdir(exist_ok=True)
    version = folder / f"..{number}"
    version.mkdir()
    file = version / name
    file.write_text(content)
    os.chown(file, 0, USER)
    file.chmod(0o440)
    (folder / "..new").symlink_to(version.name)
    (folder / "..new").rename(folder / "..data")
    if not (folder / name).is_symlink():
        (folder / name).symlink_to(f"..data/{name}")


def volume_of_group(folder: Path) -> Path:
    """A volume as an fsGroup leaves it: root's, and the group may write."""
    folder.mkdir()
    os.chown(folder, 0, USER)
    folder.chmod(0o2775)
    return folder


def keys_of(folder: Path) -> tuple[KeyFile, str]:
    file = KeyFile(folder / "api-keys.json")
    return file, file.create("desk", ["query", "enroll"])[1]


def mounted(folder: Path, name: str = "pod") -> dict[str, Volume]:
    """The volumes of a pod, by where they are mounted."""
    tmp = folder / f"{name}-tmp"
    tmp.mkdir()
    tmp.chmod(0o1777)
    data = volume_of_group(folder / f"{name}-data")
    return {
        "/data": Volume(data, writable=True),
        "/tmp": Volume(tmp, writable=True),
        "/etc/cmt-reid/keys": Volume(folder / "keys"),
    }


@pytest.fixture
def token(tmp_path: Path) -> str:
    """A key, in the secret of `mounted`."""
    file, token = keys_of(tmp_path)
    secret_volume(tmp_path / "keys", file.path.name, file.path.read_text())
    return token


@as_a_pod
def test_the_container_of_the_manifest_serves_and_ends_in_time(
    token: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    deployment = only(overlay("cpu"), "Deployment")
    pod = Pod(deployment, mounted(tmp_path), tiny_checkpoint, tmp_path / "root")
    with running(pod), pod.client(token) as http:
        for path in ("/livez", "/readyz"):
            pod.wait_until(path)
        status = pod.status()
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(USER)}
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (0, 0)
        assert status["NoNewPrivs"] == "1"
        assert pod.writable_mounts() == {"/data", "/tmp"}
        item = http.post("/gallery", files={"image": IMAGE}, data={"person_id": "7"})
        assert item.status_code == 201
        answer = http.post("/query", files={"image": IMAGE}).json()
        assert [one["item"]["person_id"] for one in answer["results"]] == ["7"]
        # A key that is revoked in the secret is refused without a restart.
        secret_volume(tmp_path / "keys", "api-keys.json", json.dumps({"keys": []}), number=2)
        wait_for(lambda: http.get("/gallery").status_code in (401, 503), "the key is let in")
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert pod.terminate(grace) == 0
    assert (tmp_path / "pod-data" / "gallery.sqlite3").exists()
    assert "Traceback" not in pod.log.read_text()


@as_a_pod
def test_the_pods_of_the_postgresql_overlay_share_a_gallery(
    token: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    postgres_url: str,  # noqa: F811
) -> None:
    deployment = only(overlay("postgresql"), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    container["env"].append({"name": "CMT_RUNTIME", "value": "torch"})  # two are quicker so
    place, _, sockets = postgres_url.partition("?host=")
    file = ".s.PGSQL.5432"
    database = {f"/run/database/{file}": Volume(Path(sockets) / file, writable=True)}
    secrets = {"cmt-reid-database/url": f"{place}?host=/run/database"}

    def start() -> Iterator[Pod]:
        for number in range(deployment["spec"]["replicas"]):
            volumes = {**mounted(tmp_path, f"pod-{number}"), **database}
            folder = tmp_path / f"root-{number}"
            yield Pod(deployment, volumes, tiny_checkpoint, folder, secrets)

    first, second = start()  # at the same time, on an empty database
    with running(first), running(second), first.client(token) as one, second.client(token) as other:
        for pod in (first, second):
            pod.wait_until("/readyz")
        item = one.post("/gallery", files={"image": IMAGE}, data={"person_id": "7"}).json()
        assert other.get(f"/gallery/{item['id']}").json() == item
        files = {"image": IMAGE}
        wait_for(lambda: other.post("/query", files=files).json().get("results"), "unseen")
        assert [pod.terminate(45) for pod in (first, second)] == [0, 0]
