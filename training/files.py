"""The files that a command leaves behind: each is there wholly or not at all.

An interruption or a full disk leaves the file that was there before. Missing folders are made.
"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.atomic_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`, text in UTF-8. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def write_report(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON; paths in it become text. Raises OSError."""
    write_file(path, json.dumps(content, indent=2, default=str) + "\n")


def write_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Replace `path` by a matplotlib figure in the format of its suffix (.png, .svg or .pdf).

    dpi: pixels per inch of a .png. Raises OSError.
    """
    picture = BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=dpi)
    write_file(path, picture.getvalue())
