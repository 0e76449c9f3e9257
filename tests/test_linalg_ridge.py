"""ridge and ridge_ex: every route against least squares of the augmented system."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch import linalg, reference
from backmatch.errors import NonFiniteError, NotPositiveDefiniteError
from backmatch.linalg import _library
from backmatch.linalg import ridge as ridge_function
from backmatch.linalg._ridge_routes import dual, primal
from backmatch.linalg.ridge import ridge_ex

pytestmark = pytest.mark.usefixtures("two_threads")

dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (16, 16), (33, 31), (17, 64), (128, 65)]


def augmented(Z, r, s, damping):
    """numpy's least squares of [diag(s) Z; sqrt(damping) I] d = [r; 0]; rank-revealing at 0."""
    J = Z if s is None else s[:, None] * Z
    if damping == 0:
        return np.linalg.pinv(J, rcond=np.sqrt(max(J.shape) * np.finfo(float).eps)) @ r
    stacked = np.vstack([J, np.sqrt(damping) * np.eye(Z.shape[1])])
    return np.linalg.lstsq(stacked, np.concatenate([r, np.zeros(Z.shape[1])]), rcond=None)[0]


def augmented_all(Z, R, slopes, damping):
    Z, R = Z.double().numpy(), R.double().numpy()
    S = [None] * len(R) if slopes is None else slopes.double().numpy()
    shifts = np.broadcast_to(np.asarray(damping, dtype=float), len(R))
    rows = [augmented(Z, r, s, d) for r, s, d in zip(R, S, shifts, strict=True)]
    return np.array(rows).reshape(len(R), Z.shape[1])


def problem(m, n, batch, dtype=torch.float64, slopes="relu", seed=0):
    Z, R = lc.normal(m, n, dtype=dtype, seed=seed), lc.normal(batch, m, dtype=dtype, seed=seed + 1)
    if slopes is None:
        return Z, R, None
    S = lc.relu_like(batch, m, seed=seed + 2)
    if slopes == "smooth":
        S = lc.normal(batch, m, seed=seed + 2)
    return Z, R, S.to(dtype)


def assert_close(d, expected, dtype, amplification=1.0):
    """Error relative to the largest entry, eps times what the damping lets rounding grow."""
    limit = 2e3 * torch.finfo(dtype).eps * amplification
    error = np.abs(d.double().numpy() - expected).max(initial=0)
    assert error <= limit * max(1.0, np.abs(expected).max(initial=0))


@dtypes
@pytest.mark.parametrize("slopes", [None, "relu", "smooth"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_ridge_damped(m, n, slopes, dtype):
    Z, R, S = problem(m, n, 6, dtype, slopes, seed=m + n)
    for damping in (0.3, lc.normal(6, dtype=dtype).abs() + 0.1):
        d = linalg.ridge(Z, R, slopes=S, damping=damping)
        assert d.shape == (6, n)
        assert d.is_contiguous()
        expected = augmented_all(Z, R, S, damping)
        condition = float(torch.linalg.matrix_norm(Z.double(), ord=2)) ** 2 / 0.1
        assert_close(d, expected, dtype, max(1.0, condition / 100))
        oracle = reference.ridge(
            Z.double().numpy(),
            R.double().numpy(),
            slopes=None if S is None else S.double().numpy(),
            damping=np.asarray(damping, dtype=float),
        )
        np.testing.assert_allclose(expected, oracle, rtol=1e-9, atol=1e-11)


@dtypes
@pytest.mark.parametrize("slopes", [None, "relu", "smooth"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_ridge_undamped_is_the_minimum_norm(m, n, slopes, dtype):
    Z, R, S = problem(m, n, 4, dtype, slopes, seed=m + n)
    d, info, rank = ridge_ex(Z, R, slopes=S, damping=0.0)
    assert not info.any()
    J = Z.double().expand(4, m, n) if S is None else (S.unsqueeze(-1) * Z).double()
    cut = float(np.sqrt(max(m, n) * torch.finfo(dtype).eps))
    sigma = torch.linalg.svdvals(J)
    assert torch.equal(rank, (sigma > cut * sigma[:, :1]).sum(-1))
    expected = (torch.linalg.pinv(J, rtol=cut) @ R.double().unsqueeze(-1)).squeeze(-1).numpy()
    smallest = torch.where(sigma > cut * sigma[:, :1], sigma, torch.inf).amin(-1)
    condition = float((sigma[:, 0] / smallest).max())
    assert_close(d, expected, dtype, condition**2)
    assert torch.equal(linalg.ridge(Z, R, slopes=S, damping=0.0), d)


def test_rank_deficient_rows_and_rcond():
    Z = lc.normal(12, 3) @ lc.normal(3, 8, seed=1)
    R, S = lc.normal(5, 12, seed=2), lc.relu_like(5, 12, seed=3)
    S[4] = 0
    d, info, rank = ridge_ex(Z, R, slopes=S, damping=0.0)
    assert rank.tolist() == [3, 3, 3, 3, 0]
    assert not info.any()
    assert torch.equal(d[4], torch.zeros(8, dtype=d.dtype))
    assert_close(d, augmented_all(Z, R, S, 0.0), d.dtype, 10)
    diagonal = torch.diag(torch.tensor([10.0, 0.5, 1.0]).double())
    d = linalg.ridge(diagonal, torch.ones(3).double(), damping=0.0, rcond=0.05)
    torch.testing.assert_close(d, torch.tensor([0.1, 0.0, 1.0]).double())


def test_group_shares_the_largest_singular_value():
    Z, R = torch.eye(2).double(), torch.ones(4, 2).double()
    S = torch.tensor([[100.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.5]]).double()
    d, _, rank = ridge_ex(Z, R, slopes=S, damping=0.0, rcond=0.1, group=2)
    assert rank.tolist() == [1, 0, 2, 2]
    assert d[:2].tolist() == [[0.01, 0.0], [0.0, 0.0]]
    _, _, alone = ridge_ex(Z, R, slopes=S, damping=0.0, rcond=0.1)
    assert alone.tolist() == [1, 2, 2, 2]


@dtypes
@pytest.mark.parametrize("slopes", [None, "relu", "smooth"])
@pytest.mark.parametrize(("m", "n"), [(5, 9), (12, 5)])
def test_damped_and_undamped_systems_together(m, n, slopes, dtype):
    Z, R, S = problem(m, n, 6, dtype, slopes)
    damping = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0], dtype=dtype)
    if S is not None:
        S[3] = 0
    d, info, rank = ridge_ex(Z, R, slopes=S, damping=damping)
    assert rank is None
    assert not info.any()
    for i in range(6):
        s = None if S is None else S[i : i + 1]
        one = linalg.ridge(Z, R[i : i + 1], slopes=s, damping=float(damping[i]))
        torch.testing.assert_close(d[i : i + 1], one, rtol=1e-4, atol=1e-5)
    assert_close(d, augmented_all(Z, R, S, damping), dtype, 100)


@dtypes
@pytest.mark.parametrize("slopes", [None, "relu"])
@pytest.mark.parametrize(
    ("m", "n", "batch"), [(0, 3, 2), (3, 0, 2), (3, 4, 0), (0, 0, 0), (0, 3, 0)]
)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_nothing_to_solve(m, n, batch, slopes, damping, dtype):
    Z, R, S = problem(m, n, batch, dtype, slopes)
    d, info, rank = ridge_ex(Z, R, slopes=S, damping=damping)
    assert not rank.any()
    assert torch.equal(d, torch.zeros(batch, n, dtype=dtype))
    assert torch.equal(info, torch.zeros(batch, dtype=torch.int32))
    assert torch.equal(linalg.ridge(Z, R, slopes=S, damping=damping), d)


@pytest.mark.parametrize(
    ("z", "r", "s", "damping", "lead"),
    [
        ((), (), None, (), ()),
        ((), (), (), (), ()),
        ((), (), (4,), (), (4,)),
        ((), (4,), (), (4,), (4,)),
        ((), (2, 4), None, (2, 1), (2, 4)),
        ((2,), (4,), None, (), (2, 4)),
        ((2,), (2, 4), (4,), (2, 4), (2, 4)),
        ((2,), (1,), None, (2, 1), (2, 1)),
        ((3, 1), (2, 4), (1,), (), (3, 2, 4)),
        ((0,), (4,), None, (), (0, 4)),
        ((2,), (0,), None, (), (2, 0)),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_ridge_broadcasts(z, r, s, damping, lead, zero):
    Z, R = lc.normal(*z, 6, 4), lc.normal(*r, 6, seed=1)
    S = None if s is None else lc.normal(*s, 6, seed=2)
    shift = lc.normal(*damping, seed=3).abs() * (not zero)
    d = linalg.ridge(Z, R, slopes=S, damping=shift)
    assert d.shape == (*lead, 4)
    ones = torch.ones(6).double()
    J = (Z.unsqueeze(-3) if z else Z) * (ones if S is None else S).unsqueeze(-1)
    J = J.expand(*lead, 6, 4)
    right = (J.mT @ R.unsqueeze(-1)).squeeze(-1)
    normal = J.mT @ J + shift.expand(lead)[..., None, None] * torch.eye(4).double()
    expected = torch.linalg.solve(normal, right.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(d, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", lc.LAYOUTS)
@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize(("m", "n"), [(7, 12), (40, 5)])
def test_ridge_layouts(layout, damping, m, n):
    Z, R, S = problem(m, n, 5)
    view = lc.LAYOUTS[layout]
    before = [value.clone() for value in (Z, R, S)]
    for slopes in (None, S):
        d = linalg.ridge(
            view(Z), view(R), slopes=None if slopes is None else view(slopes), damping=damping
        )
        expected = linalg.ridge(Z, R, slopes=slopes, damping=damping)
        torch.testing.assert_close(d, expected, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip((Z, R, S), before, strict=True))


@dtypes
@pytest.mark.parametrize(("m", "n"), [(9, 4), (6, 6), (5, 12), (40, 33)])
def test_primal_is_dual(m, n, dtype):
    Z, R, S = problem(m, n, 7, dtype, "smooth")
    damping = lc.normal(7, dtype=dtype, seed=9).abs() + 0.5
    by_primal, by_dual = primal(Z, R, S, damping)[0], dual(Z, R, S, damping)[0]
    condition = float(torch.linalg.matrix_norm(Z.double(), ord=2)) ** 2
    assert_close(by_primal, by_dual.double().numpy(), dtype, condition / 10)


@dtypes
def test_tiny_damping_does_not_take_the_singular_dual(dtype):
    """65 columns, about 64 of 128 rows active: the dual matrix of some units is singular."""
    Z, R, S = problem(128, 65, 20, dtype)
    damping = 1e-9 if dtype == torch.float64 else 1e-4
    d = linalg.ridge(Z, R, slopes=S, damping=damping)
    expected = augmented_all(Z, R, S, damping)
    J = (S.unsqueeze(-1) * Z).double()
    residual = (J @ d.double().unsqueeze(-1)).squeeze(-1) - R.double()
    gradient = (J.mT @ residual.unsqueeze(-1)).squeeze(-1) + damping * d.double()
    scale = float(torch.linalg.matrix_norm(J, ord=2).max() ** 2) * np.abs(expected).max()
    assert float(gradient.abs().max()) <= 100 * torch.finfo(dtype).eps * scale


@dtypes
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("slopes", ["relu", None])
def test_chunks_and_failed_allocations_do_not_change_bits(monkeypatch, slopes, damping, dtype):
    Z, R, S = problem(60, 8, 12, dtype, slopes)
    whole = ridge_ex(Z, R, slopes=S, damping=damping, group=2)
    monkeypatch.setattr(_library, "WORKSPACE_BYTES", 1)
    chunked = ridge_ex(Z, R, slopes=S, damping=damping, group=2)
    assert all(a is b or torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_in_chunks_halves_after_a_failed_allocation():
    done = []

    def work(part):
        size = part.stop - part.start
        if size > 4:
            if size > 12:
                torch.empty(10**15)
            raise MemoryError
        done.append((part.start, part.stop))

    _library.in_chunks(25, 1, work, multiple=2)
    assert all(start % 2 == 0 for start, _ in done)
    assert [i for a, b in done for i in range(a, b)] == list(range(25))

    def hopeless(part):
        raise MemoryError("one system does not fit")

    with pytest.raises(MemoryError, match="does not fit"):
        _library.in_chunks(8, 1, hopeless)

    def broken(part):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        _library.in_chunks(8, 1, broken)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("slopes", [None, "relu"])
@pytest.mark.parametrize(("m", "n"), [(5, 9), (30, 4)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_inputs_are_named(m, n, slopes, damping, bad):
    Z, R, S = problem(m, n, 4, slopes=slopes)
    R[1, 2] = bad
    if S is not None:
        S[1, 2] = 1.0
    d, info, _ = ridge_ex(Z, R, slopes=S, damping=damping)
    assert not d[1].isfinite().any()
    assert d[[0, 2, 3]].isfinite().all()
    assert not info[[0, 2, 3]].any()
    with pytest.raises(NonFiniteError, match="R has 1 non-finite"):
        linalg.ridge(Z, R, slopes=S, damping=damping)
    R[1, 2] = 0.0
    if S is not None:
        S[3, 0] = bad
        d, info, _ = ridge_ex(Z, R, slopes=S, damping=damping)
        assert info.ne(0).tolist() == [False, False, False, True]
        assert d[3].isnan().all()
        with pytest.raises(NonFiniteError, match="slopes has 1 non-finite"):
            linalg.ridge(Z, R, slopes=S, damping=damping)
        S[3, 0] = 1.0
    Z[0, 0] = bad
    with pytest.raises(NonFiniteError, match="Z has 1 non-finite"):
        linalg.ridge(Z, R, slopes=S, damping=damping)


@pytest.mark.parametrize("wide", [False, True])
def test_lost_damping_is_reported(wide):
    """1 + 1e-12 rounds to 1 in float32, the matrix of ones is singular."""
    Z = torch.ones(2, 4) if wide else torch.ones(4, 2)  # 4 has an exact square root
    d, info, _ = ridge_ex(Z, torch.ones(4, Z.shape[0]), slopes=None, damping=1e-12)
    assert info.tolist() == [2, 2, 2, 2]
    assert d.isnan().all()
    with pytest.raises(NotPositiveDefiniteError, match=r"the normal matrix .* raise damping"):
        linalg.ridge(Z, torch.ones(4, Z.shape[0]), damping=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    batch=st.integers(1, 6),
    density=st.floats(0.0, 1.0),
    damping=st.floats(1e-3, 1e3),
    sloped=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_gradient_vanishes_at_the_minimiser(m, n, batch, density, damping, sloped, seed):
    Z, R, S = problem(m, n, batch, slopes="smooth" if sloped else None, seed=seed)
    if S is not None:
        S = S * (torch.rand(batch, m, generator=lc.generator(seed)) < density)
    d = ridge_function(Z, R, slopes=S, damping=damping)
    J = Z.expand(batch, m, n) if S is None else S.unsqueeze(-1) * Z
    residual = (J @ d.unsqueeze(-1)).squeeze(-1) - R
    gradient = (J.mT @ residual.unsqueeze(-1)).squeeze(-1) + damping * d
    size = float(torch.linalg.matrix_norm(J).max()) + damping**0.5
    amplified = 1 + size**2 / damping  # the dual form solves for y, of size |r| / damping
    limit = 300 * torch.finfo(d.dtype).eps * amplified * size * float(R.norm() + 1)
    assert float(gradient.abs().max()) <= limit
