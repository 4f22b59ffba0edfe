"""Shards as Ray actors: Ray places them and starts those again that are lost.

A question goes to all shards that answer. One that is lost, fails where others answer, or does not
answer in time is left out until it says that it can again, so that no question waits for it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from service.errors import RuntimeUnavailable, ServiceError
from service.gallery.index.room import keep_free
from service.kit.device_loss import on_device_loss
from service.scale.slice import NotLoaded, Plan, SliceShard

log = logging.getLogger(__name__)

_AT_ONCE = 16  # calls that a shard works on
_LOOK_SECONDS = 0.5  # between two looks at the shards that are left out
_PLACE_SECONDS = 120.0  # that Ray may take to start the processes of the shards
_DEAD_LOOKS = 3  # in a row that find a shard dead, before another one is started in its place
_MONITOR, _THRESHOLD = "RAY_memory_monitor_refresh_ms", "RAY_memory_usage_threshold"
_RAY_THRESHOLD = 0.95  # of a machine's memory, unless the second says otherwise


class ShardActor(SliceShard):
    """A shard in a process of its own, which ends where the GPU is lost for it: Ray starts another.

    plan: see `SliceShard`.
    """

    def __init__(self, plan: Plan) -> None:
        keep_free(_ray_share())
        self._losing = on_device_loss(_end)
        self._losing.__enter__()  # for as long as the process lives
        super().__init__(plan)


def _ray_share() -> float:
    """Of a machine's memory: beyond it Ray ends processes, and first those that have most."""
    if os.environ.get(_MONITOR) == "0":
        return 0.0
    return 1.0 - float(os.environ.get(_THRESHOLD, _RAY_THRESHOLD))


def _end(why: str) -> None:
    log.critical("the GPU is lost for this shard, which ends to be started again (%s)", why)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(1)


class RayCrew:
    """A shard for each plan. Thread-safe.

    ray: Ray itself, initialised. resources: of each shard, as `ray.remote` takes them. seconds:
    that an answer may take. lost: called once the node of this process has died, without which it
    reaches no shard again. Raises RuntimeUnavailable, and what keeps a shard from reading its
    share.
    """

    def __init__(
        self,
        ray: Any,
        plans: Sequence[Plan],
        resources: dict[str, Any],
        seconds: float,
        lost: Callable[[], None],
    ) -> None:
        self._ray, self._plans, self._seconds, self._lost = ray, plans, seconds, lost
        self._class = ray.remote(ShardActor).options(
            max_restarts=-1,
            max_task_retries=0,  # an answer that comes too late helps nobody
            max_concurrency=_AT_ONCE,
            scheduling_strategy="SPREAD",
            **resources,
        )
        self._lock = threading.Lock()
        self._out: dict[int, Any] = {}  # shards that are left out, and what each was asked last
        self._reasons: dict[int, str] = {}  # why, as the log says
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
        answers: dict[int, Any] = {}
        failures: dict[int, Exception] = {}
        for call in ready:
            try:
                answers[places[call]] = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                failures[places[call]] = self._cause(error)
        # What fails in all of them that have read their share is the question's own fault.
        of_question = [one for one in failures.values() if not self._is_of_shard(one)]
        if of_question and not answers:
            raise of_question[0]
        for place, failure in failures.items():
            self._leave_out(place, None, _told(failure))
        return [answers[place] for place in sorted(answers)]

    def _cause(self, error: Exception) -> Exception:
        """What a shard raised; Ray's own error where it is lost."""
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error

    def _is_of_shard(self, error: Exception) -> bool:
        """Whether a shard is lost, or has not read its share."""
        return isinstance(error, (NotLoaded, self._ray.exceptions.RayError))

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
        except self._ray.exceptions.RayError as error:
            cause = self._cause(error)
            if not isinstance(cause, self._ray.exceptions.RayError):
                raise cause from None
            raise RuntimeUnavailable(
                f"a shard ended while it read its items ({_told(error)}); see Ray's logs, and give "
                "more shards or more memory"
            ) from error

    def _leave_out(self, place: int, call: Any, reason: str) -> None:
        with self._lock:
            if place in self._out:
                return
            self._out[place] = call
        self._say(place, reason)

    def _say(self, place: int, reason: str) -> None:
        if self._reasons.get(place) != reason:
            self._reasons[place] = reason
            log.warning("shard %d of %d is left out: %s", place + 1, len(self), reason)

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SECONDS):
            with self._lock:
                out = dict(self._out)
            try:
                for place, call in out.items():
                    self._look(place, call)
                if out and self._node_died():
                    self._lost()
                    return
            except Exception:  # the next look tries again
                log.exception("a shard cannot be looked after")

    def _node_died(self) -> bool:
        here = self._ray.get_runtime_context().get_node_id()
        return any(node["NodeID"] == here and not node["Alive"] for node in self._ray.nodes())

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
            except Exception as error:
                self._found_dead[place] = 0
                self._say(place, _told(self._cause(error)))
            else:
                with self._lock:
                    self._found_dead[place] = 0
                    self._out.pop(place, None)
                self._reasons.pop(place, None)
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


def _told(error: Exception) -> str:
    """An error in a line: our own by its words, any other with its name."""
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        words
        if isinstance(error, (NotLoaded, ServiceError))
        else f"{type(error).__name__}: {words}"
    )
