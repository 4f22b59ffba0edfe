"""Open-set identification: does a search find the enrolled, and stay silent for the others?

Phillips, Grother, Micheals, "Evaluation Methods in Face Recognition" (Handbook of Face
Recognition, 2nd edition, 2011). In every trial half of the gallery's identities, drawn with the
trial's number as the seed, are enrolled: the gallery holds their images only. Queries of them are
mated, queries of everyone else non-mated. A query raises an alarm where its best score is within a
threshold; the false-alarm rate is the share of non-mated queries that do. At a given rate, the
detection-and-identification rate (DIR, rank 1) is the share of mated queries that raise an alarm
and whose nearest image shows the right person.
"""

from dataclasses import dataclass

import numpy as np

from training.evaluation.metrics import BoolArray, FloatArray, IntArray

FALSE_ALARM_RATES = (0.01, 0.1)


@dataclass(frozen=True)
class OpenSetTrial:
    """One trial. dirs: at `FALSE_ALARM_RATES`; None where non-mated queries are too few to tell."""

    mated: int
    non_mated: int
    dirs: tuple[float | None, ...]


def open_set_trial(
    score: FloatArray,
    query_ids: IntArray,
    gallery_ids: IntArray,
    excluded: BoolArray,
    seed: int,
) -> OpenSetTrial:
    """DIR of one trial; see the module.

    Mated queries whose images of their person the protocol all excludes are left out, as in the
    closed-set figures.

    score: Q×N, smaller is nearer and on one scale for all queries.
    query_ids, gallery_ids: Q and N people.
    excluded: Q×N, images that the protocol has a query ignore.
    seed: of the draw, the number of the trial.
    """
    identities = np.unique(gallery_ids)
    drawn = np.random.default_rng(seed).permutation(identities)
    enrolled = drawn[: (identities.size + 1) // 2]
    columns = np.flatnonzero(np.isin(gallery_ids, enrolled))
    people = gallery_ids[columns]
    kept = np.where(excluded[:, columns], np.inf, score[:, columns])
    best, nearest = kept.min(axis=1), people[kept.argmin(axis=1)]
    mated = np.isin(query_ids, enrolled)
    answerable = (~excluded[:, columns] & (query_ids[:, None] == people)).any(axis=1)
    asked = mated & answerable
    right = nearest[asked] == query_ids[asked]
    return OpenSetTrial(
        mated=int(asked.sum()),
        non_mated=int((~mated).sum()),
        dirs=tuple(
            detection_and_identification(best[asked], right, best[~mated], rate)
            for rate in FALSE_ALARM_RATES
        ),
    )


def detection_and_identification(
    mated: FloatArray, right: BoolArray, non_mated: FloatArray, rate: float
) -> float | None:
    """DIR at rank 1 where at most `rate` of the non-mated queries raise an alarm.

    None where there is no mated query, or where one non-mated query alone is more than `rate`.

    mated: best score of each mated query, smaller is nearer.
    right: whether that is of the right person.
    non_mated: best score of each non-mated query.
    rate: share of false alarms, in (0, 1).
    """
    allowed = int(rate * non_mated.size + 1e-9)  # 0.1 · 30 is 3, not 2.999…
    if allowed < 1 or mated.size == 0:
        return None
    threshold = np.partition(non_mated, allowed)[allowed]  # alarm: strictly nearer than this
    return float((right & (mated < threshold)).mean())
