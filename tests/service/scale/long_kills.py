"""Nodes of a Ray cluster are killed for minutes, while items are enrolled and asked for.

`make scale-check` runs it; what happened is printed with the time, and written to the file that
CMT_KILLS names.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from model.machine import machine
from service.errors import ShardsMissing
from service.gallery import Options, Query
from tests.service.processes import ServiceProcess, wait_for
from tests.service.scale.conftest import Nodes
from tests.service.scale.crews import assert_equal, features, fill, new_items, queries
from tests.service.scale.test_ray import on_ray, whole

KILLS, SHARDS, BEFORE = 4, 3, 3000


def test_kills(tmp_path: Path, nodes: Nodes) -> None:
    asked = queries(BEFORE, seed=BEFORE)
    started = time.monotonic()
    kills: list[dict[str, Any]] = []
    answers = {"whole": 0, "partial": 0, "refused": 0}
    enrolled: list[str] = []
    missed: list[str] = []
    failed: list[str] = []
    stopping = threading.Event()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    with on_ray(tmp_path, nodes, SHARDS) as gallery:
        fill(gallery, BEFORE, seed=BEFORE)
        before = gallery.search_all(asked)
        say(f"{len(gallery)} items in {SHARDS} shards")

        def load() -> None:
            rows, new = features(20_000, seed=9), new_items(20_000, seed=9)
            for place in range(20_000):
                if stopping.is_set():
                    return
                try:
                    (item,) = gallery.add(new[place : place + 1], rows[place : place + 1])
                    enrolled.append(item.id)
                    wanted = Query(rows[place], None, Options(top_k=3))
                    answer = gallery.search_all([wanted])[0]
                except ShardsMissing:
                    answers["refused"] += 1
                    continue
                except Exception as error:
                    failed.append(repr(error))
                    continue
                full = answer.shards_ok == SHARDS
                answers["whole" if full else "partial"] += 1
                if full and item.id not in [hit.item.id for hit in answer.hits]:
                    missed.append(item.id)

        loading = threading.Thread(target=load)
        loading.start()
        for _ in range(KILLS):
            time.sleep(5)
            say(f"kill a node; {len(enrolled)} enrolled, answers {answers}")
            killed = time.monotonic()
            nodes.kill(0)  # the oldest, which has shards
            wait_for(lambda: gallery.presence.answered < SHARDS, "no shard is lost")
            noticed = time.monotonic() - killed
            say(f"{gallery.presence.answered} of {SHARDS} shards answer, {noticed:.1f} s later")
            wait_for(lambda: gallery.presence.answered == SHARDS, "no shard comes back", 120)
            back = time.monotonic() - killed
            say(f"all answer again, {back:.1f} s after the kill")
            kills.append({"noticed after": round(noticed, 2), "whole after": round(back, 2)})
            nodes.heal()
        stopping.set()
        loading.join()
        gallery.check()
        after = gallery.search_all(asked)
        items = len(gallery)
    assert not failed
    assert not missed
    assert answers["partial"]
    assert len(before) == len(after)
    assert_equal(after, whole(tmp_path, asked))
    say(f"{items} items, {len(enrolled)} of them enrolled meanwhile; rankings are equal")
    if file := os.environ.get("CMT_KILLS"):
        report = {
            "settings": {"shards": SHARDS, "nodes": 2, "items before": BEFORE, "kills": KILLS},
            "machine": machine(),
            "results": {
                "kills, seconds": kills,
                "enrolled meanwhile": len(enrolled),
                "answers": answers,
                "acknowledged and lost": 0,
                "rankings equal to one process's": True,
            },
        }
        Path(file).write_text(json.dumps(report, indent=2) + "\n")


def test_a_service_whose_node_has_died_ends(tmp_path: Path, tiny_checkpoint: Path) -> None:
    service = ServiceProcess(tmp_path / "data", tiny_checkpoint, engine="ray", shards=2)
    with service:
        lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in service.children()}
        (raylet,) = (pid for pid, line in lines.items() if b"/raylet/raylet" in line)
        os.kill(raylet, signal.SIGKILL)
        assert service.ended(120) == 1
    assert "the Ray node of this process has died" in service.text()
    # Supervisors start it again, on the same folder.
    with ServiceProcess(tmp_path / "data", tiny_checkpoint, engine="ray", shards=2):
        pass
