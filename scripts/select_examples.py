"""Pick the crops that `make demo` shows: a small visible gallery and infrared queries.

Chance picks, with a fixed seed, never a result: every identity of the list gets the same number of
gallery images, from as many visible cameras as it was seen by; queries are one infrared image each
of persons drawn from the list. A query of camera 3 is only taken where the gallery has its person
from another camera than 2, which stands at the same place (SYSU-MM01's rule).

Example: python scripts/select_examples.py --root synth-sysu --ids synth-sysu/exp/val_id.txt
"""

import argparse
import csv
import random
import shutil
from pathlib import Path

from training.datasets import Sample, read_ids, read_sysu

SEED = 2022
MANIFEST_FIELDS = ("file", "person_id", "camera_id", "modality", "role")
CREDITS_SECTIONS = ("## Shortcomings", "## Sources")


def pick_gallery(samples: list[Sample], per_person: int, generator: random.Random) -> list[Sample]:
    """`per_person` visible images of every identity, taking its cameras in turn."""
    gallery = []
    for person in sorted({sample.person_id for sample in samples}):
        of_person = [s for s in samples if s.person_id == person and s.modality == "rgb"]
        cameras = sorted({sample.camera for sample in of_person})
        by_camera = [[s for s in of_person if s.camera == camera] for camera in cameras]
        for images in by_camera:
            generator.shuffle(images)
        generator.shuffle(by_camera)
        # The first image of every camera, then the second of every camera, and so on.
        depth = max(len(images) for images in by_camera)
        in_turn = [images[k] for k in range(depth) for images in by_camera if k < len(images)]
        gallery += in_turn[:per_person]
    return gallery


def pick_queries(
    samples: list[Sample], gallery: list[Sample], count: int, generator: random.Random
) -> list[Sample]:
    """One infrared image of each of `count` persons that the gallery can answer for."""
    seen_by: dict[int, set[int]] = {}
    for sample in gallery:
        seen_by.setdefault(sample.person_id, set()).add(sample.camera)
    candidates: dict[int, list[Sample]] = {}
    for sample in samples:
        ignored = {2} if sample.camera == 3 else set()
        if sample.modality == "ir" and seen_by.get(sample.person_id, set()) - ignored:
            candidates.setdefault(sample.person_id, []).append(sample)
    persons = sorted(generator.sample(sorted(candidates), count))
    return [generator.choice(candidates[person]) for person in persons]


def copy_crops(samples: list[Sample], folder: Path) -> list[Path]:
    """Copy images, unchanged, into an emptied folder, with person and camera in their names."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    copies = []
    for sample in samples:
        name = f"{sample.person_id:04d}_cam{sample.camera}_{sample.path.stem}.jpg"
        copies.append(folder / name)
        shutil.copyfile(sample.path, copies[-1])
    return copies


def credits_of(readme: Path) -> str:
    """The sections of a data set's README that everything derived from it has to carry."""
    sections = ["## " + part for part in readme.read_text(encoding="utf-8").split("\n## ")[1:]]
    wanted = [section.strip() for section in sections if section.startswith(CREDITS_SECTIONS)]
    if len(wanted) != len(CREDITS_SECTIONS):
        raise SystemExit(f"Expected the sections {', '.join(CREDITS_SECTIONS)} in {readme}.")
    return "\n\n".join(wanted)


def main() -> None:
    """Write the crops, their manifest.csv and CREDITS.md, and print how many there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="data set in SYSU-MM01's layout")
    parser.add_argument("--ids", type=Path, required=True, help="identities to pick from")
    parser.add_argument("--out", type=Path, default=Path("examples"))
    parser.add_argument("--per-person", type=int, default=3, help="gallery images per identity")
    parser.add_argument("--queries", type=int, default=20)
    arguments = parser.parse_args()

    samples = read_sysu(arguments.root, read_ids(arguments.ids))
    generator = random.Random(SEED)
    gallery = pick_gallery(samples, arguments.per_person, generator)
    queries = pick_queries(samples, gallery, arguments.queries, generator)
    credits = credits_of(arguments.root / "README.md")

    out: Path = arguments.out
    rows: list[tuple[str, int, str, str, str]] = []
    for role, folder, chosen in (("gallery", "gallery", gallery), ("query", "queries", queries)):
        for sample, copy in zip(chosen, copy_crops(chosen, out / folder), strict=True):
            name = copy.relative_to(out).as_posix()
            rows.append((name, sample.person_id, f"cam{sample.camera}", sample.modality, role))
    with (out / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(MANIFEST_FIELDS)
        writer.writerows(rows)
    (out / "CREDITS.md").write_text(
        "# Example crops: origin and credits\n\n"
        f"`gallery/` holds {len(gallery)} visible and `queries/` {len(queries)} near-infrared "
        f"crops of {len({s.person_id for s in gallery})} persons, listed in `manifest.csv`. Every "
        "image is a rendering of an invented, clothed person; no photograph and no real person is "
        f"in it. `scripts/select_examples.py` picked them by chance (seed {SEED}), not by result, "
        "from identities that the example checkpoint was not trained on.\n\n"
        "The example checkpoint was trained on renderings of other invented persons from the same "
        f"source; what follows holds for it too.\n\n{credits}\n",
        encoding="utf-8",
    )
    size = sum(path.stat().st_size for path in out.glob("*/*.jpg"))
    print(f"{len(gallery)} gallery and {len(queries)} query crops, {size / 1e6:.2f} MB, in {out}")


if __name__ == "__main__":
    main()
