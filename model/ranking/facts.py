"""What a checkpoint holds of ranking: plain numbers, chosen on people it was not trained on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from model.config import Modality

Positive = Annotated[float, Field(gt=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reranking(_Record):
    """k-reciprocal re-ranking: how much it counts, and how large its neighbourhoods are.

    weight: added to the score of an item that has all neighbours in common with the query.
    neighbours: size of a neighbourhood (k1 of Zhong et al.) for each image that a person has, from
    `fewest` to `most`. expansion: images whose encodings are averaged (k2). sharpness: weights
    within a neighbourhood fall by e for 1/sharpness deviations. unlabelled_images: how many images
    of a person a gallery without labels is taken to have. default: whether a query that does not
    say is re-ranked.
    """

    weight: float = Field(default=2, ge=0, le=100)
    neighbours: Positive = 1.5
    fewest: int = Field(default=4, ge=1)
    most: int = Field(default=20, ge=1)
    expansion: int = Field(default=2, ge=1)
    sharpness: float = Field(default=0.5, ge=0)
    unlabelled_images: float = Field(default=1.5, ge=1)
    default: bool = True

    def size(self, images: float) -> int:
        """k1 where people have this many images on average."""
        return max(self.fewest, min(self.most, round(self.neighbours * images)))

    def share(self, images: float) -> float:
        """The weight there: an image without others of its person has no neighbours to go by."""
        return self.weight * max(0.0, min(1.0, images - 1))

    def images(self, labelled: int, people: int, unlabelled: int) -> float:
        """Images per person where `labelled` items show `people`, and the others have no label."""
        different = people + unlabelled / self.unlabelled_images
        return (labelled + unlabelled) / different if different else 1.0


class PosteriorFit(_Record):
    """Score → weight against "not enrolled", see `model.ranking.posterior`.

    modulated, reranked, labelled: the queries and galleries that it was fitted on.
    slope, spread, images: ln weight rises by slope · ratioˢᵖʳᵉᵃᵈ · Kⁱᵐᵃᵍᵉˢ with each unit of score.
    offset, size, own: and falls by offset + size · ln(items) + own · (share of the items that is of
    the query's modality) + raised · (by how much re-ranking raised the best score).
    log_loss, error, searches: of the fit; the first two cross-validated between the sets of people.
    """

    modulated: bool
    reranked: bool
    labelled: bool
    slope: float = Field(gt=0)
    spread: float = 0.0
    images: float = 0.0
    offset: float
    size: float
    own: float = 0.0
    raised: float = 0.0
    log_loss: float = 0.0
    error: float = 0.0
    searches: int = 0


class AgreementFit(_Record):
    """Squared unmodulated part distances → agreement, for one pair of modalities.

    slopes, intercepts: of each part; see `model.ranking.agreement`.
    """

    query: Modality
    gallery: Modality
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]


class RankingFacts(_Record):
    """All of it.

    prior_items: how many items of each modality the reference embeddings count for.
    between: mean and deviation of unmodulated distances between reference items of two modalities,
    by "rgb rgb", "rgb ir", "ir rgb" and "ir ir".
    """

    prior_items: float = Field(gt=0)
    between: dict[str, tuple[float, Positive]] = {}
    reranking: Reranking | None = None
    posteriors: tuple[PosteriorFit, ...] = ()
    agreements: tuple[AgreementFit, ...] = ()

    @field_validator("agreements", mode="before")
    @classmethod
    def _of_unmodulated_parts(cls, fits: Any) -> Any:
        """An earlier release also fitted modulated parts, which tell people apart less well."""
        if not isinstance(fits, list | tuple):
            return fits
        return [
            {name: value for name, value in fit.items() if name != "modulated"}
            if isinstance(fit, dict)
            else fit
            for fit in fits
            if not (isinstance(fit, dict) and fit.get("modulated") is True)
        ]

    def posterior(self, *, modulated: bool, reranked: bool, labelled: bool) -> PosteriorFit | None:
        """The fit that was made for such searches, None where there is none."""
        wanted = (modulated, reranked, labelled)
        fits = self.posteriors
        return next((f for f in fits if (f.modulated, f.reranked, f.labelled) == wanted), None)

    def posteriors_of(
        self, *, modulated: bool, reranked: bool
    ) -> tuple[PosteriorFit, PosteriorFit] | None:
        """Those for labelled and for unlabelled items, None where one of them is missing."""
        labelled, unlabelled = (
            self.posterior(modulated=modulated, reranked=reranked, labelled=named)
            for named in (True, False)
        )
        return None if labelled is None or unlabelled is None else (labelled, unlabelled)

    def agreement(self, query: str, gallery: str) -> AgreementFit | None:
        """The fit for a pair of modalities, None where there is none."""
        fits = self.agreements
        return next((f for f in fits if (f.query, f.gallery) == (query, gallery)), None)
