"""`cmt ablate`: Table 3, the sweeps of Figure 3 and Figure 4 of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from model.device import chosen_device
from model.outputs import Outputs, file_option, folder_option, picture_option
from model.terminal import Console, say
from training.ablation.cells import AblationData, Budget, CellRunner, Start, read_data
from training.ablation.generators import (
    GeneratorsRequest,
    trial_grids,
    trial_json,
    try_generators,
)
from training.ablation.render import show
from training.ablation.report import Ablation
from training.ablation.results import write_json
from training.ablation.sweep import (
    LAMBDAS,
    PARTS_FIELD,
    possible_parts,
    sweep_ablation,
    sweep_lambda,
    sweep_parts,
)
from training.ablation.table3 import table3_ablation
from training.ablation.tsne import Figure4Request, figure_4, figure_4_json, plot_figure_4
from training.datasets import DatasetName
from training.files import write_file
from training.malloc import keep_large_blocks
from training.options import (
    ChannelsLast,
    Compile,
    DatasetLabel,
    Device,
    Root,
    Trial,
    fields_as_options,
)
from training.recipe import load_recipe

app = typer.Typer(
    no_args_is_help=True,
    help="Repeat the paper's ablation: its Table 3, Figure 3 and Figure 4; and a try beyond it.\n\n"
    "Example: cmt ablate table3 --help",
)
sweep_app = typer.Typer(
    no_args_is_help=True,
    help="Figure 3: train over a range of values and plot rank-1 and mAP.\n\n"
    "Example: cmt ablate sweep lambda --help",
)
app.add_typer(sweep_app, name="sweep")

Dataset = Annotated[DatasetName, typer.Option(help="Layout of the folders, and the protocol.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write all figures to this file.", callback=file_option),
]
Seeds = Annotated[str, typer.Option(help="Seeds, comma-separated; each repeats every cell.")]
SelectIds = Annotated[
    Path | None,
    typer.Option(help="List of identities of --select-root. Default: its protocol's test side."),
]
Curves = Annotated[
    Path | None,
    typer.Option(help="Write the curves to this .png, .svg or .pdf.", callback=picture_option),
]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class CellOptions:
    """Options of every command that trains cells."""

    root: Annotated[
        list[Path], typer.Option("--root", help="Folder to train on; repeat for several.")
    ]
    eval_root: Annotated[Path, typer.Option(help="Folder to evaluate on.")]
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="Recipe of every cell: a name ('ablation') or a YAML file."),
    ]
    run: Annotated[
        Path,
        typer.Option(
            help="Folder of the cells; the same command goes on with what is there.",
            callback=folder_option,
        ),
    ]
    dataset: Dataset = DatasetName.SYSU
    train_ids: Annotated[
        list[Path] | None,
        typer.Option(
            help="List(s) of identities to train on. Default: the protocol's training side."
        ),
    ] = None
    eval_ids: Annotated[
        Path | None,
        typer.Option(help="List of identities to evaluate on. Default: the protocol's test side."),
    ] = None
    start: Annotated[
        Path | None,
        typer.Option(help="Checkpoint that every cell starts from, trained with both modules off."),
    ] = None
    pretrain: Annotated[
        str | None,
        typer.Option(
            help="Or: the recipe ('ablation-pretrain', a YAML file) by which to train that start "
            "first, on the same data."
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(help="Or: ImageNet weights of the backbone, 'imagenet' or a local file."),
    ] = None
    dataset_name: DatasetLabel = None
    seeds: Seeds = "0"
    trial: Trial = 1
    cells: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many cells; the next call goes on.")
    ] = None
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Stop after so many minutes, within a cell too; the next goes on."
        ),
    ] = None
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 100
    json_file: Json = None
    markdown_file: Annotated[
        Path | None,
        typer.Option("--markdown", help="Write the tables to this file.", callback=file_option),
    ] = None
    device: Device = "auto"
    channels_last: ChannelsLast = "auto"
    compile: Compile = "auto"

    def data(self) -> AblationData:
        """What the cells train and are tested on, with the errors of `read_data`."""
        return read_data(
            *(self.dataset, self.root, self.train_ids, self.eval_root, self.eval_ids),
            self.trial,
            self.dataset_name,
            self.selection(),
        )

    def selection(self) -> tuple[Path, Path | None] | None:
        """Folder and list of the people on whom settings are chosen; None where nothing is."""
        return None

    def starting_point(self) -> Start:
        """Raises BadParameter unless it is given in exactly one way."""
        if sum(given is not None for given in (self.start, self.pretrain, self.weights)) != 1:
            raise typer.BadParameter("give exactly one of --start, --pretrain and --weights")
        pretraining = None if self.pretrain is None else load_recipe(self.pretrain)
        return Start(self.start, self.weights, pretraining)

    def seed_numbers(self) -> list[int]:
        """Raises BadParameter for what is no list of numbers."""
        return _numbers(self.seeds, int, "--seeds")


@dataclass(frozen=True)
class Table3Options(CellOptions):
    """Options of Table 3."""

    seeds: Seeds = "0,1,2"
    select_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the people on whom the strength of modulation is chosen. Default: it "
            "is not, and the table has no row of it."
        ),
    ] = None
    select_ids: SelectIds = None

    def selection(self) -> tuple[Path, Path | None] | None:
        """The people of --select-root. Raises BadParameter for a list alone."""
        if self.select_root is None and self.select_ids is not None:
            raise typer.BadParameter("--select-ids is a list of people of --select-root; give both")
        return None if self.select_root is None else (self.select_root, self.select_ids)


@dataclass(frozen=True)
class LambdaOptions(CellOptions):
    """Options of Figure 3 (a)."""

    values: Annotated[str, typer.Option(help="Values of λ, comma-separated.")] = ",".join(
        f"{value:g}" for value in LAMBDAS
    )
    plot: Curves = None


@dataclass(frozen=True)
class PartsOptions(CellOptions):
    """Options of Figure 3 (b)."""

    dataset: Dataset = DatasetName.REGDB
    start: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoints that the cells start from, trained with both modules off and as "
            "many parts: 'start-{parts}.safetensors'."
        ),
    ] = None
    values: Annotated[
        str | None,
        typer.Option(
            help="Numbers of parts, comma-separated. Default: all up to 12 that the recipe's "
            "image heights allow."
        ),
    ] = None
    plot: Curves = None


@app.command()
@fields_as_options
def table3(asked: Table3Options) -> None:
    """Table 3: the base, +MAM, +IAM and both, from one start, over seeds, with paired tests.

    Beside them what tells modulation from the loss that trains it: L_mod with γ = 1 and β = 0,
    every query given the mean γ, β, and the strength of modulation that is best on other people.

    Interrupt it at any moment; the same command goes on.

    Example: cmt ablate table3 --root SYSU-MM01 --eval-root SYSU-MM01 --recipe paper --weights
    resnet50.pth --run runs/table3 --markdown table3.md
    """
    recipe = load_recipe(asked.recipe)
    _run(table3_ablation(recipe, asked.starting_point(), asked.seed_numbers()), asked)


@sweep_app.command("lambda")
@fields_as_options
def figure_3_lambda(asked: LambdaOptions) -> None:
    """Figure 3 (a): the weight λ of the modulation loss, both modules on.

    Example: cmt ablate sweep lambda --root SYSU-MM01 --eval-root SYSU-MM01 --recipe paper
    --weights resnet50.pth --run runs/lambda --plot lambda.png
    """
    recipe = load_recipe(asked.recipe)
    values = _numbers(asked.values, float, "--values")
    swept = sweep_lambda(recipe, asked.starting_point(), values)
    _run(sweep_ablation(swept, recipe, asked.dataset, asked.seed_numbers()), asked, asked.plot)


@sweep_app.command("parts")
@fields_as_options
def figure_3_parts(asked: PartsOptions) -> None:
    """Figure 3 (b): the number of parts p, for CMT and for the base.

    Example: cmt ablate sweep parts --root RegDB --eval-root RegDB --recipe paper-regdb
    --weights resnet50.pth --run runs/parts --plot parts.png
    """
    recipe = load_recipe(asked.recipe)
    start = asked.starting_point()
    if asked.values is None:
        values = possible_parts([recipe, *([start.pretraining] if start.pretraining else [])])
    else:
        values = _numbers(asked.values, int, "--values")
    if asked.start is not None and PARTS_FIELD not in str(asked.start) and len(values) > 1:
        raise typer.BadParameter(
            f"a start has a fixed number of parts; name one for each with {PARTS_FIELD} in "
            "--start, or use --pretrain"
        )
    swept = sweep_parts(recipe, start, values)
    _run(sweep_ablation(swept, recipe, asked.dataset, asked.seed_numbers()), asked, asked.plot)


@app.command()
def tsne(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint with modality alignment.")],
    root: Root,
    picture: Annotated[
        Path,
        typer.Option(
            "--plot",
            help="Write the picture to this .png, .svg or .pdf.",
            callback=picture_option,
        ),
    ],
    dataset: Dataset = DatasetName.SYSU,
    ids: Annotated[
        Path | None,
        typer.Option(help="List of identities to choose from. Default: the test side."),
    ] = None,
    people: Annotated[int, typer.Option(min=2, help="How many people to show.")] = 10,
    dataset_name: DatasetLabel = None,
    seed: Annotated[int, typer.Option(help="Of the choice of people and of t-SNE.")] = 0,
    trial: Trial = 1,
    json_file: Json = None,
    device: Device = "auto",
) -> None:
    """Figure 4: t-SNE of original and compensated features, and how well they agree in figures.

    Example: cmt ablate tsne --checkpoint run/checkpoint.safetensors --root SYSU-MM01 --plot
    figure4.png
    """
    request = Figure4Request(
        checkpoint, dataset, root, ids, trial, people, seed, chosen_device(device), dataset_name
    )
    drawn = figure_4(request)
    for alignment in drawn.alignments:
        say(
            f"{alignment.title}: same / other person's distance {alignment.distance_ratio:.3f}, "
            f"silhouette by person {alignment.silhouette:.3f}"
        )
    outputs = Outputs()
    with outputs.attempt(picture):
        plot_figure_4(drawn, picture)
        say(f"Wrote {picture}")
    if json_file is not None:
        with outputs.attempt(json_file):
            write_json(json_file, figure_4_json(request, drawn))
    outputs.finish()


@app.command()
def generators(
    checkpoint: Annotated[Path, typer.Option(help="The backbone, which knows none of them.")],
    root: Annotated[
        list[Path], typer.Option(help="Folder of the people to fit to; repeat for several.")
    ],
    select_root: Annotated[
        Path, typer.Option(help="Folder of the people on whom rank and decay are chosen.")
    ],
    eval_root: Annotated[Path, typer.Option(help="Folder of the people that are reported.")],
    dataset: Dataset = DatasetName.SYSU,
    train_ids: Annotated[
        list[Path] | None,
        typer.Option(help="List(s) of identities to fit to. Default: the training side."),
    ] = None,
    select_ids: SelectIds = None,
    eval_ids: Annotated[
        Path | None,
        typer.Option(help="List of identities to report on. Default: the test side."),
    ] = None,
    dataset_name: DatasetLabel = None,
    trial: Trial = 1,
    ranks: Annotated[str, typer.Option(help="Ranks to try, comma-separated.")] = "1,4,16",
    decays: Annotated[
        str, typer.Option(help="Weights to try by which γ, β are drawn to doing nothing.")
    ] = "1,3,10,30",
    steps: Annotated[int, typer.Option(min=1, help="Batches of each fit.")] = 400,
    seeds: Seeds = "0,1,2",
    json_file: Json = None,
    device: Device = "auto",
) -> None:
    """Fit low-rank generators of γ, β to people that the backbone has not seen.

    Frozen embeddings, minutes on one core; no checkpoint comes of it. The result is what the
    query's own γ, β rank better than their mean over the queries, with an interval over people.

    Example: cmt ablate generators --checkpoint run/checkpoint.safetensors --root new-people
    --select-root others --eval-root SYSU-MM01 --json generators.json
    """
    sizes = _numbers(ranks, int, "--ranks")
    if min(sizes) < 1:
        raise typer.BadParameter("--ranks are 1 or more: with 0 nothing is the query's own")
    asked = GeneratorsRequest(
        checkpoint,
        sizes,
        _numbers(decays, float, "--decays"),
        _numbers(seeds, int, "--seeds"),
        steps,
        chosen_device(device),
    )
    data = read_data(
        *(dataset, root, train_ids, eval_root, eval_ids),
        trial,
        dataset_name,
        (select_root, select_ids),
    )
    found = try_generators(asked, data, say)
    show(Console(), trial_grids(found, asked.seeds))
    outputs = Outputs()
    if json_file is not None:
        with outputs.attempt(json_file):
            write_json(json_file, trial_json(asked, found, data))
    outputs.finish()


def _run(ablation: Ablation, asked: CellOptions, plot: Path | None = None) -> None:
    """Run the cells that the budget allows, and report on the whole seeds that are there.

    plot: where the curves are drawn, of a sweep.
    """
    keep_large_blocks()
    runner = CellRunner(
        asked.data(),
        asked.run,
        device=chosen_device(asked.device),
        channels_last=asked.channels_last,
        compile=asked.compile,
        budget=Budget(asked.cells, asked.max_minutes),
        save_every=asked.save_every,
        say=typer.echo,
    )
    try:
        results = runner.run(ablation.cells)
    except KeyboardInterrupt:
        say(f"Interrupted; the same command goes on with what was saved in {asked.run}.", err=True)
        raise typer.Exit(130) from None
    report, outputs = ablation.report(results, runner.data), Outputs()
    if report is not None:
        show(Console(), report.grids)
        for line in report.lines:
            say(line)
        if plot is not None and report.draw is not None:
            with outputs.attempt(plot):
                report.draw(plot)
        if asked.json_file is not None:
            with outputs.attempt(asked.json_file):
                write_json(asked.json_file, report.content)
        if asked.markdown_file is not None:
            with outputs.attempt(asked.markdown_file):
                write_file(asked.markdown_file, report.markdown())
    if len(results) < len(ablation.cells):
        say(
            f"{len(results)} of {len(ablation.cells)} cells are finished; the same command goes "
            f"on from {asked.run}."
        )
    outputs.finish()


def _numbers(text: str, kind: type[Number], option: str) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise typer.BadParameter(
            f"{option} {text!r} is no comma-separated list of different numbers, as 0,1,2"
        )
    return numbers
