"""Enroll the persons that Frigate tracked: the clean snapshot of each, cut to its box, once.

    python examples/clients/frigate.py --frigate http://nvr:5000 --mqtt nvr

Frigate's HTTP API says what there is: it is asked for all that began since the last run. MQTT only
says when to ask, since what Frigate says while nobody listens is lost. Without --mqtt, it is asked
every --interval seconds. Only tracked objects that have ended and kept a snapshot are taken. Each
carries an idempotency key, so that one which was enrolled before an interruption is not enrolled
again; one that could not be enrolled yet is asked for until it is.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import httpx
import typer
from PIL import Image
from pydantic import BaseModel, TypeAdapter

from model.atomic_file import write_whole
from model.terminal import say
from service.client import DEFAULT_URL, Client, ServiceProblem, Unreachable

LATER = frozenset({408, 429, 503, 504, 507})  # answers of a service that is busy, full or starting
KEY_REFUSED = frozenset({401, 403})
SOON = 5.0  # seconds until something that is left is tried again
LOOK_BACK = 3600.0  # a person may be listed long after it began, as where it entered a zone late
PAGE = 100


@dataclass
class State:
    """What is done. after: all that began before is; done: what began since and is, with when."""

    after: float
    done: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, first: float) -> State:
        try:
            return cls(**json.loads(file.read_text())) if file.exists() else cls(first)
        except (ValueError, TypeError) as error:
            raise typer.BadParameter(f"{file} is no state of this program; remove it") from error

    def save(self, file: Path) -> None:
        self.done = {i: at for i, at in self.done.items() if at >= self.after - LOOK_BACK}
        write_whole(file, json.dumps(asdict(self)))


class Person(BaseModel):
    """A tracked object of Frigate's API. end_time: None while it is tracked. data: its box too."""

    id: str
    camera: str
    start_time: float
    end_time: float | None
    has_snapshot: bool
    zones: list[str] = []
    data: dict[str, Any] | None = None


_PERSONS = TypeAdapter(list[Person])


class Frigate:
    """Frigate's HTTP API. login: user and password, which its port 8971 asks for."""

    def __init__(self, url: str, login: dict[str, str] | None, *, verify: bool) -> None:
        self._http = httpx.Client(base_url=url, timeout=30, verify=verify)
        self._login = login

    def persons(self, after: float) -> Iterator[list[Person]]:
        """Pages of the persons that began after a time, those still tracked too, oldest first."""
        seen: set[str] = set()
        while True:
            some = self._get(
                "/api/events", labels="person", after=after, sort="date_asc", limit=PAGE,
                include_thumbnails=0,
            ).raise_for_status()  # fmt: skip
            page = [one for one in _PERSONS.validate_json(some.content) if one.id not in seen]
            if not page:
                return
            if [one.start_time for one in page] != sorted(one.start_time for one in page):
                raise ValueError("Frigate does not list what began first; take 0.15 or newer")
            yield page
            seen.update(person.id for person in page)
            after = page[-1].start_time - 0.001  # several may begin in one frame

    def frame(self, event_id: str) -> bytes | None:
        """The best frame of a tracked object, without drawings; None where it is gone."""
        # Before Frigate 0.17 it was .png. Neither is there without `clean_copy`: then the snapshot,
        # as clean as Frigate's configuration and release let it be.
        for name in ("snapshot-clean.webp", "snapshot-clean.png", "snapshot.jpg"):
            plain = {"bbox": 0, "timestamp": 0, "crop": 0, "quality": 95}
            answer = self._get(f"/api/events/{event_id}/{name}", **plain)
            if answer.status_code != 404:
                return answer.raise_for_status().content
        return None

    def _get(self, path: str, **parameters: Any) -> httpx.Response:
        try:
            answer = self._http.get(path, params=parameters)
            if answer.status_code == 401 and self._login is not None:  # not yet, or no longer
                self._http.post("/api/login", json=self._login).raise_for_status()
                answer = self._http.get(path, params=parameters)
        except httpx.TransportError as error:
            raise ConnectionError(
                f"Frigate at {self._http.base_url} does not answer ({error}); check that it runs, "
                "and the address of --frigate"
            ) from error
        return answer


def take_all(frigate: Frigate, client: Client, state: State, file: Path) -> bool:
    """Enroll who left since the last time → whether some are still tracked."""
    tracked: list[float] = []
    try:
        for page in frigate.persons(state.after - LOOK_BACK):
            for person in page:
                if person.end_time is None:
                    tracked.append(person.start_time)
                elif person.id not in state.done:
                    if person.has_snapshot:
                        take(frigate, client, person)
                    state.done[person.id] = person.start_time
            state.after = min([*tracked, max(state.after, page[-1].start_time)])
    finally:
        state.save(file)
    return bool(tracked)


def take(frigate: Frigate, client: Client, person: Person) -> None:
    """Enroll one person, or say why never. Raises where it can be enrolled later."""
    name = f"{person.id} ({person.camera})"
    image, box = frigate.frame(person.id), (person.data or {}).get("box")
    if image is None or box is None:
        say(f"{name}: Frigate has no snapshot of it any more, or no box", err=True)
        return
    try:
        with Image.open(BytesIO(image)) as opened:
            width, height = opened.size
        x, y, w, h = box  # relative to the frame
        left, right = (round(width * max(0, min(1, part))) for part in (x, x + w))
        top, bottom = (round(height * max(0, min(1, part))) for part in (y, y + h))
        client.enroll(
            image,
            box=(left, top, right - left, bottom - top),
            camera_id=person.camera,
            captured_at=datetime.fromtimestamp(person.start_time, UTC),
            metadata={"frigate_event": person.id, "zones": person.zones},
            idempotency_key=f"frigate-{person.id}",
        )
        say(f"{name}: enrolled")
    except ServiceProblem as problem:
        if problem.status in LATER or problem.status in KEY_REFUSED:
            raise
        if problem.code != "idempotency_conflict":  # which it was enrolled under before
            say(f"{name}: {problem}", err=True)
    except (OSError, TypeError, ValueError) as error:  # no picture, or no box
        say(f"{name}: {error}", err=True)


def listen(host: str, port: int, topic: str, login: tuple[str, str | None] | None) -> Event:
    """Connect to an MQTT broker, again and again → what is set whenever a person has ended."""
    from paho.mqtt.client import Client as Listener
    from paho.mqtt.client import MQTTMessage
    from paho.mqtt.enums import CallbackAPIVersion

    woken = Event()

    def connected(listener: Listener, _data: Any, _flags: Any, reason: Any, _more: Any) -> None:
        if reason.is_failure:
            say(f"the MQTT broker refuses: {reason}", err=True)
            return
        listener.subscribe(topic)

    def subscribed(_listener: Listener, _data: Any, _id: int, _reasons: Any, _more: Any) -> None:
        woken.set()  # something may have been said before; from now on nothing is missed

    def told(_listener: Listener, _data: Any, message: MQTTMessage) -> None:
        with suppress(ValueError, LookupError, TypeError):  # of another program
            said = json.loads(message.payload)
            if said["type"] == "end" and said["after"]["label"] == "person":
                woken.set()

    def failed(_listener: Listener, _data: Any) -> None:
        say(f"the MQTT broker {host}:{port} does not answer; trying again", err=True)

    listener = Listener(CallbackAPIVersion.VERSION2)
    listener.on_connect, listener.on_subscribe, listener.on_message = connected, subscribed, told
    listener.on_connect_fail = failed
    if login is not None:
        listener.username_pw_set(*login)
    listener.reconnect_delay_set(1, 30)
    listener.connect_async(host, port)
    listener.loop_start()
    return woken


def main(
    frigate: Annotated[str, typer.Option(help="Its address, such as http://nvr:5000.")],
    url: Annotated[str, typer.Option(envvar="CMT_URL", help="Of the service.")] = DEFAULT_URL,
    api_key: Annotated[str | None, typer.Option(envvar="CMT_API_KEY")] = None,
    user: Annotated[str | None, typer.Option(help="Of Frigate's port 8971.")] = None,
    password: Annotated[str, typer.Option(envvar="FRIGATE_PASSWORD")] = "",
    insecure: Annotated[bool, typer.Option(help="Accept any certificate of Frigate.")] = False,
    mqtt: Annotated[str | None, typer.Option(help="Host of the MQTT broker.")] = None,
    mqtt_port: int = 1883,
    mqtt_user: str | None = None,
    mqtt_password: Annotated[str | None, typer.Option(envvar="MQTT_PASSWORD")] = None,
    topic: Annotated[str, typer.Option(help="Of Frigate's events.")] = "frigate/events",
    interval: Annotated[float, typer.Option(help="Seconds between looks at the API.")] = 60,
    since: Annotated[float, typer.Option(help="Hours that the first run looks back.")] = 24,
    state: Annotated[Path, typer.Option(help="Where the next run goes on.")] = Path("frigate.json"),
    once: Annotated[bool, typer.Option(help="Take what there is and end.")] = False,
) -> None:
    """Enroll the persons that Frigate tracked, until Ctrl-C.

    Example: python examples/clients/frigate.py --frigate http://nvr:5000 --mqtt nvr
    """
    login = None if user is None else {"user": user, "password": password}
    nvr = Frigate(frigate, login, verify=not insecure)
    done = State.load(state, time.time() - 3600 * since)
    woken = Event()
    if mqtt is not None:
        mqtt_login = None if mqtt_user is None else (mqtt_user, mqtt_password)
        woken = listen(mqtt, mqtt_port, topic, mqtt_login)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with Client(url, api_key=api_key) as client:
        try:
            while True:
                woken.clear()
                wait = interval
                try:
                    if take_all(nvr, client, done, state):
                        wait = min(SOON, interval)
                except (ServiceProblem, Unreachable, httpx.HTTPError, OSError, ValueError) as error:
                    if once or status_of(error) in KEY_REFUSED:
                        say(f"Error: {error}", err=True)
                        raise typer.Exit(1) from error
                    say(f"{error}; trying again", err=True)
                    wait = min(SOON, interval)
                if once:
                    break
                woken.wait(wait)
        except KeyboardInterrupt:
            say("stopped; what was enrolled stays, and the next run goes on from here", err=True)


def status_of(error: Exception) -> int | None:
    """The status that the service or Frigate answered, if that is the error."""
    if isinstance(error, ServiceProblem):
        return error.status
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


if __name__ == "__main__":
    typer.run(main)
