"""`cmt embed-bulk`: the features of many pictures into Parquet files, without a service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from model.terminal import say
from service.cli.failures import Failure, failure_of, report_place, write_report
from service.cli.interrupts import INTERRUPTED, stopping
from service.cli.naming import FileTime, PatternOption, TimezoneOption, naming
from service.cli.options import ModalityOption, PolarityOption, folder
from service.cli.outputs import Force, refuse_data_folder
from service.cli.planning import (
    CameraId,
    IgnoreColumn,
    ManifestOption,
    PersonId,
    Report,
    planned,
    print_failures,
    print_left,
    progress_bar,
)
from service.kit.text import counted

if TYPE_CHECKING:
    from service.bulk.embedding import BulkEmbedder
    from service.bulk.processes import ProcessEmbedder
    from service.bulk.ray_engine import RayEmbedder
    from service.settings import Settings

_STOPPING = "Finishing the files that are begun; Ctrl-C once more ends at once."
_MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson")


def embed_bulk(
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", parser=folder, help="Where features go; made if missing."),
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH...",
            help="Folders and files, or one manifest (.csv, .jsonl).",
            parser=folder,
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="That of the gallery; CMT_CHECKPOINT names one too.")
    ] = None,
    pattern: PatternOption = None,
    timezone: TimezoneOption = None,
    file_time: FileTime = False,
    manifest: ManifestOption = None,
    ignore_column: IgnoreColumn = None,
    person_id: PersonId = None,
    camera_id: CameraId = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="This machine, or Ray Data on a cluster that sees the same folders."),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the cluster's head, or auto for one that runs here; else the setting "
            "ray_address, or a new one.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=256,
            help="Of this machine that embed: one for each GPU, or more to keep it busy.",
        ),
    ] = None,
    rows_per_file: Annotated[
        int, typer.Option(min=1, max=100_000, help="Pictures in one file.")
    ] = 1024,
    report: Report = None,
    force: Force = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of the service's settings, such as its limits.")
    ] = None,
) -> None:
    """Embed all images in folders into Parquet files, which `cmt import` loads into a gallery.

    Labels are given as to `cmt enroll`; pictures are read and refused as by a service with the same
    settings (CMT_…). May be interrupted and run again: only what is missing is embedded. Files that
    fail are listed at the end, and the exit status is then 1.

    Example: cmt embed-bulk crops --checkpoint model.safetensors --out features --camera-id gate
    """
    from service.bulk.features import arrow_parquet
    from service.settings import load_settings

    arrow_parquet()  # a package that is missing is told before the work
    paths = paths or []
    if manifest is None and len(paths) == 1 and paths[0].suffix.lower() in _MANIFESTS:
        manifest, paths = paths[0], []
    if manifest is not None and pattern is not None:
        raise typer.BadParameter("a manifest and --pattern both say labels; give one of them")
    labels = naming(
        pattern,
        timezone,
        file_time=file_time,
        person_id=person_id,
        camera_id=camera_id,
        modality=modality,
        polarity=polarity,
    )
    refuse_data_folder(out)
    settings = load_settings(config, checkpoint=checkpoint, data_dir=out, host="127.0.0.1")
    target = report_place(report, force=force)
    plan = planned(paths, manifest, labels, ignore_column or [])
    folders = [path if path.is_dir() else path.parent for path in paths]
    roots = folders if manifest is None else [manifest.parent]
    root = Path(os.path.commonpath([path.absolute() for path in roots]))

    from service.bulk.embedding import Done, left_to_do, parts, pictures_of, writing

    done = Done()
    on_ray = engine == "ray" or ray_address is not None
    place = settings, out, root
    with (
        writing(out) as features,
        stopping(_STOPPING) as wish,
        _on_ray(*place, ray_address) if on_ray else _here(*place, processes) as embedder,
    ):
        pictures = list(pictures_of(plan.entries, root))
        left = left_to_do(pictures, features, embedder.fingerprint, root)
        before = len(pictures) - len(left)
        features.reopen()
        work = parts(left, features.next_number(), rows_per_file)
        try:
            with progress_bar("Embedding") as bar:
                task = bar.add_task("", total=len(pictures), completed=before)
                embedder.embed(
                    work,
                    done,
                    advance=lambda count: bar.advance(task, count),
                    stopping=lambda: wish.wanted,
                )
            if not wish.wanted:
                features.finish()
        finally:
            failures = [*plan.failures]
            for result in done.refused:
                assert isinstance(result.entry.image, Path)
                failures.append(failure_of(result, result.entry.image))
            failures.sort(key=lambda failure: failure.file)
            total = len(plan.entries) + len(plan.failures)
            _print_tally(total, before + done.rows, before, failures, report)
            print_left(plan)
            if target is not None:
                write_report(target, failures)
    if wish.wanted:
        say("Run the same command again to go on; nothing is embedded twice.", err=True)
        raise typer.Exit(INTERRUPTED)
    if failures:
        raise typer.Exit(1)


def _on_ray(settings: Settings, out: Path, root: Path, address: str | None) -> RayEmbedder:
    from service.bulk.ray_engine import RayEmbedder

    return RayEmbedder(settings, out, root, address)


def _here(
    settings: Settings, out: Path, root: Path, processes: int | None
) -> BulkEmbedder | ProcessEmbedder:
    from service.bulk.embedding import BulkEmbedder
    from service.bulk.processes import ProcessEmbedder, devices

    count = processes or len(devices(settings))
    if count == 1:
        return BulkEmbedder(settings, out, root)
    return ProcessEmbedder(settings, out, root, count)


def _print_tally(
    files: int, embedded: int, before: int, failures: list[Failure], report: Path | None
) -> None:
    of_them = f", {before:,} of them before" if before else ""
    say(f"{embedded:,} of {counted(files, 'file is', 'files are')} embedded{of_them}.")
    print_failures(failures, report)
