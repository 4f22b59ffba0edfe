"""Time from opening a gallery to its first answer, against reading its features from disk once."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.progress import track
from rich.table import Table

from model import CheckpointInfo, load_checkpoint
from model.benchmark import Spread, publish, seconds
from model.benchmark_table import Headline, as_fast, duration, inverse, ratio_of
from model.outputs import ResultsFile
from model.terminal import Console
from service.bench.commands import Commands
from service.bench.crops import BenchmarkDataError
from service.bench.data import CHECKPOINT, STATISTICS, Checkpoint, Data, Source, Statistics
from service.gallery import Gallery, NewItem
from service.images.decode import decode

QUICK = ("--items", "50000", "--rounds", "3", "--starts", "3")
_FLAT_FILE = "bench-features.f16"  # N×(P·D) fp16, next to the gallery's own files
_SNAPSHOT = "index"  # where a gallery keeps its snapshot
_BLOCK = 1000  # items of one transaction while the store is filled


def start(
    items: Annotated[int, typer.Option(min=1, help="Items N in the gallery.")] = 100_000,
    folder: Annotated[
        Path | None,
        typer.Option(help="Data folder, filled at its first use and kept; else a temporary one."),
    ] = None,
    database_url: Annotated[
        str | None, typer.Option(help="An empty PostgreSQL database, or one this filled before.")
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also with the folder's files out of the page cache.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="How often both sides run, in turn.")] = 5,
    starts: Annotated[
        int, typer.Option(min=0, help="How often a fresh `cmt serve` and commands are started.")
    ] = 5,
    statistics: Statistics = STATISTICS,
    checkpoint: Checkpoint = CHECKPOINT,
    json: ResultsFile = None,
) -> None:
    """Time opening a gallery of N items up to its first answer, in a process that runs already.

    The other side reads the same features from a flat file into memory. Opening is timed without
    a snapshot, from SQL, and with one.

    Fresh processes too, after one start that fills the caches: `cmt serve` with an empty gallery
    until it is ready, beside one that only imports PyTorch; `cmt --help`, and a command over HTTP,
    beside Python that does nothing.

    Example: cmt bench start --items 20000 --folder /tmp/gallery
    """
    settings = {
        "items": items,
        **({"folder": str(folder)} if folder else {}),
        **({"database-url": "…"} if database_url else {}),
        **({"cold": ""} if cold else {}),
        "rounds": rounds,
        "starts": starts,
        "statistics": str(statistics),
        "checkpoint": str(checkpoint),
    }
    source = Source.load(statistics, checkpoint)
    _, info = load_checkpoint(checkpoint)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        bench = _Bench(Path(place), info, database_url, source.sample(1, 1), items)
        bench.fill(source)
        results = [
            result
            for is_cold in ([False, True] if cold else [False])
            for result in bench.compare(rounds, is_cold)
        ]
    processes: list[dict[str, Any]] = []
    if starts:
        with tempfile.TemporaryDirectory() as place:
            processes = Commands(checkpoint, Path(place)).measure(starts)
    columns = ("N", "opened", "page cache", "open, s", "read, s", "times the reading")
    rows = [
        (
            f"{r['N']:,}",
            r["opened"],
            r["page cache"],
            r["open seconds"],
            r["read seconds"],
            r["times the reading"],
        )
        for r in results
    ]
    publish("start", settings, columns, rows, [*results, *processes], json)
    if processes:
        table = Table("process", "s", "beside", "s", title="fresh processes")
        for r in processes:
            table.add_row(r["process"], str(r["seconds"]), r["beside"], str(r["seconds beside"]))
        Console().print(table)


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The rows of `cmt bench all`."""
    for result in report["results"]:
        if "process" in result:
            ours, theirs = result["seconds"], result["seconds beside"]
            what, rival = f"a fresh process: {result['process']}", result["beside"]
            times = ratio_of(theirs, ours)
        else:
            ours, theirs = result["open seconds"], result["read seconds"]
            cache = "in memory" if result["page cache"] == "warm" else "not in memory"
            what = f"opening {result['N']:,} crops {result['opened']}, files {cache}"
            rival, times = "reading the features", inverse(result["times the reading"])
        yield Headline(what, duration(ours), rival, duration(theirs), as_fast(times))


class _Bench:
    """A data folder (and database) with `items` items, and how long it takes to open it."""

    def __init__(
        self, folder: Path, info: CheckpointInfo, url: str | None, query: Data, items: int
    ) -> None:
        self._folder, self._info, self._url = folder, info, url
        self._query, self._items = query, items

    def fill(self, source: Source) -> None:
        """Enroll sampled features, unless an earlier run did. Raises BenchmarkDataError."""
        flat = self._folder / _FLAT_FILE
        gallery = self._open()
        try:
            if len(gallery) == self._items and flat.exists():
                return
            if len(gallery):
                raise BenchmarkDataError(
                    f"the gallery in {self._folder} holds {len(gallery)} items, not {self._items} "
                    "of this benchmark; give another --folder (and --database-url)"
                )
            data = source.sample(self._items, 1)
            crop = decode(_picture())
            for start in track(range(0, self._items, _BLOCK), "Filling the store", transient=True):
                rows = data.gallery[start : start + _BLOCK]
                new = [
                    NewItem(crop, person_id=f"person-{person}", camera_id="gate")
                    for person in data.persons[start : start + _BLOCK].tolist()
                ]
                gallery.add(new, rows)
            data.gallery.numpy().tofile(flat)
        finally:
            gallery.close()

    def compare(self, rounds: int, cold: bool) -> list[dict[str, Any]]:
        """One result for every way to open; all run in turn with the reading."""
        ways: dict[str, Callable[[], None]] = {
            "from SQL": self._without_snapshot,
            "from the snapshot": self._with_snapshot,
        }
        opened: dict[str, list[float]] = {way: [] for way in ways}
        read: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, prepare in ways.items():
                prepare()
                self._settle(cold)
                read[way].append(seconds(self._read))
                self._settle(cold)
                opened[way].append(self._searchable())
        return [
            {
                "N": self._items,
                "opened": way,
                "page cache": "cold" if cold else "warm",
                "open seconds": Spread.of(opened[way]),
                "read seconds": Spread.of(read[way]),
                "times the reading": Spread.of(
                    [o / r for o, r in zip(opened[way], read[way], strict=True)]
                ),
            }
            for way in ways
        ]

    def _open(self) -> Gallery:
        return Gallery.open(self._folder, self._info, database_url=self._url)

    def _searchable(self) -> float:
        """Open, answer one query, close → seconds until the answer."""
        opened: list[Gallery] = []

        def open_and_search() -> None:
            opened.append(self._open())
            x, modulation = self._query.queries[0], self._query.modulation
            found = opened[0].search(x, modulation, top_k=1)
            if found.searched != self._items:
                raise BenchmarkDataError(
                    f"{found.searched} of {self._items} items were searched; fill a new --folder"
                )

        try:
            return seconds(open_and_search)
        finally:
            for gallery in opened:
                gallery.close()

    def _read(self) -> None:
        size = self._items * self._info.config.embedding_size
        features = np.fromfile(self._folder / _FLAT_FILE, dtype=np.float16)
        if features.size != size:
            raise BenchmarkDataError(
                f"{self._folder / _FLAT_FILE} is not of {self._items} items; fill a new --folder"
            )

    def _without_snapshot(self) -> None:
        shutil.rmtree(self._folder / _SNAPSHOT, ignore_errors=True)

    def _with_snapshot(self) -> None:
        gallery = self._open()
        try:
            if not gallery.save_index():
                raise BenchmarkDataError(f"no snapshot could be written to {self._folder}")
        finally:
            gallery.close()

    def _settle(self, cold: bool) -> None:
        """Sync the folder's files to disk; cold: also drop them from the page cache.

        The pages of a PostgreSQL server's files are not touched.
        """
        for file in self._folder.rglob("*"):
            if not file.is_file():
                continue
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                if cold:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _picture() -> bytes:
    """A made-up crop of a few kilobytes."""
    blocks = np.random.default_rng(0).integers(0, 256, (64, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((96, 256)).save(buffer, "JPEG")
    return buffer.getvalue()
