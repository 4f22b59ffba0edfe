"""Small sets in the layouts of RegDB and LLCM and a plain folder, drawn anew for every session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(path: Path, person: int, shade: int) -> Path:
    """A crop whose colours depend on the person, and a little on `shade`."""
    generator = np.random.default_rng((person, shade))
    pixels = np.random.default_rng(person).integers(0, 200, (8, 4, 3))
    pixels = pixels + generator.integers(0, 50, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).resize((32, 64)).save(path)
    return path


@pytest.fixture(scope="session")
def regdb_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people, three images each in both kinds of light, and ten trials.

    In trial t the people t and above (around the circle) are trained on, four of them; labels
    start at 0 on both sides, as in the real set.
    """
    root = tmp_path_factory.mktemp("regdb")
    names = {
        (word, person): [
            f"{word}/{person}/shot_{shot}_{person}.bmp"
            for shot in range(3)
            if draw(root / f"{word}/{person}/shot_{shot}_{person}.bmp", person, shot)
        ]
        for word in ("Visible", "Thermal")
        for person in range(1, 9)
    }
    (root / "idx").mkdir()
    for trial in range(1, 11):
        circle = [(trial + step) % 8 + 1 for step in range(8)]
        for side, people in (("train", sorted(circle[:4])), ("test", sorted(circle[4:]))):
            for word in ("Visible", "Thermal"):
                lines = [
                    f"{name} {label}"
                    for label, person in enumerate(people)
                    for name in names[word, person]
                ]
                index = root / "idx" / f"{side}_{word.lower()}_{trial}.txt"
                index.write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def llcm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People 1 to 4 for training; 5 to 7 for testing, two images a camera, no infrared camera 3."""
    root = tmp_path_factory.mktemp("llcm")
    (root / "idx").mkdir()
    for word in ("vis", "nir"):
        lines = []
        for label, person in enumerate(range(1, 5)):
            for shot in range(2):
                name = f"{word}/{person:04d}/{person:04d}_c0{shot + 1}_s1_f{shot}_{word}.jpg"
                draw(root / name, person, shot)
                lines.append(f"{name} {label}")
        (root / "idx" / f"train_{word}.txt").write_text("\n".join(lines) + "\n")
        for person in range(5, 8):
            for camera in (1, 2, 3):
                for shot in range(0 if (word, camera) == ("nir", 3) else 2):
                    folder = root / f"test_{word}" / f"cam{camera}" / f"{person:04d}"
                    draw(folder / f"{shot}.jpg", person, 10 * camera + shot)
    (root / "idx" / "test_id.txt").write_text("7,5,6\n")
    return root


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Persons 3, 12, ann and bob; bob's infrared images lie a folder deeper."""
    root = tmp_path_factory.mktemp("folder")
    for number, person in enumerate(("3", "12", "ann", "bob")):
        for modality in ("rgb", "ir"):
            below = "evening/" if (modality, person) == ("ir", "bob") else ""
            for shot in range(2):
                draw(root / modality / person / f"{below}{shot}.png", number, shot)
    return root
