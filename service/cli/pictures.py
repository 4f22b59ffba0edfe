"""Results as pictures in the terminal: by its own protocol if it has one, else in half blocks."""

from __future__ import annotations

import io
import os
import sys
import termios
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from PIL import Image, ImageOps
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model.image_files import read_file
from model.terminal import Console, printable
from service.api.schemas import QueryAnswer, Result
from service.cli.answers import percent
from service.client import Client, ServiceProblem

Pictures = Annotated[
    Literal["auto", "never", "always"],
    typer.Option(
        help="Show the first results as pictures: where the output is a terminal with colors, "
        "never, or as half blocks wherever it goes."
    ),
]
Renderer = Callable[..., RenderableType]
"""Makes something to print of a picture, with a width or height in cells."""

_WIDTH, _MOST_ROWS = 14, 20  # cells of a picture
_THUMBNAIL = 256  # pixels; more than 20 lines of most terminals


def renderer(choice: Literal["auto", "never", "always"]) -> tuple[Renderer, Console] | None:
    """How to show pictures on standard output; None for not at all.

    Asks the terminal what it can, before anything else is printed.
    """
    if choice == "never":
        return None
    terminal = sys.stdout.isatty() and sys.stdout is sys.__stdout__
    console = Console()
    if choice == "auto" and (not terminal or console.color_system is None or console.no_color):
        return None
    if terminal and not _can_be_asked():
        return None
    # Imported here: this asks the terminal.
    from textual_image.renderable import HalfcellImage, Image, SixelImage, TGPImage

    if terminal and Image in (SixelImage, TGPImage):
        return Image, Console(color_system="truecolor")  # the colors are numbers of pictures
    if terminal:
        _forget_late_answers()
        few = choice == "auto" and console.color_system == "standard"  # 16 colors show nobody
        return None if few else (HalfcellImage, console)
    return HalfcellImage, Console(force_terminal=True, color_system="truecolor")


def print_pictures(
    shown: tuple[Renderer, Console], client: Client, images: Sequence[Path], answer: QueryAnswer
) -> None:
    """One line of pictures: the query and as many of the first results as fit beside it."""
    draw, console = shown
    table = Table.grid(padding=(0, 1, 0, 0))
    several = f" (1 of {len(images)})" if len(images) > 1 else ""
    cells = [_cell(draw, read_file(images[0]), f"query{several}", answer.query.modality)]
    most = max(2, console.width // (_WIDTH + 1))
    for result in answer.results[: most - 1]:
        with suppress(ServiceProblem):  # deleted since
            data, _ = client.image(result.item.id, height=_THUMBNAIL)
            cells.append(_cell(draw, data, *_captions(result)))
    for _ in cells:
        table.add_column(width=_WIDTH)
    table.add_row(*cells)
    console.print(table)


def _captions(result: Result) -> tuple[str, str]:
    item = result.item
    said = f"{result.distance:.3f}" if result.probability is None else percent(result.probability)
    return f"{result.rank}. {item.person_id or '-'}", f"{said} {item.camera_id or ''}".rstrip()


def _cell(draw: Renderer, data: bytes, *captions: str) -> RenderableType:
    """A picture with lines of text above it."""
    lines = [Text(printable(line), no_wrap=True, overflow="ellipsis") for line in captions]
    try:
        picture = _opened(data)
    except (OSError, ValueError, Image.DecompressionBombError):
        return Group(*lines, Text("(no picture)"))
    rows = picture.height / picture.width * _WIDTH / 2
    size: dict[str, Any] = {"width": _WIDTH} if rows <= _MOST_ROWS else {"height": _MOST_ROWS}
    return Group(*lines, draw(picture, **size))


def _opened(data: bytes) -> Image.Image:
    """A picture, upright, in eight bits. Raises OSError and ValueError."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.mode[0] in "IF":  # more bits than a terminal shows
        low, high = picture.convert("F").getextrema()
        scale = 255 / max(float(high) - float(low), 1e-9)  # type: ignore[arg-type]
        picture = picture.convert("F").point(lambda value: value * scale - float(low) * scale)  # type: ignore[arg-type]
        return picture.convert("L").convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "gray")
        return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _can_be_asked() -> bool:
    """Whether the terminal can say what it can, and has a size: standard input is it, too."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return False
    return sys.stdin.isatty() and sys.stdin is sys.__stdin__ and min(size) > 0


def _forget_late_answers() -> None:
    """Drop what a slow terminal answers late: it would stand in the next command line."""
    with suppress(termios.error, OSError):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
