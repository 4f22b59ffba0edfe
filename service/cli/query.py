"""`cmt query`: find a person in the gallery of a running service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Unpack

import typer
from rich.table import Table

from model.atomic_file import PRIVATE, write_whole
from model.image_files import read_file
from model.terminal import Console, printable, say, say_json
from service.api.schemas import QueryAnswer
from service.cli.answers import headline, part_bars, percent, sparkline
from service.cli.contact_sheet import Row, SheetImage, matches, render
from service.cli.options import (
    DEFAULT_URL,
    PLAIN,
    ApiKey,
    AsJson,
    Modality,
    ModalityOption,
    PolarityOption,
    Url,
)
from service.cli.outputs import Force, output
from service.cli.pictures import Pictures, print_pictures, renderer
from service.client import Client, ServiceProblem
from service.client.requests import QueryFields
from service.kit.text import counted

Option = typer.Option


def query(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="One person, in 1 to 16 images.")
    ],
    top_k: Annotated[int, Option(min=1, max=1000)] = 10,
    candidates: Annotated[int | None, Option(min=1, help="Shortlist of the recall stage.")] = None,
    exhaustive: Annotated[bool, Option("--exhaustive", help="Score the whole gallery.")] = False,
    modulation: Annotated[bool, Option(help="Rank by the query's γ and β, or without.")] = True,
    rerank: Annotated[
        Literal["none", "k_reciprocal"] | None,
        Option(help="Let the neighbours of the best count, too. Default: as the service does."),
    ] = None,
    prior: Annotated[
        float | None,
        Option(help="How probable it is, before looking, that the person is enrolled: 0 to 1."),
    ] = None,
    group_by: Annotated[
        Literal["person_id"] | None, Option(help="Only the best image per person.")
    ] = None,
    query_camera_id: Annotated[
        str | None, Option(help="The camera that took the images; its defaults hold for them.")
    ] = None,
    modality: ModalityOption = None,
    polarity: PolarityOption = None,
    person_id: Annotated[list[str] | None, Option(help="Only these; repeat.")] = None,
    camera_id: Annotated[list[str] | None, Option(help="Only these; repeat.")] = None,
    exclude_camera_id: Annotated[list[str] | None, Option(help="Not these; repeat.")] = None,
    gallery_modality: Annotated[list[Modality] | None, Option()] = None,
    max_distance: Annotated[float | None, Option(help="Drop weaker results.")] = None,
    json: AsJson = False,
    pictures: Pictures = "auto",
    html: Annotated[Path | None, Option(help="Write a contact sheet to this file.")] = None,
    force: Force = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Find a person, the most probable first.

    prob. is the probability that the person asked for is this one, "not enrolled" weighed in; same
    the similarity: that of this pair of images alone, drawn at even odds; parts how much each
    stripe agrees from head to feet; unmod. the rank without modulation. A checkpoint that is not
    calibrated has distances in their place (docs/calibration.md).

    Example: cmt query infrared.png --group-by person_id --html sheet.html
    """
    sheet = None if html is None else output(html, force=force, special=True)
    shown = None if json else renderer(pictures)
    with Client(url, api_key=api_key) as client:
        answer = _asked(
            client,
            images,
            top_k=top_k,
            candidates=candidates,
            exhaustive=exhaustive,
            modulation=modulation,
            rerank=rerank,
            prior=prior,
            group_by=group_by,
            query_camera_id=query_camera_id,
            modality=modality,
            polarity=polarity,
            person_id=person_id,
            camera_id=camera_id,
            exclude_camera_id=exclude_camera_id,
            gallery_modality=gallery_modality,
            max_distance=max_distance,
            explain=True,
        )
        if sheet is not None:
            title = printable(", ".join(image.name for image in images))
            row = Row(
                title=title,
                note=f"{answer.query.modality}, {answer.query.modality_source}",
                pictures=[SheetImage(read_file(image), "image/*") for image in images],
                answer=answer,
                matches=matches(client, answer, top_k),
            )
            write_whole(sheet, render("Who is this?", [_summary(answer)], [row]), PRIVATE)
        if json:
            say_json(answer.model_dump_json(indent=2, exclude_unset=True))
            return
        say(headline(answer))
        if shown is not None:
            print_pictures(shown, client, images, answer)
        Console().print_table(result_table(answer, top_k))
        say(_summary(answer))


def _asked(client: Client, images: list[Path], **fields: Unpack[QueryFields]) -> QueryAnswer:
    """The answer; an error about one of several images names its file."""
    try:
        return client.query(images, **fields)
    except ServiceProblem as problem:
        found = re.match(r"image (\d+) of \d+: ", str(problem))
        if found is None:
            raise
        detail = f"{images[int(found[1]) - 1]}: {str(problem)[found.end() :]}"
        told = problem.problem.model_copy(update={"detail": detail})
        raise ServiceProblem(told, problem.retry_after) from problem


def result_table(answer: QueryAnswer, show: int) -> Table:
    """The first `show` results, one line each."""
    probable = any(result.probability is not None for result in answer.results)
    calibrated = any(result.similarity is not None for result in answer.results)
    # Short headings: beside a full id, a terminal of 80 columns has no more space.
    numbers = ["prob."] if probable else ["dist."]
    numbers += ["same"] if calibrated else []
    table = Table("#", "person", "camera", *numbers, "parts", "unmod.", **PLAIN)
    table.add_column("id", no_wrap=True)  # or it could not be copied into the next command
    for result, parts in zip(answer.results[:show], part_bars(answer.results), strict=False):
        similarity = "-" if result.similarity is None else f"{result.similarity:.3f}"
        table.add_row(
            str(result.rank),
            result.item.person_id or "-",
            result.item.camera_id or "-",
            percent(result.probability) if probable else f"{result.distance:.4f}",
            *([similarity] if calibrated else []),
            sparkline(parts),
            str(result.unmodulated_rank or "-"),
            result.item.id,
        )
    return table


def _summary(answer: QueryAnswer) -> str:
    scored = "all scored" if answer.exhaustive else f"{answer.candidates} rescored"
    again = ", re-ranked" if answer.rerank != "none" else ""
    searched = counted(answer.searched, "item")
    return (
        f"{searched} searched, {scored}{again}; the query is {answer.query.modality} "
        f"({answer.query.modality_source})."
    )
