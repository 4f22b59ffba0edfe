"""Model versions: they never mix, a new one grows beside the old, the switch is one moment."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, insert, update

from model.labels import LabelError
from service.errors import ModelVersionConflict, ModelVersionUnknown
from service.gallery.feed import Position
from service.gallery.records import Filters
from service.gallery.storage import tables
from service.gallery.storage.database import FILE_NAME
from service.gallery.storage.store import Store
from service.gallery.storage.tables import crops, features, items, secrets
from tests.service.stores import MODEL, OTHER, SIZE, OpenStore, all_of, crop, new, rows

THIRD = "c" * 64


def states(store: Store) -> dict[str, tuple[str, int]]:
    return {v.fingerprint: (v.state, v.embedded) for v in store.versions.list()}


def reembed(store: Store, fingerprint: str, seed: int = 7) -> list[int]:
    """Give every missing item features of a version → their numbers."""
    done: list[int] = []
    for block in store.versions.missing(fingerprint, block=2):
        numbers = [c.number for c in block]
        data = np.concatenate([rows(1, seed + number) for number in numbers])
        assert store.versions.add_features(fingerprint, numbers, data) == len(numbers)
        done += numbers
    return done


def test_the_first_version_is_active_and_a_second_one_building(open_store: OpenStore) -> None:
    store = open_store()
    assert states(store) == {MODEL: ("active", 0)}
    store.add(new(3), rows(3))
    other = open_store(OTHER)
    assert states(other) == {MODEL: ("active", 3), OTHER: ("building", 0)}
    assert all_of(other) == {}


def test_a_configuration_is_kept_and_only_once(store: Store) -> None:
    assert store.versions.get(MODEL).configuration is None
    for dim in (8, 9):
        store.versions.register(MODEL, {"dim": dim})
        assert store.versions.get(MODEL).configuration == {"dim": 8}


def test_reembedding_gives_crops_and_goes_on_where_it_was(open_store: OpenStore) -> None:
    store = open_store()
    numbers = [number for number, _ in store.add(new(5), rows(5))]
    store.versions.register(OTHER)
    blocks = store.versions.missing(OTHER, block=2)
    first = next(blocks)
    assert [c.number for c in first] == numbers[:2]
    assert [c.data for c in first] == [crop(i).data for i in range(2)]
    assert {(c.media_type, c.modality) for c in first} == {("image/png", "ir")}
    store.versions.add_features(OTHER, numbers[:2], rows(2, seed=1))
    later = store.add(new(1), rows(1))[0][0]  # enrolled meanwhile
    assert [c.number for block in blocks for c in block] == [*numbers[2:], later]
    again = open_store()  # as after a crash: what is done stays done
    assert reembed(again, OTHER) == [*numbers[2:], later]
    assert list(again.versions.missing(OTHER)) == []
    assert again.versions.count_missing(OTHER) == 0


def test_features_are_never_doubled_nor_of_deleted_items(store: Store) -> None:
    numbers = [number for number, _ in store.add(new(4), rows(4))]
    store.versions.register(OTHER)
    store.delete([numbers[1]])
    given = [*numbers, 10**6]
    assert store.versions.add_features(OTHER, given, rows(5, seed=1)) == 3
    assert store.versions.add_features(OTHER, given, rows(5, seed=2)) == 0
    seen = all_of(store.seen_with(OTHER, SIZE))
    assert {n: row[-1] for n, row in seen.items()} == {
        n: r for n, r in zip(numbers, rows(5, seed=1).tolist(), strict=False) if n != numbers[1]
    }


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (rows(1), "for 2 items"),
        (rows(2, size=5), "5 numbers for a model version with 12"),
        (np.full((2, SIZE), np.nan, np.float16), "not finite"),
    ],
)
def test_unusable_features_are_refused(
    store: Store, bad: np.typing.NDArray[np.float16], sentence: str
) -> None:
    numbers = [number for number, _ in store.add(new(3), rows(3))]
    store.versions.register(OTHER)
    store.versions.add_features(OTHER, numbers[:1], rows(1))
    with pytest.raises(ValueError, match=sentence):
        store.versions.add_features(OTHER, numbers[1:], bad)
    assert states(store)[OTHER] == ("building", 1)


def test_a_switch_needs_every_item_and_is_one_moment(open_store: OpenStore) -> None:
    store = open_store()
    added = store.add(new(3), rows(3))
    store.versions.register(OTHER)
    reembed(store, OTHER)
    late = store.add(new(1), rows(1))[0][0]
    with pytest.raises(ModelVersionConflict, match="1 item has no features"):
        store.versions.activate(OTHER)
    assert states(store) == {MODEL: ("active", 4), OTHER: ("building", 3)}
    assert reembed(store, OTHER) == [late]
    with store.view() as before:
        assert before.count() == 4
        store.versions.activate(OTHER, actor="key-1")
        assert sorted(all_of(before)) == [*[n for n, _ in added], late]
    assert states(store) == {MODEL: ("retired", 4), OTHER: ("active", 4)}
    assert {store.get(item.id).model for _, item in added} == {OTHER}
    assert [(e.actor, e.action) for e in store.audit.page(9).entries] == [("key-1", "activate")]
    with pytest.raises(ModelVersionConflict, match="retired"):
        store.add(new(1), rows(1))  # its features would be in no search
    fresh = store.seen_with(OTHER, SIZE).add(new(1), rows(1))[0][0]
    assert sorted(all_of(open_store(OTHER))) == [*[n for n, _ in added], late, fresh]


def test_the_active_version_stays(store: Store) -> None:
    for call in (store.versions.drop, store.versions.retire):
        with pytest.raises(ModelVersionConflict, match="activate another before"):
            call(MODEL)
    assert states(store) == {MODEL: ("active", 0)}


def test_a_dropped_version_is_gone_and_the_rest_is_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gallery.storage.versions._DROPPED_AT_ONCE", 2)
    store.add(new(5), rows(5))
    store.versions.register(OTHER)
    reembed(store, OTHER)
    store.versions.activate(OTHER)
    store.versions.drop(MODEL)
    assert states(store) == {OTHER: ("active", 5)}
    assert all_of(store) == {}
    assert len(all_of(store.seen_with(OTHER, SIZE))) == 5


def test_unknown_versions_are_a_sentence(store: Store) -> None:
    versions = store.versions
    calls: list[Callable[[], object]] = [
        lambda: versions.get(THIRD),
        lambda: versions.activate(THIRD),
        lambda: versions.retire(THIRD),
        lambda: versions.drop(THIRD),
        lambda: versions.count_missing(THIRD),
        lambda: next(versions.missing(THIRD)),
        lambda: versions.add_features(THIRD, [1], rows(1)),
        lambda: store.seen_with(THIRD, SIZE),
    ]
    for call in calls:
        with pytest.raises(ModelVersionUnknown, match="no model version"):
            call()


# --- a gallery of the first release ---


MIGRATIONS = Path(tables.__file__).parent / "migrations"


def first_release(url: str, models: Sequence[str]) -> None:
    """A database at migration 0001 with one item per model, features and crop included."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for i, model in enumerate(models, start=1):
            connection.execute(
                insert(items).values(
                    number=i, id=f"item-{i}", person_id="p", camera_id=None, captured_at=None,
                    enrolled_at=i, modality="ir", modality_source="given", width=1, height=2,
                    bit_depth=8, sha256="0" * 64, details="{}", model=model,
                )
            )  # fmt: skip
            connection.execute(
                insert(crops).values(number=i, media_type="image/png", data=crop(i).data)
            )
            connection.execute(
                insert(features).values(number=i, model=model, data=rows(1, i).tobytes())
            )
    engine.dispose()


@pytest.mark.parametrize("server", [False, True], ids=["sqlite", "postgresql"])
def test_a_gallery_of_the_first_release_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, server: bool
) -> None:
    url = request.getfixturevalue("postgres_url") if server else None
    first_release(url or f"sqlite:///{tmp_path / FILE_NAME}", [MODEL] * 3)
    store = Store(tmp_path, MODEL, SIZE, url)
    assert states(store) == {MODEL: ("active", 3)}
    assert {n: row[-1] for n, row in all_of(store).items()} == {
        i: rows(1, i)[0].tolist() for i in (1, 2, 3)
    }
    assert store.get("item-2").person_id == "p"
    assert store.image("item-3") == (crop(3).data, "image/png")
    assert store.versions.get(MODEL).configuration is None
    store.close()


def test_the_newest_of_several_checkpoints_becomes_the_active_one(tmp_path: Path) -> None:
    first_release(f"sqlite:///{tmp_path / FILE_NAME}", [MODEL, OTHER, MODEL, OTHER])
    store = Store(tmp_path, OTHER, SIZE)
    assert states(store) == {MODEL: ("retired", 2), OTHER: ("active", 2)}
    assert reembed(store, OTHER) == [1, 3]
    store.close()


def test_no_two_versions_can_be_active(tmp_path: Path) -> None:
    Store(tmp_path, MODEL, SIZE).close()
    with (
        sqlite3.connect(tmp_path / FILE_NAME) as connection,
        pytest.raises(sqlite3.IntegrityError, match="UNIQUE"),
    ):
        connection.execute("INSERT INTO models VALUES ('x', NULL, 0, 'active')")
    connection.close()


def respelled(url: str) -> None:
    """A database of the second release whose labels are written in every way."""
    first_release(url, [MODEL] * len(SPELLINGS))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for number, (person, camera) in enumerate(SPELLINGS, start=1):
            spelled = {"person_id": person, "camera_id": camera}
            connection.execute(update(items).where(items.c.number == number).values(spelled))
        connection.execute(insert(secrets).values(name="audit", data=KEY))  # read on PostgreSQL
    engine.dispose()


KEY = bytes(range(32))


NFC, NFD = "zo\u00eb", "zoe\u0308"
SPELLINGS = [
    (NFC, "gate"),
    (NFD, "gate "),
    ("zo\u200b\u00eb\u00a0", None),
    ("bob", "hall\u2060"),
    ("\u3164", "\u200b"),
    ("bo" * 100, None),
]


@pytest.mark.parametrize("server", [False, True], ids=["sqlite", "postgresql"])
def test_labels_of_older_releases_get_one_spelling(
    request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture, server: bool
) -> None:
    url = request.getfixturevalue("postgres_url") if server else None
    respelled(url or f"sqlite:///{tmp_path / FILE_NAME}")
    (tmp_path / "audit.key").write_bytes(KEY)
    with caplog.at_level(logging.WARNING):
        store = Store(tmp_path, MODEL, SIZE, url)
    labels = [(row[0], row[1]) for row in all_of(store).values()]
    assert labels == [
        *((NFC, "gate"), (NFC, "gate"), (NFC, None), ("bob", "hall")),
        *(("\u3164", "\u200b"), ("bo" * 100, None)),
    ]
    with store.view() as view:  # a snapshot from before learns of every other spelling
        changed = view.changes_since(Position(len(SPELLINGS), 0)).updated
    assert (changed.numbers, changed.persons) == ([2, 3, 4], [NFC, NFC, "bob"])

    entries = store.audit.page(9).entries[::-1]
    assert {entry.action for entry in entries} == {"respell"}
    told = [(entry.subject, entry.details) for entry in entries]
    assert told[0] == (None, {"items": 3})
    assert told[-1] == (None, {"camera_id": "gate", "cameras": ["gate", "gate "]})
    assert told[1][0] == store.audit.pseudonym(NFC)
    spelled = {store.audit.pseudonym(person) for person, _ in SPELLINGS[:3]}
    assert set(told[1][1]["persons"]) == spelled
    assert "1 persons and 1 cameras were spelled in several ways" in caplog.text
    assert "3 labels cannot be respelled" in caplog.text
    assert "zo" not in caplog.text

    # What cannot be respelled is in reach all the same, exactly as it is stored.
    for person in ("\u3164", "bo" * 100):
        assert store.label("person_id", person) == person
        assert store.list(Filters(person_id=(person,)), 5, None).total == 1
        assert len(store.erase_person(person)) == 1
    with pytest.raises(LabelError, match="cannot be seen"):
        store.label("person_id", "\u3164")  # nobody has it any more
    assert len(store.erase_person(NFD)) == 3
    store.close()


def test_infrared_of_older_releases_was_taken_for_white_hot(tmp_path: Path) -> None:
    respelled(f"sqlite:///{tmp_path / FILE_NAME}")
    store = Store(tmp_path, MODEL, SIZE)
    assert store.get("item-1").polarity == "white_hot"
    store.close()
