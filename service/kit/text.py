"""Text that every reader takes."""

from __future__ import annotations


def is_utf_8(text: str) -> bool:
    """Whether a text can be written in UTF-8: it has no half of a surrogate pair.

    JSON may name such a half, and bytes that are no UTF-8 are decoded to it (surrogateescape).
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
