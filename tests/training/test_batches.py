"""Batches are balanced and repeatable; augmentation does what it says to each image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from model import Modality
from model.pixels import normalise
from training.augmentation import AugmentationConfig, augment
from training.datasets.sample import Sample
from training.sampler import IdentityBalancedSampler, TrainingSetError

CAMERAS: dict[int, Modality] = {1: "rgb", 3: "ir"}
OFF = AugmentationConfig(padding=0, flip=0, erasing=0)


def people(count: int, images: int = 3) -> list[Sample]:
    return [
        Sample(Path(f"{person}-{camera}-{i}.jpg"), person, camera, modality)
        for person in range(10, 10 + count)
        for camera, modality in CAMERAS.items()
        for i in range(images)
    ]


def test_a_batch_has_n_identities_with_k_images_of_each_modality() -> None:
    samples = people(7, images=5)
    sampler = IdentityBalancedSampler(samples, identities=3, images=4, seed=0)
    for step in range(20):
        batch = sampler.batch(step)
        assert batch.rows.shape == batch.labels.shape == batch.is_ir.shape == (24,)
        counts = Counter(zip(batch.labels.tolist(), batch.is_ir.tolist(), strict=True))
        assert set(counts.values()) == {4}
        assert len(counts) == 6
        assert len(set(batch.rows.tolist())) == 24  # enough images: none twice
        for row, label, ir in zip(*batch, strict=True):
            assert samples[row].person_id == sampler.people[label]
            assert (samples[row].modality == "ir") == ir


def test_everyone_appears_once_in_a_pass_and_a_curriculum_keeps_to_the_first() -> None:
    sampler = IdentityBalancedSampler(people(6, 5), identities=2, images=2, seed=1)
    seen = Counter(label for step in range(3) for label in set(sampler.batch(step).labels.tolist()))
    assert seen == Counter(range(6))
    assert {x for step in range(20) for x in sampler.batch(step, 3).labels.tolist()} == {0, 1, 2}


def test_batches_are_a_function_of_seed_and_step() -> None:
    first, again, other = (
        IdentityBalancedSampler(people(9), identities=3, images=4, seed=seed) for seed in (5, 5, 6)
    )
    assert np.array_equal(first.batch(17).rows, again.batch(17).rows)  # without the 16 before
    assert any(not np.array_equal(first.batch(s).rows, other.batch(s).rows) for s in range(3))


def test_few_images_are_repeated_and_a_missing_modality_is_refused() -> None:
    batch = IdentityBalancedSampler(people(2, images=1), 2, images=4, seed=0).batch(0)
    assert len(set(batch.rows.tolist())) == 4
    lacking = [s for s in people(3) if not (s.person_id == 11 and s.modality == "ir")]
    with pytest.raises(TrainingSetError, match=r"identity 11 .* no infrared image \(1 of 3"):
        IdentityBalancedSampler(lacking, 2, 2, seed=0)
    with pytest.raises(TrainingSetError, match="3 identities are fewer than the 8"):
        IdentityBalancedSampler(people(3), 8, 2, seed=0)


def noise(count: int = 64, height: int = 24, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, height, width), generator=generator).to(torch.uint8)


def run(
    images: torch.Tensor, config: AugmentationConfig, seed: int = 0, ir: bool = False
) -> torch.Tensor:
    is_ir = torch.full((len(images),), ir)
    return augment(images, is_ir, config, torch.Generator().manual_seed(seed))


def test_with_everything_off_only_normalisation_is_left() -> None:
    assert torch.equal(run(noise(), OFF), normalise(noise()))


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    result = run(noise(), OFF.model_copy(update={"flip": 0.5}))
    plain = normalise(noise())
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(result, plain, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(result, plain, strict=True)]
    assert 16 < sum(mirrored) < 48
    assert sum(mirrored) + sum(same) == 64


def test_crop_is_a_window_of_the_zero_padded_image() -> None:
    images = noise(count=16)
    result = run(images, OFF.model_copy(update={"padding": 3 / 24}))
    padded = normalise(torch.nn.functional.pad(images, (3, 3, 3, 3)))
    shifts = set()
    for image, whole in zip(result, padded, strict=True):
        found = [
            (y, x)
            for y in range(7)
            for x in range(7)
            if torch.equal(image, whole[:, y : y + 24, x : x + 12])
        ]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 5


def test_erasing_blanks_one_rectangle_of_the_stated_area() -> None:
    result = run(noise(count=200), OFF.model_copy(update={"erasing": 0.5}))
    plain = normalise(noise(count=200))
    erased = 0
    for image, before in zip(result, plain, strict=True):
        hole = (image == 0).all(0) & (before != 0).any(0)
        if not hole.any():
            assert torch.equal(image, before)
            continue
        erased += 1
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        box = hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert hole.float().mean() <= 0.4 + 3 * (24 + 12) / (24 * 12)  # up to one pixel a side
        assert torch.equal(image[:, ~hole], before[:, ~hole])
    assert 70 < erased < 130


def test_gray_takes_the_colour_from_visible_images_only() -> None:
    gray = OFF.model_copy(update={"gray": 1.0})
    back = run(noise(), gray) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    back = back + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    assert (back[:, 0] - back[:, 1]).abs().max() < 1e-5
    assert (back[:, 0] - back[:, 2]).abs().max() < 1e-5
    assert torch.equal(run(noise(), gray, ir=True), normalise(noise()))


def test_brightness_scales_each_image_by_its_own_factor() -> None:
    images = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    result = run(images, OFF.model_copy(update={"brightness": 0.3}))
    values = (result * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))[:, 0, 0, 0] + 0.485
    factors = values * 255 / 100
    assert 0.7 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.3


def test_channel_exchange_puts_one_channel_in_the_place_of_all_three() -> None:
    images = noise()
    exchange = OFF.model_copy(update={"channel_exchange": 0.5})
    result = run(images, exchange)
    kept, taken = 0, set()
    for image, before in zip(result, images, strict=True):
        same = [
            torch.equal(image, normalise(before[c].expand_as(before)[None])[0]) for c in range(3)
        ]
        if any(same):
            taken.add(same.index(True))
        else:
            assert torch.equal(image, normalise(before[None])[0])
            kept += 1
    assert taken == {0, 1, 2}
    assert 16 < kept < 48
    assert torch.equal(run(images, exchange, ir=True), normalise(images))


def test_contrast_keeps_each_images_mean_and_scales_what_deviates_from_it() -> None:
    images = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    images[:, :, :2] = 140
    result = run(images, OFF.model_copy(update={"contrast": 0.3}))
    pixels = result * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pixels = 255 * (pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    assert torch.allclose(pixels.mean((1, 2, 3)), torch.full((50,), 120.0), atol=0.01)
    factors = (pixels[:, 0, 0, 0] - 120) / 20
    assert 0.7 <= factors.min() < 0.8
    assert 1.2 < factors.max() <= 1.3
