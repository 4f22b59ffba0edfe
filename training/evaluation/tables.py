"""An evaluation in a terminal: every search in detail, then as the paper's Table 1 or 2."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from training.datasets import DatasetName
from training.evaluation.identification import LIKELY, NONE
from training.evaluation.open_set import FALSE_ALARM_RATES
from training.evaluation.published import TITLES, PublishedRow, published_rows
from training.evaluation.report import Evaluation, RankingFigures, SplitEvaluation, TrialSpread
from training.evaluation.ways import DIAGNOSES, NAMES

# Heading, field, and whether its deviation is shown: 80 columns hold three of them.
DETAIL_FIGURES = (
    ("rank-1", "rank_1", True),
    ("r5", "rank_5", False),
    ("r10", "rank_10", False),
    ("r20", "rank_20", False),
    ("mAP", "mean_ap", True),
    ("mINP", "mean_inp", True),
)
HEADS = {"visible-to-infrared": "V→I", "infrared-to-visible": "I→V"}
PUBLISHED_FIGURES = ("rank_1", "rank_10", "rank_20", "mean_ap")
# Tables with published rows, those of the paper first: title, and the (setting, shots) side by side
# in each of their parts.
PAPER_TABLES: dict[DatasetName, list[tuple[str, list[tuple[str, str]]]]] = {
    DatasetName.SYSU: [
        ("Table 1, all-search of the paper", [("all", "single"), ("all", "multi")]),
        ("Table 1, indoor-search of the paper", [("indoor", "single"), ("indoor", "multi")]),
    ],
    DatasetName.REGDB: [
        ("Table 2 of the paper", [("visible-to-infrared", ""), ("infrared-to-visible", "")]),
    ],
    DatasetName.LLCM: [
        ("Beside published work", [("visible-to-infrared", ""), ("infrared-to-visible", "")]),
    ],
}
# Queries of the published test sets per model: with others, figures do not compare.
PUBLISHED_QUERIES = {
    (DatasetName.SYSU, "all"): 3803,
    (DatasetName.SYSU, "indoor"): 2208,
    (DatasetName.REGDB, "visible-to-infrared"): 2060,
    (DatasetName.REGDB, "infrared-to-visible"): 2060,
    (DatasetName.LLCM, "visible-to-infrared"): 8680,
    (DatasetName.LLCM, "infrared-to-visible"): 7166,
}


def detail_tables(evaluation: Evaluation) -> list[Table]:
    """One table a search: a row a way of ranking."""
    models = "" if evaluation.models == 1 else f", {evaluation.models} models"
    tables = []
    for split in evaluation.splits:
        table = Table(
            title=f"{evaluation.dataset}, {split.title}{models}",
            caption=f"by {evaluation.metric} distance"
            + (", but score and re-ranked by score; percent, " if split.mixed else "; percent, ")
            + ("mean ± std over trials" if split.trials > 1 else "of a single trial"),
            box=None,
            padding=(0, 1, 0, 0),
        )
        table.add_column("", no_wrap=True)
        for name, *_ in DETAIL_FIGURES:
            table.add_column(name, justify="right", no_wrap=True)
        for way, ranking in split.rankings.items():
            cells = [
                # One trial has no deviation: "± 0.00" would claim one.
                _spread(getattr(ranking, field), shown and split.trials > 1)
                for _, field, shown in DETAIL_FIGURES
            ]
            table.add_row(NAMES[way], *cells)
        tables.append(table)
    return tables


def way_lines(evaluation: Evaluation) -> list[str]:
    """What the rows of the tables mean, as far as it differs between checkpoints."""
    known = dict.fromkeys(evaluation.strengths)
    said = ", ".join(
        "s = 1 (no strength was chosen)" if one is None else f"s = {one.s:g} about c = {one.c:.3f}"
        for one in known
    )
    lines = []
    if any(split.modulation for split in evaluation.splits):
        lines.append(f"modulated: γ and β at strength {said}; unmodulated is s = 0")
    mirror = "the mean with the mirror image's" if evaluation.mirror else "the crop's alone"
    lines.append(f"representation: {mirror}")
    return lines


def _spread(figure: TrialSpread, deviation: bool) -> str:
    return str(figure) if deviation else f"{100 * figure.mean:.2f}"


def open_set_table(evaluation: Evaluation) -> Table:
    """Detection and identification at fixed false alarms, one row a search and score."""
    several = any(split.trials > 1 for split in evaluation.splits)
    spread = "mean ± std over trials" if several else "of a single trial"
    table = Table(
        title="open-set identification, rank 1",
        caption=Text(
            "half of the identities enrolled in each trial; percent of mated queries that raise\n"
            "an alarm and name the right person, where the stated share of non-mated queries\n"
            f"raises one; {spread}"
        ),
    )
    table.add_column("ranked and judged by", no_wrap=True)
    for rate in FALSE_ALARM_RATES:
        table.add_column(Text(f"false alarms\n{rate:.0%}"), justify="right", no_wrap=True)
    for split in evaluation.splits:
        table.add_row(split.title, style="bold")
        cells: dict[str, list[str]] = {}
        for entry in split.open_set.rates:
            cells.setdefault(entry.score, []).append(_open_set_cell(entry.rate, split.trials))
        for score, row in cells.items():
            table.add_row(f"  {score}", *row)
        table.add_section()
    return table


def identification_table(evaluation: Evaluation, known: int) -> Table:
    """What answers in an open set say, one row a kind of gallery.

    known: how many of the people the probabilities were fitted on.
    """
    warning = f"FITTED ON {known} OF THESE PEOPLE, so that the figures flatter.\n" if known else ""
    counts = sorted({kind.searches for kind in evaluation.identification})
    number = " to ".join(dict.fromkeys((f"{counts[0]}", f"{counts[-1]}")))
    table = Table(
        title="open set, as served: do probabilities come true?",
        caption=Text(
            f"{warning}Half of the people enrolled, {number} searches each. right: percent of\n"
            "first answers that show the person asked for. ECE, Brier: of the first answer's\n"
            "probability, in ten equal bins. FPIR, FNIR: percent, where first answers from\n"
            f"{LIKELY:g} on are believed (likely), and where what is under {NONE:g} of being "
            "enrolled\nis not answered (none)."
        ),
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("gallery", no_wrap=True)
    for head in ("\npeople", "\nright", "\nECE", "\nBrier"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    for head in ("likely\nFPIR", "likely\nFNIR", "none\nFPIR", "none\nFNIR"):
        table.add_column(Text(head), justify="right", no_wrap=True)
    for kind in evaluation.identification:
        rates = (kind.likely.fpir, kind.likely.fnir, kind.none.fpir, kind.none.fnir)
        table.add_row(
            kind.title,
            f"{kind.people:.0f}",
            f"{100 * kind.right:.1f}",
            f"{kind.calibration_error:.3f}",
            f"{kind.brier:.3f}",
            *("–" if rate is None else f"{100 * rate:.1f}" for rate in rates),
        )
    return table


def open_set_lines(evaluation: Evaluation) -> list[str]:
    """How many queries the open-set figures are of, and which rates those cannot tell."""
    lines = []
    for split in evaluation.splits:
        sizes = split.open_set
        line = (
            f"{split.title}, open-set: {sizes.mated:.0f} mated and {sizes.non_mated:.0f} non-mated "
            "queries a trial"
        )
        untold = {entry.false_alarm_rate for entry in sizes.rates if entry.rate is None}
        if untold:
            line += (
                f"; a false-alarm rate of {min(untold):.0%} needs at least "
                f"{round(1 / min(untold))} non-mated queries in every trial"
            )
        lines.append(line)
    return lines


def explained_lines(evaluation: Evaluation) -> list[str]:
    """How well `parts` and `agreement` of first answers tell right ones from wrong ones."""
    return [
        f"{split.title}: of {e.answers:.0f} right and {e.answers:.0f} wrong first answers a trial, "
        f"area under ROC {e.parts.mean:.3f} ± {e.parts.std:.3f} by the sum of parts, "
        f"{e.agreement.mean:.3f} ± {e.agreement.std:.3f} by mean agreement"
        for split in evaluation.splits
        if (e := split.explained) is not None
    ]


def _open_set_cell(rate: TrialSpread | None, trials: int) -> str:
    return "–" if rate is None else _spread(rate, trials > 1)


def paper_tables(evaluation: Evaluation) -> list[Table]:
    """The paper's Table 1 or 2, or LLCM's: published rows first, ours below; none for folders."""
    dataset = DatasetName(evaluation.dataset)
    tables = []
    for title, columns in PAPER_TABLES.get(dataset, []):
        splits = [_split(evaluation, column) for column in columns]
        if any(splits):
            tables.append(_paper_table(dataset, title, columns, splits))
    return tables


def size_lines(evaluation: Evaluation) -> list[str]:
    """What was searched, one sentence a search, and by which convention."""
    drawn = {
        "official": "from the official trial file",
        "seeded": "drawn by the seeded convention",
        "whole": "the whole gallery",
        "authors": "by the scripts of the set's authors: drawn infrared images ask all visible "
        "ones",
    }
    return [
        f"{split.title}: {split.identities:.0f} identities, {split.queries:.0f} queries, "
        f"{split.gallery:.0f} gallery images, {split.trials} "
        f"{'trial' if split.trials == 1 else 'trials'} ({drawn[split.convention]})"
        for split in evaluation.splits
    ]


def module_lines(evaluation: Evaluation) -> list[str]:
    """What shows that the two modules are alive, one sentence each."""
    lines = []
    said: set[str] = set()  # searches with the same queries have the same γ, β
    for split in evaluation.splits:
        if (m := split.modulation) is None:
            continue
        gamma_beta = (
            f"γ over queries: mean {m.gamma_mean:.3f}, deviation {m.gamma_std:.4f}; ‖β‖/‖y‖ "
            f"{m.beta_to_feature:.3f}"
        )
        if gamma_beta not in said:
            said.add(gamma_beta)
            lines.append(gamma_beta)
        lines += [
            f"{split.title}: top 10 changed by modulation for {m.top10_changed:.1%} of queries "
            f"(changed or reordered {m.top10_reordered:.1%})",
            f"{split.title}: mAP modulated − unmodulated{' by score' if split.mixed else ''} "
            f"{100 * m.map_gain:+.2f} points, 95 % interval [{100 * m.map_gain_low:+.2f}, "
            f"{100 * m.map_gain_high:+.2f}] (bootstrap over query identities)",
        ]
    for missing, c in (evaluation.compensation or {}).items():
        if c is not None:
            lines.append(
                f"compensated {missing} features: rank-1 {c.rank_1:.1%} against real {missing} "
                f"centroids (chance {c.chance:.1%}, {c.images} images); variance / ‖mean‖² "
                f"{c.variance_to_mean:.3f}"
            )
    return lines


def _paper_table(
    dataset: DatasetName,
    title: str,
    columns: Sequence[tuple[str, str]],
    splits: Sequence[SplitEvaluation | None],
) -> Table:
    comparable = all(
        split is None or split.queries == PUBLISHED_QUERIES[dataset, split.setting]
        for split in splits
    )
    caveat = (
        ""
        if comparable
        else ("; this folder is not the published test set, so the rows do not compare")
    )
    table = Table(
        title=f"{title} ({TITLES[dataset]})",
        caption=f"published: as papers state on the real {TITLES[dataset]}; measured: this folder"
        f"{caveat}. Percent.",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for setting, shots in columns:
        for name in ("r1", "r10", "r20", "mAP"):
            head = HEADS.get(setting, shots)
            table.add_column(Text(f"{head}\n{name}"), justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[tuple[str, str], PublishedRow]] = {}
    for row in published_rows(TITLES[dataset]):
        rows.setdefault((row.method, row.venue), {})[row.setting, row.shots] = row
    table.add_row("published", style="italic")
    for (method, venue), settings in rows.items():
        found = [settings.get(column) for column in columns]
        if any(found):
            table.add_row(f" {method} {venue}", *_cells(found, 1))
    table.add_row("measured", style="italic bold")
    scored = {way for split in splits if split for way in split.rankings}
    for way in (way for way in NAMES if way in scored and way not in DIAGNOSES):
        ours = [split.rankings.get(way) if split else None for split in splits]
        table.add_row(f" ours, {NAMES[way]}", *_cells(ours, 100), style="bold")
    return table


def _cells(columns: Sequence[PublishedRow | RankingFigures | None], percent: int) -> list[str]:
    """Four cells a column group; empty where there is no figure."""
    cells = []
    for column in columns:
        for figure in PUBLISHED_FIGURES:
            value = getattr(column, figure, None)
            value = getattr(value, "mean", value)
            cells.append("" if value is None else f"{percent * value:.2f}")
    return cells


def _split(evaluation: Evaluation, column: tuple[str, str]) -> SplitEvaluation | None:
    return next((s for s in evaluation.splits if (s.setting, s.shots) == column), None)
