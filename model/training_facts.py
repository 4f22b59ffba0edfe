"""What a checkpoint says of its training: the facts that programs read, checked when it is loaded.

A run writes more (its recipe, seed, seconds); that is for people and stays as it is.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LearntPeople(BaseModel):
    """People of one data set whom a network, or a network that it started from, knows.

    dataset: the set's layout. name: of the set, where it has one; in two sets of one name a number
    is the same person. identities: their numbers. images: digests of their files, one after the
    other in base64, by which they are known in any folder, layout and numbering; empty where the
    checkpoint is from a release that did not keep them.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    dataset: str
    name: str | None = None
    identities: list[int] = Field(default_factory=list)
    images: str = Field(default="", pattern="^([A-Za-z0-9+/]{8})*$")  # six bytes each


class TrainingFacts(BaseModel):
    """The facts that programs read.

    dataset, identities: what the network itself was trained on; learnt_from: the same with what
    identifies the people, and those of all its ancestors. trial: the split of RegDB. selection: how
    the weights were chosen; selected_on: under "val" those on whose images they were, and those of
    all ancestors; held_out: their numbers, or those of people who were only validated on.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    dataset: str | None = None
    identities: list[int] = Field(default_factory=list)
    learnt_from: list[LearntPeople] = Field(default_factory=list)
    selected_on: list[LearntPeople] = Field(default_factory=list)
    held_out: list[int] = Field(default_factory=list)
    trial: int | None = None
    selection: str | None = None
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def people(self) -> list[LearntPeople]:
        """Everybody whom the network learnt from, set by set.

        Checkpoints of earlier releases name their own people only, by number.
        """
        return self.learnt_from or self._by_number(self.identities)

    def selecting_people(self) -> list[LearntPeople]:
        """Everybody on whose images its weights, or those of an ancestor, were chosen.

        Checkpoints of earlier releases name their own people only, by number.
        """
        return self.selected_on or self._by_number(self.held_out if self.selection == "val" else [])

    def _by_number(self, identities: list[int]) -> list[LearntPeople]:
        if self.dataset is None or not identities:
            return []
        return [LearntPeople(dataset=self.dataset, name=self.dataset, identities=identities)]
