"""Text that every reader takes, and counts as people say them."""

from __future__ import annotations


def counted(count: int, one: str, more: str | None = None) -> str:
    """A count with its noun: 1 item, 2,198 items. more: a plural that is not made with an s."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def is_utf_8(text: str) -> bool:
    """Whether a text can be written in UTF-8: it has no half of a surrogate pair.

    JSON may name such a half, and bytes that are no UTF-8 are decoded to it (surrogateescape).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
