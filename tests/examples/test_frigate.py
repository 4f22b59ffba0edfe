"""examples/clients/frigate.py against a real service, and a stand-in of Frigate and its broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from service.client import Client
from tests.examples.frigate_stand_in import Broker, FrigateStandIn
from tests.paths import MINI, ROOT
from tests.service.processes import ServiceProcess, kept_port, wait_for

PROGRAM = [sys.executable, str(ROOT / "examples" / "clients" / "frigate.py")]
START = 1_790_000_000.25


def frame(file: Path) -> bytes:
    """A picture of a camera with a person at (100, 50), of 50 by 100 pixels."""
    with Image.open(file) as crop:
        whole = Image.new("RGB", (400, 250), "gray")
        whole.paste(crop.resize((50, 100)), (100, 50))
    target = BytesIO()
    whole.save(target, "PNG")
    return target.getvalue()


def event(number: float, **given: Any) -> dict[str, Any]:
    """A tracked object as the API lists it; the box is where `frame` has the person."""
    return {
        "id": f"{START + number:.6f}-abc{number}",
        "camera": "gate",
        "label": "person",
        "start_time": START + number,
        "end_time": START + number + 9,
        "has_snapshot": True,
        "has_clip": True,
        "zones": ["yard"],
        "sub_label": None,
        "data": {"box": [0.25, 0.2, 0.125, 0.4], "top_score": 0.8, "type": "object"},
        **given,
    }


def command(frigate: str, url: str, state: Path, *more: object) -> list[str]:
    """The program with what every run needs: the first one looks back for ever."""
    given = ["--frigate", frigate, "--url", url, "--state", state, "--since", "1000000", *more]
    return [*PROGRAM, *map(str, given)]


def run(
    *arguments: Any, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


@contextmanager
def running(*arguments: Any) -> Iterator[list[str]]:
    """The program as it goes on → what it has printed; it ends by a signal, with status 0."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        yield lines
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, lines
        reader.join(30)
        assert "stopped" in lines[-1]
    finally:
        process.kill()


def test_persons_that_ended_are_enrolled_once_each(
    service: ServiceProcess, client: Client, tmp_path: Path
) -> None:
    infrared = sorted((MINI / "cam3").glob("*/0001.jpg"))
    with FrigateStandIn(password="secret") as frigate:
        frigate.events = [
            event(0),
            event(1, camera="yard/ä", zones=[]),
            event(2, label="car"),
            event(3, end_time=None, has_snapshot=False),
            event(4, has_snapshot=False),
            event(5),  # whose snapshot was deleted
            event(6, data={"box": [0.25, 0.2, 0.0125, 0.4]}),  # too narrow
            event(7, data={}),
            event(8),  # no clean copy is kept
            # More than a page, of many that began in one frame.
            *(event(at, id=f"{at}-{n}", has_snapshot=False) for at in (9, 9.5) for n in range(60)),
            event(10),
        ]  # fmt: skip
        ids = {one["start_time"] - START: one["id"] for one in frigate.events}
        for number, file in ((0, infrared[0]), (1, infrared[1]), (6, infrared[2]),
                             (7, infrared[2]), (10, infrared[3])):  # fmt: skip
            kind = "png" if number else "webp"
            frigate.files[f"/api/events/{ids[number]}/snapshot-clean.{kind}"] = frame(file)
        frigate.files[f"/api/events/{ids[8]}/snapshot.jpg"] = frame(infrared[4])
        arguments = (frigate.url, service.url, tmp_path / "state.json", "--once")

        refused = run(*arguments)
        assert refused.returncode == 1
        assert "401" in refused.stderr
        assert "Traceback" not in refused.stderr

        login = (*arguments, "--user", "viewer")
        frigate.old = True
        refused = run(*login, environment={"FRIGATE_PASSWORD": "secret"})
        assert (refused.returncode, client.list().total) == (1, 0)
        assert "take 0.15 or newer" in refused.stderr
        frigate.old, frigate.logins = False, 0

        done = run(*login, environment={"FRIGATE_PASSWORD": "secret"})
        assert done.returncode == 0, done.stderr
        assert frigate.logins == 1
        items = {item.metadata["frigate_event"]: item for item in client.list().items}
        assert set(items) == {ids[0], ids[1], ids[8], ids[10]}
        item = items[ids[1]]
        assert (item.camera_id, item.person_id, item.metadata["zones"]) == ("yard/ä", None, [])
        assert (item.width, item.height) == (50, 100)
        assert item.captured_at == datetime.fromtimestamp(START + 1, UTC)
        assert (item.modality, item.modality_source) == ("ir", "detected")
        said = done.stderr.splitlines()
        assert [line.split(" (")[0] for line in said] == [ids[5], ids[6], ids[7]]

        # The next run asks again only for the one that was tracked, and finds it ended.
        frigate.events[3].update(end_time=START + 50, has_snapshot=True)
        frigate.files[f"/api/events/{ids[3]}/snapshot-clean.png"] = frame(infrared[5])
        again = run(*login, environment={"FRIGATE_PASSWORD": "secret"})
        assert again.stdout.splitlines() == [f"{ids[3]} (gate): enrolled"]
        assert again.stderr == ""
        assert client.list().total == 5

        # Without its state it begins anew, and the service knows them all.
        Path(arguments[2]).unlink()
        assert run(*login, environment={"FRIGATE_PASSWORD": "secret"}).returncode == 0
        assert client.list().total == 5


def test_what_does_not_answer_is_named(service: ServiceProcess, tmp_path: Path) -> None:
    with kept_port() as port:  # where nobody listens
        silent = f"http://127.0.0.1:{port}"
        done = run(silent, service.url, tmp_path / "state.json", "--once")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: Frigate at {silent} does not answer")


def message(one: dict[str, Any], kind: str) -> bytes:
    """What Frigate says of a tracked object."""
    said = {name: one[name] for name in ("id", "camera", "label", "start_time", "end_time")}
    return json.dumps({"type": kind, "before": said, "after": said}).encode()


def test_the_end_of_a_person_is_heard_through_restarts(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    files = sorted((MINI / "cam3").glob("*/0001.jpg"))
    data = tmp_path / "data"
    broker = Broker()

    def ends(number: int) -> None:
        ended = event(number)
        # First its picture: the program may ask what there is at any moment.
        frigate.files[f"/api/events/{ended['id']}/snapshot-clean.png"] = frame(files[number])
        frigate.events.append(ended)

    def says(kind: str) -> None:
        broker.publish("nvr/events", message(frigate.events[-1], kind))

    def enrolled(count: int) -> None:
        text = "enrolled"
        wait_for(lambda: sum(text in line for line in lines) == count, f"{lines}: no {count}")

    with kept_port() as port, FrigateStandIn() as frigate:
        url = f"http://127.0.0.1:{port}"
        options = ("--mqtt", "127.0.0.1", "--mqtt-port", broker.port, "--topic", "nvr/events")
        arguments = (frigate.url, url, tmp_path / "state.json", "--interval", "3600", *options)
        with running(*arguments) as lines:
            with ServiceProcess(data, tiny_checkpoint, port=port):
                wait_for(broker.subscribed, "nobody subscribes")
                assert broker.topics == ["nvr/events"]
                broker.publish("nvr/events", b"\xff not JSON")
                broker.publish("nvr/events", b"[]")
                ends(0)
                says("update")
                says("end")
                enrolled(1)
                # The broker restarts, and what ends meanwhile is never said.
                broker.close()
                ends(1)
                broker = Broker(broker.port)
                enrolled(2)
            # The service restarts.
            wait_for(broker.subscribed, "nobody subscribes")
            ends(2)
            says("end")
            wait_for(lambda: any("no answer from" in line for line in lines), f"{lines}")
            frigate.down = True
            wait_for(lambda: any("502" in line for line in lines), f"{lines}")
            frigate.down = False
            with ServiceProcess(data, tiny_checkpoint, port=port), Client(url) as client:
                enrolled(3)
                found = client.list().items
                ids = [one["id"] for one in frigate.events]
                assert [item.metadata["frigate_event"] for item in found] == ids
        broker.close()
