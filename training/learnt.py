"""Whom a network learnt from, so that nobody is tested whom it knows.

A person of a data set is a number, and numbers are not enough: every folder of somebody's own
images may have a person 1. So a checkpoint keeps short digests of the files as well. A file that is
found again is the same person, whatever folder, layout or number it has now; another file may be of
the same person too, which is known where the set has a name: in two sets of one name a number is
the same person. The sets of the three public layouts have their layout's name unless another one
is stated. A checkpoint hands on the people of the one that it started from. People on whom the
best weights of a run were chosen are kept in the same way: they too make figures better than they
are.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from model import CheckpointInfo
from model.training_facts import LearntPeople
from training.datasets import DatasetError, DatasetName, Sample
from training.datasets.decoding import READERS
from training.datasets.folder import person_number

_BYTES = 6  # of a digest: by chance one of a million files equals one of a million others by 0.4 %
_SHOWN = 5


def name_of(dataset: DatasetName, stated: str | None) -> str | None:
    """The name of a data set: as stated, or its layout's, or none for a folder of own images."""
    if stated is not None or dataset is DatasetName.FOLDER:
        return stated
    return dataset.value


def stated_name(people: LearntPeople) -> str | None:
    """The name of their set where it is not what `name_of` gives without a stated one."""
    return people.name if people.name != name_of(DatasetName(people.dataset), None) else None


def learnt_people(
    dataset: DatasetName, name: str | None, samples: Sequence[Sample]
) -> LearntPeople:
    """What identifies the people of `samples` in any other folder. name: see `name_of`."""
    return LearntPeople(
        dataset=dataset.value,
        name=name,
        identities=sorted({sample.person_id for sample in samples}),
        images=_packed(_digests(samples)),
    )


def united(people: Iterable[LearntPeople]) -> list[LearntPeople]:
    """The same people, each data set once."""
    sets: dict[tuple[str, str | None], list[LearntPeople]] = defaultdict(list)
    for one in people:
        sets[one.dataset, one.name].append(one)
    return [
        LearntPeople(
            dataset=dataset,
            name=name,
            identities=sorted({person for one in of_set for person in one.identities}),
            images=_packed({digest for one in of_set for digest in _unpacked(one.images)}),
        )
        for (dataset, name), of_set in sets.items()
    ]


def known_people(
    learnt: Sequence[LearntPeople],
    samples: Sequence[Sample],
    dataset: DatasetName,
    name: str | None,
) -> set[int]:
    """Those of the people of `samples` who are among `learnt`.

    dataset, name: of the samples; the name is None where none is stated.
    """
    return _by_number(learnt, samples, dataset, name) | _by_file(learnt, samples)


def refuse_known_people(
    info: CheckpointInfo,
    samples: Sequence[Sample],
    dataset: DatasetName,
    name: str | None,
    *,
    selecting_may: bool = False,
) -> None:
    """Refuse people whom a network knows: figures on them say nothing about others.

    selecting_may: whether people on whom its weights were chosen, but not trained, are welcome.
    Raises DatasetError where the checkpoint, or one that it started from, was trained or selected
    on some of the people of `samples`, by its own record.
    """
    roles = {"trained": info.facts.people()}
    if not selecting_may:
        roles["selected by validation"] = info.facts.selecting_people()
    people = len({sample.person_id for sample in samples})
    found: list[str] = []
    by_file = False
    for role, learnt in roles.items():
        numbers, files = _by_number(learnt, samples, dataset, name), _by_file(learnt, samples)
        if known := numbers | files:
            of = "of them" if found else f"of these {people} identities"
            found.append(f"{role} on {len(known)} {of} ({_in_words(known, samples)})")
            by_file |= bool(files)
    if not found:
        return
    remedy = "choose others with --ids"
    if not by_file:
        remedy += ", or if they only have the same numbers, name their set with --dataset-name"
    raise DatasetError(
        f"The checkpoint, or one that it started from, was {' and '.join(found)}; {remedy}."
    )


def _by_number(
    learnt: Sequence[LearntPeople],
    samples: Sequence[Sample],
    dataset: DatasetName,
    name: str | None,
) -> set[int]:
    known: set[int] = set()
    for one in learnt:
        # Without digests, the numbers of a layout are all there is.
        own = name_of(dataset, name) or (None if one.images else dataset.value)
        if own is not None and own == one.name:
            known.update(one.identities)
    return known & {sample.person_id for sample in samples}


def _by_file(learnt: Sequence[LearntPeople], samples: Sequence[Sample]) -> set[int]:
    seen = {digest for one in learnt for digest in _unpacked(one.images)}
    if not seen:
        return set()
    return {person for digest, person in _digests(samples).items() if digest in seen}


def _in_words(people: set[int], samples: Sequence[Sample]) -> str:
    """The first few, by their folders' names where their numbers are made from these."""
    names = {s.person_id: _name(s) for s in samples if s.person_id in people}
    shown = ", ".join(names[person] for person in sorted(people)[:_SHOWN])
    return shown + (", …" if len(people) > _SHOWN else "")


def _name(sample: Sample) -> str:
    folders = (part for part in sample.path.parts if not part.isdecimal())
    return next(
        (name for name in folders if person_number(name) == sample.person_id),
        str(sample.person_id),
    )


def _digests(samples: Sequence[Sample]) -> dict[bytes, int]:
    """Digest of a file → whose it is.

    A file that several people have, such as a black picture, identifies nobody.
    """
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_digest, (sample.path for sample in samples))
        owners: dict[bytes, set[int]] = defaultdict(set)
        for sample, digest in zip(samples, found, strict=True):
            if digest is not None:
                owners[digest].add(sample.person_id)
    return {digest: people.pop() for digest, people in owners.items() if len(people) == 1}


def _digest(path: Path) -> bytes | None:
    """None for a file that cannot be read, which whoever decodes it will name."""
    try:
        state = path.stat()
        return _digest_of(path, state.st_size, state.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=1 << 18)
def _digest_of(path: Path, size: int, modified: int) -> bytes:
    """size, modified: another file under the same path is read again."""
    return hashlib.sha256(path.read_bytes()).digest()[:_BYTES]


def _packed(digests: Iterable[bytes]) -> str:
    return base64.b64encode(b"".join(sorted(digests))).decode()


def _unpacked(text: str) -> set[bytes]:
    content = base64.b64decode(text)
    return {content[place : place + _BYTES] for place in range(0, len(content), _BYTES)}
