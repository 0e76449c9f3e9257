"""The loops that measure what a device gives at most: they compute what they claim to."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_host_library import CudaHost, Device, build

DEVICE = Device(multiprocessors=1)
THREADS, CHAINS, TILES = 8 * 256, 8, 4


@pytest.fixture(scope="module")
def cuda(request: pytest.FixtureRequest) -> CudaHost:
    return CudaHost(build(request.config.cache.mkdir("cuda_host")))


@pytest.mark.parametrize("repeats", [0, 1, 11])  # 8 steps are unrolled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_rate(cuda: CudaHost, dtype: type, repeats: int) -> None:
    sums, flops = cuda.chain_rate("fma_rate", dtype, repeats, DEVICE)
    start = np.arange(256)[:, None] % 4 + np.arange(CHAINS)
    # x / 2 + 1 / 4 halves the distance to 1 / 2, exactly while the digits suffice.
    expected = (0.5 + (start - 0.5) * 0.5**repeats).sum(1)
    np.testing.assert_array_equal(sums, np.tile(expected, THREADS // 256).astype(dtype))
    assert flops == 2 * CHAINS * repeats * THREADS


@pytest.mark.parametrize("repeats", [0, 1, 11])
def test_matrix_rate(cuda: CudaHost, repeats: int) -> None:
    sums, flops = cuda.chain_rate("matrix_rate", np.float64, repeats, DEVICE)
    # An entry of every product is a sum over four pairs: 4 a b = 1 / 2.
    expected = sum(2 * (tile + repeats / 2) for tile in range(TILES))
    np.testing.assert_array_equal(sums, np.full(THREADS, expected))
    assert flops == 2 * 8 * 8 * 4 * TILES * repeats * THREADS / 32
