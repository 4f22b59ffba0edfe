"""Crops outside of the database: objects of a bucket, by the protocol of S3.

An object is written once under a random name and never changed. What belongs to which item, and
what is to be deleted, is in SQL (`service.gallery.storage.crops`).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

from service.errors import CropsUnavailable

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

_AT_ONCE = 16  # requests to the object storage, of all callers together
_CONNECT_SECONDS, _READ_SECONDS, _ATTEMPTS = 3, 10, 2
# After a failure nothing is asked for so long: whoever waited would hold the place of a search.
_REST_SECONDS = 5
_RETRY_AFTER = {"Retry-After": str(_REST_SECONDS)}
_FULL = 507  # Insufficient Storage, as MinIO answers; others name a quota
_PARAMETERS = ("endpoint", "region", "credentials_file")
_BUCKET = re.compile(r"[a-zA-Z0-9][\w.-]{1,62}", re.ASCII)
_PREFIX = re.compile(r"([\w.=-]+(/[\w.=-]+)*)?", re.ASCII)
_WHY = {
    "NoSuchBucket": "there is no such bucket; make it, or correct CMT_CROPS_URL",
    "PermanentRedirect": "the bucket is in another region; name it in CMT_CROPS_URL",
    "AuthorizationHeaderMalformed": "the bucket is in another region; name it in CMT_CROPS_URL",
    **dict.fromkeys(
        ("InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch", "InvalidToken"),
        "the credentials are wrong; correct those that boto3 finds, such as AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, and start again",
    ),
    "ExpiredToken": "the credentials have expired; renew those that boto3 finds, and start again",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}


class Address(NamedTuple):
    """Where objects are. prefix: without slashes at its ends, may be empty."""

    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    credentials_file: str | None = None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


class Placed(NamedTuple):
    """A stored object: its name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


class ObjectLost(Exception):  # noqa: N818 (what happened)
    """An object that is missing, or else not as it was written."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__("is missing" if missing else "is damaged")
        self.missing = missing


class StorageAway(CropsUnavailable):
    """The object storage does not answer; it may soon."""


def parse_address(url: str) -> Address:
    """The address in a URL such as s3://bucket/prefix?endpoint=http://minio:9000.

    Raises ValueError, one sentence, which never repeats the URL: it may hold a secret.
    """
    remedy = "write s3://BUCKET/PREFIX, with ?endpoint=, &region= and &credentials_file= if needed"
    try:
        parts = urlsplit(url)
        given = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        )
    except ValueError as error:
        raise ValueError(f"it is no URL of a bucket; {remedy}") from error
    if "@" in parts.netloc:
        raise ValueError(
            "it holds credentials, which logs and process lists would show; give them as boto3 "
            "finds them, or as a credentials_file"
        )
    prefix = parts.path.strip("/")
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.fragment:
        raise ValueError(f"it names no bucket; {remedy}")
    if not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/")):
        raise ValueError(f"its prefix may have letters, digits and . _ = - /; {remedy}")
    if not given.keys() <= set(_PARAMETERS) or not all(given.values()):
        raise ValueError(f"it has a parameter that is unknown or empty; {remedy}")
    endpoint = given.get("endpoint")
    if endpoint is not None:
        there = urlsplit(endpoint)
        if there.scheme not in ("http", "https") or not there.hostname or "@" in there.netloc:
            raise ValueError("its endpoint is no address such as http://minio:9000")
    return Address(parts.netloc, prefix, **given)


class ObjectStorage:
    """The objects of one gallery. Thread-safe; opening it asks for nothing.

    url: see `parse_address`; what it does not say is found as boto3 does: in the environment, in
    ~/.aws, or from the machine's role. Every method raises CropsUnavailable, one sentence.
    """

    def __init__(self, url: str) -> None:
        try:
            self.address = parse_address(url)
        except ValueError as error:
            raise CropsUnavailable(f"CMT_CROPS_URL is not usable: {error}") from error
        self.available = True
        """Whether the last request was carried out."""
        self._rests_until = 0.0
        if find_spec("boto3") is None:
            raise CropsUnavailable("CMT_CROPS_URL needs the package boto3; install the extra s3")
        with self._reported("reach"):
            self._client = _client(self.address)
        self._threads = ThreadPoolExecutor(_AT_ONCE, "objects")

    def close(self) -> None:
        """End the threads, once nothing is in progress."""
        self._threads.shutdown()
        self._client.close()

    def put(self, objects: Sequence[tuple[str, bytes]]) -> list[Placed]:
        """Store objects under names of `new_name` → what is there then.

        The storage compares each with its checksum before it says that it has it. After an error no
        request is in progress any more, and any of the objects may be there.
        """
        return self._all(lambda one: self._put(*one), objects)

    def get(self, objects: Sequence[Placed]) -> list[bytes | ObjectLost]:
        """Read objects → their bytes, compared with their SHA-256, or what is wrong with them."""
        return self._all(self._get, objects)

    def delete(self, names: Sequence[str]) -> tuple[list[str], CropsUnavailable | None]:
        """Delete objects → the names of which nothing is there now, and why others are."""
        failures = self._all(self._delete, names)
        gone = [name for name, failure in zip(names, failures, strict=True) if failure is None]
        return gone, next((failure for failure in failures if failure is not None), None)

    def probe(self) -> list[str]:
        """Write, read and delete an object → what should be better about the bucket, in sentences.

        Raises CropsUnavailable where one of these is not possible.
        """
        name, data = f"probe-{new_name()}", secrets.token_bytes(16)
        [placed] = self.put([(name, data)])
        [found] = self.get([placed])
        if isinstance(found, ObjectLost):
            raise self._unusable(f"what was just written there {found}; use another one")
        _, failure = self.delete([name])
        if failure is not None:
            raise failure
        [found] = self.get([placed])  # which is refused where it may not be told that it is gone
        if not isinstance(found, ObjectLost):
            raise self._unusable("it still has what was deleted; use another one")
        return [*self._versioning(), *self._locks()]

    def _put(self, name: str, data: bytes) -> Placed:
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        with self._reported("write to"):
            self._client.put_object(**self._at(name), Body=data, ContentMD5=md5)
        return Placed(name, len(data), hashlib.sha256(data).hexdigest())

    def _get(self, placed: Placed) -> bytes | ObjectLost:
        from botocore.exceptions import ClientError, IncompleteReadError

        with self._reported("read from"):
            try:
                answer = self._client.get_object(**self._at(placed.name))
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                    return ObjectLost(missing=True)
                raise
            with answer["Body"] as body:
                data: bytes = body.read(placed.size + 1)  # no more, whatever is there now
            told = int(answer.get("ContentLength", 0))
            if len(data) < min(told, placed.size + 1):  # the connection broke, not the object
                raise IncompleteReadError(actual_bytes=len(data), expected_bytes=told)
        if len(data) != placed.size or hashlib.sha256(data).hexdigest() != placed.sha256:
            return ObjectLost(missing=False)
        return data

    def _delete(self, name: str) -> CropsUnavailable | None:
        from botocore.exceptions import ClientError

        try:
            with self._reported("delete from"):
                try:
                    self._client.delete_object(**self._at(name))
                except ClientError as error:
                    if error.response["Error"]["Code"] != "NoSuchKey":  # as some storages answer
                        raise
        except CropsUnavailable as failure:
            return failure
        return None

    def _versioning(self) -> Iterator[str]:
        answer = self._looked_at("get_bucket_versioning")
        if answer.get("Status") in ("Enabled", "Suspended"):
            yield (
                f"the bucket {self.address.bucket} keeps versions, so erased crops stay in it; "
                "take one without versioning, or let a lifecycle rule delete noncurrent versions "
                "after a day"
            )

    def _locks(self) -> Iterator[str]:
        answer = self._looked_at("get_object_lock_configuration")
        rule = answer.get("ObjectLockConfiguration", {}).get("Rule")
        if rule:
            yield (
                f"the bucket {self.address.bucket} locks objects, so that erased crops stay until "
                "their retention ends; use a bucket without a default retention"
            )

    def _looked_at(self, operation: str) -> Mapping[str, Any]:
        """What the bucket says of itself; nothing where it does not say or may not be asked."""
        from botocore.exceptions import ClientError

        with self._reported("ask"):
            try:
                answer: Mapping[str, Any] = getattr(self._client, operation)(
                    Bucket=self.address.bucket
                )
                return answer
            except ClientError:
                return {}

    def _at(self, name: str) -> dict[str, str]:
        prefix = self.address.prefix
        return {"Bucket": self.address.bucket, "Key": f"{prefix}/{name}" if prefix else name}

    def _all(self, call: Callable[[A], B], arguments: Sequence[A]) -> list[B]:
        """Call for each, several at a time; every call has ended when the first error is raised."""
        if len(arguments) == 1:
            return [call(arguments[0])]
        stop = threading.Event()

        def one(argument: A) -> B | None:
            if stop.is_set():
                return None
            try:
                return call(argument)
            except BaseException:
                stop.set()
                raise

        running = [self._threads.submit(one, argument) for argument in arguments]
        errors = [error for future in running if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in running]  # type: ignore[misc]

    @contextmanager
    def _reported(self, act: str) -> Iterator[None]:
        """Turn errors of boto3 into sentences. act: what was to be done, with its preposition."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        if time.monotonic() < self._rests_until:
            raise self._away("has just failed to answer")
        try:
            yield
            self.available = True
        except ClientError as error:
            answer = error.response
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            code = answer["Error"]["Code"] or str(status)
            if status == _FULL or re.search("full|quota", code, re.IGNORECASE):
                raise self._unusable(
                    f"it is full ({code}); make room in it or raise its quota, what is stored is "
                    "read meanwhile"
                ) from error
            if status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout"):
                self._rest()
                raise self._away(f"answers {code}") from error
            why = _WHY.get(code) or (
                f"it is not allowed to {act} this place; give its user the permissions of "
                "docs/object-storage.md"
                if code in ("AccessDenied", "403")
                else f"it answers {code} to an attempt to {act} it; see its log"
            )
            raise self._unusable(why) from error
        except RecursionError as error:  # boto3 follows what leads nowhere
            raise self._unusable(
                "it sends requests elsewhere; name its endpoint with http or https as it wants, "
                "and its region, in CMT_CROPS_URL"
            ) from error
        except (BotoCoreError, HTTPError) as error:
            name = type(error).__name__
            if "Credentials" in name or "Token" in name or "Profile" in name:
                raise self._unusable(
                    f"no credentials are found ({_first_line(error)}); set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or name a credentials_file in CMT_CROPS_URL"
                ) from error
            self._rest()
            raise self._away(f"does not answer ({name})") from error
        except ValueError as error:  # of an endpoint or a region that is none
            raise self._unusable(f"{_first_line(error)}; correct CMT_CROPS_URL") from error

    def _rest(self) -> None:
        self._rests_until = time.monotonic() + _REST_SECONDS

    def _away(self, what: str) -> StorageAway:
        self.available = False
        return StorageAway(
            f"the object storage {self.address} {what}; searches go on, try again in "
            f"{_REST_SECONDS} seconds",
            headers=_RETRY_AFTER,
        )

    def _unusable(self, why: str) -> CropsUnavailable:
        self.available = False
        return CropsUnavailable(
            f"the object storage {self.address} cannot be used: {why}", headers=_RETRY_AFTER
        )


def new_name() -> str:
    """A name that says nothing of what is in the object, and that no other has."""
    return secrets.token_hex(16)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _client(address: Address) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.session import Session

    session = Session()
    if address.credentials_file is not None:
        if not Path(address.credentials_file).is_file():
            raise ValueError(f"there is no credentials file {address.credentials_file}")
        session.set_config_variable("credentials_file", address.credentials_file)
    return boto3.Session(botocore_session=session, region_name=address.region).client(
        "s3",
        endpoint_url=address.endpoint,
        config=Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
            max_pool_connections=2
            * _AT_ONCE,  # a single object is asked for by the caller's thread
            # The newer checksums of AWS are unknown to many other storages; each object has its
            # Content-MD5, and its SHA-256 in SQL.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
