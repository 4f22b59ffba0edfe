"""Labels from the paths of files: what a pattern means, and what is said of one without sense."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from service.client.patterns import PathPattern, PatternError

BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("pattern", "path", "labels"),
    [
        ("{camera}/{person}/*.jpg", "gate/anna/1.JPG", {"camera_id": "gate", "person_id": "anna"}),
        ("{camera}/{person}/*.jpg", "gate/anna/x/1.jpg", None),
        ("{camera}/{person}/*.jpg", "gate/anna/1.png", None),
        ("{person_id}_{camera_id}_*", "07_c1s1_9.jpg", {"person_id": "07", "camera_id": "c1s1"}),
        ("{camera}/{person}", "gate/anna.b.png", {"camera_id": "gate", "person_id": "anna.b"}),
        ("{camera}/", "gate/1.jpg", {"camera_id": "gate"}),
        ("./{camera}/**", "gate/a/b/1.jpg", {"camera_id": "gate"}),
        ("**/{person}/*", "anna/1.jpg", {"person_id": "anna"}),
        ("**/{person}/*", "a/b/anna/1.jpg", {"person_id": "anna"}),
        ("{person}/{person}_*", "7/7_1.jpg", {"person_id": "7"}),
        ("{person}/{person}_*", "7/8_1.jpg", None),
        ("Cam?/[x] (1)+/*", "cam1/[x] (1)+/a.jpg", {}),
        ("Cam?/*", "cam12/a.jpg", None),
        ("{modality}/*", "Thermal/a.jpg", {"modality": "ir"}),
        ("{modality}/{polarity}/*", "ir/black_hot/a.jpg",
         {"modality": "ir", "polarity": "black_hot"}),
        ("{person}/*", "Zoe\u0308/a.jpg", {"person_id": "Zo\u00eb"}),
    ],
)  # fmt: skip
def test_labels(pattern: str, path: str, labels: dict[str, str] | None) -> None:
    compiled = PathPattern(pattern)
    texts = compiled.match(path)
    assert (None if texts is None else compiled.labels(texts)) == labels


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("{time}.jpg", "20260301T130500+0100.jpg"),
        ("{time}.jpg", "2026-03-01_13-05-00.jpg"),
        ("{time}", "20260301130500.jpg"),
        ("{time:%d.%m.%y %H.%M}*", "01.03.26 13.05 gate.jpg"),
        ("x{time:%Y/%m/%d/%H%M%S}.jpg", "x2026/03/01/130500.jpg"),
        ("{time:%Y-%m-%d}/{camera}/{time:%H%M%S}*", "2026-03-01/gate/130500_1.jpg"),
        ("{camera}{time:%Y%j%H%M}.jpg", "gate20260601305.jpg"),
        ("{camera}-{time:unix}-*.jpg", "front-door-1772366700-ab.jpg"),
        ("{camera}_{time:unix}.jpg", "gate_1772366700000.jpg"),
    ],
)
def test_times(pattern: str, path: str) -> None:
    compiled = PathPattern(pattern, BERLIN)
    texts = compiled.match(path)
    assert texts is not None
    assert compiled.time(texts) == datetime(2026, 3, 1, 12, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("", "is empty"),
        ("/srv/{camera}/*", "leads out of the folder"),
        ("{camera}/../*", "leads out of the folder"),
        ("{camera}\\*", "write / between folders"),
        ("{camera}//*", "a folder without a name"),
        ("{camra}/*", "is it {camera}?"),
        ("*.{jpg,png}", "there are {person}, {camera}"),
        ("{camera/*", "a single '{'"),
        ("{camera}{person}.jpg", "nothing stands between {camera} and {person}"),
        ("{camera}*.jpg", "nothing stands between {camera} and *"),
        ("a**/x", "nothing stands between * and *"),
        ("{camera:%Y}/*", "only {time:…} has a format"),
        ("{time:%Q}.jpg", "'%Q' in {time:%Q} is not known"),
        ("{time:%H%M}.jpg", "have no full date"),
        ("{time:%Y%m%d}/{time}.jpg", "each needs a format"),
        ("{time:%Y%m%d%H}.jpg", "--timezone"),
    ],
)
def test_a_pattern_that_means_nothing_is_a_sentence(pattern: str, sentence: str) -> None:
    with pytest.raises(PatternError) as raised:
        PathPattern(pattern)
    assert sentence in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("pattern", "path", "sentence"),
    [
        ("{time}", "a.jpg", "is no date with a time"),
        ("{time}", "20260231T000000Z.jpg", "is no time that exists"),
        ("{time:%Y%m%d %z}", "20261301 +0000.jpg", "is no time that exists"),
        ("{time}", "20260301T130500.jpg", "--timezone"),
    ],
)
def test_a_time_that_is_none_is_a_sentence(pattern: str, path: str, sentence: str) -> None:
    compiled = PathPattern(pattern)
    texts = compiled.match(path)
    assert texts is not None
    with pytest.raises(ValueError, match=sentence):
        compiled.time(texts)


def test_why_a_path_does_not_match() -> None:
    assert "lies 0 folders deep, the pattern's files 2 folders" in (
        PathPattern("{camera}/{person}/?*").why_not("a.jpg")
    )
    assert PathPattern("**/{person}/*.png").why_not("a/b.jpg") == "its names are others"
