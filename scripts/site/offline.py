"""A hook of the documentation's site: a page that loads something from elsewhere fails the build.

Links that a reader follows are free; scripts, styles, fonts and pictures are the site's own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

_LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\b(?:src|srcset)=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b(?![^>]*rel=[\"']?(?:canonical|prev|next))[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>"
)
_STYLE_LOADS = re.compile(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//[^)\s;]*")


def on_post_page(output: str, *, page: Any, config: Any) -> str:
    """Refuse a page with an element that loads something remote."""
    refuse(_LOADS.findall(output), page.file.src_uri)
    return output


def on_post_build(*, config: Any) -> None:
    """Refuse a style sheet that does."""
    for file in Path(config["site_dir"]).rglob("*.css"):
        refuse(_STYLE_LOADS.findall(file.read_text()), str(file))


def refuse(found: list[str], where: str) -> None:
    """Raise PluginError where something was found."""
    if found:
        raise PluginError(f"{where} loads {found[0]}; keep a copy of it under docs/ instead")
