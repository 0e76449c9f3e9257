"""The block emulator itself: it sees planted faults and the loss of any barrier of the kernels."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from cuda_cases import TINY, family, spd_matrices
from cuda_host_library import KERNELS, CudaHost, Device, FindingError, build


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> CudaHost:
    return CudaHost(build(request.config.cache.mkdir("cuda_host")))


BARRIER = re.compile(r"\b(sync_(block|warp)|wait_for_copies)\(\);")
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


def barriers() -> list[tuple[str, int]]:
    """Every barrier and wait of the kernels: file and line, counted from 0."""
    return [
        (path.name, number)
        for path in sorted(KERNELS.glob("*.cuh"))
        for number, line in enumerate(path.read_text().splitlines())
        if BARRIER.search(line)
    ]


def test_no_finding_on_the_kernels_as_they_are(cuda):
    exercise(cuda)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), barriers())
def test_every_barrier_is_needed_and_its_loss_is_seen(tmp_path, name, number):
    """Compiles the kernels without one of their barriers; the emulator must object."""
    kernels = tmp_path / "csrc" / "cuda"
    shutil.copytree(KERNELS, kernels)
    shutil.copy(KERNELS.parent / "kernels.h", kernels.parent)
    source = kernels / name
    lines = source.read_text().splitlines()
    lines[number] = BARRIER.sub(";", lines[number])
    source.write_text("\n".join(lines))
    cuda = CudaHost(build(tmp_path, kernels))
    with pytest.raises(FindingError, match=r"race|uninitialised"):
        exercise(cuda)


def exercise(cuda: CudaHost) -> None:
    """Each kernel, several systems a block, two passes of columns, solved and failed systems."""
    for seed in range(4):
        exercise_in_order(cuda, Device(seed, TINY.shared_bytes, multiprocessors=1))
        exercise_in_order(cuda, Device(seed, multiprocessors=1))


def exercise_in_order(cuda: CudaHost, device: Device) -> None:
    rng = np.random.default_rng(0)
    A, B = spd_matrices(rng, 5, 40, np.float64), rng.standard_normal((5, 40, 40))
    A[0, 20, 20] = A[1, 5, 5] = -100
    _, info = cuda.spd_solve(A, np.zeros(5), B, device)
    assert info.tolist() == [21, 6, 0, 0, 0]
    K, D, R, damping = family(rng, 17, 60, np.float64, density=0.9)
    D[2::3, 20:] = 0  # so that each launch passes some systems over
    damping[:2] = np.nan
    _, info = cuda.scaled_gram_solve(K, D, R, damping, device)
    assert np.flatnonzero(info).tolist() == [0, 1]
