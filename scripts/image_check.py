"""Build the image of docker-compose.yml, run it as that file says, and hold it to its promises.

    python -m scripts.image_check [--service cpu] [--file MORE.yml …] [--out FOLDER] [--keep]

It needs Docker with Compose, or Podman with its socket in DOCKER_HOST and a `docker-compose`
(DOCKER_BUILDKIT=0 there). It takes the variables BASE, TORCH_INDEX, EDGE and GPU of
docker-compose.yml from the environment, checks the defaults of all others, and leaves `.env` out.
A further compose file says what has to differ on this machine, and the log says that it does.

What is started is a project of its own with a volume of its own. It is removed in the end, also
after an error or Ctrl-C; the image too, unless `--keep`. The log and a JSON file with sizes and
times go to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from service.client import Client, ServiceProblem, Unreachable

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROJECT = "cmt-image-check"
QUERY = sorted((EXAMPLES / "queries").glob("*.jpg"))[0]
STARTING_SECONDS = 180.0
IN_FLIGHT = 8
# Variables of the compose file that may differ from machine to machine.
OF_THE_MACHINE = {"BASE", "EDGE", "GPU", "TORCH_INDEX"}
# What compose does by itself, or says of other containers and of the build.
NOT_OF_THE_CONTAINER = {
    *("build", "command", "depends_on", "entrypoint", "image", "logging", "profiles"),
}
# Of a build: pip's bars and where it found what are many and say little.
_CHATTER = re.compile("━|Downloading|Using cached|metadata|Sending build context")
_STATUS = re.compile(r"^(\w+):\s*(.*)$", re.MULTILINE)


class Broken(Exception):  # noqa: N818 (a state of what is checked, not an error of the check)
    """A promise that is not held, or a command that failed."""


@dataclass(frozen=True)
class Mount:
    """One of the container's. kind: of its file system."""

    options: list[str]
    kind: str


@dataclass(frozen=True)
class Promises:
    """A method for each key of a service in docker-compose.yml → whether it is held, and in words.

    seen: what the engine says of the container. status: what the kernel says of its first process.
    """

    seen: dict[str, Any]
    status: dict[str, str]
    mounts: dict[str, Mount]

    def cap_drop(self, value: list[str]) -> tuple[bool, str]:
        sets = {self.status[name].strip("0") for name in ("CapPrm", "CapEff", "CapBnd")}
        return value == ["ALL"] and sets == {""}, "cap_drop: no capability"

    def deploy(self, value: dict[str, Any]) -> tuple[bool, str]:
        devices = value["resources"]["reservations"]["devices"]
        given = self.seen["HostConfig"]["DeviceRequests"] or []
        return len(given) == len(devices), "deploy: the GPU is passed in"

    def environment(self, value: dict[str, str | None]) -> tuple[bool, str]:
        wanted = {f"{name}={text}" for name, text in value.items() if text is not None}
        return wanted <= set(self.seen["Config"]["Env"]), f"environment: {len(wanted)} settings"

    def init(self, value: bool) -> tuple[bool, str]:
        first = self.status["Name"]
        return value == (first not in ("cmt", "python")), f"init: the first process is {first}"

    def mem_limit(self, value: str) -> tuple[bool, str]:
        return str(self.seen["HostConfig"]["Memory"]) == value, f"mem_limit: {value} bytes"

    def memswap_limit(self, value: str) -> tuple[bool, str]:
        return str(self.seen["HostConfig"]["MemorySwap"]) == value, f"memswap_limit: {value} bytes"

    def networks(self, value: dict[str, Any]) -> tuple[bool, str]:
        names = self.seen["NetworkSettings"]["Networks"]
        found = sorted(name.removeprefix(f"{PROJECT}_") for name in names)
        return found == sorted(value), f"networks: {', '.join(found)}"

    def ports(self, value: list[dict[str, Any]]) -> tuple[bool, str]:
        found = {
            (int(port.partition("/")[0]), one["HostIp"])
            for port, bindings in self.seen["NetworkSettings"]["Ports"].items()
            for one in bindings or ()
        }
        wanted = {(one["target"], one["host_ip"]) for one in value}
        told = ", ".join(f"{target} at {address} alone" for target, address in found)
        return found == wanted, f"ports: {told}"

    def read_only(self, value: bool) -> tuple[bool, str]:
        return value == ("ro" in self.mounts["/"].options), "read_only: the root is"

    def restart(self, value: str) -> tuple[bool, str]:
        name = self.seen["HostConfig"]["RestartPolicy"]["Name"]
        return name == value, f"restart: {name}"

    def secrets(self, value: list[dict[str, str]]) -> tuple[bool, str]:
        places = [one["target"] for one in value]
        true = all("ro" in self.mounts[place].options for place in places)
        return true, f"secrets: {', '.join(places)}, read-only"

    def security_opt(self, value: list[str]) -> tuple[bool, str]:
        true = value == ["no-new-privileges:true"] and self.status["NoNewPrivs"] == "1"
        return true, "security_opt: nothing gains privileges"

    def stop_grace_period(self, value: str) -> tuple[bool, str]:
        grace = self.seen["Config"]["StopTimeout"]
        return f"{grace}s" == value, f"stop_grace_period: {grace} seconds"

    def tmpfs(self, value: list[str]) -> tuple[bool, str]:
        true = all(self.mounts[place].kind == "tmpfs" for place in value)
        return true, f"tmpfs: {', '.join(value)}"

    def volumes(self, value: list[dict[str, Any]]) -> tuple[bool, str]:
        modes = {one["target"]: "ro" if one.get("read_only") else "rw" for one in value}
        true = all(mode in self.mounts[place].options for place, mode in modes.items())
        return true, f"volumes: {', '.join(f'{place} {mode}' for place, mode in modes.items())}"


class Check:
    """One service of the compose file; everything that is said goes to the log, too."""

    def __init__(self, service: str, files: list[Path], log: TextIO, folder: Path) -> None:
        self.service = service
        self.log = log
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.held = 0
        self.image = f"{PROJECT}:{service}"
        named = folder / "image.yml"  # not the name of the image that may serve on this host
        named.write_text(json.dumps({"services": {service: {"image": self.image}}}))
        (folder / "models").mkdir()
        compose_file = ROOT / "docker-compose.yml"
        variables = set(re.findall(r"\$\{(\w+)", compose_file.read_text())) - OF_THE_MACHINE
        self.environment = {
            # Another network and port than those of a service that runs here.
            "EDGE": "172.31.249",
            **{
                name: text
                for name, text in os.environ.items()
                if name not in variables and not name.startswith(("CMT_", "COMPOSE_"))
            },
            "CMT_PUBLISH": "127.0.0.1:0",
            "MODELS": str(folder / "models"),
        }
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True)
        program = ["docker-compose"] if plugin.returncode else ["docker", "compose"]
        whole = ["--env-file", os.devnull, "--profile", service, "--project-name", PROJECT]
        self._plain = [*program, *whole, "--file", str(compose_file)]
        self._all = [*self._plain]
        for file in (*files, named):
            self._all += ["--file", str(file)]

    # --- what it says ---

    def say(self, text: str) -> None:
        """A line, with the seconds since the beginning."""
        for line in text.replace(f"{ROOT}/", "").splitlines():
            stamped = f"{time.monotonic() - self.began:7.1f}  {line}"
            print(stamped, flush=True)
            print(stamped, file=self.log, flush=True)

    def hold(self, true: bool, promise: str) -> None:
        """Say a promise that is held. Raises Broken where it is not."""
        if not true:
            raise Broken(promise)
        self.held += 1
        self.say(f"ok: {promise}")

    # --- what it runs ---

    def run(self, command: list[str], *, secret: str = "", quiet: bool = False) -> str:
        """A command's output. Raises Broken where it fails. secret: a key, which is not shown."""
        shown = " ".join(command).replace(" ".join(self._all), "docker compose")
        if not quiet:
            self.say(f"$ {shown}")
        environment = self.environment | ({"CMT_API_KEY": secret} if secret else {})
        answer = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace"
        )
        if answer.returncode:
            raise Broken(f"{shown}: status {answer.returncode}\n{answer.stdout}{answer.stderr}")
        return answer.stdout

    def compose(self, *words: str, quiet: bool = False) -> str:
        """The output of a command of Compose."""
        return self.run([*self._all, *words], quiet=quiet)

    def inside(self, *words: str, quiet: bool = True) -> str:
        """The output of a command in the container, as the container's user."""
        return self.compose("exec", "-T", self.service, *words, quiet=quiet)

    def timed(self, name: str, call: Callable[[], object]) -> float:
        """How long a call took, kept under a name."""
        began = time.monotonic()
        call()
        self.seconds[name] = round(time.monotonic() - began, 1)
        return self.seconds[name]

    def config(self, *, plain: bool = False) -> dict[str, Any]:
        """The service as Compose understands the files; plain: docker-compose.yml alone."""
        words = [*(self._plain if plain else self._all), "config", "--format", "json"]
        found: dict[str, Any] = json.loads(self.run(words, quiet=True))["services"][self.service]
        return found

    def container(self) -> dict[str, Any]:
        """What the engine says of the container."""
        (name,) = self.compose("ps", "--all", "--quiet", self.service, quiet=True).split()
        (found,) = json.loads(self.run(["docker", "inspect", name], quiet=True))
        return dict(found)

    def logged(self) -> str:
        """What the container has written."""
        words = ("logs", "--no-color", "--no-log-prefix", self.service)
        return self.compose(*words, quiet=True).replace("\x1b[2K", "")

    def url(self) -> str:
        """Where the service is reached from this machine."""
        return "http://" + self.compose("port", self.service, "8000", quiet=True).strip()

    def wait_until_ready(self) -> None:
        """Raises Broken where /readyz does not answer 200 in time, or the container ends."""
        until = time.monotonic() + STARTING_SECONDS
        told = ""
        while time.monotonic() < until:
            state = self.container()["State"]
            if not (state["Running"] or state.get("Restarting")):
                raise Broken(f"the container has ended with status {state['ExitCode']}")
            try:
                with Client(self.url(), retries=0) as client:
                    client.ready()
                return
            except (ServiceProblem, Unreachable, Broken) as error:
                told = str(error)
            time.sleep(0.5)
        raise Broken(f"not ready after {STARTING_SECONDS:.0f} seconds: {told}")

    # --- the steps ---

    def build(self) -> None:
        """The image, with what the engine prints."""
        self.say("$ docker compose build")
        words = [*self._all, "build", self.service]
        began = time.monotonic()
        with subprocess.Popen(
            words,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() and not _CHATTER.search(line):
                    self.say("  " + line.rstrip()[:400])
        if process.returncode:
            raise Broken(f"the build ended with status {process.returncode}")
        self.seconds["build"] = round(time.monotonic() - began, 1)
        self.say(f"built in {self.seconds['build']} seconds")

    def image_facts(self) -> dict[str, Any]:
        """Size and layers of the image, whose user has to be ours."""
        (image,) = json.loads(self.run(["docker", "image", "inspect", self.image], quiet=True))
        self.hold(image["Config"]["User"] == "10001", "the image's user is 10001")
        history = ["docker", "history", "--no-trunc", "--human=false", "--format", "{{json .}}"]
        layers = [
            {"bytes": int(layer["Size"]), "by": layer["CreatedBy"][:120]}
            for line in self.run([*history, self.image], quiet=True).splitlines()
            for layer in [json.loads(line)]
            if int(layer["Size"]) > 1_000_000
        ]
        self.say(f"image: {image['Size'] / 1e9:.2f} GB")
        for layer in layers:
            self.say(f"  {layer['bytes'] / 1e6:8.0f} MB  {layer['by']}")
        return {"bytes": image["Size"], "layers": layers}

    def confinement(self, config: dict[str, Any]) -> None:
        """Every key of the compose file, by what kernel and engine say of the container."""
        seen = self.container()
        status = dict(_STATUS.findall(self.inside("cat", "/proc/1/status")))
        mounts = {
            fields[4]: Mount(fields[5].split(","), rest.split()[0])
            for line in self.inside("cat", "/proc/1/mountinfo").splitlines()
            for before, _, rest in [line.partition(" - ")]
            for fields in [before.split()]
        }
        self.hold(status["Uid"].split() == ["10001"] * 4, "every process is of user 10001")
        test = (seen["Config"].get("Healthcheck") or {}).get("Test")
        self.hold(test == ["CMD", "health"], "it has the image's health check")
        promises = Promises(seen, status, mounts)
        for key, value in config.items():
            if value is None or key in NOT_OF_THE_CONTAINER:
                continue
            if not hasattr(promises, key):
                raise Broken(f"this check does not know {key}: {value}; teach it")
            self.hold(*getattr(promises, key)(value))
        limit = self.inside("sh", "-c", _MEMORY).strip()
        self.hold(limit == config["mem_limit"], f"the kernel's limit of memory is {limit} bytes")
        self._writable(mounts, config)

    def _writable(self, mounts: dict[str, Mount], config: dict[str, Any]) -> None:
        """Nothing can be written but volumes and what is in memory."""
        tried = [place for place in mounts if not place.startswith(("/proc", "/dev", "/sys"))]
        script = 'for place; do if [ -d "$place" ] && [ -w "$place" ]; then echo "$place"; fi; done'
        found = set(self.inside("sh", "-c", script, "sh", *tried).split())
        volumes = {one["target"] for one in config["volumes"] if not one.get("read_only")}
        wanted = volumes | set(config["tmpfs"])
        self.hold(wanted <= found, f"writable: {', '.join(sorted(wanted))}")
        others = found - wanted
        in_memory = all(mounts[place].kind == "tmpfs" for place in others)
        told = f" but, in memory and by the engine, {', '.join(sorted(others))}" if others else ""
        self.hold(in_memory, f"nothing else is{told}")

    def first_key(self) -> str:
        """The key that the first start has made: in a private file, and in no log."""
        key = self.inside("cat", "/data/first-key").strip()
        modes = self.inside("stat", "-c", "%a %u", "/data/first-key", "/data/api-keys.json")
        self.hold(set(modes.splitlines()) == {"600 10001"}, "keys are readable by 10001 alone")
        log = self.logged()
        self.hold("First start" in log and key not in log, "the log names the file, not the key")
        return key

    def cmt(self, key: str, *words: str) -> str:
        """A command of ours on this machine, against the published port."""
        program = str(Path(sys.executable).with_name("cmt"))
        return self.run([program, *words, "--url", self.url()], secret=key)

    def used(self, key: str, folder: Path) -> list[str]:
        """Enroll, query and back up → the ids of the answer."""
        manifest = ("--manifest", str(EXAMPLES / "manifest.csv"), "--ignore-column", "role")
        self.say(self.cmt(key, "enroll", *manifest, str(EXAMPLES / "gallery")))
        enrolled = len(list((EXAMPLES / "gallery").glob("*.jpg")))
        self.hold(self.total(key) == enrolled, f"enrolled: {enrolled} crops")
        found = self.answer(key)
        self.hold(len(found) == 10, f"a query has ten results, first {found[0]}")
        backup = folder / "gallery.zip"
        self.cmt(key, "backup", str(backup))
        self.hold(backup.stat().st_size > 0, f"backup: {backup.stat().st_size} bytes, checked")
        return found

    def total(self, key: str) -> int:
        """How many crops the gallery has."""
        with Client(self.url(), api_key=key) as client:
            return client.list(limit=1).total

    def answer(self, key: str) -> list[str]:
        """The ids that a query finds."""
        told = json.loads(self.cmt(key, "query", str(QUERY), "--json"))
        return [one["item"]["id"] for one in told["results"]]

    def health(self) -> None:
        """The image's check, once by hand; and by the engine, where it runs checks."""
        self.inside("health", quiet=False)
        self.hold(True, "the health check passes")
        for _ in range(20):
            health = self.container()["State"].get("Health") or {}
            if health.get("Status") == "healthy":
                self.hold(True, "the engine says that it is healthy")
                return
            time.sleep(1)
        if health.get("Log"):
            raise Broken(f"the engine's health checks do not pass: {health}")
        self.say("not shown: this engine has run no health check (Podman needs systemd for that)")

    def stop(self, key: str, config: dict[str, Any]) -> None:
        """SIGTERM while queries are in flight: they are answered, and it ends in time."""

        def ask() -> int:
            with Client(self.url(), api_key=key, retries=0) as client:
                begun.release()
                return len(client.query([QUERY] * 16).results)

        begun = threading.Semaphore(0)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            asked = [pool.submit(ask) for _ in range(IN_FLIGHT)]
            for _ in asked:
                begun.acquire()
            time.sleep(0.3)  # they are on their way
            took = self.timed("stop", lambda: self.compose("stop", self.service))
            answers = [one.result() for one in asked]
        self.hold(all(answers), f"queries in flight were answered: {answers} results")
        grace = config["stop_grace_period"]
        self.hold(took < int(grace.removesuffix("s")), f"stopped in {took} seconds, of {grace}")
        state = self.container()["State"]
        told = f"exit status {state['ExitCode']}"
        self.hold(state["ExitCode"] == 0 and not state["OOMKilled"], told)

    def again(self, key: str, found: list[str]) -> None:
        """A restart keeps data and keys, and so does a crash, after which the engine restarts."""
        total = self.total_of(found, key, "start", lambda: self.compose("start", self.service))
        self.hold(self.logged().count("First start") == 1, "no second key was made")
        before = self.container()["State"]["StartedAt"]
        self.inside("sh", "-c", "kill -KILL $(cat /tmp/.serve.pid)", quiet=False)

        def restarted() -> None:
            until = time.monotonic() + 60
            while self.container()["State"]["StartedAt"] == before:
                if time.monotonic() > until:
                    raise Broken("the engine does not restart what was killed")
                time.sleep(0.5)

        after = self.total_of(found, key, "restart after SIGKILL", restarted)
        self.hold(after == total, "restart: the engine has restarted what was killed")

    def total_of(self, found: list[str], key: str, name: str, call: Callable[[], object]) -> int:
        """Start it somehow → how many crops there are, after the same answer as before."""

        def started() -> None:
            call()
            self.wait_until_ready()

        took = self.timed(name, started)
        total = self.total(key)
        self.hold(self.answer(key) == found, f"ready in {took} s, {total} crops, the same answer")
        return total

    def clean(self, *, keep: bool) -> None:
        """Remove what was started, whatever of it there is."""
        self.say("$ docker compose down --volumes")
        words = [*self._all, "down", "--volumes", "--timeout", "5"]
        subprocess.run(words, cwd=ROOT, env=self.environment, capture_output=True)
        if not keep:
            subprocess.run(["docker", "image", "rm", self.image], capture_output=True)


_MEMORY = (
    "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"
)


def differences(plain: Any, now: Any, path: str = "") -> Iterator[str]:
    """What the further files change of a service."""
    if isinstance(plain, dict) and isinstance(now, dict):
        for key in plain.keys() | now.keys():
            yield from differences(plain.get(key), now.get(key), f"{path}.{key}")
    elif plain != now:
        yield f"{path.removeprefix('.')}: {json.dumps(now)} instead of {json.dumps(plain)}"


def check(service: str, files: list[Path], out: Path, *, keep: bool) -> bool:
    """All steps, in order → whether every promise is held."""
    out.mkdir(parents=True, exist_ok=True)
    name = f"image-check-{service}"
    with (
        tempfile.TemporaryDirectory(prefix="cmt-image-check-") as temporary,
        (out / f"{name}.log").open("w") as log,
    ):
        folder = Path(temporary)
        one = Check(service, files, log, folder)
        one.say(
            f"{datetime.now(UTC).isoformat(timespec='seconds')}: image of the service {service}"
        )
        try:
            config = one.config()
            differing = sorted(set(differences(one.config(plain=True), config)))
            differing = [text for text in differing if not text.startswith("image:")]
            for text in differing:
                one.say(f"differs on this machine: {text}")
            one.build()
            image = one.image_facts()
            one.compose("up", "--detach", "--no-build", service)
            one.timed("first start", one.wait_until_ready)
            one.say(f"ready after {one.seconds['first start']} seconds")
            one.confinement(config)
            key = one.first_key()
            found = one.used(key, folder)
            one.health()
            one.stop(key, config)
            one.again(key, found)
            facts = "import json, model.machine as m; print(json.dumps(m.machine()))"
            machine = json.loads(one.inside("python", "-c", facts))
            told = one.run(["docker", "version", "--format", "{{json .Server}}"], quiet=True)
            engine = {part["Name"]: part["Version"] for part in json.loads(told)["Components"]}
        except (Broken, ServiceProblem, Unreachable) as error:
            one.say(f"BROKEN: {error}")
            with suppress(Broken):
                one.say(one.logged())
            return False
        finally:
            one.clean(keep=keep)
        one.say(f"{one.held} promises held")
        result = {
            "check": name,
            "build": config["build"]["args"],
            "differs": differing,
            "engine": engine,
            "image": image,
            "seconds": one.seconds,
            "held": one.held,
            "machine": machine,
        }
        (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--service", default="cpu", help="of docker-compose.yml")
    parser.add_argument("--file", action="append", type=Path, default=[], help="a compose file")
    parser.add_argument("--out", type=Path, default=Path("build"), help="for log and JSON")
    parser.add_argument("--keep", action="store_true", help="leave the image")
    options = parser.parse_args()
    if shutil.which("docker") is None:
        sys.exit(
            "the program docker is missing: install Docker with Compose, or see "
            "scripts/debian_engine.sh for a machine without a container engine"
        )
    files = [file.resolve() for file in options.file]
    # So that what was started is removed.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return 0 if check(options.service, files, options.out, keep=options.keep) else 1


if __name__ == "__main__":
    sys.exit(main())
