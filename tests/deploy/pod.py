"""A container of a manifest as a process: its command, environment, user and read-only root.

What the image would bring (the interpreter, the packages) is the machine's own, bound read-only
into a new root at the places that the Dockerfile names; the checkpoint there is a small one. A
seccomp profile and limits of resources are the cluster's to give; they are not imitated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import httpx

from tests.paths import ROOT
from tests.service.processes import STARTING_SECONDS, is_up, wait_for
from tests.test_project import instructions

# $1: the folder that becomes the root, and the process's arguments after it.
_ENTER = """
set -eu
root=$1; shift
mount -t tmpfs -o mode=0755 tmpfs "$root"
for place in /bin /sbin /lib /lib32 /lib64 /libx32; do
    if [ -L "$place" ]; then cp -P "$place" "$root/"; elif [ -d "$place" ]; then
        mkdir "$root$place"; mount --bind "$place" "$root$place"; fi
done
for place in proc dev sys; do mkdir "$root/$place"; mount --rbind "/$place" "$root/$place"; done
mkdir "$root/etc"
for file in passwd group hosts nsswitch.conf ld.so.cache; do
    if [ -e "/etc/$file" ]; then cp "/etc/$file" "$root/etc/"; fi
done
$binds
mkdir -p "$root/opt/cmt/bin"
ln -s "$prefix/bin/cmt" "$prefix/bin/python" "$root/opt/cmt/bin/"
cp "$project/docker/entrypoint" "$root/opt/cmt/bin/"
chmod 0755 "$root/opt/cmt/bin/entrypoint"
cp "$checkpoint" "$root/opt/cmt/checkpoint.safetensors"
chmod 0644 "$root/opt/cmt/checkpoint.safetensors"
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$group" --groups "$fsgroup" --no-new-privs \\
    --bounding-set=-all --inh-caps=-all sh -c 'cd /data; exec "$@"' sh "$@"
"""


class Volume(NamedTuple):
    """A file or folder of this machine that is mounted."""

    source: Path
    writable: bool = False


class Pod:
    """The first container of a Deployment. secrets: the values that its environment is given."""

    def __init__(
        self,
        deployment: Mapping[str, Any],
        volumes: Mapping[str, Volume],
        checkpoint: Path,
        folder: Path,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        spec = deployment["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        security = spec["securityContext"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {mount["mountPath"] for mount in container["volumeMounts"]} <= volumes.keys()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**image_environment(), **_environment(container, secrets or {})}
        # The one thing that is not as in the cluster: there every pod has the port to itself.
        environment["CMT_PORT"] = str(self.port)
        script = Template(_ENTER).safe_substitute(
            binds="\n".join(_binds(volumes)),
            prefix=sys.prefix,
            project=str(ROOT),
            checkpoint=str(checkpoint),
            user=security["runAsUser"],
            group=security["runAsGroup"],
            fsgroup=security["fsGroup"],
        )
        folder.mkdir()
        self.log = folder.with_suffix(".log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--propagation", "private"),
                    *("sh", "-c", script, "sh", str(folder)),
                    *entry_point(),
                    *container["args"],
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def client(self, key: str | None = None) -> httpx.Client:
        """HTTP to it."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = f"http://127.0.0.1:{self.port}"
        return httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False)

    def wait_until(self, path: str) -> None:
        """Until a probe's path answers 200."""

        def up() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return is_up(http, path)

        with self.client() as http:
            wait_for(up, f"{path} does not answer", STARTING_SECONDS)

    def status(self) -> dict[str, str]:
        """What the kernel says of the process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def writable_mounts(self) -> set[str]:
        """Where the process could write if modes allowed it, but for what the kernel shows."""
        lines = Path(f"/proc/{self.process.pid}/mountinfo").read_text().splitlines()
        mounts = {line.split()[4]: line.split()[5].split(",") for line in lines}
        return {
            place
            for place, options in mounts.items()
            if "rw" in options and not place.startswith(("/proc", "/dev", "/sys"))
        }

    def terminate(self, seconds: float) -> int:
        """SIGTERM → the exit status."""
        self.process.terminate()
        return self.process.wait(seconds)


@contextmanager
def running(pod: Pod) -> Iterator[Pod]:
    """The pod, which is killed in the end where it still runs."""
    try:
        yield pod
    finally:
        pod.process.kill()
        pod.process.wait()


def why_not() -> str | None:
    """Why no pod can be imitated here; None where one can."""
    if os.geteuid() != 0:
        return "only root can give a process another root and user"
    if missing := [name for name in ("unshare", "setpriv", "chroot") if not shutil.which(name)]:
        return f"{missing[0]} of util-linux or coreutils is missing"
    tried = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
    return "this container may not mount" if tried.returncode else None


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets with ENV in its last stage."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    for name, arguments in last_stage():
        if name == "ENV":
            for setting in shlex.split(arguments):
                key, _, value = setting.partition("=")
                environment[key] = Template(value).substitute(environment)
    return environment


def entry_point() -> list[str]:
    """The Dockerfile's ENTRYPOINT, to which a manifest's `args` are given."""
    (words,) = (arguments for name, arguments in last_stage() if name == "ENTRYPOINT")
    return [str(word) for word in json.loads(words)]


def last_stage() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile's last stage."""
    found = instructions((ROOT / "docker/Dockerfile").read_text())
    start = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def _environment(container: Mapping[str, Any], secrets: Mapping[str, str]) -> dict[str, str]:
    environment = {}
    for variable in container["env"]:
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            environment[variable["name"]] = secrets[f"{reference['name']}/{reference['key']}"]
        else:
            environment[variable["name"]] = variable["value"]
    return environment


def _binds(volumes: Mapping[str, Volume]) -> Iterator[str]:
    """Commands that mount the machine's programs and the pod's volumes into the new root."""
    programs = {Path("/usr"), ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    outer = sorted(one for one in programs if not programs & set(one.parents))
    mounts = [(str(place), Volume(place)) for place in outer] + sorted(volumes.items())
    for place, volume in mounts:
        source, target = shlex.quote(str(volume.source)), f'"$root"{shlex.quote(place)}'
        if volume.source.is_dir():
            yield f"mkdir -p {target}"
        else:
            yield f"mkdir -p $(dirname {target}); touch {target}"
        yield f"mount --bind {source} {target}"
        if not volume.writable:
            yield f"mount -o remount,bind,ro {target}"
