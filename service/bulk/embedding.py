"""Pictures → files of features, as an enrollment would decode, embed and store them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio
from anyio import create_task_group

from model.atomic_file import whole_file
from service.api.gallery import enrollment_of
from service.api.schemas import BatchItem
from service.bulk.features import (
    BulkError,
    FeatureFolder,
    Header,
    Row,
    Writer,
    file_name,
    is_group,
    place_of,
)
from service.client.requests import image_bytes
from service.client.stream import Entry, EntryResult, with_key
from service.embedding.embedder import Embedder
from service.embedding.engine import EmbeddingEngine
from service.errors import (
    EmbeddingFailed,
    GalleryLocked,
    ImageTooLarge,
    RuntimeUnavailable,
    ServiceError,
    StorageUnwritable,
)
from service.gallery import RequestKey
from service.gallery.storage.folder_lock import FolderLock
from service.images.decode import ImageLimits, Picture
from service.images.pool import Decoders
from service.images.turns import Share
from service.settings import Settings

Advance = Callable[[int], None]

_FILES_AT_ONCE = 2  # one is finished while the next has begun
_WINDOW = 4  # batches that are decoded or wait for the network, of each file


class Planned(NamedTuple):
    """A picture to embed. path, state: those of its `Row`."""

    entry: Entry
    path: str
    state: bytes


@dataclass(frozen=True)
class Part:
    """What one file will hold."""

    name: str
    pictures: Sequence[Planned]


@dataclass
class Done:
    """What became of a part: rows that were written, and pictures that were refused."""

    rows: int = 0
    refused: list[EntryResult] = field(default_factory=list)


@contextmanager
def writing(out: Path) -> Iterator[FeatureFolder]:
    """The folder of features `out`, made if missing, with nobody else writing to it.

    Raises BulkError.
    """
    try:
        lock = FolderLock(out)
    except GalleryLocked as error:
        raise BulkError(
            f"another `cmt embed-bulk` writes to {out}; wait until it is done, or stop it"
        ) from error
    except StorageUnwritable as error:
        why = error.detail.replace(f"the data folder {out}", f"the folder of features {out}")
        raise BulkError(f"{why}, or give another --out") from error
    try:
        folder = FeatureFolder(out)
        folder.remove_partial()
        yield folder
    finally:
        lock.release()


def pictures_of(entries: Sequence[Entry], root: Path) -> Iterator[Planned]:
    """Pictures with their paths below `root`, and the states that they are in."""
    for entry in entries:
        assert isinstance(entry.image, Path)
        file = entry.image.absolute()
        try:
            status = file.stat()
            seen: list[Any] = [status.st_size, status.st_mtime_ns]
        except OSError:  # reported when it is read
            seen = []
        seen.append(entry.item.model_dump(mode="json"))
        state = hashlib.blake2b(json.dumps(seen, sort_keys=True).encode(), digest_size=16).digest()
        place = file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
        yield Planned(entry, _text(place), state)


def left_to_do(
    pictures: Sequence[Planned], folder: FeatureFolder, fingerprint: str, root: Path
) -> list[Planned]:
    """Those pictures that the folder has no rows of, by this checkpoint.

    Raises BulkError where it has features of another checkpoint, or rows of the same pictures as
    they were before, beside which the new ones would be enrolled too.
    """
    done: dict[str, bytes] = {}
    for file in folder.files():
        if file.header.fingerprint != fingerprint:
            raise BulkError(
                f"{folder.folder} holds features of the checkpoint {file.header.fingerprint[:12]}, "
                f"and this one is {fingerprint[:12]}; give another --out"
            )
        done.update(file.states())
    left = []
    for one in pictures:
        state = done.get(place_of(_text(str(root)), one.path, _box(one.entry.item)))
        if state is None:
            left.append(one)
        elif state != one.state:
            raise BulkError(
                f"{one.path} is embedded in {folder.folder} with other content or labels than it "
                "has now; give another --out"
            )
    return left


def parts(pictures: Sequence[Planned], first: int, rows_per_file: int) -> list[Part]:
    """Pictures divided among files. first: number of the first of them."""
    starts = range(0, len(pictures), rows_per_file)
    return [
        Part(file_name(first + number), pictures[start : start + rows_per_file])
        for number, start in enumerate(starts)
    ]


def decoders_of(settings: Settings) -> Decoders:
    """Processes that decode as those of a service with these settings."""
    return Decoders(
        settings.decode_processes,
        ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        seconds=settings.decode_timeout,
        keep_metadata=settings.keep_image_metadata,
    )


class BulkEmbedder:
    """One checkpoint on this machine's device, with the processes that decode for it.

    out: where files go. root: that of the `Header`.
    """

    def __init__(self, settings: Settings, out: Path, root: Path) -> None:
        self._settings, self._out = settings, out
        self._embedder = Embedder(
            settings.checkpoint, device=settings.device, runtime=settings.runtime
        )
        self.header = Header(
            release=version("cmt-reid"),
            fingerprint=self._embedder.info.fingerprint,
            config=self._embedder.info.config,
            device=self._embedder.device,
            runtime=self._embedder.runtime,
            precision=self._embedder.precision,
            keep_image_metadata=settings.keep_image_metadata,
            root=_text(str(root)),
        )
        self._decoders = decoders_of(settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoders.close()
        self._embedder.close()

    @property
    def fingerprint(self) -> str:
        """The checkpoint's."""
        return self.header.fingerprint

    def embed(
        self, work: Sequence[Part], done: Done, *, advance: Advance, stopping: Callable[[], bool]
    ) -> None:
        """Write the parts' files, and note in `done` what became of them.

        advance: called with how many more pictures were tried. stopping: whether to end soon; a
        file begun is then closed with the rows that it has. Raises OSError where the disk refuses,
        and RuntimeUnavailable where nothing can be decoded or embedded any more.
        """
        anyio.run(self._embed, work, done, advance, stopping)

    async def _embed(
        self, work: Sequence[Part], done: Done, advance: Advance, stopping: Callable[[], bool]
    ) -> None:
        engine = EmbeddingEngine(self._embedder, self._settings, lambda size: None)
        run = _Run(
            self._out,
            self.header,
            self._decoders,
            engine,
            done,
            advance,
            stopping,
            most_bytes=self._settings.max_image_bytes,
        )
        waiting = deque(work)

        async def write() -> None:
            while waiting and not stopping():
                await run.write(waiting.popleft())

        try:
            async with create_task_group() as embedding:
                embedding.start_soon(engine.run)
                async with create_task_group() as writing:
                    for _ in range(_FILES_AT_ONCE):
                        writing.start_soon(write)
                engine.batcher.retire()
        except ExceptionGroup as several:
            raise _first(several) from several


class _Run:
    """One run over some parts, on one event loop."""

    def __init__(
        self,
        out: Path,
        header: Header,
        decoders: Decoders,
        engine: EmbeddingEngine,
        done: Done,
        advance: Advance,
        stopping: Callable[[], bool],
        *,
        most_bytes: int,
    ) -> None:
        self._out, self._header, self._most_bytes = out, header, most_bytes
        self._decoders, self._engine = decoders, engine
        self._done, self._advance, self._stopping = done, advance, stopping
        self._window = _WINDOW * engine.batcher.max_batch * engine.embedder.backend.streams
        self._share = Share("")

    async def write(self, part: Part) -> None:
        """Write one part's file; none where all its pictures are refused."""
        begun: deque[asyncio.Task[Row | EntryResult]] = deque()
        pictures = iter(part.pictures)
        rows: list[Row] = []
        written = size = 0
        try:
            with ExitStack() as stack:
                writer: Writer | None = None
                while True:
                    while len(begun) < self._window and not self._stopping():
                        one = next(pictures, None)
                        if one is None:
                            break
                        begun.append(asyncio.create_task(self._row(one)))
                    result = await begun.popleft() if begun else None
                    if isinstance(result, Row):
                        rows.append(result)
                        size += len(result.crop)
                    elif result is not None:
                        self._done.refused.append(result)
                    if is_group(len(rows), size) or (rows and result is None):
                        if writer is None:
                            file = stack.enter_context(whole_file(self._out / part.name))
                            writer = Writer(file, self._header)
                        await asyncio.to_thread(writer.write, rows)
                        written += len(rows)
                        rows, size = [], 0
                    if result is None:
                        break
                    self._advance(1)
                if writer is not None:
                    writer.close()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        self._done.rows += written

    async def _row(self, one: Planned) -> Row | EntryResult:
        """The row of a picture, or why it has none."""
        try:
            return await self._embedded(
                one, await asyncio.to_thread(_read, one.entry, self._most_bytes)
            )
        except OSError as error:
            return EntryResult(one.entry, reason=error.strerror or str(error))
        except RuntimeUnavailable:
            raise
        except ServiceError as error:
            return EntryResult(one.entry, None, error.detail, error.status, error.code)

    async def _embedded(self, one: Planned, read: _Read) -> Row:
        item, picture, request = read
        size = self._header.config.input_height, self._header.config.input_width
        batcher = self._engine.batcher
        with batcher.in_flight():
            crop = await asyncio.wrap_future(self._decoders.submit(picture, *size, self._share))
            embedded = await batcher.embed(crop, query=False)
        features = embedded.features.flatten().half()
        if not features.isfinite().all():
            raise EmbeddingFailed(
                "the features of the image are not finite; the checkpoint is damaged or untrained"
            )
        return Row(
            path=one.path,
            state=one.state,
            key=request.key,
            request_sha256=request.sha256,
            sha256=crop.sha256,
            person_id=item.person_id,
            camera_id=item.camera_id,
            captured_at=item.captured_at,
            metadata=json.dumps(item.metadata),
            given_modality=item.modality,
            given_polarity=item.polarity,
            box=_box(item),
            modality=crop.modality,
            modality_source=crop.modality_source,
            polarity=crop.polarity,
            width=crop.width,
            height=crop.height,
            bit_depth=crop.bit_depth,
            media_type=crop.media_type,
            crop=crop.data,
            features=features.numpy(),
        )


class _Read(NamedTuple):
    """A picture and its labels, as they would be enrolled."""

    item: BatchItem
    picture: Picture
    request: RequestKey


def _read(entry: Entry, most_bytes: int) -> _Read:
    """Read a file, but none that would fill the memory. Raises OSError and ImageTooLarge."""
    size = 0 if isinstance(entry.image, bytes) else Path(entry.image).stat().st_size
    if size > most_bytes:
        raise ImageTooLarge(
            f"the image has {size:,} bytes, the limit is {most_bytes:,}; send a smaller crop"
        )
    data = image_bytes(entry.image)
    item = with_key(entry, data)
    wanted = enrollment_of(data, item, item.key)
    picture = wanted.picture({})
    request = wanted.request(picture)
    assert request is not None  # it has a key
    return _Read(item, picture, request)


def _box(item: BatchItem) -> str | None:
    return None if item.box is None else ",".join(map(str, item.box))


def _text(path: str) -> str:
    """A path as text: a name that is no UTF-8 with its bytes escaped."""
    return path.encode(errors="backslashreplace").decode()


def _first(several: BaseException) -> BaseException:
    while isinstance(several, BaseExceptionGroup):
        several = several.exceptions[0]
    return several
