"""What of a Markdown document is code, and what is not."""

from __future__ import annotations

import re
from collections.abc import Callable

# A fenced block, or a span in backticks.
_CODE = re.compile(r"(^(`{3,}).*?^\2[^\n]*$|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))", re.M | re.S)


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """`change` applied to all that is no code."""
    parts, end = [], 0
    for found in _CODE.finditer(markdown):
        parts += [change(markdown[end : found.start()]), found[0]]
        end = found.end()
    return "".join([*parts, change(markdown[end:])])
