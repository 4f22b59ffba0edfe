"""The `cmt` command: it finds its subcommands among the installed packages and runs one.

`service` and `training` never import each other, so neither can hold the whole command line. Each
registers its commands in pyproject.toml, under the entry-point group `cmt.commands` (benchmarks
under `cmt.benchmarks`, run as `cmt bench NAME`), as `name = "module:target"`. A target is either a
function with Typer annotations or a `typer.Typer` that holds subcommands. Only the command that
runs is imported: help is read from the source (see `_summary`), so `cmt --help` loads no torch.
"""

from __future__ import annotations

import ast
import atexit
import io
import logging
import os
import signal
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from model.cores import limit_threads
from model.importing import without_collections
from model.terminal import say, say_lines


class RegisteredCommand(TyperCommand):
    """A name in the list of commands that stands for an entry point until it is run."""

    def __init__(self, entry_point: EntryPoint) -> None:
        super().__init__(name=entry_point.name)
        self.entry_point = entry_point

    def load(self) -> TyperCommand | TyperGroup:
        """Import the target and make the command that Typer runs."""
        with without_collections():
            target = self.entry_point.load()
        if isinstance(target, typer.Typer):
            group = get_group(target)
            _unwrap(group)
            return group
        single = typer.Typer(add_completion=False)
        single.command(self.entry_point.name)(target)
        command = get_command(single)
        assert isinstance(command, TyperCommand)
        _unwrap(command)
        return command


class CommandGroup(TyperGroup):
    """A group that adds the commands registered under `registry` to its own."""

    registry: ClassVar[str] = "cmt.commands"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for entry_point in entry_points(group=self.registry):
            self.commands[entry_point.name] = RegisteredCommand(entry_point)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for help and completion; only these need the summaries, which are read here."""
        for command in self.commands.values():
            if isinstance(command, RegisteredCommand):
                command.help = _summary(command.entry_point)
        return sorted(super().list_commands(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that `args` names, imported if it is a registered one."""
        name, command, rest = super().resolve_command(ctx, args)
        if isinstance(command, RegisteredCommand):
            command = command.load()
        return name, command, rest


class BenchmarkGroup(CommandGroup):
    """`cmt bench`: the registered benchmarks.

    A signal that ends one is an interrupt to it, so that it ends the servers that it has started,
    in sessions of their own, and removes its galleries.
    """

    registry = "cmt.benchmarks"

    def invoke(self, ctx: Any) -> Any:
        """Run the one that was named. A SIGHUP that is ignored, as nohup does, stays ignored."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        return super().invoke(ctx)


app = typer.Typer(
    cls=CommandGroup,
    help="Find a person across visible and infrared cameras.\n\nExample: cmt query crop.png",
    epilog="cmt COMMAND --help explains a command and shows an example.",
)
app.add_typer(
    typer.Typer(
        cls=BenchmarkGroup,
        help="Measure a part of the system, print a table and write JSON.\n\n"
        "Example: cmt bench rescore --json benchmarks/results/rescore.json",
    ),
    name="bench",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(version("cmt-reid"))
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="On an error, show where it happened.")
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of `cmt` itself; `main` takes --verbose away before, wherever it stands."""


def main(arguments: list[str] | None = None) -> int:
    """Run `cmt` and return its exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    An error is one sentence on stderr; `--verbose`, anywhere on the line, adds the traceback.
    """
    _open_standard_streams()
    limit_threads()
    arguments = sys.argv[1:] if arguments is None else arguments
    verbose = "--verbose" in arguments
    arguments = [argument for argument in arguments if argument != "--verbose"] or ["--help"]
    try:
        status = get_command(app).main(arguments, prog_name="cmt", standalone_mode=False)
    except typer.Abort:
        say("Aborted.", err=True)
        return 1
    except typer.TyperException as error:  # wrong usage: Typer's own sentence
        if message := _one_line(error.format_message()):  # else the help was printed
            say(f"Error: {message}", err=True)
        return error.exit_code
    except Exception as error:
        for handler in logging.getLogger().handlers:
            handler.flush()  # the error comes last, though a thread may write the log
        if verbose:
            say_lines(traceback.format_exc().rstrip(), err=True)
        say(f"Error: {_sentence(error)}", err=True)
        return 1
    finally:
        # It is over: a Ctrl-C that comes while libraries are put away would only print a traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return status if isinstance(status, int) else 0


def _open_standard_streams() -> None:
    """Open what the caller closed of the descriptors 0 to 2, on /dev/null.

    A database or socket would otherwise get such a number, and whatever a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show, or a file name that is no text, is escaped.
            stream.reconfigure(errors="backslashreplace")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(error: Exception) -> str:
    """What went wrong, in one line; a bug (no message written for users) also names its type."""
    from pydantic import ValidationError

    if isinstance(error, ModuleNotFoundError):
        return (
            f"the module {error.name!r} is not installed; install the extras that this command "
            "needs, for example: pip install -c constraints.txt -e '.[cpu,train]'"
        )
    if isinstance(error, ValidationError):
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        return _one_line("; ".join(problems))
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    message = _one_line(lines[0]) if lines else ""
    if not message or isinstance(error, LookupError | TypeError | AttributeError | AssertionError):
        return f"{type(error).__name__}: {message} (--verbose shows where)"
    return message


def _unwrap(command: Any) -> None:
    """Join the lines of each paragraph of the help; Typer would break them as the source does."""
    if command.help:
        paragraphs = command.help.split("\n\n")
        command.help = "\n\n".join(_one_line(paragraph) for paragraph in paragraphs)
    for inner in getattr(command, "commands", {}).values():
        _unwrap(inner)


def _summary(entry_point: EntryPoint) -> str:
    """First paragraph of a target's help, read from its source without running it.

    A function's is its docstring; a `name = typer.Typer(help="…")`'s is that text. Empty where
    the source has neither.
    """
    source = _source(entry_point.module)
    if source is None:
        return ""
    help_text = ""
    for node in ast.parse(source.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point.attr:
            help_text = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == entry_point.attr for t in targets):
                for keyword in node.value.keywords:
                    if keyword.arg == "help" and isinstance(keyword.value, ast.Constant):
                        help_text = str(keyword.value.value)
    return _one_line(help_text.strip().split("\n\n")[0])


def _source(module: str) -> Path | None:
    """The file that defines `module`, found without importing its package."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        base = Path(folder, *rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
