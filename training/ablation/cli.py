"""`cmt ablate`: Table 3, the sweeps of Figure 3 and Figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from model import load_checkpoint
from model.machine import machine
from training.ablation import sweep as sweeps
from training.ablation import table3 as tables
from training.ablation import tsne as planes
from training.ablation.cells import AblationData, Budget, Cell, Runner, Start, read_data
from training.ablation.render import Grid, markdown, show
from training.ablation.results import CellResult, write_json, write_text
from training.datasets import LAYOUTS, DatasetName
from training.device import chosen_device
from training.evaluation.checkpoints import refuse_training_identities
from training.evaluation.cli import PLOT_SUFFIXES
from training.malloc import keep_large_blocks
from training.recipe import Recipe, load_recipe

app = typer.Typer(
    no_args_is_help=True,
    help="Repeat the paper's ablation: its Table 3, Figure 3 and Figure 4.\n\n"
    "Example: cmt ablate table3 --help",
)
sweep_app = typer.Typer(
    no_args_is_help=True,
    help="Figure 3: train over a range of values and plot rank-1 and mAP.\n\n"
    "Example: cmt ablate sweep lambda --help",
)
app.add_typer(sweep_app, name="sweep")

Roots = Annotated[
    list[Path], typer.Option("--root", help="Folder to train on; repeat for several.")
]
TrainIds = Annotated[
    list[Path] | None,
    typer.Option(help="List(s) of identities to train on. Default: the protocol's training side."),
]
EvalRoot = Annotated[Path, typer.Option(help="Folder to evaluate on.")]
EvalIds = Annotated[
    Path | None,
    typer.Option(help="List of identities to evaluate on. Default: the protocol's test side."),
]
RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Recipe of every cell: a name ('ablation') or a YAML file.")
]
Run = Annotated[
    Path, typer.Option(help="Folder of the cells; the same command goes on with what is there.")
]
StartOption = Annotated[
    Path | None,
    typer.Option(help="Checkpoint that every cell starts from, trained with both modules off."),
]
Pretrain = Annotated[
    str | None,
    typer.Option(
        help="Or: the recipe ('ablation-pretrain', a YAML file) by which to train that start "
        "first, on the same data."
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(help="Or: ImageNet weights of the backbone, 'imagenet' or a local file."),
]
Seeds = Annotated[str, typer.Option(help="Seeds, comma-separated; each repeats every cell.")]
Trial = Annotated[int, typer.Option(help="RegDB: which of the ten splits.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Cells = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many cells; the next call goes on.")
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(min=0, help="Stop after so many minutes, within a cell too; the next goes on."),
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between saved states.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", help="Write the tables to this file.")
]
Plot = Annotated[Path | None, typer.Option(help="Write the curves to this .png, .svg or .pdf.")]
Layout = Annotated[DatasetName, typer.Option(help="Layout of the folders, and the protocol.")]

Number = TypeVar("Number", int, float)
Report = Callable[[Sequence[CellResult]], tuple[list[Grid], dict[str, Any]] | None]


@app.command()
def table3(
    root: Roots,
    eval_root: EvalRoot,
    recipe: RecipeOption,
    run: Run,
    dataset: Layout = DatasetName.SYSU,
    train_ids: TrainIds = None,
    eval_ids: EvalIds = None,
    start: StartOption = None,
    pretrain: Pretrain = None,
    weights: Weights = None,
    seeds: Seeds = "0,1,2",
    trial: Trial = 1,
    cells: Cells = None,
    max_minutes: MaxMinutes = None,
    save_every: SaveEvery = 100,
    json_file: Json = None,
    markdown_file: MarkdownOption = None,
    device: Device = "auto",
) -> None:
    """Table 3: the base, +MAM, +IAM and both, from one start, over seeds, with paired tests.

    Interrupt it at any moment; the same command goes on.

    Example: cmt ablate table3 --root SYSU-MM01 --eval-root SYSU-MM01 --recipe paper --weights
    resnet50.pth --run runs/table3 --markdown table3.md
    """
    chosen = load_recipe(recipe)
    start_given = _start(start, pretrain, weights)

    def report(results: Sequence[CellResult]) -> tuple[list[Grid], dict[str, Any]] | None:
        table = tables.summarise_table3(results)
        if table is None:
            return None
        return tables.grids(table, chosen), tables.to_json(table, chosen)

    _run(
        "Ablation: Table 3",
        tables.table3_cells(chosen, start_given, _seeds(seeds)),
        report,
        chosen,
        Runner(
            read_data(dataset, root, train_ids, eval_root, eval_ids, trial),
            run,
            device=chosen_device(device),
            budget=Budget(cells, max_minutes),
            save_every=save_every,
        ),
        json_file,
        markdown_file,
    )


@sweep_app.command("lambda")
def sweep_lambda(
    root: Roots,
    eval_root: EvalRoot,
    recipe: RecipeOption,
    run: Run,
    dataset: Layout = DatasetName.SYSU,
    values: Annotated[str, typer.Option(help="Values of λ, comma-separated.")] = ",".join(
        f"{value:g}" for value in sweeps.LAMBDAS
    ),
    train_ids: TrainIds = None,
    eval_ids: EvalIds = None,
    start: StartOption = None,
    pretrain: Pretrain = None,
    weights: Weights = None,
    seeds: Seeds = "0",
    trial: Trial = 1,
    cells: Cells = None,
    max_minutes: MaxMinutes = None,
    save_every: SaveEvery = 100,
    json_file: Json = None,
    markdown_file: MarkdownOption = None,
    plot: Plot = None,
    device: Device = "auto",
) -> None:
    """Figure 3 (a): the weight λ of the modulation loss, both modules on.

    Example: cmt ablate sweep lambda --root SYSU-MM01 --eval-root SYSU-MM01 --recipe paper
    --weights resnet50.pth --run runs/lambda --plot lambda.png
    """
    _check_plot(plot)
    chosen = load_recipe(recipe)
    numbers = _numbers(values, float, "--values")
    swept = sweeps.sweep_lambda(chosen, _start(start, pretrain, weights), numbers)
    _run(
        "Ablation: Figure 3 (a)",
        swept.cells(_seeds(seeds)),
        _sweep_report(swept, chosen, dataset, plot),
        chosen,
        Runner(
            read_data(dataset, root, train_ids, eval_root, eval_ids, trial),
            run,
            device=chosen_device(device),
            budget=Budget(cells, max_minutes),
            save_every=save_every,
        ),
        json_file,
        markdown_file,
    )


@sweep_app.command("parts")
def sweep_parts(
    root: Roots,
    eval_root: EvalRoot,
    recipe: RecipeOption,
    run: Run,
    dataset: Layout = DatasetName.REGDB,
    values: Annotated[
        str | None,
        typer.Option(
            help="Numbers of parts, comma-separated. Default: all up to 12 that the recipe's "
            "image heights allow."
        ),
    ] = None,
    train_ids: TrainIds = None,
    eval_ids: EvalIds = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Checkpoints that the cells start from, trained with both modules off and as "
            "many parts: 'start-{parts}.safetensors'."
        ),
    ] = None,
    pretrain: Pretrain = None,
    weights: Weights = None,
    seeds: Seeds = "0",
    trial: Trial = 1,
    cells: Cells = None,
    max_minutes: MaxMinutes = None,
    save_every: SaveEvery = 100,
    json_file: Json = None,
    markdown_file: MarkdownOption = None,
    plot: Plot = None,
    device: Device = "auto",
) -> None:
    """Figure 3 (b): the number of parts p, for CMT and for the base.

    Example: cmt ablate sweep parts --root RegDB --eval-root RegDB --recipe paper-regdb
    --weights resnet50.pth --run runs/parts --plot parts.png
    """
    _check_plot(plot)
    chosen = load_recipe(recipe)
    given = _start(None if start is None else Path(start), pretrain, weights)
    if values is None:
        pretraining = [] if given.pretraining is None else [given.pretraining]
        numbers = sweeps.possible_parts([chosen, *pretraining])
    else:
        numbers = _numbers(values, int, "--values")
    if start is not None and sweeps.PARTS_FIELD not in start and len(numbers) > 1:
        raise typer.BadParameter(
            f"a start has a fixed number of parts; name one for each with {sweeps.PARTS_FIELD} in "
            "--start, or use --pretrain"
        )
    swept = sweeps.sweep_parts(chosen, given, numbers)
    _run(
        "Ablation: Figure 3 (b)",
        swept.cells(_seeds(seeds)),
        _sweep_report(swept, chosen, dataset, plot),
        chosen,
        Runner(
            read_data(dataset, root, train_ids, eval_root, eval_ids, trial),
            run,
            device=chosen_device(device),
            budget=Budget(cells, max_minutes),
            save_every=save_every,
        ),
        json_file,
        markdown_file,
    )


@app.command()
def tsne(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint with modality alignment.")],
    root: Annotated[Path, typer.Option(help="Folder of the dataset.")],
    plot: Annotated[Path, typer.Option(help="Write the picture to this .png, .svg or .pdf.")],
    dataset: Layout = DatasetName.SYSU,
    ids: Annotated[
        Path | None,
        typer.Option(help="List of identities to choose from. Default: the test side."),
    ] = None,
    people: Annotated[int, typer.Option(min=2, help="How many people to show.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the choice of people and of t-SNE.")] = 0,
    trial: Trial = 1,
    json_file: Json = None,
    device: Device = "auto",
) -> None:
    """Figure 4: t-SNE of original and compensated features, and how well they agree in figures.

    Example: cmt ablate tsne --checkpoint run/checkpoint.safetensors --root SYSU-MM01 --plot
    figure4.png
    """
    _check_plot(plot)
    layout = LAYOUTS[dataset]
    model, info = load_checkpoint(checkpoint, chosen_device(device))
    samples = layout.test(root, trial, None if ids is None else layout.read_ids(ids))
    chosen = planes.choose_people(samples, people, seed)
    refuse_training_identities(info, dataset.value, sorted({s.person_id for s in chosen}))
    clouds = planes.clouds_of(model, chosen)
    figures = planes.alignments(clouds)
    planes.plot(clouds, planes.embed_in_plane(clouds, seed), figures, plot)
    for figure in figures:
        typer.echo(
            f"{figure.title}: same / other person's distance {figure.distance_ratio:.3f}, "
            f"silhouette by person {figure.silhouette:.3f}"
        )
    typer.echo(f"Wrote {plot}")
    if json_file is not None:
        content = {
            "ablation": "Figure 4",
            "checkpoint": {"file": checkpoint.name, "fingerprint": info.fingerprint},
            "dataset": dataset.value,
            "seed": seed,
            **planes.to_json(clouds, figures),
            "machine": machine(),
        }
        write_json(json_file, content)


def _run(
    title: str,
    cells: Sequence[Cell],
    report: Report,
    recipe: Recipe,
    runner: Runner,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Run what the budget allows and report on the whole seeds that are there."""
    keep_large_blocks()
    try:
        results = runner.run(cells)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; the same command goes on from {runner.folder}.", err=True)
        raise typer.Exit(130) from None
    found = report(results)
    if found is not None:
        grids, content = found
        lines = facts_lines(results, runner.data)
        show(Console(), grids)
        typer.echo("\n".join(lines))
        pretraining = cells[0].start.pretraining
        facts = {
            "ablation": title.removeprefix("Ablation: "),
            "complete": len(results) == len(cells),
            "recipe": recipe.model_dump(mode="json"),
            "pretraining": pretraining and pretraining.model_dump(mode="json"),
            "data": runner.data.facts,
            "machine": machine(),
        }
        if json_file is not None:
            write_json(json_file, facts | content)
        if markdown_file is not None:
            write_text(markdown_file, markdown(title, lines, grids))
    if len(results) < len(cells):
        typer.echo(
            f"{len(results)} of {len(cells)} cells are finished; the same command goes on from "
            f"{runner.folder}."
        )


def facts_lines(results: Sequence[CellResult], data: AblationData) -> list[str]:
    """What was trained and tested, for how long and where, one sentence each."""
    sides = [
        f"{facts['identities']:,} identities ({facts['images']:,} images of "
        f"{', '.join(facts['folders'])})"
        for facts in (data.facts["training"], data.facts["test"])
    ]
    steps = sorted({result.steps for result in results})
    seconds = sorted({f"{result.seconds:.0f}" for result in results}, key=int)
    machines = {str(r.machine["gpu"] or r.machine["cpu"]) for r in results}
    starts = {start_words(result.settings["start"]) for result in results}
    return [
        f"Trained on {sides[0]}, tested on {sides[1]}.",
        f"Every cell: {' or '.join(map(str, steps))} steps from {', '.join(sorted(starts))}; "
        f"{' to '.join(dict.fromkeys((seconds[0], seconds[-1])))} s each, on "
        f"{', '.join(sorted(machines))}.",
    ]


def start_words(facts: dict[str, Any]) -> str:
    """A start by its name and the beginning of its fingerprint."""
    name = next(facts[kind] for kind in ("checkpoint", "pretraining", "weights") if kind in facts)
    fingerprint = facts.get("fingerprint")
    return name if fingerprint is None else f"{name} ({fingerprint[:12]})"


def _sweep_report(
    swept: sweeps.Sweep, recipe: Recipe, dataset: DatasetName, plot: Path | None
) -> Report:
    def report(results: Sequence[CellResult]) -> tuple[list[Grid], dict[str, Any]] | None:
        found = sweeps.summarise_sweep(swept, results, dataset)
        if found is None:
            return None
        if plot is not None:
            sweeps.plot(swept, found, recipe, plot)
        return [sweeps.grid(swept, found, recipe)], sweeps.to_json(swept, found, recipe)

    return report


def _start(checkpoint: Path | None, pretrain: str | None, weights: str | None) -> Start:
    if sum(given is not None for given in (checkpoint, pretrain, weights)) != 1:
        raise typer.BadParameter("give exactly one of --start, --pretrain and --weights")
    return Start(checkpoint, weights, None if pretrain is None else load_recipe(pretrain))


def _seeds(text: str) -> list[int]:
    return _numbers(text, int, "--seeds")


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


def _check_plot(plot: Path | None) -> None:
    if plot is not None and plot.suffix not in PLOT_SUFFIXES:  # before hours of training
        raise typer.BadParameter(f"{plot} ends in none of {', '.join(PLOT_SUFFIXES)}")
