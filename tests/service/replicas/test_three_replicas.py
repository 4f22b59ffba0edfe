"""Three real services over one PostgreSQL: each follows the others, whoever dies or is cut off."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model import CMT, load_checkpoint, save_checkpoint
from service.auth.keys import KeyFile, Scope
from tests.conftest import alive
from tests.service.postgres import PostgresServer
from tests.service.processes import ServiceProcess, assert_no_defect, gauge, wait_for
from tests.service.replicas.network import Network

# A run of the second checkpoint, by a replica that the test kills.
_RUNNER = """
import json, sys, time
from pathlib import Path
from service.gallery.storage.replicas import Replicas
folder, url, model, details = sys.argv[1:]
replicas = Replicas(Path(folder), url, model)
replicas.begin_run(json.loads(details))
print("begun", flush=True)
time.sleep(600)
"""


class Trio:
    """Three services, each on a network of its own to the same database."""

    def __init__(self, folder: Path, server: str, stack: ExitStack, checkpoint: Path) -> None:
        self._folder, self._stack = folder, stack
        self.checkpoint, self.server = checkpoint, server
        file = KeyFile(folder / "keys.json")
        scopes: list[Scope] = ["query", "enroll", "admin"]
        self.key = file.create("test", scopes)[1]
        self.slow = file.create("slow", scopes, "7/hour")[1]
        self.networks = [stack.enter_context(Network(server)) for _ in range(3)]
        self.services = [self._started(number) for number in range(3)]
        self.clients = [self._client(number) for number in range(3)]

    def restart(self, number: int) -> None:
        """Start a replica again that has ended, on the folder that it left."""
        self.services[number] = self._started(number)
        self.clients[number] = self._client(number)

    def leaders(self) -> list[int]:
        """The replicas that say they lead, of those that run."""
        return [
            number
            for number, client in enumerate(self.clients)
            if self.services[number].process.poll() is None and gauge(client, "cmt_replica_leads")
        ]

    def leader(self) -> int:
        """The one that leads, once nobody else says so, as one may that was cut off."""

        def alone() -> list[int]:
            leaders = self.leaders()
            return leaders if len(leaders) == 1 else []

        [leader] = wait_for(alone, "none leads, or several do")
        return int(leader)

    def stop(self) -> None:
        """Ask all that run to end; the test waits for it afterwards."""
        for service in self.services:
            if service.process.poll() is None:
                service.send(signal.SIGTERM)

    def enroll(self, number: int, image: bytes, **headers: str) -> httpx.Response:
        return self.clients[number].post("/gallery", files={"image": image}, headers=headers)

    def found(self, number: int, image: bytes) -> set[str] | None:
        """The ids that a query finds, None where it is refused."""
        answer = self.clients[number].post(
            "/query", files={"image": image}, data={"top_k": "100", "exhaustive": "true"}
        )
        if answer.status_code == 503:
            return None
        return {one["item"]["id"] for one in answer.json()["results"]}

    def fingerprints(self) -> set[str]:
        return {client.get("/model").json()["fingerprint"] for client in self.clients}

    def _started(self, number: int) -> ServiceProcess:
        service = ServiceProcess(
            self._folder / str(number),
            self.checkpoint,
            database_url=self.networks[number].url,
            api_keys_file=self._folder / "keys.json",
            shutdown_linger=0,
        )
        self._stack.callback(self._ended, service)
        return service

    def _ended(self, service: ServiceProcess) -> None:
        if service.process.poll() is None:
            assert service.ended() == 0
        assert_no_defect(service)

    def _client(self, number: int) -> httpx.Client:
        self.services[number].wait_until_ready()
        return self._stack.enter_context(self.services[number].client(self.key))


@pytest.fixture(scope="module")
def trio(
    postgres: PostgresServer,
    tiny_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trio]:
    postgres.start()
    folder, url = tmp_path_factory.mktemp("replicas"), postgres.make_database()
    checkpoint = folder / "first.safetensors"
    shutil.copy(tiny_checkpoint, checkpoint)
    with ExitStack() as stack:
        started = Trio(folder, url, stack, checkpoint)
        try:
            yield started
        finally:
            started.stop()
    postgres.drop_database(url)


def test_what_is_acknowledged_anywhere_is_found_and_what_is_erased_is_gone(
    trio: Trio, image: bytes
) -> None:
    first, second = (trio.enroll(number, image).json()["id"] for number in (0, 1))
    for number in range(3):
        wait_for(lambda: trio.found(number, image) == {first, second}, "it is not found")  # noqa: B023
    assert trio.clients[2].delete(f"/gallery/{first}").status_code == 204
    for number in range(3):
        # Items are checked before they are answered; None where it lags behind.
        found = wait_for(lambda: trio.found(number, image), "nothing is found")  # noqa: B023
        assert found == {second}
        wait_for(lambda: gauge(trio.clients[number], "cmt_gallery_items") == 1, "it stays")  # noqa: B023
        client = trio.clients[number]
        wait_for(lambda: client.get("/readyz").json().get("lag_seconds", -1) >= 0, "it lags")  # noqa: B023
        wait_for(lambda: gauge(trio.clients[number], "cmt_replicas") == 3, "not all are seen")  # noqa: B023
        assert gauge(trio.clients[number], "cmt_replica_lag_seconds") >= 0
    trio.leader()


def test_one_key_enrolls_once_wherever_it_is_sent(trio: Trio, image: bytes) -> None:
    def send(number: int) -> httpx.Response:
        return trio.enroll(number % 3, image, **{"Idempotency-Key": "the-same"})

    with ThreadPoolExecutor(9) as threads:
        answers = list(threads.map(send, range(9)))
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 8}
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_keys_rate_holds_for_all_replicas_together(trio: Trio) -> None:
    def ask(number: int) -> int:
        headers = {"Authorization": f"Bearer {trio.slow}"}
        return trio.clients[number % 3].get("/cameras", headers=headers).status_code

    with ThreadPoolExecutor(6) as threads:
        assert Counter(threads.map(ask, range(18))) == {200: 7, 429: 11}


def test_there_is_one_audit_log(trio: Trio, image: bytes) -> None:
    _, two, three = trio.clients
    item = trio.enroll(0, image).json()["id"]
    two.patch(f"/gallery/{item}", json={"person_id": "ann"})
    three.delete(f"/gallery/{item}")
    for client in trio.clients:
        entries = client.get("/admin/audit").json()["entries"]
        assert [e["action"] for e in entries if e["subject"] == item] == ["delete", "update"]


def test_a_replica_without_its_database_answers_nothing_old(trio: Trio, image: bytes) -> None:
    item = trio.enroll(0, image).json()["id"]
    wait_for(lambda: item in (trio.found(2, image) or ()), "it is not found")
    trio.networks[2].stop()
    assert trio.clients[0].delete(f"/gallery/{item}").status_code == 204

    def unready() -> str | None:
        answer = trio.clients[2].get("/readyz")
        return None if answer.is_success else str(answer.json()["detail"])

    detail = wait_for(unready, "it stays ready")
    assert "this replica has not followed it for" in detail
    assert trio.found(2, image) is None
    wait_for(lambda: trio.found(1, image) is not None, "it follows no more")
    trio.networks[2].mend()
    trio.services[2].wait_until_ready()
    found = wait_for(lambda: trio.found(2, image), "it does not come back")
    wait_for(lambda: trio.found(0, image) == found, "they do not find the same")
    trio.networks[2].cut()
    more = trio.enroll(0, image).json()["id"]
    wait_for(lambda: more in (trio.found(2, image) or ()), "it does not come back")


def test_a_killed_replica_loses_nothing_and_a_killed_leader_is_followed(
    trio: Trio, image: bytes
) -> None:
    leader = trio.leader()
    acknowledged: list[str] = []

    def enroll(_: int) -> None:
        try:
            answer = trio.enroll(leader, image)
        except httpx.TransportError:  # it was killed before it answered
            return
        acknowledged.append(answer.json()["id"])
        if len(acknowledged) >= 8:
            trio.services[leader].kill()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(enroll, range(24)))
    assert len(acknowledged) >= 8
    others = [number for number in range(3) if number != leader]
    for number in others:
        wait_for(
            lambda: set(acknowledged) <= (trio.found(number, image) or set()),  # noqa: B023
            "what was acknowledged is not found",
        )
    follower = trio.leader()
    assert follower in others
    trio.restart(leader)
    wait_for(
        lambda: (found := trio.found(leader, image)) and found == trio.found(follower, image),
        "they do not find the same",
    )


def test_all_go_on_to_the_checkpoint_that_one_embeds_with_even_if_that_one_dies(
    trio: Trio, image: bytes, tmp_path: Path
) -> None:
    second = other_than(trio, trio.checkpoint.parent)
    _, info = load_checkpoint(second)
    [first] = trio.fingerprints()
    trio.enroll(0, image, **{"Idempotency-Key": "again"})
    details: dict[str, Any] = {"state": "running", "checkpoint": info.fingerprint, "actor": "key:1"}
    details |= {"done": 0, "total": 0}
    runner = subprocess.Popen(
        [sys.executable, "-c", _RUNNER, str(tmp_path), trio.server, first, json.dumps(details)],
        stdout=subprocess.PIPE,
    )
    assert runner.stdout is not None
    assert runner.stdout.readline() == b"begun\n"
    for client in trio.clients:
        assert client.get("/admin/reembed").json()["state"] == "running"
        again = client.post("/admin/reembed", json={"checkpoint": second.name})
        assert (again.status_code, again.json()["code"]) == (409, "model_version_conflict")
    runner.kill()
    runner.communicate()
    statuses: set[int] = set()

    def switched() -> bool:
        for client in trio.clients:
            statuses.add(client.post("/query", files={"image": image}).status_code)
            statuses.add(trio.enroll(0, image, **{"Idempotency-Key": "again"}).status_code)
        return trio.fingerprints() == {info.fingerprint}

    before = wait_for(lambda: trio.found(0, image), "it finds nothing")
    wait_for(switched, "they do not all go on to it")
    assert statuses <= {200, 201, 503}
    for number, client in enumerate(trio.clients):
        trio.services[number].wait_until_ready()
        wait_for(
            lambda: client.get("/admin/reembed").json()["state"] == "done",  # noqa: B023
            "the run has no end",
        )
        assert client.get("/admin/reembed").json()["checkpoint"] == info.fingerprint
        wait_for(lambda: trio.found(number, image) == before, "it finds others")  # noqa: B023
    item = trio.enroll(1, image).json()
    assert item["model"] == info.fingerprint
    wait_for(lambda: item["id"] in (trio.found(2, image) or ()), "it is not found")


def other_than(trio: Trio, folder: Path) -> Path:
    """A second checkpoint of the same configuration."""
    path = folder / "second.safetensors"
    _, info = load_checkpoint(trio.checkpoint)
    torch.manual_seed(11)
    save_checkpoint(path, alive(CMT(info.config)).eval(), training={"dataset": "none"})
    return path
