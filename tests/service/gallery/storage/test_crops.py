"""Crops in an object storage: what a 201 and an erasure promise there, and what it does not give.

The storage is a real S3 server (moto's) in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, create_engine, select, update

from model.cli import main
from model.labels import LabelError
from service.errors import (
    CropsUnavailable,
    GalleryDamaged,
    IdempotencyConflict,
    ItemNotFound,
)
from service.gallery import Gallery, NewItem, RequestKey
from service.gallery.backup.restore import restore
from service.gallery.storage import crops as crops_module
from service.gallery.storage import objects as objects_module
from service.gallery.storage.crops import Crops, StoredImage
from service.gallery.storage.database import address_of
from service.gallery.storage.objects import Address, ObjectStorage, Placed, parse_address
from service.gallery.storage.tables import loose_objects
from service.settings import SettingsError, load_settings
from tests.service.crash.gallery_process import GalleryProcess
from tests.service.crash.run import CrashTest, Report
from tests.service.crash.subject import CONTEXT
from tests.service.object_server import Bucket, address
from tests.service.places import INFO, KINDS, MakePlace, Place, features
from tests.service.processes import wait_for
from tests.service.stores import crop

T = TypeVar("T")


def opened(place: Place, bucket: Bucket | None, inline_bytes: int = 0) -> Gallery:
    url = None if bucket is None else bucket.url
    return Gallery.open(
        place.folder,
        INFO,
        database_url=place.url,
        crops_url=url,
        crops_inline_bytes=inline_bytes,
    )


def enrolled(gallery: Gallery, count: int = 3, start: int = 0, **fields: Any) -> list[str]:
    new = [NewItem(crop(start + i), **fields) for i in range(count)]
    return [item.id for item in gallery.add(new, features(count, start))]


def engine_of(place: Place) -> Engine:
    """The database without a gallery, which would need its bucket."""
    return create_engine(address_of(place.folder, place.url))


def loose(place: Place) -> list[int | None]:
    """What `loose_objects` says of each name."""
    with engine_of(place).connect() as connection:
        return list(connection.execute(select(loose_objects.c.item)).scalars())


@pytest.fixture
def place(make_place: MakePlace) -> Place:
    return make_place("sqlite")


@pytest.fixture
def gallery(place: Place, bucket: Bucket) -> Iterator[Gallery]:
    """All crops in the bucket."""
    with closing(opened(place, bucket)) as gallery:
        yield gallery


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `hurry`."""
    hurry(monkeypatch)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Give the storage little time, so that a test need not wait for it: see `served`."""
    patch.setattr(objects_module, "_CONNECT_SECONDS", 0.3)
    patch.setattr(objects_module, "_READ_SECONDS", 0.3)
    patch.setattr(objects_module, "_REST_SECONDS", 0.2)


def served(call: Callable[[], T]) -> T:
    """What a call gives once the storage, which is given little time, has answered in it."""

    def answered() -> list[T]:
        with suppress(CropsUnavailable):
            return [call()]
        return []

    [given] = wait_for(answered, "the storage does not answer")
    found: T = given
    return found


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some that boto3 finds."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often for what is to be deleted."""
    monkeypatch.setattr(crops_module, "_CLEAN_SECONDS", 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_large_crops_are_objects_and_small_ones_rows(
    kind: str, make_place: MakePlace, bucket: Bucket
) -> None:
    place = make_place(kind)
    size = len(crop(0).data)
    with closing(opened(place, bucket, size)) as gallery:
        inside = enrolled(gallery, 2, person_id="Erika", metadata={"note": "gate"})
        assert bucket.objects() == {}
    with closing(opened(place, bucket, size - 1)) as gallery:
        outside = enrolled(gallery, 3, start=2, person_id="Erika", camera_id="gate")
        there = bucket.objects()
        assert sorted(there.values()) == sorted(crop(i).data for i in (2, 3, 4))
        for number, item in enumerate([*inside, *outside]):
            assert gallery.image(item) == (crop(number).data, "image/png")
        # A name says nothing: neither who, nor which item, nor what picture.
        secrets = [
            "Erika",
            *outside,
            *(hashlib.sha256(data).hexdigest() for data in there.values()),
        ]
        for key in there:
            assert not any(secret.replace("-", "")[:8] in key for secret in secrets)
        hits = gallery.search(features(3, 2)[1], None, top_k=1).hits
        assert hits[0].item.id == outside[1]
    with closing(opened(place, bucket, size)) as gallery:  # as they were, whatever is set now
        assert gallery.image(outside[0])[0] == crop(2).data
        assert gallery.image(inside[0])[0] == crop(0).data


def test_replicas_share_a_bucket(make_place: MakePlace, bucket: Bucket) -> None:
    place = make_place("postgresql")
    other = Place(place.folder / "replica", place.url)
    with closing(opened(place, bucket)) as here, closing(opened(other, bucket)) as there:
        ids = [*enrolled(here, 2), *enrolled(there, 1, start=2)]
        for gallery in (here, there):
            assert [gallery.image(item)[0] for item in ids] == [crop(i).data for i in range(3)]
        assert there.delete(ids[0]) == 0
        with pytest.raises(ItemNotFound):
            here.image(ids[0])
        assert sorted(bucket.objects().values()) == sorted([crop(1).data, crop(2).data])


def test_without_a_bucket_nothing_of_it_is_loaded(place: Place) -> None:
    with closing(place.open()) as gallery:
        enrolled(gallery)
        assert gallery.crops_available is None
        assert gallery.pending_objects == 0
        assert not [t for t in threading.enumerate() if t.name == "loose objects"]


def test_what_is_erased_is_gone_from_the_bucket_too(gallery: Gallery, bucket: Bucket) -> None:
    kept = enrolled(gallery, 2)
    mine = enrolled(gallery, 3, start=2, person_id="Erika")
    assert gallery.delete(kept[0]) == 0
    assert gallery.erase("Erika") == (3, 0)
    assert list(bucket.objects().values()) == [crop(1).data]
    with pytest.raises(ItemNotFound):
        gallery.image(mine[0])
    assert gallery.expire(gallery.get(kept[1]).enrolled_at + timedelta(days=1)) == 1
    wait_for(lambda: not bucket.objects(), "what retention deletes stays in the bucket")


def test_a_refused_enrollment_leaves_no_object(gallery: Gallery, bucket: Bucket) -> None:
    key = RequestKey("key-1", "1" * 64)
    [item] = enrolled(gallery, 1, request=key)
    before = bucket.objects()
    with pytest.raises(IdempotencyConflict):  # as where two come at the same moment
        enrolled(gallery, 1, start=1, request=key)
    with pytest.raises(LabelError):
        enrolled(gallery, 1, start=2, person_id="\n")
    wait_for(lambda: bucket.objects() == before, "an object of no item stays")
    assert gallery.image(item)[0] == crop(0).data


def test_what_was_acknowledged_survives_kills_and_nothing_else_stays(
    bucket: Bucket, tmp_path: Path
) -> None:
    """The rounds of `tests/service/crash`, every crop an object; then nothing is loose."""
    report = Report(7, "gallery", "sqlite")
    victim = GalleryProcess(tmp_path / "data", None, bucket.url)
    try:
        CrashTest(victim, report).run(4)
    finally:
        victim.kill()
    assert report.enrollments_acknowledged > report.deletes_acknowledged > 0
    place = Place(tmp_path / "data", None)
    with closing(opened(place, bucket)) as gallery:
        wait_for(lambda: len(bucket.objects()) == len(gallery), "objects of no item stay")


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(where: str, place: Place, crops_url: str, item: str | None = None) -> None:
    """A process that enrolls two crops, or deletes an item, and dies where `Crops` would go on."""
    setattr(Crops, "_clean_on", lambda self: None)  # noqa: B010 - a thread that could be faster
    gallery = Gallery.open(
        place.folder, INFO, database_url=place.url, crops_url=crops_url, crops_inline_bytes=0
    )
    setattr(Crops, where, die)
    if item is None:
        enrolled(gallery, 2, person_id="Erika")
    else:
        gallery.delete(item)


def killed(where: str, place: Place, bucket: Bucket, item: str | None = None) -> None:
    process = CONTEXT.Process(target=killed_before, args=(where, place, bucket.url, item))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", KINDS)
def test_an_enrollment_killed_between_object_and_row_leaves_neither(
    kind: str, make_place: MakePlace, bucket: Bucket
) -> None:
    place = make_place(kind)
    killed("insert", place, bucket)
    assert len(bucket.objects()) == 2
    assert loose(place) == [None, None]
    if kind == "postgresql":  # another replica may still be writing: it goes by their age
        with closing(opened(place, bucket)):
            assert loose(place) == [None, None]
        with engine_of(place).begin() as connection:
            connection.execute(update(loose_objects).values(since=0))
    with closing(opened(place, bucket)) as gallery:
        wait_for(lambda: not bucket.objects(), "objects of a killed enrollment stay")
        assert len(gallery) == 0
        wait_for(lambda: not loose(place), "they stay listed")


def test_an_erasure_killed_before_the_bucket_was_told_is_carried_out(
    place: Place, bucket: Bucket
) -> None:
    with closing(opened(place, bucket)) as gallery:
        item, other = enrolled(gallery, 2)
    killed("finish", place, bucket, item)
    assert len(bucket.objects()) == 2
    with closing(opened(place, bucket)) as gallery:
        with pytest.raises(ItemNotFound):
            gallery.get(item)
        wait_for(lambda: len(bucket.objects()) == 1, "what was erased stays in the bucket")
        assert gallery.image(other)[0] == crop(1).data


def test_while_the_storage_hangs_searches_go_on_and_nothing_is_half_stored(
    place: Place, bucket: Bucket, hasty: None
) -> None:
    with closing(opened(place, bucket)) as gallery:
        item, _, third = served(lambda: enrolled(gallery, 3))
        bucket.server.pause()
        try:
            with pytest.raises(CropsUnavailable, match="does not answer") as refused:
                enrolled(gallery, 2, start=3)
            assert int(refused.value.headers["Retry-After"]) > 0
            with pytest.raises(CropsUnavailable, match=r"try again in .* seconds"):
                gallery.image(item)
            assert gallery.crops_available is False
            assert len(gallery) == 3
            assert gallery.search(features(3, 0)[0], None, top_k=1).hits[0].item.id == item
            assert gallery.delete(item) == 1  # erased, and one object is still to be deleted
            assert [hit.item.id for hit in gallery.search(features(3, 0)[0], None, top_k=3).hits]
            with pytest.raises(ItemNotFound):
                gallery.get(item)
        finally:
            bucket.server.resume()
        wait_for(lambda: gallery.crops_available, "it does not find out that the storage is back")
        kept = sorted([crop(1).data, crop(2).data])
        wait_for(lambda: sorted(bucket.objects().values()) == kept, "the rest is not deleted")
        wait_for(lambda: gallery.pending_objects == 0, "it is still counted")
        assert served(lambda: gallery.image(third))[0] == crop(2).data
        assert served(lambda: enrolled(gallery, 1, start=3))


def test_a_gallery_opens_while_its_storage_is_away(
    place: Place, bucket: Bucket, hasty: None, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(opened(place, bucket)) as gallery:
        [item] = served(lambda: enrolled(gallery, 1))
    bucket.server.pause()
    try:
        with closing(opened(place, bucket)) as gallery:
            assert "does not answer" in caplog.text
            assert gallery.search(features(1, 0)[0], None, top_k=1).hits[0].item.id == item
            assert gallery.crops_available is False
            bucket.server.resume()
            wait_for(lambda: gallery.crops_available, "it does not find out that it is back")
            assert served(lambda: gallery.image(item))[0] == crop(0).data
    finally:
        bucket.server.resume()


def test_a_damaged_or_missing_object_is_an_error_and_never_served(
    gallery: Gallery, bucket: Bucket, place: Place
) -> None:
    ids = enrolled(gallery, 4)
    keys = {data: key for key, data in bucket.objects().items()}
    damaged, longer, missing = (keys[crop(i).data] for i in range(3))
    data = bytearray(crop(0).data)
    data[len(data) // 2] ^= 1
    bucket.s3.put_object(Bucket=bucket.name, Key=damaged, Body=bytes(data))
    bucket.s3.put_object(Bucket=bucket.name, Key=longer, Body=crop(1).data + b"x")
    bucket.s3.delete_object(Bucket=bucket.name, Key=missing)
    for item, why in zip(ids, ("is damaged", "is damaged", "is missing"), strict=False):
        with pytest.raises(GalleryDamaged, match=f"{item} {why} in the object storage"):
            gallery.image(item)
    assert gallery.image(ids[3])[0] == crop(3).data
    gallery.delete(ids[2])  # as the sentence says
    with pytest.raises(GalleryDamaged, match=f"{ids[0]}, {ids[1]} is damaged"):
        gallery.backup(place.folder / "never.zip")
    assert not (place.folder / "never.zip").exists()


def test_an_item_that_is_erased_while_it_is_backed_up_is_left_out(
    gallery: Gallery, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = enrolled(gallery, 3)
    fetch = Crops.fetch

    def erase_first(crops: Crops, numbers: Sequence[int]) -> dict[int, StoredImage]:
        monkeypatch.undo()  # the rows are copied, the objects are not
        gallery.delete(ids[1])
        return fetch(crops, numbers)

    monkeypatch.setattr(Crops, "fetch", erase_first)
    gallery.backup(tmp_path / "backup.zip")
    assert restore(tmp_path / "backup.zip", tmp_path / "restored").counts["items"] == 2
    assert crop(1).data not in (tmp_path / "backup.zip").read_bytes()
    with closing(Gallery.open(tmp_path / "restored", INFO)) as restored:
        assert [restored.image(ids[i])[0] for i in (0, 2)] == [crop(0).data, crop(2).data]


def test_a_crop_that_moves_while_it_is_read_is_read_where_it_is(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(opened(place, bucket)) as gallery:
        [item] = enrolled(gallery, 1)
        get = ObjectStorage.get

        def move_first(storage: ObjectStorage, wanted: Sequence[Placed]) -> Any:
            if wanted[0].name == "gallery":  # whether the storage answers
                return get(storage, wanted)
            monkeypatch.setattr(ObjectStorage, "get", get)
            assert sum(gallery.move_crops(back=True)) == 1
            return get(storage, wanted)

        monkeypatch.setattr(ObjectStorage, "get", move_first)
        assert gallery.image(item)[0] == crop(0).data
        assert bucket.objects() == {}


def test_an_enrollment_that_was_given_up_meanwhile_is_refused(
    gallery: Gallery, place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a replica hangs for an hour between writing its objects and its rows."""
    put = ObjectStorage.put

    def slowly(storage: ObjectStorage, new: Sequence[tuple[str, bytes]]) -> list[Placed]:
        placed = put(storage, new)
        with engine_of(place).begin() as connection:
            connection.execute(update(loose_objects).values(since=0))
        wait_for(lambda: not bucket.objects(), "they are not given up")
        return placed

    monkeypatch.setattr(ObjectStorage, "put", slowly)
    with pytest.raises(CropsUnavailable, match="took too long"):
        enrolled(gallery, 2)
    assert len(gallery) == 0
    assert bucket.objects() == {}


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("https://bucket/prefix", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a/../b", "its prefix"),
        ("s3://bucket?secret=x", "parameter that is unknown"),
        ("s3://bucket?endpoint=minio:9000", "its endpoint"),
        ("s3://bucket?endpoint=http://user:hunter2@minio:9000", "its endpoint"),
        ("s3://user:hunter2@bucket/prefix", "holds credentials"),
    ],
)
def test_an_address_that_is_none_is_a_sentence_without_its_secret(
    url: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CropsUnavailable, match=sentence) as refused:
        Gallery.open(tmp_path, INFO, crops_url=url)
    assert "hunter2" not in refused.value.detail
    with pytest.raises(SettingsError, match=sentence) as misset:
        load_settings(checkpoint=tmp_path / "x", data_dir=tmp_path, crops_url=url)
    assert "hunter2" not in str(misset.value)
    assert parse_address("s3://b-1/x/y?region=eu-west-1") == Address(
        "b-1", "x/y", None, "eu-west-1"
    )


def test_a_bucket_that_cannot_be_used_is_a_sentence_at_the_start(
    place: Place, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = bucket._replace(url=bucket.url.replace(bucket.name, "no-such-bucket"))
    with pytest.raises(CropsUnavailable, match="there is no such bucket"):
        opened(place, missing)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    nobody = tmp_path / "empty"
    nobody.write_text("")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CropsUnavailable, match="no credentials are found"):
        opened(place, bucket._replace(url=address(bucket.server, bucket.name, nobody)))
    with pytest.raises(CropsUnavailable, match="there is no credentials file"):
        opened(place, bucket._replace(url=address(bucket.server, bucket.name, tmp_path / "none")))


def test_rights_that_are_missing_are_a_sentence_at_the_start(
    place: Place, bucket: Bucket, tmp_path: Path
) -> None:
    iam = bucket.server.client("iam")
    iam.create_user(UserName=bucket.name)
    rights = {"Effect": "Allow", "Action": ["s3:PutObject", "s3:GetObject", "s3:ListBucket"]}
    policy = {"Version": "2012-10-17", "Statement": [{**rights, "Resource": "*"}]}
    iam.put_user_policy(UserName=bucket.name, PolicyName="p", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=bucket.name)["AccessKey"]
    for secret, sentence in (
        ("wrong", "the credentials are wrong"),
        (key["SecretAccessKey"], "not allowed to delete from this place"),
    ):
        file = tmp_path / "user"
        file.write_text(
            f"[default]\naws_access_key_id = {key['AccessKeyId']}\n"
            f"aws_secret_access_key = {secret}\n"
        )
        mine = bucket._replace(url=address(bucket.server, bucket.name, file))
        other = Place(tmp_path / f"other-{sentence[:3]}", None)
        with closing(opened(place, mine)) as gallery:
            bucket.server.demand_rights(0)
            try:
                with pytest.raises(CropsUnavailable, match=sentence):
                    opened(other, mine._replace(url=mine.url.replace("/gate", "/other")))
                if secret == "wrong":  # as where they are revoked while it runs
                    wait_for(lambda: gallery.crops_available is False, "it does not tell")
            finally:
                bucket.server.demand_rights(float("inf"))


def test_a_bucket_that_keeps_what_is_deleted_is_named(
    place: Place, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.s3.put_bucket_versioning(
        Bucket=bucket.name, VersioningConfiguration={"Status": "Enabled"}
    )
    with closing(opened(place, bucket)):
        assert "keeps versions, so erased crops stay in it" in caplog.text


def answer(status: str, body: bytes, length: int | None = None, *fields: str) -> bytes:
    """An answer of HTTP. length: that it claims to have."""
    size = len(body) if length is None else length
    head = [f"HTTP/1.1 {status}", f"Content-Length: {size}", "Connection: close", *fields]
    return "\r\n".join([*head, "", ""]).encode() + body


@contextmanager
def answering(data: bytes) -> Iterator[ObjectStorage]:
    """A storage whose server answers everything with these bytes, and then ends the connection."""

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with server.accept()[0] as client:
                    client.recv(65_536)
                    client.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        url = f"s3://bucket/gate?endpoint=http://127.0.0.1:{server.getsockname()[1]}"
        with closing(ObjectStorage(url)) as storage:
            yield storage
        server.shutdown(socket.SHUT_RDWR)


CONTENT = bytes(range(250)) * 4
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n"
NO_KEY = b"<Error><Code>NoSuchKey</Code></Error>"
ELSEWHERE = answer("302 Found", b"", None, "Location: https://portal.example/")


@pytest.mark.parametrize(
    ("answered", "sentence"),
    [
        # A connection that broke says nothing of the object.
        (answer("200 OK", CONTENT[:500], 1000), r"does not answer \(IncompleteReadError\)"),
        (CHUNKED + CONTENT[:500], r"does not answer \(ProtocolError\)"),
        (ELSEWHERE, "sends requests elsewhere; name its endpoint"),
        (answer("404 Not Found", b"<html>proxy</html>"), "answers 404 to an attempt to read"),
        (answer("403 Forbidden", b"<html>proxy</html>"), "not allowed to read from this place"),
        (
            answer("400 Bad Request", b"<Error><Code>ExpiredToken</Code></Error>"),
            "credentials have expired; renew",
        ),
        (
            answer("409 Conflict", b"<Error><Code>OperationAborted</Code></Error>"),
            "answers OperationAborted to an attempt",
        ),
    ],
)
def test_an_answer_that_is_none_is_a_sentence_and_no_damage(
    answered: bytes, sentence: str, credentials: None
) -> None:
    wanted = Placed("name", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    with answering(answered) as storage, pytest.raises(CropsUnavailable, match=sentence):
        storage.get([wanted])


@pytest.mark.parametrize(
    ("status", "code"),
    [
        ("507 Insufficient Storage", "XMinioStorageFull"),
        ("507 Insufficient Storage", ""),
        ("403 Forbidden", "QuotaExceeded"),
        ("400 Bad Request", "XMinioAdminBucketQuotaExceeded"),
    ],
)
def test_a_full_storage_is_said_and_goes_on_being_read(
    status: str, code: str, credentials: None
) -> None:
    told = answer(status, f"<Error><Code>{code}</Code></Error>".encode())
    with answering(told) as storage:
        for _ in range(2):  # it does not count as away: what is asked next is asked
            with pytest.raises(CropsUnavailable, match=r"is full \(\w+\); make room in it"):
                storage.put([("name", b"crop")])


def test_an_object_that_was_not_there_counts_as_deleted(credentials: None) -> None:
    with answering(answer("404 Not Found", NO_KEY)) as storage:
        assert storage.delete(["name"]) == (["name"], None)


def test_what_is_to_be_deleted_ties_a_gallery_to_its_place(place: Place, bucket: Bucket) -> None:
    """In another one it would count as deleted, since nothing of it is there."""
    elsewhere = bucket._replace(url=bucket.url.replace("/gate", "/other"))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        gallery = opened(place, bucket)
    with closing(gallery):
        [item] = served(lambda: enrolled(gallery, 1))
        bucket.server.pause()
        try:
            assert gallery.delete(item) == 1
            gallery.close()
        finally:
            bucket.server.resume()
    with pytest.raises(CropsUnavailable, match="none of this gallery's crops"):
        opened(place, elsewhere)
    with closing(opened(place, bucket)):
        wait_for(lambda: not bucket.objects(), "what was erased stays in the bucket")
    with closing(opened(place, elsewhere)) as gallery:
        assert enrolled(gallery, 1)


def test_a_place_that_becomes_another_gallerys_is_noticed(gallery: Gallery, bucket: Bucket) -> None:
    """As where two galleries begin in the same empty place at the same moment."""
    mark = {"Bucket": bucket.name, "Key": "gate/gallery"}
    [item] = enrolled(gallery, 1)
    mine = bucket.s3.get_object(**mark)["Body"].read()
    bucket.s3.put_object(**mark, Body=mine[::-1])
    wait_for(lambda: gallery.crops_available is False, "it is not noticed")
    with pytest.raises(CropsUnavailable, match="holds another gallery's crops"):
        enrolled(gallery, 1, start=1)
    bucket.s3.put_object(**mark, Body=mine)
    wait_for(lambda: gallery.crops_available, "that it is put right is not noticed")
    assert gallery.image(item)[0] == crop(0).data


def test_each_gallery_has_a_place_of_its_own(
    make_place: MakePlace, place: Place, bucket: Bucket
) -> None:
    with closing(opened(place, bucket)) as gallery:
        [item] = enrolled(gallery, 1)
    with pytest.raises(CropsUnavailable, match="another gallery's crops"):
        opened(make_place("sqlite"), bucket)
    elsewhere = bucket._replace(url=bucket.url.replace("/gate", "/other"))
    with pytest.raises(CropsUnavailable, match="none of this gallery's crops"):
        opened(place, elsewhere)
    with pytest.raises(CropsUnavailable, match="set CMT_CROPS_URL"):
        opened(place, None)
    with closing(opened(place, bucket)) as gallery:
        assert gallery.image(item)[0] == crop(0).data


@pytest.mark.parametrize("kind", KINDS)
def test_crops_move_out_and_back(kind: str, make_place: MakePlace, bucket: Bucket) -> None:
    place = make_place(kind)
    with closing(opened(place, bucket, 10**6)) as gallery:
        ids = enrolled(gallery, 5)
    with closing(opened(place, bucket, 0)) as gallery:
        moving = gallery.move_crops()
        # Erased while it is moved: the object that was written for it goes, too.
        gallery.delete(ids[0])
        assert sum(moving) == 4
        assert sum(gallery.move_crops()) == 0
        assert sorted(bucket.objects().values()) == sorted(crop(i).data for i in range(1, 5))
        assert [gallery.image(item)[0] for item in ids[1:]] == [crop(i).data for i in range(1, 5)]
        assert sum(gallery.move_crops(back=True)) == 4
        assert bucket.objects() == {}
        assert [gallery.image(item)[0] for item in ids[1:]] == [crop(i).data for i in range(1, 5)]
    with closing(opened(place, None)) as gallery:
        assert gallery.image(ids[4])[0] == crop(4).data


def test_a_move_that_was_stopped_goes_on(
    place: Place, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops_module, "_MOVED_AT_ONCE", 2)
    with closing(opened(place, bucket, 10**6)) as gallery:
        ids = enrolled(gallery, 5)
    with closing(opened(place, bucket)) as gallery:
        assert next(gallery.move_crops()) == 2
        assert len(bucket.objects()) == 2
    with closing(opened(place, bucket)) as gallery:
        assert sum(gallery.move_crops()) == 3
        assert [gallery.image(item)[0] for item in ids] == [crop(i).data for i in range(5)]


def test_a_long_work_waits_for_a_storage_that_is_away(
    place: Place, bucket: Bucket, hasty: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(crops_module, "_AGAIN_SECONDS", 0.2)
    with closing(opened(place, bucket, 10**6)) as gallery:
        ids = enrolled(gallery, 3)

    def away(work: Callable[[], object]) -> None:
        bucket.server.pause()
        try:
            with ThreadPoolExecutor(1) as beside:
                done = beside.submit(work)
                wait_for(lambda: gallery.crops_available is False, "it does not try")
                bucket.server.resume()
                done.result()
        finally:
            bucket.server.resume()

    with closing(opened(place, bucket)) as gallery:
        away(lambda: sum(gallery.move_crops()))
        assert sorted(bucket.objects().values()) == sorted(crop(i).data for i in range(3))
        away(lambda: gallery.backup(tmp_path / "backup.zip"))
        assert restore(tmp_path / "backup.zip", tmp_path / "restored").counts["items"] == 3
        away(lambda: sum(gallery.move_crops(back=True)))
        found = served(lambda: [gallery.image(item)[0] for item in ids])
        assert found == [crop(i).data for i in range(3)]
        wait_for(lambda: not bucket.objects(), "what was given up of the move stays")


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_by_command_says_where_crops_are(
    kind: str, make_place: MakePlace, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_place(kind)
    with closing(opened(place, bucket, 10**6)) as gallery:
        enrolled(gallery, 3)
        large = [replace(crop(i), data=crop(i).data + bytes(100)) for i in (3, 4)]
        gallery.add([NewItem(one) for one in large], features(2, 3))
    options = ["--data-dir", str(place.folder), "--crops-url", bucket.url]
    if place.url is not None:
        options += ["--database-url", place.url]
    for more, told in (
        (
            ["--inline-bytes", str(len(crop(0).data))],
            "Moved 2 crops: 3 are in the database now, and 2 in",
        ),
        (["--inline-bytes", "0"], "Moved 3 crops: 0 are in the database now, and 5 in the bucket."),
        (["--back"], "Moved 5 crops: 5 are in the database now, and 0 in the bucket."),
    ):
        assert main(["crops", "move", *options, *more]) == 0
        assert capsys.readouterr().out.startswith(told)
