"""Features in Parquet files: one row per crop, with all that a gallery stores of it.

A folder holds `features-NNNNNN.parquet` files, each written as a whole or not at all, and, once
everything that was planned has been tried, `embedded.json`, which lists them. Each row has a
SHA-256 over its other columns, each page of a file a CRC, and each file says in its metadata
(`Header`) which checkpoint made it and how.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from model.atomic_file import PRIVATE, write_whole
from model.config import CMTConfig, Modality
from model.pictures import ModalityChoice, Polarity
from model.strict_json import read_json
from service.gallery.times import microseconds
from service.images.decode import ModalitySource

RECORD = "embedded.json"
_NAME = re.compile(r"features-(\d{6,})\.parquet")
_METADATA = b"cmt-features"
_FORMAT: Literal[1] = 1
_MOST = 256  # rows in a row group, which is read as a whole
# What Arrow raises for a file that is not as it was written, or for times that Python cannot hold.
_UNREADABLE = (OSError, ValueError, ArithmeticError, LookupError, NotImplementedError, TypeError)
_BYTES_AT_ONCE = 32_000_000  # of its crops, at least where it has fewer rows


class BulkError(Exception):
    """Features that cannot be written or used; the message says what to do."""


class Header(BaseModel):
    """Which checkpoint made a file, and how; root: the folder that paths of rows are below."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = _FORMAT
    release: str
    fingerprint: str
    config: CMTConfig
    device: str
    runtime: str
    precision: str
    keep_image_metadata: bool
    root: str


@dataclass(frozen=True)
class Row:
    """A crop, its labels and its features (P·D numbers in fp16).

    path: of the picture, below the header's root where it is there. state: a digest of the file's
    size and time and of its labels, by which a later run knows it again. key, request_sha256: as of
    an enrollment (`RequestKey`). sha256: of the picture. metadata: JSON. given_modality,
    given_polarity, box: as the sender says them, None where it does not; box as x,y,width,height.
    The others are those of an `Item`, and of its stored crop.
    """

    path: str
    state: bytes
    key: str
    request_sha256: str
    sha256: str
    person_id: str | None
    camera_id: str | None
    captured_at: datetime | None
    metadata: str
    given_modality: ModalityChoice | None
    given_polarity: Polarity | None
    box: str | None
    modality: Modality
    modality_source: ModalitySource
    polarity: Polarity | None
    width: int
    height: int
    bit_depth: int
    media_type: str
    crop: bytes
    features: npt.NDArray[np.float16]

    def checksum(self) -> bytes:
        """SHA-256 over all of it."""
        facts: list[Any] = [_plain(getattr(self, name)) for name in _FACTS]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(hashlib.sha256(self.crop).digest())
        digest.update(np.ascontiguousarray(self.features, "<f2").tobytes())
        return digest.digest()


_COLUMNS = tuple(field.name for field in fields(Row))
_FACTS = tuple(name for name in _COLUMNS if name not in ("crop", "features"))
_OPTIONAL = {
    *("person_id", "camera_id", "captured_at"),
    *("given_modality", "given_polarity", "box", "polarity"),
}


class Writer:
    """Writes the rows of one file, a group of them at a time."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._parquet = arrow_parquet()
        self._schema = schema(header.config.embedding_size)
        metadata = {_METADATA: header.model_dump_json().encode()}
        small = [name for name in self._schema.names if name not in ("crop", "features")]
        self._writer = self._parquet.ParquetWriter(
            file,
            self._schema.with_metadata(metadata),
            # Pictures and features hardly shrink.
            compression=dict.fromkeys(small, "zstd"),
            use_dictionary=["person_id", "camera_id", "media_type"],
            write_statistics=False,
            write_page_checksum=True,
        )

    def write(self, rows: Sequence[Row]) -> None:
        """Write a row group. Raises OSError."""
        import pyarrow

        columns: list[Any] = []
        for name in self._schema.names:
            kind = self._schema.field(name).type
            if name == "features":
                numbers = np.concatenate([row.features for row in rows]).astype("<f2", copy=False)
                columns.append(pyarrow.FixedSizeListArray.from_arrays(numbers, type=kind))
            elif name == "checksum":
                columns.append(pyarrow.array([row.checksum() for row in rows], kind))
            else:
                columns.append(pyarrow.array([getattr(row, name) for row in rows], kind))
        self._writer.write_table(pyarrow.table(columns, schema=self._schema), len(rows))

    def close(self) -> None:
        """Write the footer. Raises OSError."""
        self._writer.close()


def is_group(rows: int, crop_bytes: int) -> bool:
    """Whether rows with so many bytes of crops are enough for a row group."""
    return rows >= _MOST or crop_bytes >= _BYTES_AT_ONCE


@dataclass(frozen=True)
class DamagedRow:
    """A row that is not as it was written. path: as in `Row`, or that of the file and the row."""

    path: str
    reason: str


class FeatureFile:
    """One file of features. Raises BulkError where it is none, or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with self._opened() as file:
                kinds, found = file.schema_arrow, file.metadata
                self._groups = [found.row_group(at).num_rows for at in range(found.num_row_groups)]
                metadata: Mapping[bytes, bytes] = kinds.metadata or {}
        except _UNREADABLE as error:
            raise BulkError(
                f"{path} cannot be read as a whole Parquet file ({_reason(error)}); remove it and "
                "run the same `cmt embed-bulk` again, which embeds what it held"
            ) from error
        foreign = f"{path} is no file of `cmt embed-bulk`; name a folder that it wrote"
        if _METADATA not in metadata:
            raise BulkError(foreign)
        try:
            header = read_json(metadata[_METADATA].decode())
            if isinstance(header, dict) and header.get("format") != _FORMAT:
                raise BulkError(
                    f"{path} was written by another release ({header.get('release')}); embed its "
                    "pictures again, or use that release"
                )
            self.header = Header.model_validate(header)
        except (ValueError, ValidationError) as error:
            raise BulkError(foreign) from error
        wanted = schema(self.header.config.embedding_size)
        if not kinds.equals(wanted) or max(self._groups, default=0) > _MOST:
            raise BulkError(
                f"{path} has other columns or row groups than `cmt embed-bulk` writes; embed its "
                "pictures again"
            )

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The file for a moment: a folder may have more of them than a process may open.

        Raises BulkError where the system refuses, which says nothing of what is in the file.
        """
        try:
            with arrow_parquet().ParquetFile(self.path, page_checksum_verification=True) as file:
                yield file
        except OSError as error:
            if error.errno in (None, errno.EIO, errno.EINVAL):
                raise
            raise BulkError(
                f"{self.path} cannot be read ({os.strerror(error.errno)}); mend that and run the "
                "same command again"
            ) from error

    @property
    def count(self) -> int:
        """How many rows it has."""
        return sum(self._groups)

    def groups(self) -> list[int]:
        """How many rows each row group has."""
        return self._groups

    def read_group(self, at: int) -> list[Row | DamagedRow]:
        """The rows of one row group, in order; those that are not as they were written as such."""
        try:
            with self._opened() as file:
                table = file.read_row_group(at)
            size = self.header.config.embedding_size
            numbers = table["features"].combine_chunks().flatten().to_numpy()
            features = numbers.reshape(table.num_rows, size)
            columns = {name: table[name].to_pylist() for name in _FACTS}
            crops, sums = table["crop"].to_pylist(), table["checksum"].to_pylist()
        except _UNREADABLE as error:
            start = sum(self._groups[:at])
            where = f"{self.path.absolute()}, row "
            reason = f"{self.path} is damaged ({_reason(error)}); remove it and embed again"
            return [
                DamagedRow(f"{where}{start + place + 1}", reason)
                for place in range(self._groups[at])
            ]
        rows: list[Row | DamagedRow] = []
        for place in range(table.num_rows):
            facts = {name: columns[name][place] for name in _FACTS}
            row = Row(**facts, crop=crops[place], features=features[place])
            if row.checksum() == sums[place]:
                rows.append(row)
            else:
                reason = f"the row is not as it was written to {self.path}; remove that and embed"
                rows.append(DamagedRow(row.path, f"{reason} again"))
        return rows

    def first_request(self, at: int) -> tuple[str, str]:
        """Key and `request_sha256` of the first row of a row group; empty where it is damaged."""
        try:
            with self._opened() as file:
                table = file.read_row_group(at, ["key", "request_sha256"])
            return table["key"][0].as_py(), table["request_sha256"][0].as_py()
        except _UNREADABLE:
            return "", ""

    def states(self) -> Iterator[tuple[str, bytes]]:
        """Of each row, what it is of (`place_of`) and its state. Raises BulkError."""
        try:
            with self._opened() as file:
                table = file.read(["path", "box", "state"])
            rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        except _UNREADABLE as error:
            raise BulkError(
                f"{self.path} is damaged ({_reason(error)}); remove it and run the same command "
                "again, which embeds what it held"
            ) from error
        for path, box, state in rows:
            yield place_of(self.header.root, path, box), state


class FeatureFolder:
    """A folder of such files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names of its files, in order. Raises OSError."""
        return sorted(name for name in os.listdir(self.folder) if _NAME.fullmatch(name))  # noqa: PTH208

    def next_number(self) -> int:
        """A number above those of all its files."""
        found = [_NAME.fullmatch(name) for name in self.names()]
        return max((int(one[1]) for one in found if one is not None), default=0) + 1

    def files(self) -> list[FeatureFile]:
        """All of them, opened. Raises BulkError and OSError."""
        return [FeatureFile(self.folder / name) for name in self.names()]

    def remove_partial(self) -> None:
        """Remove what a run that was killed had begun. Raises OSError."""
        for partial in self.folder.glob("features-*.parquet.partial"):
            partial.unlink()

    def reopen(self) -> None:
        """Say no longer that everything is there. Raises OSError."""
        (self.folder / RECORD).unlink(missing_ok=True)

    def finish(self) -> None:
        """Say that everything is there. Raises BulkError and OSError."""
        rows = {file.path.name: file.count for file in self.files()}
        write_whole(
            self.folder / RECORD, json.dumps({"format": _FORMAT, "files": rows}, indent=1), PRIVATE
        )

    def complete(self) -> list[FeatureFile]:
        """All of its files. Raises BulkError where something is missing, and OSError."""
        record = self.folder / RECORD
        try:
            listed = read_json(record.read_text(encoding="utf-8"))["files"]
            rows = {str(name): int(count) for name, count in listed.items()}
        except (FileNotFoundError, NotADirectoryError) as error:
            if not self.folder.is_dir() or not self.names():
                raise BulkError(
                    f"{self.folder} holds no features; name a folder that `cmt embed-bulk` wrote"
                ) from error
            raise BulkError(
                f"{self.folder} is not finished; run the same `cmt embed-bulk` again, or import "
                "what is there with --unfinished"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise BulkError(
                f"{record} is damaged; run the same `cmt embed-bulk` again, which writes it"
            ) from error
        for name in rows:
            if not (self.folder / name).is_file():
                raise BulkError(
                    f"{self.folder / name} is missing; put it back, or run the same `cmt "
                    "embed-bulk` again, which embeds what it held"
                )
        return [FeatureFile(self.folder / name) for name in sorted(rows)]


def file_name(number: int) -> str:
    """The name of a file."""
    return f"features-{number:06}.parquet"


def place_of(root: str, path: str, box: str | None) -> str:
    """What a row is of: a picture, or a box of it."""
    return f"{Path(root, path)}#{box or ''}"


def schema(size: int) -> Any:
    """The columns. size: P·D."""
    import pyarrow as pa

    kinds: dict[str, Any] = {
        "state": pa.binary(16),
        "captured_at": pa.timestamp("us", "UTC"),
        **dict.fromkeys(("width", "height", "bit_depth"), pa.int32()),
        "crop": pa.large_binary(),
        "features": pa.list_(pa.field("element", pa.float16(), nullable=False), size),
    }
    columns = [
        pa.field(name, kinds.get(name, pa.string()), nullable=name in _OPTIONAL)
        for name in _COLUMNS
    ]
    return pa.schema([*columns, pa.field("checksum", pa.binary(32), nullable=False)])


def arrow_parquet() -> Any:
    """The module pyarrow.parquet. Raises BulkError where it is not installed."""
    try:
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise BulkError(
            "features are Parquet files, which need pyarrow; run `pip install 'cmt-reid[bulk]'`, "
            "or `pip install pyarrow`"
        ) from error
    return parquet


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return microseconds(value) if isinstance(value, datetime) else value


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
