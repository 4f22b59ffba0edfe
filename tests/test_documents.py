"""Code in the documents runs as it stands there, in order, against a real service.

A comment above a block says what a reader does with it: nothing (it runs), `not run: REASON`,
`in the background, until URL answers`, or `prints` above what the block before it prints, where
`...` stands for anything. All other documents are read for blocks that nobody runs.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from markdown_it import MarkdownIt

from service import errors
from service.auth.authorization import ROUTE_SCOPES
from tests.paths import ROOT
from tests.service.processes import wait_for

DOCS = ROOT / "docs"
FIRST = "docs/quick-start.md"  # starts the service that the others use
PAGES = [
    FIRST,
    *sorted(str(page.relative_to(ROOT)) for page in (DOCS / "guides").glob("*.md")),
    "docs/gallery.md",
    "docs/privacy.md",
    "README.md",
]
# How many blocks of each document cannot run, each with its reason above it.
NOT_RUN = {
    "CONTRIBUTING.md": 3,
    "README.md": 3,
    "docs/ablation.md": 6,
    "docs/benchmarks.md": 13,
    "docs/calibration.md": 2,
    "docs/deploy.md": 14,
    "docs/export.md": 4,
    "docs/gallery.md": 1,
    "docs/guides/bulk.md": 3,
    "docs/guides/calibrate.md": 1,
    "docs/guides/checkpoint.md": 2,
    "docs/guides/enroll.md": 2,
    "docs/guides/frigate-and-videos.md": 3,
    "docs/guides/own-people.md": 2,
    "docs/guides/replicas.md": 1,
    "docs/guides/watch.md": 1,
    "docs/object-storage.md": 3,
    "docs/operations.md": 3,
    "docs/privacy.md": 1,
    "docs/quick-start.md": 3,
    "docs/scale.md": 7,
    "docs/training.md": 12,
    "examples/README.md": 2,
}
RUNNABLE = {"sh", "python"}
_COMMENT = re.compile(r"<!-- (?:(not run): (?P<reason>.+)|in the background, until (?P<url>\S+) "
                      r"answers|(?P<prints>prints)) -->\s*")  # fmt: skip
_ADDRESS = re.compile(r"127\.0\.0\.1:(80\d\d)|(?<=--port )(80\d\d)")


@dataclass(frozen=True)
class Block:
    """A fenced block. reason: why it is not run. until: the address that answers once it runs."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None
    until: str | None
    printed: bool

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found, before = [], ""
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type == "fence":
            mark = _COMMENT.fullmatch(before)
            told = mark.groupdict() if mark else {}
            assert token.map is not None
            language = token.info.split()[0] if token.info else ""
            line, printed = token.map[0] + 1, bool(told.get("prints"))
            reason, until = told.get("reason"), told.get("url")
            found.append(Block(page, line, language, token.content, reason, until, printed))
        before = token.content if token.type == "html_block" else ""
    return found


@dataclass
class Reader:
    """Somebody who types what the documents say, in one folder, with one terminal."""

    folder: Path
    ports: dict[str, int] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def here(self, text: str) -> str:
        """The text with ports that are free on this machine."""

        def port(found: re.Match[str]) -> str:
            said = found[1] or found[2]
            free = self.ports.setdefault(said, _free_port())
            return found[0].replace(said, str(free))

        return _ADDRESS.sub(port, text)

    def follow(self, page: str) -> int:
        """Run a document's blocks → how many ran."""
        ran, printed, names = 0, "", dict[str, Any]()
        for block in blocks(page):
            if block.printed:
                if not says(block.code, printed):
                    pytest.fail(f"{block.place} is not what is printed:\n{printed}")
            elif block.reason is None and block.language in RUNNABLE:
                printed = self.run(block, names)
                ran += 1
        return ran

    def run(self, block: Block, names: dict[str, Any]) -> str:
        """Run one block → what it prints. names: those of the document's Python so far."""
        code = self.here(block.code)
        if block.until is not None:
            self.start(block, code)
            return ""
        if block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
                exec(compile("\n" * block.line + code, block.page, "exec"), names)
            return printed.getvalue()
        # What a block exports is there for the next one.
        kept = self.folder / ".exported"
        script = f"[ ! -f {kept} ] || . {kept}\n{code}\nexport -p > {kept}"
        answer = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
        )  # fmt: skip
        assert answer.returncode == 0, f"{block.place} fails:\n{answer.stdout}"
        return answer.stdout

    def start(self, block: Block, code: str) -> None:
        """Start what goes on running, and wait until it answers."""
        log = (self.folder / f"log-{block.line}").open("w+")
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL,
            stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        url = self.here(str(block.until))

        def answers() -> bool:
            ended = process.poll() is not None
            assert not ended, f"{block.place} ends:\n{Path(log.name).read_text()}"
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(url, trust_env=False, timeout=60).is_success
            time.sleep(0.1)
            return False

        wait_for(answers, f"{block.place}: {url} does not answer", 120)

    def environment(self) -> dict[str, str]:
        """That of the terminal: commands of this environment, the service at its address."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CMT_")}
        address = self.here("http://127.0.0.1:8000")
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
            "CMT_RUNTIME": "torch",  # which starts sooner
            "CMT_URL": address,
            "CMT_PORT": address.rsplit(":", 1)[1],
        }

    def leave(self, process: subprocess.Popen[str]) -> None:
        """End what was started, as Ctrl-C would."""
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def says(expected: str, printed: str) -> bool:
    """Whether a text is printed, where `...` stands for anything and space is no matter."""
    parts = [re.escape(" ".join(part.split())) for part in expected.split("...")]
    return re.fullmatch(".*".join(parts), " ".join(printed.split()), re.DOTALL) is not None


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """One who has followed the quick start."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("examples", "tests", "training", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    one = Reader(folder)
    try:
        one.follow(FIRST)
        yield one
    finally:
        for process in one.processes:
            one.leave(process)


@pytest.mark.parametrize("page", PAGES[1:])
def test_what_a_guide_says_to_do_works(reader: Reader, page: str) -> None:
    running = len(reader.processes)
    try:
        ran = reader.follow(page)
    finally:
        for process in reader.processes[running:]:
            reader.leave(process)
        del reader.processes[running:]
    assert ran == sum(b.language in RUNNABLE and b.reason is None for b in blocks(page))


def test_blocks_that_are_not_run_say_why_and_are_counted() -> None:
    documents = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    counts = {}
    for document in documents:
        page = str(document.relative_to(ROOT))
        code = [block for block in blocks(page) if block.language in RUNNABLE]
        if page not in PAGES:
            for block in code:
                assert block.reason, f"{block.place} is run by no test and does not say why"
        if not_run := [block for block in code if block.reason]:
            counts[page] = len(not_run)
    assert counts == NOT_RUN


def test_the_quick_start_runs_a_service_and_asks_it() -> None:
    quick = [block for block in blocks(FIRST) if block.reason is None]
    assert [b.language for b in quick if b.until] == ["sh"]
    assert {"sh", "python", "text"} <= {block.language for block in quick}


TROUBLE = "docs/troubleshooting.md"


def sentences(quoted: str) -> Iterator[str]:
    """The parts of a sentence that is quoted, or written in the code: reason and remedy."""
    for part in " ".join(quoted.split()).split("; "):
        yield re.sub(r"(…[, ]?)+$|^…", "…", part)


def written() -> set[str]:
    """All parts of sentences in the code, with … for what differs."""
    found = set[str]()
    for file in [*(ROOT / "service").rglob("*.py"), *(ROOT / "model").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            found |= set(sentences(text))
    return found


def test_every_code_is_explained_in_its_own_words() -> None:
    text = (ROOT / TROUBLE).read_text()
    explained = dict(re.findall(r"^### `(\w+)`\n\n(.+(?:\n.+)*)", text, re.MULTILINE))
    expected = {
        kind.code: f"{kind.status} {kind.title}. {(kind.__doc__ or '').splitlines()[0]}"
        for kind in errors.ServiceError.__subclasses__()
    }
    assert {code: " ".join(said.split()) for code, said in explained.items()} == expected


def test_sentences_of_errors_are_quoted_as_they_are() -> None:
    text = (ROOT / TROUBLE).read_text()
    quotes = [
        quote.replace("\n> ", " ")[2:] for quote in re.findall(r"(?:^> .*\n?)+", text, re.MULTILINE)
    ]
    assert len(quotes) > 80
    known = written()
    unknown = [(quote, part) for quote in quotes for part in sentences(quote) if part not in known]
    assert unknown == []


def test_the_table_of_scopes_has_every_route() -> None:
    table = re.findall(
        r"^\| (?:`(\w+)`|none, open[^|]*) \| (.+) \|$",
        (DOCS / "operations.md").read_text().split("## Keys and scopes")[1].split("## Labels")[0],
        re.MULTILINE,
    )
    told = {
        (method, path): scope or None
        for scope, routes in table
        for method, path in re.findall(r"`([A-Z]+) (/[^`]*)`", routes)
    }
    assert told == dict(ROUTE_SCOPES)
