from __future__ import annotations

import numpy as np
import pytest

from model.pictures.quantiles import quantiles

_SHARES = (0.0, 0.02, 0.25, 0.5, 0.7, 0.9, 0.99, 1.0)


@pytest.mark.parametrize("count", [1, 2, 7, 128, 5000])
def test_quantiles_are_those_of_numpy(count: int) -> None:
    random = np.random.default_rng(count)
    numbers = random.normal(size=(1, count))
    levels = random.integers(0, 256, (count, 1), dtype=np.uint8)

    assert quantiles(numbers, *_SHARES) == np.quantile(numbers, _SHARES).tolist()
    assert quantiles(levels, *_SHARES) == np.quantile(levels, _SHARES).tolist()
