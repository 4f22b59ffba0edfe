"""What a calibrated checkpoint knows of ranking, with numbers made by hand."""

from __future__ import annotations

from itertools import product

from model.config import MODALITIES
from model.ranking import AgreementFit, PosteriorFit, RankingFacts, Reranking

BOOLEANS = (False, True)


def ranking_facts(parts: int, *, between: tuple[float, float] = (12.0, 1.0)) -> RankingFacts:
    """Fits for every kind of query. between: mean and deviation of distances between items."""
    pairs = list(product(MODALITIES, MODALITIES))
    return RankingFacts(
        prior_items=30,
        between={f"{first} {second}": between for first, second in pairs},
        reranking=Reranking(default=False),
        posteriors=tuple(
            PosteriorFit(
                modulated=modulated,
                reranked=reranked,
                labelled=labelled,
                slope=1.8 if reranked else 2.0,
                spread=1.5,
                offset=3.5 if labelled else 3.0,
                size=0.97,
                own=0.2,
            )
            for modulated, reranked, labelled in product(BOOLEANS, BOOLEANS, BOOLEANS)
        ),
        agreements=tuple(
            AgreementFit(
                query=query,
                gallery=gallery,
                slopes=(1.5,) * parts,
                intercepts=(-1.0,) * parts,
            )
            for query, gallery in pairs
        ),
    )
