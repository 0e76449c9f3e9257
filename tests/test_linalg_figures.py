"""How far the dense solvers can be trusted, in figures: each test counts what it looked at."""

from __future__ import annotations

import linalg_cases as lc
import numpy as np
import pytest
import scipy.linalg
import torch
from native_calls import cg as native_cg
from torch import Tensor

from backmatch import linalg
from backmatch.errors import NonFiniteError

ORDERS = (0, 1, 2, 3, 4, 5, 10, 31, 32, 33, 50, 63, 64, 65, 127, 128, 129, 256)
BATCHES = ((), (0,), (1,), (7,), (3, 0, 2))
dtypes = pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)


def potrf(A: Tensor) -> int:
    """LAPACK's ``info`` of one matrix."""
    routine = {torch.float32: scipy.linalg.lapack.spotrf, torch.float64: scipy.linalg.lapack.dpotrf}
    return int(routine[A.dtype](A.numpy(), lower=1)[1])


#: LAPACK's positive definite test matrices (xCHKPO): condition number, and scale as an exponent of
#: two from the middle (0) to the smallest and largest that the test uses (-1, 1).
TYPES = {
    "diagonal": (2.0, 0),
    "well": (2.0, 0),
    "root": (None, 0),
    "ill": (None, 0),
    "near-underflow": (2.0, -1),
    "near-overflow": (2.0, 1),
}


def lapack_type(name: str, lead: tuple[int, ...], n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Matrices of one of :data:`TYPES`; "ill" leaves room for the rounding of n numbers."""
    info = torch.finfo(dtype)
    condition, side = TYPES[name]
    if condition is None:
        condition = 0.1 / info.eps / (1 if name == "root" else max(n, 1))
        condition = condition**0.5 if name == "root" else condition
    if name == "diagonal":
        A = torch.diag_embed(1 + lc.normal(*lead, n, seed=seed).abs()).to(dtype)
    else:
        A = lc.spd(*lead, n, condition=condition, dtype=dtype, seed=seed)
    edge = 0.25 * info.tiny / info.eps
    return A * 2.0 ** (-side * int(np.log2(edge)))


def worst_ratio(A: Tensor, X: Tensor, B: Tensor) -> float:
    """:func:`lc.residual_ratio` with A and B scaled into the middle of float64 first."""
    largest = float(A.abs().max()) if A.numel() else 1.0
    scale = 2.0 ** -float(np.floor(np.log2(largest)))
    return lc.residual_ratio(A.double() * scale, X, B.double() * scale)


@dtypes
@pytest.mark.parametrize("name", TYPES)
def test_residual_ratio_below_30_on_over_2000_matrices(name, dtype):
    """13,836 matrices, 1,836 of them outside the batches of 1000; four numbers of columns."""
    count = 0
    for n in ORDERS:
        for lead in (*BATCHES, *([(1000,)] if n == 3 else [])):
            A = lapack_type(name, lead, n, dtype, seed=n)
            for k in (0, 1, 2, 15):
                B = (A.double() @ lc.normal(*lead, n, k, seed=k)).to(dtype)
                X, info = linalg.spd_solve_ex(A, B)
                assert X.shape == B.shape
                assert info.shape == lead
                assert not info.any()
                assert worst_ratio(A, X, B) < lc.RESIDUAL_LIMIT
            count += A.shape[:-2].numel() * (n > 0)
    assert count == 17 * 9 + 1000
    assert len(TYPES) * len(lc.DTYPES) * count == 13836


@dtypes
def test_info_is_potrfs_on_over_500_bad_matrices(dtype):
    """Zero rows and columns (xCHKPO's), shifted pivots, indefinite ones; good ones in between."""
    count = 0
    for n in ORDERS[1:]:
        places = sorted({0, n // 3, n // 2, n - 1})
        A = lc.spd(1 + 4 * len(places), n, condition=10.0, dtype=dtype, seed=n)
        for i, place in enumerate(places):
            zero, shift, cross, flipped = A[4 * i : 4 * i + 4]
            zero[place, :], zero[:, place] = 0, 0
            shift[place, place] -= 2
            cross[-1, place], cross[place, -1] = 3, 3
            flipped[place:, place:] *= -1
        X, info = linalg.spd_solve_ex(A, lc.normal(len(A), n, 1, dtype=dtype, seed=1))
        expected = [potrf(a) for a in A]
        assert info.tolist() == expected
        bad = info != 0
        assert bad[0::4][: len(places)].all()
        assert not bad[-1]
        assert X[bad].isnan().all()
        assert X[~bad].isfinite().all()
        count += int(bad.sum())
    assert count >= 230  # in each dtype


def test_info_counts_500_bad_matrices_of_one_kind_in_one_call():
    """Pivots drawn at random, batch 300, both dtypes: the status lands at its own system."""
    for dtype in lc.DTYPES:
        pivots = torch.randint(0, 21, (300,), generator=lc.generator(0))
        A = lc.spd(300, 20, condition=4.0, dtype=dtype)
        bad = pivots > 0
        A[bad, pivots[bad] - 1, pivots[bad] - 1] -= 2
        _, info = linalg.spd_solve_ex(A, torch.ones(300, 20, 1, dtype=dtype))
        assert info.tolist() == pivots.tolist() == [potrf(a) for a in A]
        assert int(bad.sum()) >= 250


@dtypes
def test_nan_never_gives_info_0_and_leaves_its_neighbours_bits_alone(dtype):
    """Every place of the lower triangle up to order 9, random ones above: over 1,000 matrices."""
    count = 0
    for n in (*range(1, 10), 16, 17, 33, 64, 65, 129):
        rows, columns = torch.tril_indices(n, n)
        chosen = torch.randperm(len(rows), generator=lc.generator(n))[:45]
        A = lc.spd(2 * len(chosen), n, dtype=dtype, seed=n)
        B = lc.normal(len(A), n, 2, dtype=dtype, seed=1)
        good = linalg.spd_solve(A, B)
        for value in (torch.nan, torch.inf):
            spoiled = A.clone()
            spoiled[torch.arange(len(chosen)) * 2, rows[chosen], columns[chosen]] = value
            X, info = linalg.spd_solve_ex(spoiled, B)
            assert (info[0::2] != 0).all()
            assert X[0::2].isnan().all()
            assert not info[1::2].any()
            assert torch.equal(X[1::2], good[1::2])
            count += len(chosen)
    assert count > 800


@pytest.mark.parametrize("exponent", range(17))
def test_condition_sweep_from_1_to_1e16_is_scipys(exponent):
    """The error grows as LAPACK's does, and a refusal is LAPACK's refusal or its neighbour."""
    n, condition = 24, 10.0**exponent
    A, exact = lc.spd(9, n, condition=condition, seed=exponent), lc.normal(9, n, 3, seed=1)
    B = A @ exact
    X, info = linalg.spd_solve_ex(A, B)
    refused = np.array([potrf(a) for a in A])
    if exponent <= 13:
        assert not info.any()
        assert not refused.any()
    solved = (info == 0).numpy() & (refused == 0)
    theirs = [
        scipy.linalg.cho_solve(scipy.linalg.cho_factor(a, lower=True), b)
        for a, b in zip(A[solved].numpy(), B[solved].numpy(), strict=True)
    ]
    if theirs:
        ours = np.linalg.norm(X[solved].numpy() - exact[solved].numpy())
        lapack = np.linalg.norm(np.stack(theirs) - exact[solved].numpy())
        assert ours <= 10 * lapack + n * 2.3e-16 * np.linalg.norm(exact[solved].numpy())
    assert lc.residual_ratio(A[info == 0], X[info == 0], B[info == 0]) < lc.RESIDUAL_LIMIT
    assert X[info != 0].isnan().all()


def test_minimum_norm_of_200_rank_deficient_systems_is_lstsqs():
    """Through the normal matrix and through ``ridge`` at damping 0."""
    random = np.random.default_rng(0)
    for case in range(200):
        m, n = random.integers(2, 40, 2)
        rank = int(random.integers(1, min(m, n)))
        left, right = random.standard_normal((m, rank)), random.standard_normal((rank, n))
        J = np.linalg.qr(left)[0] @ np.linalg.qr(right.T)[0].T  # singular values 1 and 0
        b = random.standard_normal((m, 2))
        want, _, found, _ = np.linalg.lstsq(J, b, rcond=1e-8)
        assert found == rank
        Jt, bt = torch.from_numpy(J), torch.from_numpy(b)
        X = linalg.min_norm_solve(Jt.mT @ Jt, Jt.mT @ bt)
        d = linalg.ridge(Jt, bt.mT, damping=0.0).mT
        for got in (X, d):
            error = np.abs(got.numpy() - want).max()
            assert error <= 1e-10 * (1 + np.abs(want).max()), case


@dtypes
def test_denormals_and_the_edges_of_overflow(dtype):
    """Powers of two, so that every right answer is exact: 24 scales times 5 orders."""
    info = torch.finfo(dtype)
    lowest, highest = int(np.log2(info.smallest_normal)) - 12, int(np.log2(info.max))
    count = 0
    for exponent in np.linspace(lowest, highest - 5, 24).astype(int):
        for n in (1, 3, 9, 33, 65):
            steps = torch.arange(n) % 4
            diagonal = torch.ldexp(torch.ones(n, dtype=dtype), steps + exponent)
            assert (diagonal > 0).all()
            B = diagonal.unsqueeze(-1) * torch.tensor([[1.0, -3.0]], dtype=dtype)
            X, status = linalg.spd_solve_ex(torch.diag(diagonal), B)
            assert int(status) == 0
            expected = torch.tensor([[1.0, -3.0]], dtype=dtype).expand(n, 2)
            torch.testing.assert_close(X, expected, rtol=4 * info.eps, atol=0.0)
            count += 1
    assert count == 120
    with pytest.raises(NonFiniteError, match="the result"):
        linalg.spd_solve(
            torch.full((1, 1), info.tiny, dtype=dtype), torch.ones(1, 1, dtype=dtype) * 8
        )


def _strided(*order_and_steps: tuple[int, int]):
    """Memory order and step per dimension of a (batch, rows, columns) tensor."""

    def lay_out(value: Tensor) -> Tensor:
        order, steps = zip(*order_and_steps, strict=True)
        extents = [2 + steps[d] * value.shape[d] for d in range(3)]
        memory = torch.full([extents[d] for d in order], torch.nan, dtype=value.dtype)
        view = memory.permute(tuple(np.argsort(order)))
        view = view[tuple(slice(1, None, step) for step in steps)]
        return view[tuple(slice(0, size) for size in value.shape)].copy_(value)

    return lay_out


LAYOUTS = {
    **lc.LAYOUTS,
    "padded rows": _strided((0, 1), (1, 1), (2, 1)),
    "padded columns": _strided((0, 1), (2, 1), (1, 1)),
    "rows outermost": _strided((1, 1), (0, 1), (2, 1)),
    "columns outermost": _strided((2, 1), (0, 1), (1, 1)),
    "batch innermost, transposed": _strided((2, 1), (1, 1), (0, 1)),
    "every third of all": _strided((0, 3), (1, 3), (2, 3)),
    "every other row, transposed": _strided((0, 1), (2, 2), (1, 1)),
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_13_memory_layouts_give_equal_bits(layout, dtype):
    assert len(LAYOUTS) == 13
    change = LAYOUTS[layout]
    for n in (1, 7, 33, 130):
        A, B = lc.spd(4, n, dtype=dtype), lc.normal(4, n, 3, dtype=dtype, seed=1)
        D, R = lc.relu_like(1, 4, n, dtype=dtype), lc.normal(1, 4, n, dtype=dtype, seed=2)
        K = lc.spd(1, n, dtype=dtype)
        for call, operands in (
            (lambda a, b: linalg.spd_solve(a, b, damping=0.5), (A, B)),
            (lambda a, b: linalg.cg(a, b, damping=0.5).x, (A, B)),
            (lambda k, d, r: linalg.scaled_gram_solve(k, d, r, damping=0.5), (K, D, R)),
            (
                lambda z, w: linalg.weighted_gram(z[0], w[0], damping=0.5),
                (B[:1], D.mT.mT[:, :, :n]),
            ),
        ):
            if not torch.equal(call(*map(change, operands)), call(*operands)):
                pytest.fail(f"n = {n}: other bits")


def virtual(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory that the machine lends only where it is touched."""
    try:
        return torch.empty(elements, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no {elements} elements of address space: {error}")


@pytest.mark.parametrize("far", ["batch", "row", "column"])
def test_offsets_beyond_2_to_the_31_elements(far):
    """Views whose last entries lie more than 2^31 elements from their first."""
    n, jump = 5, 2**31 + 64
    memory = virtual(jump + 4096, torch.float32)
    strides = {
        "batch": (jump, n, 1),
        "row": (n, jump // (n - 1), 1),
        "column": (n, 1, jump // (n - 1)),
    }[far]
    A, B = lc.spd(2, n, dtype=torch.float32), lc.normal(2, n, 2, dtype=torch.float32, seed=1)
    spread = memory.as_strided((2, n, n), strides)
    spread.copy_(A)
    assert sum((size - 1) * s for size, s in zip(spread.shape, strides, strict=True)) > 2**31 - 1
    assert torch.equal(linalg.spd_solve(spread, B), linalg.spd_solve(A, B))
    assert torch.equal(linalg.cg(spread, B).x, linalg.cg(A, B).x)
    D, R = lc.relu_like(2, n, dtype=torch.float32), B[..., 0]
    got = linalg.scaled_gram_solve(spread[1], D, R, damping=0.5)
    assert torch.equal(got, linalg.scaled_gram_solve(A[1], D, R, damping=0.5))
    assert torch.equal(linalg.weighted_gram(spread[1], D), linalg.weighted_gram(A[1], D))
    got = linalg.ridge(spread[0], R, slopes=D, damping=0.5)
    torch.testing.assert_close(got, linalg.ridge(A[0], R, slopes=D, damping=0.5))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """2^31 + 2^20 weights, all of them read: sums of ones are exact in float32 up to 2^24."""
    rows, batch = 2**20, 2**11 + 1
    Z, w = torch.ones(rows, 1), torch.ones(rows).expand(batch, rows)
    assert w.numel() > 2**31
    G = linalg.weighted_gram(Z, w)
    assert G.shape == (batch, 1, 1)
    assert torch.equal(G, torch.full_like(G, rows))


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e37])
def test_cg_refuses_a_start_whose_squares_overflow(scale):
    """x stays at its start, the residual tells; no NaN, and the neighbour's bits are untouched."""
    A, B = lc.spd(2, 9, dtype=torch.float32), lc.normal(2, 9, 1, dtype=torch.float32, seed=1)
    start = torch.zeros_like(B)
    plain = native_cg(A, B, torch.zeros(1), 1e-5, 90, start)
    start[0] = scale * B[0]
    x, steps, residual, converged = native_cg(A, B, torch.zeros(1), 1e-5, 90, start)
    assert x.isfinite().all()
    torch.testing.assert_close(x[0], start[0], rtol=1e-6, atol=0.0)
    assert steps[0] == 0
    assert residual[0] == torch.inf
    assert converged.tolist() == [[0], [1]]
    assert torch.equal(x[1], plain[0][1])
    with pytest.raises(NonFiniteError, match="the result"):
        linalg.cg(A, B, x0=start)
