"""One interface for all layouts: which images are there, which are trained on, which are tested."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import ClassVar

from training.datasets.identity_lists import read_ids
from training.datasets.sample import DatasetError, DatasetName, Sample


class Layout(ABC):
    """A folder layout and the sides of its protocol.

    name: what `--dataset` says.
    title: the set's name in tables.
    folders: what its root holds; a folder without them is no such root.
    trials: how many splits into training and test people the set has (one model each).
    published: what the set's own papers count, by the names that `cmt data check` uses.
    """

    name: ClassVar[DatasetName]
    title: ClassVar[str]
    folders: ClassVar[tuple[str, ...]]
    trials: ClassVar[int] = 1
    published: ClassVar[dict[str, int]] = {}

    @abstractmethod
    def images(
        self, root: Path, trial: int = 1, ids: Collection[int] | None = None
    ) -> list[Sample]:
        """Every image of a folder, or those of some identities.

        Raises DatasetError where a file or folder of the layout is missing, or an identity that was
        asked for has no image.
        """

    @abstractmethod
    def train_ids(self, root: Path, trial: int = 1) -> set[int]:
        """The identities that the protocol trains on. Raises DatasetError without their list."""

    @abstractmethod
    def test_ids(self, root: Path, trial: int = 1) -> set[int]:
        """The identities that the protocol tests on. Raises DatasetError without their list."""

    def read_ids(self, path: Path) -> dict[int, str]:
        """Whom a list given by the user names (`--train-ids`, `--ids`): number → as written."""
        return {number: str(number) for number in read_ids(path, self.name)}

    def train(self, root: Path, trial: int = 1, ids: Collection[int] | None = None) -> list[Sample]:
        """The training images, or those of `ids` that this root has.

        Raises DatasetError where the protocol trains on an identity that has no image.
        """
        self.check_trial(trial)
        self.check_root(root)
        if ids is None:
            return self.images(root, trial, self.train_ids(root, trial))
        return [sample for sample in self.images(root, trial) if sample.person_id in ids]

    def test(self, root: Path, trial: int = 1, ids: Collection[int] | None = None) -> list[Sample]:
        """All images of the test identities, or of `ids`.

        Raises DatasetError where one of them has no image.
        """
        self.check_trial(trial)
        self.check_root(root)
        return self.images(root, trial, self.test_ids(root, trial) if ids is None else ids)

    def notes(self, root: Path) -> list[str]:
        """What a user should know of the lists of this root, in sentences."""
        return []

    def fits(self, root: Path) -> bool:
        """Whether a folder has this layout's folders."""
        return all((root / folder).is_dir() for folder in self.folders)

    def check_root(self, root: Path) -> None:
        """Raises DatasetError unless `root` has this layout's folders.

        The message suggests a folder below `root` that has them.
        """
        if self.fits(root):
            return
        if not root.is_dir():
            raise DatasetError(
                f"Expected the {self.title} folder {root}, but there is no such folder.", self.name
            )
        missing = next(folder for folder in self.folders if not (root / folder).is_dir())
        # Archives are often unpacked into a folder of their own name.
        below = [folder for folder in sorted(root.iterdir()) if self.fits(folder)]
        hint = f", as {below[0]} has it: give that one" if below else ""
        raise DatasetError(
            f"Expected the folder {root / missing} of the {self.title} layout{hint}.", self.name
        )

    def check_trial(self, trial: int) -> None:
        """Raises DatasetError unless the set has a split of that number, from 1."""
        if not 1 <= trial <= self.trials:
            there = "one split only" if self.trials == 1 else f"splits 1 to {self.trials}"
            raise DatasetError(f"{self.title} has {there}, not --trial {trial}.", self.name)

    def refuse_namesakes(self, people: Iterable[tuple[str, int]]) -> None:
        """Raises DatasetError where two names of people, such as 007 and 7, have one number."""
        names: dict[int, str] = {}
        for name, number in people:
            other = names.setdefault(number, name)
            if other != name:
                first, second = sorted((other, name))
                raise DatasetError(
                    f"Expected another name than {second!a} beside {first!a}: both would be person "
                    f"{number}. Rename the folder of one, or give both the same name if they are "
                    "one person.",
                    self.name,
                )

    def require(
        self,
        samples: Iterable[Sample],
        ids: Collection[int] | None,
        expected: Callable[[int], str],
    ) -> list[Sample]:
        """`samples` of `ids` in their order.

        ids: with names, as `read_ids` gives them, an error calls people by these.
        expected: where the images of an identity should be.
        Raises DatasetError where an identity has no image.
        """
        kept = [sample for sample in samples if ids is None or sample.person_id in ids]
        missing = set(ids or ()) - {sample.person_id for sample in kept}
        if missing:
            first = min(missing)
            name = ids[first] if isinstance(ids, Mapping) else first
            raise DatasetError(
                f"Expected images at {expected(first)}, but identity "
                f"{name} ({len(missing)} missing in all) has none in this folder: add "
                "images, or drop the identity.",
                self.name,
            )
        return kept
