"""What the path of a file says of its picture: patterns such as `{camera}/{person}/*.jpg`.

A pattern describes a file's path below the folder that was named, from its first step to its last:

- `{person}`, `{camera}`, `{time}`, `{modality}` and `{polarity}` take as few characters as fit, of
  one step; `{person_id}`, `{camera_id}` and `{captured_at}` are the same. A field that stands there
  twice must be the same twice.
- `*` is any characters of one step, `?` is one, and the step `**` is any number of folders.
- All else stands for itself, in upper or lower case.
- A pattern that ends in a field leaves the suffix of the file's name out of it.

`{time}` reads a date and a time of day as ISO 8601 writes them, with or without punctuation.
`{time:%Y%m%d-%H%M%S}` says how it is written, in the directives of `strptime`; several such fields
(a folder of the day, a name of the time) are read together. `{time:unix}` counts seconds.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from difflib import get_close_matches

from service.api.schemas import BatchItem
from service.kit.text import counted

_FIELDS = {
    "person": "person_id",
    "camera": "camera_id",
    "time": "captured_at",
    "modality": "modality",
    "polarity": "polarity",
}
_NAMES = {**_FIELDS, **{name: name for name in _FIELDS.values()}}
_MODALITIES = {"visible": "rgb", "infrared": "ir", "thermal": "ir"}
_TOKEN = re.compile(
    r"\{(?P<field>[^{}]*)\}|(?P<folders>(?<![^/])\*\*(?:/|\Z))|(?P<any>\*)|(?P<one>\?)"
    r"|(?P<text>[^{}*?]+)|(?P<brace>[{}])"
)
_DIRECTIVES = {
    "%Y": "[0-9]{4}",
    **dict.fromkeys(("%y", "%m", "%d", "%H", "%M", "%S"), "[0-9]{2}"),
    "%j": "[0-9]{3}",
    "%f": "[0-9]{1,6}",
    "%z": "(?:[Zz]|[+-][0-9]{2}:?[0-9]{2})",
    "%%": "%",
}
_UNIX = "unix"
_ISO = re.compile(
    r"(\d{4})[-.]?(\d\d)[-.]?(\d\d)[Tt _-]?(\d\d)[:.-]?(\d\d)(?:[:.-]?(\d\d)(?:[.,](\d{1,6}))?)?"
    r"\s?([Zz]|[+-]\d\d:?\d\d)?",
    re.ASCII,
)
_EXAMPLE = "'{camera}/{person}/*.jpg'"


class PatternError(Exception):
    """A pattern that cannot be read; the message says what to write instead."""


class PathPattern:
    """A pattern. zone: of times that say no offset.

    Raises PatternError.
    """

    def __init__(self, text: str, zone: tzinfo | None = None) -> None:
        self.text = text
        self._zone = zone
        self._times: list[str] = []  # formats, in order
        self._regex = re.compile(self._translated(_plain(text)), re.IGNORECASE)
        self.depth = None if "**" in text else self._regex.pattern.replace("[^/", "").count("/")
        """In how many folders its files lie; None for any number."""
        self._check_times()

    def match(self, path: str) -> dict[str, str] | None:
        """The texts of the fields in a path with slashes; None where it does not match."""
        found = self._regex.fullmatch(unicodedata.normalize("NFC", path))
        return None if found is None else found.groupdict()

    def labels(self, texts: Mapping[str, str]) -> dict[str, str]:
        """The labels in the texts of a match but for the time, named as in BatchItem."""
        labels = {name: text for name, text in texts.items() if name in BatchItem.model_fields}
        if "modality" in labels:
            modality = labels["modality"].casefold()
            labels["modality"] = _MODALITIES.get(modality, modality)
        return labels

    def time_texts(self, texts: Mapping[str, str]) -> list[str]:
        """What stands in a match for the time, part by part."""
        return [text for name, text in texts.items() if name not in BatchItem.model_fields]

    def time(self, texts: Mapping[str, str]) -> datetime | None:
        """The time in the texts of a match, in UTC. Raises ValueError with a sentence."""
        times = self.time_texts(texts)
        return self._time(times) if times else None

    def why_not(self, path: str) -> str:
        """Why a path does not match, in a few words."""
        depth = path.count("/")
        if self.depth is not None and depth != self.depth:
            here, wanted = (counted(one, "folder") for one in (depth, self.depth))
            return f"it lies {here} deep, the pattern's files {wanted}"
        return "its names are others"

    def _translated(self, text: str) -> str:
        regex = ""
        known: set[str] = set()
        before = ""  # what stood just before where that has no end of its own
        for token in _TOKEN.finditer(text):
            kind, shown = token.lastgroup, token[0]
            if kind == "brace":
                raise PatternError(
                    f"the pattern {self.text!r} has a single {shown!r}; fields are written as in "
                    f"{_EXAMPLE}, and ? stands for a brace in a file's name"
                )
            if kind == "text":
                regex, before = regex + re.escape(shown), ""
                continue
            if kind == "one":
                regex, before = regex + "[^/]", ""
                continue
            if kind == "folders":
                regex += "(?:[^/]+/)*" + ("" if shown.endswith("/") else "[^/]+")
                before = ""
                continue
            part, ends = ("[^/]*", False) if kind == "any" else self._field(token["field"], known)
            if not ends and before:
                raise PatternError(
                    f"in the pattern {self.text!r} nothing stands between {before} and {shown}, so "
                    "that nobody knows where one ends; write the text that does, or a slash"
                )
            regex, before = regex + part, "" if ends else shown
        if text.endswith("}"):
            regex += r"\.[^/.]+"
        return regex

    def _field(self, field: str, known: set[str]) -> tuple[str, bool]:
        """A field as a regular expression, and whether that alone says where it ends."""
        name, _, written = field.partition(":")
        meant = _NAMES.get(name.strip())
        if meant is None:
            near = get_close_matches(name, _NAMES, 1)
            fields = ", ".join(f"{{{one}}}" for one in _FIELDS)
            hint = f"is it {{{near[0]}}}?" if near else f"there are {fields}"
            raise PatternError(
                f"the pattern {self.text!r} has an unknown field {{{field}}}; {hint}"
            )
        if meant == "captured_at":
            self._times.append(written)
            group = f"time_{len(self._times)}"
            if written == _UNIX:
                return rf"(?P<{group}>[0-9]{{9,13}}(?:\.[0-9]+)?)", True
            if written:
                return f"(?P<{group}>{self._written(written)})", True
            return f"(?P<{group}>[^/]+?)", False
        if written:
            raise PatternError(f"only {{time:…}} has a format; write {{{name}}} in {self.text!r}")
        if meant in known:
            return f"(?P={meant})", True
        known.add(meant)
        return f"(?P<{meant}>[^/]+?)", False

    def _written(self, written: str) -> str:
        """A format of times as a regular expression."""
        regex = ""
        for part in re.findall(r"%.?|[^%]+", written):
            if part.startswith("%") and part not in _DIRECTIVES:
                raise PatternError(
                    f"{part!r} in {{time:{written}}} is not known; a time is written with "
                    f"{' '.join(_DIRECTIVES)}"
                )
            regex += _DIRECTIVES.get(part) or re.escape(part)
        return regex

    def _check_times(self) -> None:
        if not self._times:
            return
        together = "".join(self._times)
        if len(self._times) > 1 and not all(format not in ("", _UNIX) for format in self._times):
            raise PatternError(
                f"the pattern {self.text!r} has several times; each needs a format, as in "
                "'{time:%Y-%m-%d}/{time:%H%M%S}.jpg'"
            )
        if self._times[0] in ("", _UNIX):
            return
        if not re.search("%[Yy]", together) or not re.search("%m.*%d|%d.*%m|%j", together):
            raise PatternError(
                f"the times of {self.text!r} have no full date; it needs %Y, %m and %d"
            )
        if self._zone is None and "%z" not in together:
            raise PatternError(
                f"the times of {self.text!r} say no offset; give the zone of the cameras' clock, "
                "such as --timezone Europe/Berlin or --timezone UTC"
            )

    def _time(self, texts: list[str]) -> datetime:
        if self._times == [_UNIX]:
            seconds = float(texts[0])
            return datetime.fromtimestamp(seconds / 1000 if seconds >= 1e11 else seconds, UTC)
        if self._times == [""]:
            time = _iso(texts[0])
        else:
            try:
                time = datetime.strptime("\n".join(texts), "\n".join(self._times))
            except ValueError:
                raise ValueError(f"{' '.join(texts)!r} is no time that exists") from None
        if time.tzinfo is not None:
            return time.astimezone(UTC)
        if self._zone is None:
            raise ValueError(
                f"the time {texts[0]!r} says no offset; give the zone of the camera's clock, such "
                "as --timezone UTC"
            )
        return time.replace(tzinfo=self._zone).astimezone(UTC)


def _plain(text: str) -> str:
    """The pattern without a ./ at its start. Raises PatternError for what no path below matches."""
    plain = unicodedata.normalize("NFC", text.strip())
    while plain.startswith("./"):
        plain = plain[2:]
    if not plain:
        raise PatternError(f"the pattern is empty; write one such as {_EXAMPLE}")
    if plain.startswith("/") or ".." in plain.split("/"):
        raise PatternError(
            f"the pattern {text!r} leads out of the folder; write what is below it, as {_EXAMPLE}"
        )
    if "\\" in plain:
        raise PatternError(f"the pattern {text!r} has a backslash; write / between folders")
    if "//" in plain:
        raise PatternError(f"the pattern {text!r} has a folder without a name; write one slash")
    return plain + "*" if plain.endswith("/") else plain


def _iso(text: str) -> datetime:
    found = _ISO.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no date with a time, such as 20260301T140500; say how it is written, as "
            "in {time:%d.%m.%Y_%H%M}"
        )
    year, month, day, hour, minute, second, fraction, offset = found.groups()
    written = f"{year}-{month}-{day}T{hour}:{minute}:{second or '00'}"
    written += f".{fraction.ljust(6, '0')}" if fraction else ""
    try:
        return datetime.fromisoformat(written + (offset or "").upper())
    except ValueError:
        raise ValueError(f"{text!r} is no time that exists") from None
