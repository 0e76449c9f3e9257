"""weighted_gram: against einsum and the reference, layouts, memory."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import torch

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)


def exact(Z, w, damping=0.0):
    G = torch.einsum("ia,ji,ib->jab", Z.double(), w.double(), Z.double())
    return (
        G
        + torch.as_tensor(damping, dtype=torch.float64).reshape(-1, 1, 1)
        * torch.eye(Z.shape[1]).double()
    )


def assert_close(G, Z, w, damping=0.0):
    """Every entry is a sum of m products: error m eps sum |z_a w z_b|."""
    size = torch.einsum("ia,ji,ib->jab", *(v.double().abs() for v in (Z, w, Z)))
    limit = (Z.shape[0] + 4) * torch.finfo(G.dtype).eps * (size + float(np.max(damping)))
    assert bool(((G.double() - exact(Z, w, damping)).abs() <= limit).all())
    assert torch.equal(G, G.mT)


@dtypes
@pytest.mark.parametrize("n", lc.SIZES)
@pytest.mark.parametrize("m", [0, 1, 7, 32, 129])
def test_weighted_gram_sizes(m, n, dtype):
    Z, w = lc.normal(m, n, dtype=dtype), lc.normal(3, m, dtype=dtype, seed=1)
    G = linalg.weighted_gram(Z, w, damping=0.5)
    assert G.shape == (3, n, n)
    assert_close(G, Z, w, 0.5)


@dtypes
@pytest.mark.parametrize("batch", [0, 1, 7, 300])
def test_weighted_gram_batches_and_zero_weights(batch, dtype):
    Z, w = lc.normal(20, 9, dtype=dtype), lc.relu_like(batch, 20, dtype=dtype, seed=1)
    damping = lc.normal(batch, dtype=dtype, seed=2).abs()
    G = linalg.weighted_gram(Z, w, damping=damping)
    for i in range(batch):
        assert_close(G[i : i + 1], Z, w[i : i + 1], float(damping[i]))
    oracle = reference.weighted_gram(Z.numpy(), w.numpy(), damping=damping.numpy())
    tolerance = 50 * torch.finfo(dtype).eps
    np.testing.assert_allclose(G.numpy(), oracle, rtol=tolerance, atol=20 * tolerance)


@dtypes
@pytest.mark.parametrize("layout", lc.LAYOUTS)
def test_weighted_gram_layouts_give_equal_bits(layout, dtype):
    Z, w = lc.normal(19, 33, dtype=dtype), lc.normal(5, 19, dtype=dtype, seed=1)
    view = lc.LAYOUTS[layout]
    assert torch.equal(linalg.weighted_gram(view(Z), view(w)), linalg.weighted_gram(Z, w))
    same = linalg.weighted_gram(Z, w[0].expand(4, 19))
    assert torch.equal(same, linalg.weighted_gram(Z, w[0]).expand(4, 33, 33))


def test_weighted_gram_broadcasts():
    Z, w = lc.normal(2, 6, 4), lc.normal(3, 6, seed=1)
    G = linalg.weighted_gram(Z, w, damping=torch.ones(2, 1, dtype=Z.dtype))
    assert G.shape == (2, 3, 4, 4)
    for i in range(2):
        assert_close(G[i], Z[i], w, 1.0)
    assert linalg.weighted_gram(Z[0], w[0]).shape == (4, 4)
    assert linalg.weighted_gram(Z[:0], w).shape == (0, 3, 4, 4)


def test_zero_weight_rows_are_not_read_and_bits_do_not_depend_on_threads():
    Z, w = lc.normal(40, 17), lc.normal(30, 40, seed=1)
    w[:, ::3] = 0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linalg.weighted_gram(Z, w)
    finally:
        torch.set_num_threads(threads)
    Z[::3] = torch.nan
    assert torch.equal(linalg.weighted_gram(Z, w), one)
    assert torch.equal(linalg.weighted_gram(Z, w[11]), one[11])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weighted_gram_nonfinite(bad):
    Z, w = lc.normal(6, 5), lc.normal(3, 6, seed=1)
    with pytest.raises(NonFiniteError, match="w has 1 non-finite"):
        linalg.weighted_gram(
            Z, w.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad).double())
        )
    Z[2, 3] = bad
    with pytest.raises(NonFiniteError, match="Z has 1 non-finite"):
        linalg.weighted_gram(Z, w)
