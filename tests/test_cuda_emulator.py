"""The block emulator itself: it sees planted faults and the loss of any barrier of the kernels."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from cuda_exercises import EXERCISES
from cuda_host_library import KERNELS, CudaHost, Device, FindingError

BARRIER = re.compile(r"\b(sync_(block|warp|group<[\w:]+>)|wait_for_copies)\(\);")
FAULTS = [
    "",
    "race|uninitialised",
    "deadlock: 63 threads wait for the block, 0 for their warp, 1 have ended",
    "race|uninitialised",
    "uninitialised",
    "out of bounds",
    "write to an input",
    "race at .* of out",
    "address not a multiple of 8",
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_planted_faults_are_seen(cuda, fault, seed):
    source = np.arange(192, dtype=np.int32).reshape(3, 64)
    if fault == 0:
        reverse = source[:, ::-1].reshape(3, 2, 32)
        expected = (reverse + np.roll(reverse, -1, 2)).reshape(3, 64)
        np.testing.assert_array_equal(cuda.planted(fault, source, Device(seed)), expected)
        return
    with pytest.raises(FindingError, match=FAULTS[fault]):
        cuda.planted(fault, source, Device(seed))


def test_product_of_the_matrix_units(cuda):
    rng = np.random.default_rng(0)
    A, B = rng.integers(-9, 9, (8, 4)).astype(float), rng.integers(-9, 9, (4, 8)).astype(float)
    np.testing.assert_array_equal(cuda.product(A, B), A @ B)


def test_product_of_the_matrix_units_in_bf16(cuda):
    """Exact on small numbers; a sum that does not fit a float is cut off."""
    rng = np.random.default_rng(0)
    A, B = rng.integers(-9, 9, (16, 16)), rng.integers(-9, 9, (16, 8))
    C = rng.integers(-9, 9, (16, 8))
    np.testing.assert_array_equal(cuda.split_product(A, B, C), A @ B + C)
    large = np.full((16, 8), 2.0**25)
    expected = np.trunc((A @ B + large) / 4) * 4  # 4 between two floats, none of them negative
    below = A @ B + large < 2.0**25
    expected[below] = np.trunc((A @ B + large)[below] / 2) * 2
    np.testing.assert_array_equal(cuda.split_product(A, B, large), expected)


def barriers() -> list[tuple[str, int]]:
    """Every barrier and wait of the kernels: file and line, counted from 1."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if BARRIER.search(line)
    ]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_no_finding_on_the_kernels_as_they_are(cuda, exercise):
    EXERCISES[exercise](cuda)


@pytest.mark.parametrize(("name", "line"), barriers())
def test_every_barrier_is_needed_and_its_loss_is_seen(cuda, name, line):
    """The emulator objects to the kernels without any one of their barriers."""
    with (
        cuda.without_barrier(name, line),
        pytest.raises(FindingError, match=r"race|uninitialised"),
    ):
        exercise_all(cuda, users(name))


def exercise_all(cuda: CudaHost, stems: list[str]) -> None:
    for stem in stems:
        EXERCISES[stem](cuda)


def users(header: str) -> list[str]:
    """The kernel sources that include a header, directly or not."""
    return [stem for stem in EXERCISES if header in included(KERNELS / f"{stem}.cu")]


def included(path: Path) -> set[str]:
    names = set()
    for name in re.findall(r'#include "([\w.]+)"', path.read_text()):
        names |= {name, *included(KERNELS / name)} if (KERNELS / name).exists() else set()
    return names
