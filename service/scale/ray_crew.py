"""Shards as Ray actors: Ray places them and starts those again that are lost.

A question goes to all shards that answer. One that is lost or does not answer in time is left out
until it says that it has read its share again, so that no question waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from service.errors import RuntimeUnavailable
from service.scale.slice import NotLoaded, Plan, SliceShard

log = logging.getLogger(__name__)

_AT_ONCE = 16  # calls that a shard works on
_LOOK_SECONDS = 0.5  # between two looks at the shards that are left out
_PLACE_SECONDS = 120.0  # that Ray may take to start the processes of the shards
_DEAD_LOOKS = 3  # in a row that find a shard dead, before another one is started in its place


class RayCrew:
    """A shard for each plan. Thread-safe.

    ray: Ray itself, initialised. resources: of each shard, as `ray.remote` takes them. seconds:
    that an answer may take. Raises RuntimeUnavailable, and what keeps a shard from reading its
    share.
    """

    def __init__(
        self, ray: Any, plans: Sequence[Plan], resources: dict[str, Any], seconds: float
    ) -> None:
        self._ray, self._plans, self._seconds = ray, plans, seconds
        self._class = ray.remote(SliceShard).options(
            max_restarts=-1,
            max_task_retries=0,  # an answer that comes too late helps nobody
            max_concurrency=_AT_ONCE,
            scheduling_strategy="SPREAD",
            **resources,
        )
        self._lock = threading.Lock()
        self._out: dict[int, Any] = {}  # shards that are left out, and what each was asked last
        self._found_dead = [0] * len(plans)
        self._told: list[Any] = [None] * len(plans)
        self._closing = threading.Event()
        self._shards = [self._class.remote(plan) for plan in plans]
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        self._watcher = threading.Thread(target=self._watch, name="shard watcher", daemon=True)
        self._watcher.start()

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def present(self) -> int:
        """`Crew.present`."""
        return len(self) - len(self._out)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """`Crew.ask`."""
        with self._lock:
            asked = {i: shard for i, shard in enumerate(self._shards) if i not in self._out}
        places = {
            getattr(shard, method).remote(*arguments): place for place, shard in asked.items()
        }
        if not places:
            return []
        ready, late = self._ray.wait(list(places), num_returns=len(places), timeout=self._seconds)
        for call in late:
            self._leave_out(places[call], call, f"it did not answer in {self._seconds:g} s")
        answers = {}
        for call in ready:
            try:
                answers[places[call]] = self._ray.get(call)
            except NotLoaded:
                self._leave_out(places[call], None, "it still reads its items")
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                self._leave_out(places[call], None, type(error).__name__)
        return [answers[place] for place in sorted(answers)]

    def tell(self, method: str, *arguments: Any) -> None:
        """`Crew.tell`. A shard that has not done what it was told before is told nothing more."""
        with self._lock:
            for place, shard in enumerate(self._shards):
                before = self._told[place]
                if place in self._out or (before is not None and not self._done(before)):
                    continue
                self._told[place] = getattr(shard, method).remote(*arguments)

    def close(self) -> None:
        """End the shards."""
        self._closing.set()
        self._watcher.join()
        self._end()

    def _end(self) -> None:
        for shard in self._shards:
            self._ray.kill(shard)

    def _wait(self) -> None:
        """Wait until every shard has read its share."""
        calls = [shard.loaded.remote() for shard in self._shards]
        started = [shard.started.remote() for shard in self._shards]
        count = len(calls)
        placed, _ = self._ray.wait(started, num_returns=count, timeout=_PLACE_SECONDS)
        if len(placed) < count:
            raise RuntimeUnavailable(
                f"Ray has started only {len(placed)} of {count} shards in {_PLACE_SECONDS:g} s; "
                "see `ray status` for what is missing, and give fewer shards or add nodes"
            )
        try:
            self._ray.get(calls)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeUnavailable(
                f"a shard ended while it read its items ({reason}); see Ray's logs, and give more "
                "shards or more memory"
            ) from error

    def _leave_out(self, place: int, call: Any, reason: str) -> None:
        with self._lock:
            if place in self._out:
                return
            self._out[place] = call
        log.warning("shard %d of %d is left out: %s", place + 1, len(self), reason)

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            with self._lock:
                out = dict(self._out)
            for place, call in out.items():
                try:
                    self._look(place, call)
                except Exception:  # the next look tries again
                    log.exception("a shard cannot be looked after")

    def _look(self, place: int, call: Any) -> None:
        """Take a shard in again that answers, and ask one that does not once more."""
        dead = False
        if call is not None:
            if not self._done(call):
                return
            try:
                self._ray.get(call)
            except self._ray.exceptions.ActorDiedError:
                dead = True
            except Exception:
                self._found_dead[place] = 0
            else:
                with self._lock:
                    self._found_dead[place] = 0
                    self._out.pop(place, None)
                log.info("shard %d of %d answers again", place + 1, len(self))
                return
        if dead:
            self._found_dead[place] += 1
        with self._lock:
            if self._found_dead[place] >= _DEAD_LOOKS:  # Ray itself starts it no more
                self._found_dead[place] = 0
                self._shards[place] = self._class.remote(self._plans[place])
            self._out[place] = self._shards[place].ready.remote()

    def _done(self, call: Any) -> bool:
        return bool(self._ray.wait([call], timeout=0)[0])
