"""Labels of people and cameras: one spelling for what looks the same.

A label is kept in Unicode normalization form C. What a reader cannot see is refused rather than
removed, so that whoever sent it learns of it: white space at either end, white space other than the
ordinary space, control characters and the characters that Unicode calls default-ignorable. Zero
width joiners and non-joiners stay where spelling needs them: between two letters of a joining or
Indic script.
"""

from __future__ import annotations

import unicodedata

MAX_LABEL = 128

# Default_Ignorable_Code_Point of Unicode's DerivedCoreProperties.txt, without unassigned ranges
# that would have to be listed one by one, plus the interlinear annotations and the blank of
# Braille, which look like nothing too.
_INVISIBLE = (
    (0x00AD, 0x00AD),
    (0x034F, 0x034F),
    (0x061C, 0x061C),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x200B, 0x200F),
    (0x202A, 0x202E),
    (0x2060, 0x206F),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFFB),
    (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A),
    (0xE0000, 0xE0FFF),
)
_JOINERS = ("\u200c", "\u200d")
# First words of the names of letters in whose scripts a joiner changes the spelling.
_JOINING_SCRIPTS = frozenset(
    [
        "ARABIC",
        "SYRIAC",
        "MANDAIC",
        "MONGOLIAN",
        "NKO",
        "MANICHAEAN",
        "ADLAM",
        "DEVANAGARI",
        "BENGALI",
        "GURMUKHI",
        "GUJARATI",
        "ORIYA",
        "TAMIL",
        "TELUGU",
        "KANNADA",
        "MALAYALAM",
        "SINHALA",
        "KHMER",
        "MYANMAR",
        "TIBETAN",
        "BALINESE",
        "JAVANESE",
        "SUNDANESE",
        "MEETEI",
        "CHAKMA",
    ]
)


class LabelError(ValueError):
    """A text that is no label; the message is one sentence with the remedy."""


def normalized_label(text: str) -> str:
    """`text` as it is stored and compared: normalization form C.

    Raises LabelError where it is empty, longer than `MAX_LABEL` characters, begins or ends with
    white space or a combining mark that has nothing to stand on, or holds what cannot be seen.
    """
    label = unicodedata.normalize("NFC", text)
    if not label:
        raise LabelError("a label may not be empty; leave it out instead")
    if len(label) > MAX_LABEL:
        raise LabelError(f"the label has {len(label)} characters; {MAX_LABEL} are the limit")
    if label[0].isspace() or label[-1].isspace():
        raise LabelError(f"the label {label!a} begins or ends with white space; trim it")
    for place, character in enumerate(label):
        if not _visible(label, place):
            raise LabelError(
                f"the label {label!a} holds U+{ord(character):04X}"
                f"{_name(character)}, which cannot be seen; write it without"
            )
    return label


def cleaned_label(text: str) -> str | None:
    """The label that `text` looks like: without what cannot be seen. None where nothing is left.

    For texts that were stored before labels were checked.
    """
    label = unicodedata.normalize("NFC", text)
    spaced = "".join(" " if character.isspace() else character for character in label)
    kept = "".join(c for place, c in enumerate(spaced) if _visible(spaced, place)).strip()
    try:
        return normalized_label(kept)
    except LabelError:
        return None


def _visible(label: str, place: int) -> bool:
    character = label[place]
    if character in _JOINERS:
        return 0 < place < len(label) - 1 and all(map(_joins, (label[place - 1], label[place + 1])))
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Zs" and character != " "):
        return False
    if kind[0] == "M" and place == 0:
        return False
    code = ord(character)
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # no characters at all
        return False
    return not any(first <= code <= last for first, last in _INVISIBLE)


def _joins(character: str) -> bool:
    """Whether a joiner beside this character may change how a word is spelled."""
    if unicodedata.category(character)[0] not in "LM":
        return False
    return unicodedata.name(character, "").split(" ")[0] in _JOINING_SCRIPTS


def _name(character: str) -> str:
    name = unicodedata.name(character, "")
    return f" ({name})" if name else ""
