"""A calibration in a terminal: what was chosen, and how true it is of people not in the fit."""

from __future__ import annotations

from itertools import product

import numpy as np
from rich.table import Table
from rich.text import Text

from model.calibration import (
    NORMALISATIONS,
    CalibrationFacts,
    CalibrationMap,
    Normalisation,
    Threshold,
)
from model.ranking import PosteriorFit
from training.calibration.calibrate import Fit
from training.calibration.curves import FITS, Method
from training.calibration.ranking import RankingFit
from training.calibration.similarity import FALSE_ACCEPT_RATES
from training.calibration.strength import StrengthChoice


def tables(fit: Fit) -> list[Table]:
    """All of it, in the order in which it was fitted."""
    found = []
    if fit.strength.steps:
        found.append(_strength(fit.strength))
    facts = fit.calibration.facts
    found += [_curves(facts, modulated) for modulated in (True, False)]
    if fit.ranking is not None:
        if fit.ranking.reranking.gains:
            found.append(_reranking(fit.ranking))
        found += [_answers(fit.ranking, labelled) for labelled in (True, False)]
        found.append(_extrapolated(fit.ranking))
    return found


def _table(title: str, first: str, columns: list[str], caption: str = "") -> Table:
    table = Table(title=title, caption=caption or None, box=None, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right", no_wrap=True)  # of one line or two
    return table


def _strength(choice: StrengthChoice) -> Table:
    sets = len(choice.steps[0].mean_ap)
    names = [f"set {number}" for number in range(1, sets + 1)]
    table = _table(
        "Strength s of the modulation",
        "s",
        [*(f"mAP {name}" for name in names), *(f"other ten {name}" for name in names)],
        "percent (* kept): mAP, and the share of queries with another ten nearest than at s = 0",
    )
    for step in choice.steps:
        kept = choice.chosen is not None and step.s == choice.chosen.s
        table.add_row(
            f"{step.s:.1f}{'*' if kept else ''}",
            *(f"{100 * value:.1f}" for value in step.mean_ap),
            *(f"{100 * value:.0f}" for value in step.changed),
        )
    return table


def _reranking(fit: RankingFit) -> Table:
    chosen = fit.reranking.chosen
    table = _table(
        f"Re-ranking{'' if chosen.default else ', not by default'}: weight {chosen.weight:g}, "
        f"{chosen.neighbours:g} neighbours an image",
        "gallery",
        ["mAP", "gain", "± one error"],
        "percent; galleries of other kinds are not re-ranked",
    )
    for kind, gain in fit.reranking.gains.items():
        if gain.gain or gain.error:
            values = f"{100 * gain.before:.1f}", f"{100 * gain.gain:+.1f}"
            table.add_row(kind, *values, f"{100 * gain.error:.1f}")
    return table


_ROWS = {
    "all": "all searches",
    "visible": "infrared → visible",
    "infrared": "visible → infrared",
    "mixed": "mixed gallery",
    "same kind": "within one kind",
    "fewer than 5": "fewer than 5 people",
    "5 to 10": "5 to 10 people",
    "more people": "more people",
    "several images": "several query images",
}


def _answers(fit: RankingFit, labelled: bool) -> Table:
    judged = [one for one in fit.judged if one.fit.labelled == labelled]
    table = _table(
        f"Probability of the first answer, {'labelled' if labelled else 'unlabelled'} gallery",
        "calibration error",
        [way_name(one.fit).replace(", ", "\n") for one in judged],
        "of people held out of the fit, half of them not enrolled, mean of the sets; by chance: "
        "what true probabilities would have, mean of the kinds",
    )
    for kind, name in _ROWS.items():
        figures = [one.by_kind.get(kind) for one in judged]
        table.add_row(name, *("-" if f is None else f"{f.error:.3f}" for f in figures))
    chances = [np.mean([f.chance for f in one.by_kind.values()]) for one in judged]
    table.add_row("by chance", *(f"{chance:.3f}" for chance in chances))
    table.add_row("log loss, nats", *(f"{one.fit.log_loss:.3f}" for one in judged))
    return table


def way_name(fit: PosteriorFit) -> str:
    """Of ranking, in a few words."""
    way = "modulated" if fit.modulated else "unmodulated"
    return f"{way}, re-ranked" if fit.reranked else way


def _extrapolated(fit: RankingFit) -> Table:
    table = _table(
        "Probability of the first answer beyond what the fit saw, simulated",
        "people",
        ["right", "probability", "calibration error", "enrolled"],
        "one image each, modulated, drawn from the held-out people's distances; enrolled: mean "
        "probability, of a half",
    )
    for row in fit.extrapolated:
        values = (row.right, row.probability, row.error, row.enrolled)
        table.add_row(f"{row.items:,}", *(f"{value:.3f}" for value in values))
    return table


def _curves(facts: CalibrationFacts, modulated: bool) -> Table:
    """One column a modality pair: the forms that were compared, then what the kept one is worth."""
    maps = [m for m in facts.maps if m.modulated == modulated]
    table = _table(
        f"{'Modulated' if modulated else 'Unmodulated'} distance → similarity, prior "
        f"{facts.prior:g}",
        "query → gallery",
        [f"{m.query} → {m.gallery}" for m in maps],
        "log loss in nats a pair (* kept; of the prior alone "
        f"{maps[0].log_loss_of_prior:.4f}), calibration error and rates of accepts are of people "
        "held out of the fit, five halvings; accept above the similarity",
    )
    for method, normalisation in product(FITS, NORMALISATIONS):
        table.add_row(
            f"log loss, {normalisation} {method}",
            *(_loss(m, normalisation, method) for m in maps),
        )
    table.add_section()
    table.add_row("pairs of one person", *(f"{m.positives:,}" for m in maps))
    table.add_row("pairs of two people", *(f"{m.negatives:,}" for m in maps))
    table.add_row("calibration error", *(f"{m.expected_calibration_error:.4f}" for m in maps))
    for place, rate in enumerate(FALSE_ACCEPT_RATES):
        thresholds = [m.thresholds[place] for m in maps]
        table.add_section()
        table.add_row(
            f"false accepts {rate:.1%}: similarity", *(_similarity(t) for t in thresholds)
        )
        table.add_row("  true accepts", *(_percent(t.true_accept_rate) for t in thresholds))
        table.add_row(
            "  false accepts, measured",
            *(_percent(t.measured_false_accept_rate) for t in thresholds),
        )
    return table


def _loss(m: CalibrationMap, normalisation: Normalisation, method: Method) -> str:
    kept = (m.normalisation, m.curve.method) == (normalisation, method)
    form = (normalisation, method)
    loss = next(c.log_loss for c in m.candidates if (c.normalisation, c.method) == form)
    return f"{loss:.4f}{'*' if kept else ' '}"


def _similarity(threshold: Threshold) -> str:
    similarity = threshold.similarity
    return "too few" if similarity is None else f"{similarity:.4f}"


def _percent(rate: float | None) -> str:
    return "too few" if rate is None else f"{100 * rate:.2f} %"
