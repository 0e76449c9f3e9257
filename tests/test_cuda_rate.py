"""The loops that measure what a device gives at most: they compute what they claim to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_host_library import CudaHost, Device

from backmatch import _C

DEVICE = Device(multiprocessors=1)
THREADS, CHAINS, TILES = 8 * 256, 8, 4
REPEATS = [0, 1, 11]  # 8 steps are unrolled

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.build_info()["cuda"]),
    reason="no GPU, or torch or backmatch built without CUDA",
)


def chains(repeats: int) -> np.ndarray:
    """Sums of the chains of a block's threads, shape (256,).

    x / 2 + 1 / 4 halves the distance to 1 / 2, exactly while the digits suffice.
    """
    start = np.arange(256)[:, None] % 4 + np.arange(CHAINS)
    return (0.5 + (start - 0.5) * 0.5**repeats).sum(1)


def tiles(repeats: int) -> float:
    """A thread's sum: an entry of every product is one over four pairs, 4 a b = 1 / 2."""
    return sum(2 * (tile + repeats / 2) for tile in range(TILES))


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_rate(cuda: CudaHost, dtype: type, repeats: int) -> None:
    sums, flops = cuda.chain_rate("fma_rate", dtype, repeats, DEVICE)
    np.testing.assert_array_equal(sums, np.tile(chains(repeats), THREADS // 256).astype(dtype))
    assert flops == 2 * CHAINS * repeats * THREADS


@pytest.mark.parametrize("repeats", REPEATS)
def test_matrix_rate(cuda: CudaHost, repeats: int) -> None:
    sums, flops = cuda.chain_rate("matrix_rate", np.float64, repeats, DEVICE)
    np.testing.assert_array_equal(sums, np.full(THREADS, tiles(repeats)))
    assert flops == 2 * 8 * 8 * 4 * TILES * repeats * THREADS / 32


@needs_gpu
@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_on_the_gpu(dtype: torch.dtype, repeats: int) -> None:
    name, stream = str(dtype).removeprefix("torch."), torch.cuda.current_stream().cuda_stream
    size = _C.cuda.fma_rate_workspace(name) // dtype.itemsize
    sums = torch.empty(size, dtype=dtype, device="cuda")
    assert _C.cuda.fma_rate(name, repeats, sums.data_ptr(), stream) == 2 * CHAINS * repeats * size
    expected = torch.from_numpy(chains(repeats)).to(dtype).repeat(size // 256)
    assert torch.equal(sums.cpu(), expected)
    if dtype == torch.float64:
        assert _C.cuda.matrix_rate_workspace() == sums.nbytes
        flops = _C.cuda.matrix_rate(repeats, sums.data_ptr(), stream)
        assert flops == 2 * 8 * 8 * 4 * TILES * repeats * size / 32
        assert torch.equal(sums.cpu(), torch.full((size,), tiles(repeats), dtype=dtype))
