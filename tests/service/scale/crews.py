"""Galleries of random people, in one process and in shards, and queries that use every option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import CheckpointInfo, CMTConfig, Modality, Modulation
from model.ranking import Moments
from service.gallery import Filters, Gallery, ItemUpdate, NewItem, Options, Query, Scale
from service.gallery.feed import Slice
from service.gallery.records import SearchResult
from service.gallery.storage.store import Store
from service.scale.follower import ShardedFollower
from service.scale.shards import Crew
from service.scale.slice import Plan, SliceShard
from tests.service.rankings import ranking_facts
from tests.service.stores import crop

PARTS, DIM = 3, 16
START = datetime(2026, 1, 1, tzinfo=UTC)


class LocalCrew:
    """Shards in this process. `missing` are the places of those that do not answer.

    closed: whether they were ended.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.shards = [SliceShard(plan) for plan in plans]
        self.missing: set[int] = set()
        self.closed = False
        for shard in self.shards:
            shard.loaded()

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def present(self) -> int:
        return len(self.shards) - len(self.missing)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        answers = []
        for place, shard in enumerate(self.shards):
            if place not in self.missing:
                answers.append(getattr(shard, method)(*arguments))
        return answers

    def tell(self, method: str, *arguments: Any) -> None:
        """Nothing: a search follows by itself."""

    def close(self) -> None:
        self.closed = True
        for shard in self.shards:
            shard.close()


def info(metric: str = "euclidean") -> CheckpointInfo:
    config = CMTConfig(
        input_height=96,
        input_width=48,
        parts=PARTS,
        dim=DIM,
        heads=2,
        metric=metric,  # type: ignore[arg-type]
    )
    return CheckpointInfo("a" * 64, config)


def plans(info: CheckpointInfo, count: int, folder: Path, url: str | None) -> list[Plan]:
    config = info.config.model_dump(mode="json")
    return [
        Plan(Slice(i, count), folder, url, config, info.fingerprint, "cpu", None)
        for i in range(count)
    ]


def open_sharded(
    folder: Path, about: CheckpointInfo, count: int, *, partial: bool = True
) -> tuple[Gallery, LocalCrew]:
    """The gallery of a folder in shards of this process."""
    crews: list[LocalCrew] = []

    def start(of: CheckpointInfo, items: int) -> Crew:
        crews.append(LocalCrew(plans(of, count, folder, None)))
        return crews[-1]

    def follow(store: Store, of: CheckpointInfo, at: Path) -> ShardedFollower:
        return ShardedFollower(store, of, at, start, partial=partial)

    return Gallery.open(folder, about, candidates=40, follow=follow), crews[0]


def features(count: int, seed: int) -> Tensor:
    """Of crops of people, some of whom look alike; every ninth is there twice."""
    generator = torch.Generator().manual_seed(seed)
    people = torch.randn(max(1, count // 8), PARTS, DIM, generator=generator)
    whose = torch.randint(len(people), (count,), generator=generator)
    rows = people[whose] + 0.5 * torch.randn(count, PARTS, DIM, generator=generator)
    rows[8::9] = rows[7::9][: len(rows[8::9])]
    return rows


def new_items(count: int, seed: int) -> list[NewItem]:
    random = np.random.default_rng(seed)
    pictures = {"ir": crop(0), "rgb": replace(crop(1), modality="rgb")}
    return [
        NewItem(
            pictures["ir" if random.random() < 0.4 else "rgb"],
            person_id=None if random.random() < 0.2 else f"p{random.integers(count // 6 + 1)}",
            camera_id=None if random.random() < 0.2 else f"c{random.integers(4)}",
            captured_at=None if random.random() < 0.1 else START + timedelta(hours=i),
        )
        for i in range(count)
    ]


def fill(gallery: Gallery, count: int, seed: int) -> None:
    """Enroll so many, erase some, rename some."""
    rows, new = features(count, seed), new_items(count, seed)
    for at in range(0, count, 500):
        gallery.add(new[at : at + 500], rows[at : at + 500])
    items = gallery.list(Filters(), 1000).items
    for item in items[3:30:9]:
        gallery.delete(item.id)
    for item in items[5:40:9]:
        gallery.update(item.id, ItemUpdate(person_id="renamed"))


def queries(count: int, seed: int, facts: bool = True) -> list[Query]:
    """One of every kind of option, with as many numbers as chance gives them."""
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    near = features(count, seed - 1) if seed else features(count, seed)
    made = []
    known = ranking_facts(PARTS) if facts else None
    references: dict[Modality, Moments] = {}
    if facts:
        references = {"rgb": Moments(9.0, 1.5), "ir": Moments(10.0, 1.2)}
    filters = [
        Filters(),
        Filters(gallery_modality=("ir",)),
        Filters(camera_id=("c1", "c2")),
        Filters(exclude_camera_id=("c0",), captured_from=START + timedelta(hours=count // 3)),
        Filters(captured_to=START + timedelta(hours=count // 2), person_id=("p0", "p1", "p3")),
        Filters(person_id=("p1", "p2", "renamed")),
        Filters(person_id=("nobody",)),
    ]
    for number in range(36):
        x = near[int(random.integers(count))] + 0.4 * torch.randn(PARTS, DIM, generator=generator)
        modulation = Modulation(
            1 + 0.5 * torch.randn(1, DIM, generator=generator),
            0.3 * torch.randn(1, DIM, generator=generator),
        )
        options = Options(
            top_k=int(random.integers(1, 60)),
            candidates=[None, 5, 130][number % 3],
            exhaustive=number % 4 == 0,
            filters=filters[number % len(filters)],
            group_by="person_id" if number % 5 < 2 else None,
            explain=number % 3 == 1,
            max_distance=9.0 if number % 7 == 0 else None,
        )
        scale = Scale(
            query=["rgb", "ir", "mixed"][number % 3],
            references=references,
            facts=known,
            modulated=number % 6 != 5,
            images=1 + number % 3,
            prior=float(random.uniform(0.05, 0.95)),
            rerank=number % 2 == 0,
        )
        made.append(Query(x, modulation if scale.modulated else None, options, scale))
    return made


def assert_equal(sharded: Sequence[SearchResult], whole: Sequence[SearchResult]) -> None:
    """The same items in the same order, and the same numbers."""
    for mine, theirs in zip(sharded, whole, strict=True):
        assert [hit.item.id for hit in mine.hits] == [hit.item.id for hit in theirs.hits]
        for one, other in zip(mine.hits, theirs.hits, strict=True):
            assert one.distance == other.distance
            for name, value in vars(other).items():
                if isinstance(value, list):
                    assert vars(one)[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
                elif isinstance(value, float):
                    assert vars(one)[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
                else:
                    assert vars(one)[name] == value, name
        for name in ("searched", "people", "candidates", "exhaustive"):
            assert vars(mine)[name] == vars(theirs)[name], name
        enrolled = theirs.probability_enrolled
        close = enrolled if enrolled is None else pytest.approx(enrolled, rel=1e-9)
        assert mine.probability_enrolled == close
