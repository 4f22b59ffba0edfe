"""The computation of what large galleries need, and its tables in the documentation."""

from __future__ import annotations

import numpy as np

from scripts.scale_on_paper import COLUMNS, MEASURED_ROWS, Network, main, measured
from service.gallery.feed import Stored
from service.gallery.index.byte_codes import code_bytes
from service.gallery.index.columns import Columns
from service.gallery.index.features import Features
from tests.paths import ROOT

PRINTED = "<!-- printed by scripts/scale_on_paper.py -->"


def row(text: str, name: str) -> list[str]:
    """The cells of the first row that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_documentation_holds_what_is_printed() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    assert page.partition(PRINTED)[2].partition("<!-- end")[0].strip() == main([]).strip()


def test_a_crop_takes_as_many_bytes_as_the_gallery_says() -> None:
    features = Features(6, 128, "euclidean", "cpu")
    network = Network("compact", 6, 128)
    assert network.bytes == 2 * features.width
    assert network.codes == code_bytes(1, features.width)
    columns = Columns()
    count = 2048
    columns.add(
        Stored(
            numbers=list(range(count)),
            persons=[None] * count,
            cameras=[None] * count,
            modalities=["rgb"] * count,
            captured=[None] * count,
            features=np.empty((count, 0), np.float16),  # columns hold none
        )
    )
    assert columns.bytes == count * COLUMNS


def test_rates_come_from_the_files_and_assumptions_from_the_command_line() -> None:
    rates = measured()
    assert rates.embed["compact"] > rates.embed["ResNet-50"] > 0
    assert 0 < rates.inverted < 1 < MEASURED_ROWS * 1792 / rates.scan * 1000
    usual, small = main([]), main(["--gpu-memory", "70.5e9", "--gpu-bandwidth", "2.4e12"])
    gpus = [[int(cell) for cell in row(text, "GPUs, exact search")] for text in (usual, small)]
    assert gpus[0][-1] == 15  # 1,792 GB in 127 GB each
    assert gpus[1][-1] == 29
    assert row(usual, "features in memory") == row(small, "features in memory")
    assert row(usual, "features in memory") == ["18 GB", "179 GB", "1,792 GB"]
