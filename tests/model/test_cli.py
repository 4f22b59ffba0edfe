"""The `cmt` command, run as users run it: a process, with commands of a package it never saw."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

import model.cli

PLUGIN = '''
"""A package that must not be imported for `cmt --help`: importing it leaves a file behind."""
import signal
from pathlib import Path
from typing import Annotated

import typer
from plugin import heavy

boxes = typer.Typer(help="Look after boxes.\\n\\nNot part of the summary.")


@boxes.command()
def count(number: int) -> None:
    """Count boxes."""
    typer.echo(f"{number} boxes")


@boxes.command()
def drop() -> None:
    """Drop them."""


def greet(name: str, loud: bool = False) -> None:
    """Say hello.

    To one person,
    by name.

    Example: cmt greet Ada
    """
    typer.echo(f"hello {name}" + "!" * loud)


def fail(kind: str) -> None:
    """Raise an error."""
    if kind == "full":
        raise ValueError("the box is full: empty it first")
    if kind == "two":
        raise RuntimeError("first line\\nsecond line")
    if kind == "file":
        Path("nowhere.txt").read_bytes()
    if kind == "bug":
        {}["key"]
    if kind == "validation":
        from pydantic import BaseModel

        class Box(BaseModel):
            size: int

        Box(size="large")
    if kind == "exit":
        raise typer.Exit(7)
    if kind == "interrupt":
        raise KeyboardInterrupt


def weigh(json: Annotated[Path, typer.Option("--json")], number: int = 0) -> None:
    """Weigh the boxes."""
    json.write_text("{}")
    if number:
        try:
            signal.raise_signal(number)
        finally:
            json.unlink()
'''

ENTRY_POINTS = """
[cmt.commands]
boxes = plugin.commands:boxes
greet = plugin.commands:greet
fail = plugin.commands:fail
lost = plugin.absent:lost
needy = plugin.needy:needy

[cmt.benchmarks]
weigh = plugin.commands:weigh
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """An installed distribution that registers commands and a benchmark; returns its folder."""
    package = tmp_path / "plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "heavy.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"
    )
    (package / "commands.py").write_text(PLUGIN)
    (package / "needy.py").write_text("import surely_not_installed\ndef needy(): 'Need.'\n")
    metadata = tmp_path / "plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(textwrap.dedent(ENTRY_POINTS))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cmt ARGUMENTS` in a process of its own that sees the packages of `folder`."""
    script = (
        "import sys; from model.cli import main; status = main(); "
        "print('TORCH' if 'torch' in sys.modules else '', end=''); sys.exit(status)"
    )
    root = str(Path(model.cli.__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), root]),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=60,
    )


def test_help_lists_every_command_without_importing_any(plugin: Path) -> None:
    answer = run(plugin, "--help")
    assert answer.returncode == 0, answer.stderr
    for name, summary in {
        "boxes": "Look after boxes.",
        "greet": "Say hello.",
        "fail": "Raise an error.",
        "bench": "Measure a part of the system",
        "lost": "",
    }.items():
        (line,) = (line for line in answer.stdout.splitlines() if f"│ {name} " in line)
        assert summary in line
    assert "Not part of the summary" not in answer.stdout
    assert "TORCH" not in answer.stdout
    assert not (plugin / "plugin" / "heavy.imported").exists()


def test_no_arguments_show_the_help(plugin: Path) -> None:
    answer = run(plugin)
    assert answer.returncode == 0
    assert "boxes" in answer.stdout


def test_a_function_and_a_group_run(plugin: Path) -> None:
    assert run(plugin, "greet", "Ada", "--loud").stdout == "hello Ada!\n"
    assert run(plugin, "boxes", "count", "3").stdout == "3 boxes\n"


def test_help_of_a_command_shows_its_example(plugin: Path) -> None:
    answer = run(plugin, "greet", "--help")
    assert answer.returncode == 0
    assert "To one person, by name." in answer.stdout
    assert "Example: cmt greet Ada" in answer.stdout
    assert "drop" in run(plugin, "boxes", "--help").stdout


def test_a_benchmark_runs_under_bench_and_nowhere_else(plugin: Path) -> None:
    assert "Weigh the boxes." in run(plugin, "bench", "--help").stdout
    answer = run(plugin, "bench", "weigh", "--json", "out.json")
    assert answer.returncode == 0, answer.stderr
    assert (plugin / "out.json").read_text() == "{}"
    assert run(plugin, "weigh", "--json", "out.json").returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_that_is_ended_puts_away_what_it_made(
    number: signal.Signals, plugin: Path
) -> None:
    answer = run(plugin, "bench", "weigh", "--json", "out.json", "--number", str(number.value))
    assert answer.returncode == 130
    assert not (plugin / "out.json").exists()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("full", "Error: the box is full: empty it first\n"),
        ("two", "Error: first line\n"),
        ("file", "Error: nowhere.txt: No such file or directory\n"),
        ("bug", "Error: KeyError: 'key' (--verbose shows where)\n"),
    ],
)
def test_an_error_is_one_sentence(plugin: Path, kind: str, sentence: str) -> None:
    answer = run(plugin, "fail", kind)
    assert (answer.returncode, answer.stderr) == (1, sentence)


def test_invalid_settings_are_named_in_one_line(plugin: Path) -> None:
    answer = run(plugin, "fail", "validation")
    assert answer.returncode == 1
    assert answer.stderr.startswith("Error: size: Input should be a valid integer")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_verbose_adds_the_traceback_wherever_it_stands(plugin: Path, place: int) -> None:
    arguments = ["fail", "bug"]
    arguments.insert(place, "--verbose")
    answer = run(plugin, *arguments)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr
    assert answer.stderr.endswith("Error: KeyError: 'key' (--verbose shows where)\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gret"], "Error: No such command 'gret'. Did you mean 'greet'?\n"),
        (["greet"], "Error: Missing argument 'NAME'.\n"),
        (["greet", "Ada", "--x"], "Error: No such option: --x\n"),
    ],
)
def test_wrong_usage_is_one_sentence(plugin: Path, arguments: list[str], sentence: str) -> None:
    answer = run(plugin, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.lower() == sentence.lower()


def test_a_missing_extra_is_named(plugin: Path) -> None:
    answer = run(plugin, "needy")
    assert answer.returncode == 1
    assert "'surely_not_installed' is not installed" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_exit_statuses_reach_the_shell(plugin: Path) -> None:
    assert run(plugin, "fail", "exit").returncode == 7
    interrupted = run(plugin, "fail", "interrupt")
    assert interrupted.returncode == 130
    assert "Traceback" not in interrupted.stderr


def test_version(plugin: Path) -> None:
    answer = run(plugin, "--version")
    assert answer.returncode == 0
    assert answer.stdout.strip().replace(".", "").isdigit()


@pytest.mark.parametrize("kind", [model.cli.CommandGroup, model.cli.BenchmarkGroup])
def test_every_registered_command_has_a_summary_and_loads(
    kind: type[model.cli.CommandGroup],
) -> None:
    group = kind(name="cmt")
    listed = group.list_commands(typer.Context(group))  # reads the summaries
    assert listed == sorted(entry_points(group=kind.registry).names)
    for command in group.commands.values():
        assert isinstance(command, model.cli.RegisteredCommand)
        assert command.help, f"{command.entry_point.value}: no docstring or help="
        assert command.load() is not None


def commands(group: Any, ctx: typer.Context, path: str) -> Iterator[tuple[str, Any]]:
    """Every command and group below a group, with what is typed to reach it."""
    for name in group.list_commands(ctx):
        _, command, _ = group.resolve_command(ctx, [name])
        yield f"{path} {name}", command
        if isinstance(command, TyperGroup):
            inner = typer.Context(command, info_name=name, parent=ctx)
            yield from commands(command, inner, f"{path} {name}")


def test_every_command_shows_an_example_that_it_understands() -> None:
    root = get_command(model.cli.app)
    tree = dict(commands(root, typer.Context(root, info_name="cmt"), "cmt"))
    assert {"cmt query", "cmt gallery versions drop", "cmt bench recall", "cmt watch"} <= set(tree)
    for path, command in tree.items():
        paragraphs = [" ".join(text.split()) for text in (command.help or "").split("\n\n")]
        examples = [text for text in paragraphs if text.startswith(f"Example: {path}")]
        assert examples, path
        if isinstance(command, TyperGroup):
            continue
        example = examples[0].removeprefix("Example: ")
        command.make_context(path, shlex.split(example)[len(path.split()) :])


def test_the_shell_completes_commands_options_and_values() -> None:
    """Also those of commands that are imported only when they run."""
    for line, words in {
        "cmt enr": ["enroll"],
        "cmt gallery ver": ["versions"],
        "cmt enroll --patt": ["--pattern"],
        "cmt watch . --done ": ["delete", "leave", "move"],
    }.items():
        place = len(line.split()) - (not line.endswith(" "))
        asked = {"COMP_WORDS": line, "COMP_CWORD": str(place), "_CMT_COMPLETE": "complete_bash"}
        program = "import sys; from model.cli import main; sys.exit(main([]))"
        answer = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            check=True,
        )
        assert sorted(answer.stdout.split()) == words
    program = "from model.cli import main; main(['--show-completion'])"
    shown = subprocess.run(  # the nearest shell is looked for: `make` has another
        ["bash", "-c", '"$0" -c "$1"; exit $?', sys.executable, program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "complete -o default -F _cmt_completion cmt" in shown.stdout


def test_closed_descriptors_are_opened_on_nothing(tmp_path: Path) -> None:
    """Without, the first files of a command would be its standard input, output and error."""
    program = (
        "import os, sys; from model.cli import main; status = main(['--version']); "
        "print('said', file=sys.stderr); first = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY); "
        "names = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]; "
        "os.write(first, repr((status, names)).encode())"
    )
    told = tmp_path / "told"
    command = [sys.executable, "-c", program, str(told)]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, check=False).returncode == 0
    assert told.read_text() == repr((0, ["/dev/null"] * 3))


def test_output_that_cannot_show_a_character_escapes_it() -> None:
    """On a terminal of another encoding, and the name of a file that is no text."""
    program = "from model.cli import main; main(['--version']); print('caf\\xe9', '\\udcff')"
    for encoding, shown in (("ascii", b"caf\\xe9 \\udcff"), ("utf-8", b"caf\xc3\xa9 \\udcff")):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
        )
        assert run.stdout.splitlines()[-1] == shown
