"""Random crops and mirror images against a plain loop, and what their draws depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch.training import augmentation, data
from backmatch.training.pixels import Normalization


def plain(images: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Pad, cut, turn over: one image after the other."""
    result = torch.empty_like(images)
    _, channels, height, width = images.shape
    for i, (down, right, mirrored) in enumerate(moves.tolist()):
        padded = torch.zeros(channels, height + 8, width + 8, dtype=images.dtype)
        padded[:, 4:-4, 4:-4] = images[i]
        cut = padded[:, down : down + height, right : right + width]
        result[i] = torch.flip(cut, [2]) if mirrored else cut
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(81 * 2, 3, 32, 32), (5, 1, 8, 5), (1, 4, 1, 1), (0, 3, 4, 4)])
def test_move_is_the_plain_loop(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, shape, generator=generator).to(dtype)
    every = list(itertools.product(range(9), range(9), range(2)))  # all there are
    moves = torch.tensor(every)[: shape[0]] if shape[0] != 5 else torch.tensor(every)[::40]
    before = images.clone()
    moved = augmentation.move(images, moves)
    assert torch.equal(moved, plain(images, moves))
    assert moved.is_contiguous()
    assert moved.dtype == dtype
    assert torch.equal(images, before)


@given(
    st.integers(0, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_move_of_any_shape(count: int, channels: int, height: int, width: int, seed: int) -> None:
    images = torch.rand(count, channels, width, height).transpose(2, 3)  # strided
    moves = augmentation.draw(seed, 0, count)
    assert torch.equal(augmentation.move(images, moves), plain(images, moves))


def test_draws_are_uniform_and_independent() -> None:
    moves = augmentation.draw(0, 0, 50_000).numpy()
    every = np.ravel_multi_index(tuple(moves.T), (9, 9, 2))
    counts = np.bincount(every, minlength=162)
    expected = 50_000 / 162
    # Chi-squared with 161 degrees of freedom: 161 + 5 sqrt(322) is beyond any luck.
    assert ((counts - expected) ** 2 / expected).sum() < 161 + 5 * 322**0.5
    assert np.abs(np.corrcoef(moves.T) - np.eye(3)).max() < 0.02
    assert abs(np.corrcoef(every[1:], every[:-1])[0, 1]) < 0.02  # neighbours


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    first = augmentation.draw(3, 2, 100)
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    assert torch.equal(augmentation.draw(3, 2, 100), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augmentation.draw(3, 2, 40), first[:40])
    for other in (augmentation.draw(3, 1, 100), augmentation.draw(2, 2, 100)):
        assert not torch.equal(other, first)


def images(count: int = 70) -> data.Dataset:
    x = torch.randint(0, 256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(1)).byte()
    y = torch.arange(count)
    scale = Normalization((100.0, 90.0, 80.0), (50.0, 60.0, 70.0), torch.float64)
    return data.Dataset(x, y, x[:2], y[:2], count, scale)


def epoch(size: int, start: int = 0, number: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    given = list(
        data.batches(images(), batch_size=size, seed=1, epoch=number, start=start, augment=True)
    )
    return torch.cat([x for x, _ in given]), torch.cat([y for _, y in given])


def test_batches_are_moved_normalized_and_can_be_taken_up_anywhere() -> None:
    x, y = epoch(14)
    held = images()
    scale = held.normalization
    assert scale is not None
    moves = augmentation.draw(1, 4, 70)
    assert torch.equal(x, scale(plain(held.x_train[y], moves)))
    for start in range(6):
        if start < 5:
            later, labels = epoch(14, start)
            assert torch.equal(later, x[14 * start :])
            assert torch.equal(labels, y[14 * start :])
    assert torch.equal(epoch(7)[0], x)  # whatever the batch size
    assert not torch.equal(epoch(14, number=5)[0], x)


def test_no_batch_touches_the_global_generator() -> None:
    state = torch.get_rng_state()
    epoch(14)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_augmentation_only_normalized() -> None:
    held = images()
    for x, y in data.batches(held, batch_size=14, seed=1, epoch=4, start=0):
        assert torch.equal(x, held.inputs(held.x_train[y]))
