"""`cmt bench evaluate` on small data: both sides agree, and a disagreement is caught."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.cli import main
from training.evaluation.bench import (
    ProtocolData,
    gallery_distances,
    loop,
    random_data,
    require_equal,
    vectorised,
    vectorised_distances,
)


@pytest.fixture(scope="module")
def data() -> ProtocolData:
    return random_data(queries=70, identities=12, parts=2, dim=4)


def test_the_data_have_the_proportions_of_the_real_set() -> None:
    real = random_data(queries=200, identities=96, parts=1, dim=2)
    assert {gallery.size for gallery in real.galleries} == {301}
    for gallery in real.galleries:
        cells = set(zip(real.pool_ids[gallery], real.pool_cameras[gallery], strict=True))
        assert len(cells) == 301  # one image of each identity and camera
    assert set(real.query_cameras) == {3, 6}


def test_both_sides_give_the_same_figures_from_features_and_from_distances(
    data: ProtocolData,
) -> None:
    ours = vectorised(data, vectorised_distances(data))
    require_equal(ours, loop(data, None))
    given = [gallery_distances(data, gallery) for gallery in data.galleries]
    require_equal(vectorised(data, given), loop(data, given))
    assert len(ours) == 10
    assert len({metrics.mean_ap for metrics in ours}) == 10


def test_figures_that_differ_stop_the_benchmark(data: ProtocolData) -> None:
    distances = vectorised_distances(data)
    theirs = loop(data, distances)
    distances[3] = np.roll(distances[3], 1, axis=1)
    with pytest.raises(ValueError, match="trial 4: figures of the two sides differ"):
        require_equal(vectorised(data, distances), theirs)


def test_the_command_writes_both_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "evaluate.json"
    size = ("--queries", "60", "--identities", "10", "--parts", "2", "--dim", "4")
    assert main(["bench", "evaluate", *size, "--rounds", "2", "--json", str(out)]) == 0
    assert "from features" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [result["case"] for result in written["results"]] == ["from features", "from distances"]
    for result in written["results"]:
        spread = result["seconds"]["ratio"]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    assert written["command"] == f"cmt bench evaluate {' '.join(size)} --rounds 2"
    assert {"date", "cpu", "threads", "packages"} <= written["machine"].keys()
