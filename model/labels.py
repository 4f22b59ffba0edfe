"""Labels of people and cameras: one spelling for what looks the same.

A label is kept in Unicode normalization form C. What a reader cannot see is refused rather than
removed, so that whoever sent it learns of it: white space at either end, white space other than the
ordinary space, control characters and the characters that Unicode calls default-ignorable. Zero
width joiners and non-joiners stay where spelling needs them: inside a word of a cursive or Indic
script.
"""

from __future__ import annotations

import unicodedata

MAX_LABEL = 128

# Of Unicode's Default_Ignorable_Code_Point what is no format character (Cf, which are refused but
# for those below), and the blank of Braille, which looks like nothing too.
_INVISIBLE = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)
# Format characters that are drawn: Unicode's Prepended_Concatenation_Mark.
_DRAWN = frozenset(map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD)))
_NON_JOINER, _JOINER = "\u200c", "\u200d"
# First words of the names of letters that join: there a non-joiner changes what is read.
_CURSIVE = frozenset(["ARABIC", "SYRIAC", "MANDAIC", "MONGOLIAN", "NKO", "MANICHAEAN", "ADLAM"])
_VIRAMA = 9  # canonical combining class of the signs that join Indic consonants


class LabelError(ValueError):
    """A text that is no label; the message is one sentence with the remedy."""


def normalized_label(text: str) -> str:
    """`text` as it is stored and compared: normalization form C.

    Raises LabelError where it is empty, longer than `MAX_LABEL` characters, begins or ends with
    white space, begins with a combining mark, which has nothing to stand on, or holds what cannot
    be seen. The message does not repeat the text, which may be the name of a person.
    """
    label = unicodedata.normalize("NFC", text)
    if not label:
        raise LabelError("a label may not be empty; leave it out instead")
    if len(label) > MAX_LABEL:
        raise LabelError(f"a label of {len(label)} characters is too long; {MAX_LABEL} may be used")
    if label[0].isspace() or label[-1].isspace():
        raise LabelError("the label begins or ends with white space; trim it")
    for place, character in enumerate(label):
        if not _visible(label, place):
            why = "is another white space than the ordinary one; write that"
            raise LabelError(
                f"character {place + 1} of the label, U+{ord(character):04X}{_name(character)}, "
                + (why if character.isspace() else "cannot be seen; write the label without it")
            )
    return label


def cleaned_label(text: str) -> str | None:
    """The label that `text` looks like: without what cannot be seen. None where nothing is left.

    For texts that were stored before labels were checked.
    """
    label = "".join(" " if character.isspace() else character for character in text)
    before = None
    while label != before:  # what is removed changes what stands beside a joiner or a mark
        before = label
        label = unicodedata.normalize("NFC", label).strip()
        place = 0
        while place < len(label):
            if _visible(label, place):
                place += 1
            else:
                label = label[:place] + label[place + 1 :]
    try:
        return normalized_label(label)
    except LabelError:
        return None


def _visible(label: str, place: int) -> bool:
    character = label[place]
    if character in (_NON_JOINER, _JOINER):
        return _is_spelled(label, place)
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Zs" and character != " "):
        return False
    if kind == "Cf" and character not in _DRAWN:
        return False
    if kind[0] == "M" and place == 0:
        return False
    code = ord(character)
    if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # no characters at all
        return False
    return not any(first <= code <= last for first, last in _INVISIBLE)


def _is_spelled(label: str, place: int) -> bool:
    """Whether a joiner is inside a word and changes how it is written.

    That is a non-joiner between cursive letters, and either of them beside a virama.
    """
    if not 0 < place < len(label) - 1:
        return False
    beside = label[place - 1], label[place + 1]
    if any(unicodedata.category(character)[0] not in "LM" for character in beside):
        return False
    if any(unicodedata.combining(character) == _VIRAMA for character in beside):
        return True
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in beside}
    return label[place] == _NON_JOINER and scripts <= _CURSIVE


def _name(character: str) -> str:
    name = unicodedata.name(character, "")
    return f" ({name})" if name else ""
