"""docs/training.md keeps up with the code: places, commands and options, counts."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import entry_points

import pytest
import typer
from torch.distributed.run import get_args_parser
from typer.core import TyperGroup
from typer.main import get_command, get_group

from tests.paths import ROOT
from training.datasets import LAYOUTS, DatasetError, DatasetName

DOCUMENT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^#+ (.+)$", DOCUMENT, re.MULTILINE)
SLUGS = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}


def commands(program: str = "cmt") -> list[list[str]]:
    """The words of every command of `program` in the document's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line.split("||")[0]) for line in lines]
    return [line for line in words if line[:1] == [program]]


@pytest.mark.parametrize("name", DatasetName)
def test_the_place_that_errors_name_exists(name: DatasetName) -> None:
    target = str(DatasetError("", name)).partition("see ")[2].rstrip(".")
    file, _, anchor = target.partition("#")
    assert file == "docs/training.md"
    assert anchor in SLUGS


def test_links_within_the_document_lead_somewhere() -> None:
    anchors = set(re.findall(r"\]\(#([^)]+)\)", DOCUMENT))
    assert anchors
    assert anchors <= SLUGS


def test_every_command_exists_with_the_options_that_are_shown() -> None:
    registered = {entry.name: entry for entry in entry_points(group="cmt.commands")}
    shown = commands()
    assert {words[1] for words in shown} >= {"data", "train", "evaluate"}
    for words in shown:
        if words[1] not in registered:
            continue
        target = registered[words[1]].load()
        rest = words[2:]
        if isinstance(target, typer.Typer):
            command = get_group(target).commands[rest.pop(0)]
            while isinstance(command, TyperGroup):
                command = command.commands[rest.pop(0)]
        else:
            single = typer.Typer()
            single.command()(target)
            command = get_command(single)
        known = {option for parameter in command.params for option in parameter.opts}
        unknown = {word for word in rest if word.startswith("--")} - known
        assert not unknown, f"{' '.join(words)}: no {unknown}"


def test_torchrun_hands_all_options_of_cmt_train_on() -> None:
    (words,) = commands("torchrun")
    found = get_args_parser().parse_args(words[1:])
    assert [found.training_script, *found.training_script_args] == words[words.index("cmt") :]


def test_every_dataset_is_checked_trained_and_evaluated() -> None:
    for name in DatasetName:
        for command in ("train", "evaluate"):
            assert any(
                words[1] == command and words[words.index("--dataset") + 1] == name
                for words in commands()
            ), f"{command} of {name}"


def test_what_is_computed_is_what_the_published_counts_give() -> None:
    sysu = LAYOUTS[DatasetName.SYSU].published
    visible, infrared = sysu["training visible images"], sysu["training infrared images"]
    steps = -(-max(visible, infrared) // 64)
    assert f"| {visible + infrared:,} |" in DOCUMENT
    assert f"| {steps} | 33 |" in DOCUMENT
    assert f"| {120 * steps:,} | {120 * 33:,} |" in DOCUMENT
    assert f"| {(visible + infrared) * 3 * 384 * 144 / 1e9:.2f} GB |" in DOCUMENT
    assert -(-LAYOUTS[DatasetName.REGDB].published["training visible images"] // 64) == 33
