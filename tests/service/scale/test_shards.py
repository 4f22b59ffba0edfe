"""Shards answer as one process does: the same items in the same order, with the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.gallery import Gallery
from tests.service.scale.crews import assert_equal, fill, info, open_sharded, queries


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("facts", [True, False])
@pytest.mark.parametrize(("count", "shards"), [(1, 2), (40, 5), (900, 3), (5200, 2)])
def test_ranking_is_that_of_one_process(
    tmp_path: Path, metric: str, facts: bool, count: int, shards: int
) -> None:
    about, asked = info(metric), queries(count, seed=count, facts=facts)
    with_all = Gallery.open(tmp_path, about, candidates=40)
    fill(with_all, count, seed=count)
    whole = with_all.search_all(asked)
    with_all.close()
    gallery, _crew = open_sharded(tmp_path, about, shards)
    assert_equal(gallery.search_all(asked), whole)
    gallery.close()
