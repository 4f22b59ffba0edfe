"""A hook of the documentation's site: what pages link to outside of docs/ becomes part of it.

Documents of the repository link to each other by their places in it, so that they can be read
there. Those outside of docs/ get a page (or, if they are no Markdown, a copy) under `repository/`,
and all links are turned to where their targets are in the site.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

from scripts.site.blocks import outside_code

ROOT = Path(__file__).parents[2]
FOLDER = "repository"  # of the site
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))|(?<=src=\")([^\"#:]+)(?=\")")

_TEXT_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#:]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        source = ROOT / page
        if not source.is_file():
            continue  # made by another hook
        for target in _targets(page, source.read_text()):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            seen.add(target)
            file = File.generated(config, f"{FOLDER}/{target}", abs_src_path=str(ROOT / target))
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Turn links between documents of the repository to their places in the site."""
    here = page.file.src_uri
    place = here.removeprefix(f"{FOLDER}/") if here.startswith(f"{FOLDER}/") else f"docs/{here}"

    def without_folders(found: re.Match[str]) -> str:
        """The text alone of a link to a folder, of which a site has no page."""
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(place), found[2]))
        return found[1] if (ROOT / meant).is_dir() else found[0]

    def turned(found: re.Match[str]) -> str:
        target, anchor = found[1] or found[3], found[2] or ""
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        goal = meant.removeprefix("docs/") if meant.startswith("docs/") else f"{FOLDER}/{meant}"
        if not goal.startswith(FOLDER) or files.get_file_from_path(goal) is not None:
            return os.path.relpath(goal, posixpath.dirname(here) or ".") + anchor
        return found[0]

    return outside_code(
        markdown, lambda text: _LINK.sub(turned, _TEXT_LINK.sub(without_folders, text))
    )


def _targets(page: str, markdown: str) -> list[str]:
    """What a page links to, by its place in the repository."""
    found: list[str] = []

    def note(text: str) -> str:
        for link, _, source in _LINK.findall(text):
            joined = posixpath.join(posixpath.dirname(page), link or source)
            found.append(posixpath.normpath(joined))
        return text

    outside_code(markdown, note)
    return found
