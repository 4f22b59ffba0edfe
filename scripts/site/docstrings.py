"""Docstrings as Markdown: `name: meaning.` becomes an item of a list, code in backticks stays.

Docstrings here are a summary line, prose, and descriptions `name: meaning.` of parameters and
fields, at the start of a line or after a sentence. In the source that reads well; as Markdown it
would all be one paragraph.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Attribute, Class, Extension, Function, Object

_LINE = re.compile(r"^(\w+(?:, \w+)*): (?=\S)")


class ListDescriptions(Extension):
    """Rewrites the docstring of every object that is collected."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called once for each object, when its members are known."""
        if obj.docstring is None or isinstance(obj, Attribute):
            return
        obj.docstring.value = listed(obj.docstring.value, _names(obj))


def _names(obj: Object) -> set[str]:
    """What a docstring of this object may describe."""
    if isinstance(obj, Function):
        return {parameter.name.lstrip("*") for parameter in obj.parameters}
    if isinstance(obj, Class):
        constructor = obj.members.get("__init__")
        return set(obj.members) | (
            _names(constructor) if isinstance(constructor, Object) else set()
        )
    return set()


def listed(docstring: str, names: set[str]) -> str:
    """The docstring with a list in the place of its descriptions of `names`."""
    out = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith((" ", "\t")) or not names:
            out.append(paragraph)
            continue
        name = f"(?:{'|'.join(map(re.escape, sorted(names)))})"
        inside = re.compile(rf"(?<=[.;] )({name}(?:, {name})*): (?=\S)")
        lines: list[str] = []
        paragraph = re.sub(r"(?<=\. )Raises ", r"\nRaises ", paragraph)
        for line in inside.sub(r"\n\1: ", paragraph).split("\n"):
            found = _LINE.match(line)
            if found and set(found[1].split(", ")) & names:
                lines += [""] if lines and not lines[-1].startswith(("- ", "  ")) else []
                shown = ", ".join(f"`{name}`" for name in found[1].split(", "))
                lines.append(f"- {shown}: {line[found.end() :].rstrip()}")
            elif line.startswith("Raises ") and lines and lines[-1].startswith(("- ", "  ")):
                lines += ["", line]
            elif lines and lines[-1].startswith(("- ", "  ")):
                lines.append(f"  {line.strip()}")
            else:
                lines.append(line.rstrip())
        out.append("\n".join(lines))
    return "\n\n".join(out)
