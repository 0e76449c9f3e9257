"""weighted_gram at every SIMD level: both of its ways, which rows it reads, bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_calls import DTYPES, SIZES, name, random_slopes, random_tensor, weighted_gram
from torch import Tensor

pytestmark = pytest.mark.usefixtures("level", "two_threads")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name)


def assert_close(G: Tensor, Z: Tensor, w: Tensor, damping: Tensor) -> None:
    """Against float64 einsum: every entry is a sum of m products."""
    (m, n), rows, weights = Z.shape, Z.double().numpy(), w.double().numpy()
    want = np.einsum("mi,bm,mj->bij", rows, weights, rows, optimize=True)
    size = np.einsum("mi,bm,mj->bij", abs(rows), abs(weights), abs(rows), optimize=True)
    shift = damping.double().numpy()[:, None, None] * np.eye(n)
    bound = (m + 4) * torch.finfo(G.dtype).eps * (size + abs(shift))
    assert (abs(G.double().numpy() - want - shift) <= bound).all()
    assert torch.equal(G, G.mT)


@dtypes
@pytest.mark.parametrize("n", SIZES)
def test_matches_numpy(n: int, dtype: torch.dtype) -> None:
    damping = random_tensor(5, dtype=dtype)
    for m in (0, 1, 7, 33, 300):
        Z, w = random_tensor(m, n, dtype=dtype), random_slopes(5, m, dtype)
        w[0].clamp_(min=0)
        assert_close(weighted_gram(Z, w, damping), Z, w, damping)


@dtypes
def test_every_order_and_batch(dtype: torch.dtype) -> None:
    """All tails: of a vector of columns, of a block of pairs, of a group of systems."""
    for n in (*range(1, 71), 79, 80, 81, 127, 128):
        batch, m = n % 13 + 1, (n * 37) % 200 + 1
        Z, w = random_tensor(m, n, dtype=dtype), random_tensor(batch, m, dtype=dtype, seed=2)
        damping = random_tensor(batch, dtype=dtype, seed=3)
        assert_close(weighted_gram(Z, w, damping), Z, w, damping)


@dtypes
@pytest.mark.parametrize("n", [5, 37, 65, 90])
def test_skips_rows_and_keeps_bits(n: int, dtype: torch.dtype) -> None:
    batch, m = 23, 257
    Z, w = random_tensor(m, n, dtype=dtype), random_slopes(batch, m, dtype)
    Z[5] = float("nan")
    w[:, 5] = 0.0
    damping = torch.full((1,), 0.5, dtype=dtype)
    torch.set_num_threads(2)
    G = weighted_gram(Z, w, damping)
    assert G.isfinite().all()
    torch.set_num_threads(1)
    strided = torch.zeros(2 * m, 3 * n, dtype=dtype)[::2, ::3].copy_(Z)
    for rows, weights in ((Z, w), (Z.T.contiguous().T, w.T.contiguous().T), (strided, w)):
        assert torch.equal(weighted_gram(rows, weights, damping), G)
    for part in (slice(0, 1), slice(3, 12), slice(22, 23)):
        assert torch.equal(weighted_gram(Z, w[part], damping), G[part])
    assert torch.equal(weighted_gram(Z, w[4:5].expand(batch, m), damping)[7], G[4])
    Z[5] = 1.0
    assert torch.equal(weighted_gram(Z, w, damping), G)


@dtypes
@pytest.mark.parametrize("value", ["nan", "inf", "huge"])
def test_rows_without_finite_products_stay_with_their_systems(
    value: str, dtype: torch.dtype
) -> None:
    """A row that holds NaN, Inf or a number whose square overflows, in some systems at weight 0."""
    batch, m, n = 12, 40, 19
    Z, w = random_tensor(m, n, dtype=dtype), random_tensor(batch, m, dtype=dtype, seed=2)
    w[::2, 7] = 0.0
    damping = torch.zeros(1, dtype=dtype)
    clean = weighted_gram(Z, w, damping)
    Z[7, 3] = -(torch.finfo(dtype).max ** 0.9) if value == "huge" else float(value)
    G = weighted_gram(Z, w, damping)
    assert torch.equal(G[::2], clean[::2])
    assert not G[1::2, 3, 3].isfinite().any()
    others = torch.arange(n) != 3
    assert G[1::2][:, others][:, :, others].isfinite().all()


@dtypes
def test_huge_rows_with_tiny_weights_are_exact(dtype: torch.dtype) -> None:
    """(w z) z is in range where z z is not."""
    huge = torch.finfo(dtype).max ** 0.75
    Z = torch.full((3, 4), huge, dtype=dtype)
    w = torch.full((2, 3), 1.0 / huge, dtype=dtype)
    G = weighted_gram(Z, w, torch.zeros(1, dtype=dtype))
    torch.testing.assert_close(G, torch.full_like(G, 3 * huge), rtol=1e-5, atol=0.0)


@dtypes
@pytest.mark.parametrize("n", [9, 48, 64])
def test_sparse_and_full_weights_agree(n: int, dtype: torch.dtype) -> None:
    """Systems with few weights go by rows, the others by pairs: same numbers to rounding."""
    m = 150
    Z, w = random_tensor(m, n, dtype=dtype), random_tensor(2, m, dtype=dtype, seed=2)
    w[0, 10:] = 0.0
    w = torch.cat([w, w[:1]])
    w[2, 10:] = torch.finfo(dtype).tiny  # changes the way taken, not the numbers
    damping = torch.zeros(3, dtype=dtype)
    assert_close(weighted_gram(Z, w, damping), Z, w, damping)
