"""`cmt query` shows pictures as the terminal can, and never where there is none."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.cli import main
from service.client import Client
from tests.service.processes import CMT

HALF, SIXEL, KITTY = "▀", "\x1bP", "\x1b_G"
ASKED_SIXEL, ASKED_KITTY = "\x1b[c", re.compile(r"\x1b_Gi=\d+,[^\x1b]*a=q[^\x1b]*\x1b\\")


@pytest.fixture(scope="module")
def enrolled(url: str, visible: list[Path]) -> Iterator[None]:
    with Client(url) as client:
        for file in visible[:3]:
            client.enroll(file, person_id=f"[b]{file.parent.name}", camera_id="gate")
        yield


@pytest.fixture(autouse=True)
def clean_environment(url: str, enrolled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CMT_")]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CMT_URL", url)
    monkeypatch.setenv("COLUMNS", "100")


def in_terminal(image: Path, kind: str, *options: str, columns: int = 100) -> str:
    """What `cmt query` prints on a terminal of this kind, which answers what such a one does."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40 if columns else 0, columns))
    environment = {**os.environ, "TERM": "dumb" if kind == "dumb" else "xterm-256color"}
    process = subprocess.Popen(
        [*CMT, "query", str(image), *options],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown, answered = b"", False
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            shown += os.read(ours, 65536)
        except OSError:  # its end
            break
        text = shown.decode(errors="replace")
        if kind == "sixel" and ASKED_SIXEL in text and not answered:
            os.write(ours, b"\x1b[?62;4;22c")
            answered = True
        if kind == "kitty" and ASKED_KITTY.search(text) and not answered:
            os.write(ours, b"\x1b_Gi=1;OK\x1b\\")
            answered = True
    os.close(ours)
    assert process.wait(60) == 0, shown
    return shown.decode()


@pytest.mark.parametrize(
    ("kind", "protocol"), [("sixel", SIXEL), ("kitty", KITTY), ("plain", HALF), ("dumb", None)]
)
def test_pictures_are_drawn_as_the_terminal_can(
    kind: str, protocol: str | None, infrared: list[Path]
) -> None:
    shown = in_terminal(infrared[0], kind)
    drawn = ASKED_KITTY.sub("", shown)
    assert {mark for mark in (HALF, SIXEL, KITTY) if mark in drawn} == {protocol} - {None}
    assert "3 items searched" in shown
    if protocol is not None:
        assert "1. [b]" in shown


def test_a_terminal_gets_none_where_they_are_not_wanted(infrared: list[Path]) -> None:
    for options in (("--pictures", "never"), ("--json",)):
        shown = in_terminal(infrared[0], "sixel", *options)
        assert not [mark for mark in (HALF, SIXEL, ASKED_SIXEL) if mark in shown]
    assert HALF not in in_terminal(infrared[0], "plain", columns=0)  # of no size


def test_only_a_terminal_gets_pictures_unasked(
    infrared: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", str(infrared[0])]) == 0
    assert not {HALF, "\x1b"} & set(capsys.readouterr().out)
    crop = np.array(Image.open(io.BytesIO(infrared[0].read_bytes())).convert("L"), np.uint16)
    deep = tmp_path / "deep.png"
    Image.fromarray(crop * 5 + 3000).save(deep)  # 12 bits, all of which would be white in 8
    assert main(["query", str(deep), "--pictures", "always", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["query", str(deep), str(infrared[0]), "--pictures", "always"]) == 0
    shown = capsys.readouterr().out
    assert "query (1 of 2)" in shown
    first = {re.match(r"\x1b\[38;2;(\d+);", line) for line in shown.splitlines() if HALF in line}
    assert len({found[1] for found in first if found}) > 5  # shades of the query
