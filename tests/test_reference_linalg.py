"""The reference solvers against NumPy's own routes and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NOT_SPD, SINGULAR, SPD
from hypothesis import given, settings
from hypothesis import strategies as st

from backmatch import reference
from backmatch.errors import NonFiniteError, NotPositiveDefiniteError


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation over the largest entry."""
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-300))


@pytest.mark.parametrize("name", SPD)
def test_spd_solve_agrees_with_numpy(name):
    A, B = SPD[name].make()
    damping = np.linspace(0.0, 0.5, len(A))
    shifted = A + damping[:, None, None] * np.eye(A.shape[-1])
    X = reference.spd_solve(A, B, damping=damping)
    assert relative(shifted @ X, B) < 1e-12
    assert relative(X, np.linalg.solve(shifted, B)) < 1e-15 * 100 * SPD[name].condition


def test_spd_solve_reads_the_lower_triangle_only():
    A, B = SPD["n7-cond1e3"].make()
    spoiled = np.tril(A) + np.triu(np.full_like(A, np.nan), 1)
    assert np.array_equal(reference.spd_solve(spoiled, B), reference.spd_solve(A, B))


def test_spd_solve_broadcasts_batch_dimensions():
    A, B = SPD["batch-1"].make(columns=3)
    B = np.stack([B, 2 * B, -B])  # (3, 1, n, 3) against (1, n, n)
    X = reference.spd_solve(A, B, damping=0.1)
    assert X.shape == (3, 1, 9, 3)
    assert relative(X[1], 2 * X[0]) < 1e-14


@pytest.mark.parametrize("name", NOT_SPD)
def test_spd_solve_names_the_failing_systems_and_pivots(name):
    bad, pivot = NOT_SPD[name]
    A = np.stack([np.eye(3), bad, np.eye(3), bad])
    with pytest.raises(NotPositiveDefiniteError) as caught:
        reference.spd_solve(A, np.ones((4, 3, 1)))
    assert (caught.value.indices, caught.value.pivots) == ([1, 3], [pivot, pivot])


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_non_finite_input_is_an_error(spoil):
    with pytest.raises(NonFiniteError, match="B has 1 non-finite"):
        reference.spd_solve(np.eye(2), [[1.0], [spoil]])
    with pytest.raises(NonFiniteError, match="A has 1 non-finite"):
        reference.min_norm_solve(np.diag([1.0, spoil]), np.ones((2, 1)))


@pytest.mark.parametrize(("n", "k", "batch"), [(0, 2, 3), (3, 0, 3), (3, 2, 0)])
def test_empty_systems_have_empty_answers(n, k, batch):
    A, B = np.tile(np.eye(n), (batch, 1, 1)), np.ones((batch, n, k))
    assert reference.spd_solve(A, B).shape == (batch, n, k)
    assert reference.min_norm_solve(A, B).shape == (batch, n, k)
    assert reference.cg(A, B).x.shape == (batch, n, k)


@pytest.mark.parametrize("name", [*SINGULAR, "n7-cond1e3"])
def test_min_norm_solve_is_the_pseudo_inverse(name):
    A, B = {**SINGULAR, **SPD}[name].make()
    B = B + 1.0  # a part outside the range must not matter
    expected = np.linalg.pinv(A, rcond=1e-10, hermitian=True) @ B
    assert np.abs(reference.min_norm_solve(A, B) - expected).max() < 1e-10


def test_scaled_gram_solve_equals_the_primal_ridge():
    rng = np.random.default_rng(0)
    Z, R = rng.standard_normal((9, 4)), rng.standard_normal((6, 9))
    D = rng.standard_normal((6, 9)) * (rng.random((6, 9)) < 0.6)
    damping = np.linspace(0.1, 2.0, 6)
    dual = reference.scaled_gram_solve(np.tril(Z @ Z.T), D, R, damping=damping) @ Z
    assert relative(dual, reference.ridge(Z, R, slopes=D, damping=damping)) < 1e-12


def test_scaled_gram_solve_without_damping_is_the_minimum_norm_solution():
    rng = np.random.default_rng(1)
    Z, R = rng.standard_normal((9, 4)), rng.standard_normal((6, 9))
    D = (rng.random((6, 9)) < 0.5).astype(float)
    D[0] = 0.0
    X = reference.scaled_gram_solve(Z @ Z.T, D, R, damping=0.0)
    assert not X[D == 0].any()
    for d, r, x in zip(D, R, X, strict=True):
        assert np.abs(x @ Z - np.linalg.pinv(d[:, None] * Z) @ r).max() < 1e-10


def test_weighted_gram_is_its_formula():
    rng = np.random.default_rng(2)
    Z, w = rng.standard_normal((8, 5)), rng.standard_normal((3, 8))
    G = reference.weighted_gram(Z, w, damping=[0.0, 1.0, 2.0])
    expected = np.einsum("ma,bm,mc->bac", Z, w, Z) + np.arange(3)[:, None, None] * np.eye(5)
    assert relative(G, expected) < 1e-14


@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 9), (5, 5), (1, 3), (3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_ridge_solves_its_normal_equations(m, n, masked):
    rng = np.random.default_rng(3)
    Z, R = rng.standard_normal((2, m, n)), rng.standard_normal((2, 6, m))
    S = rng.standard_normal((2, 6, m)) * (rng.random((2, 6, m)) < 0.7) if masked else None
    d = reference.ridge(Z, R, slopes=S, damping=0.3)
    J = np.broadcast_to(Z[:, None], (2, 6, m, n)) * (1.0 if S is None else S[..., None])
    left = np.einsum("abmn,abmk,abk->abn", J, J, d) + 0.3 * d
    assert np.abs(left - np.einsum("abmn,abm->abn", J, R)).max() < 1e-12


def test_ridge_without_damping_is_the_pseudo_inverse_and_cuts_by_rcond():
    Z = np.diag([1.0, 1e-3, 1e-9])
    R = np.ones((1, 3))
    assert reference.ridge(Z, R, damping=0.0).round(6).tolist() == [[1.0, 1000.0, 0.0]]
    assert reference.ridge(Z, R, damping=0.0, rcond=1e-2).round(6).tolist() == [[1.0, 0.0, 0.0]]


def test_tiny_damping_is_not_squared_away():
    # The Gram matrix of this J is singular in float64; the augmented system is not.
    J, damping = np.diag([1.0, 1e-9]), 1e-18
    d = reference.ridge(J, [0.0, 1e-9], damping=damping)
    assert relative(d, np.array([0.0, 0.5])) < 1e-6


@pytest.mark.parametrize("name", ["cond1e1", "cond1e3", "batch-65", "one", "orthonormal"])
def test_cg_converges_to_the_direct_solution(name):
    A, B = SPD[name].make(columns=3)
    result = reference.cg(A, B, damping=1e-2)
    assert result.converged.all()
    assert (result.residual <= 1e-10).all()
    assert relative(result.x, reference.spd_solve(A, B, damping=1e-2)) < 1e-7


def test_cg_needs_as_many_steps_as_distinct_eigenvalues_and_no_more():
    A = np.diag([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    assert reference.cg(A, np.ones((6, 1))).iterations.tolist() == [3]


def test_cg_systems_do_not_touch_each_other():
    A, B = SPD["batch-65"].make(columns=1)
    B[::2] *= 1e6
    together = reference.cg(A, B).x
    alone = np.stack([reference.cg(a, b).x for a, b in zip(A, B, strict=True)])
    assert np.array_equal(together, alone)


def test_cg_with_rtol_zero_runs_exactly_its_steps():
    A, B = SPD["cond1e3"].make(columns=1)
    result = reference.cg(A, B, rtol=0.0, max_steps=5)
    assert (result.iterations == 5).all()
    assert not result.converged.any()


def test_cg_of_zero_is_zero_whatever_the_start():
    result = reference.cg(np.eye(3), np.zeros((3, 1)), x0=np.ones((3, 1)))
    assert not result.x.any()
    assert result.converged.all()
    assert not result.iterations.any()


def test_cg_starts_where_told():
    A, B = SPD["n7-cond1e3"].make(columns=1)
    solution = reference.spd_solve(A, B)
    assert not reference.cg(A, B, rtol=1e-8, x0=solution).iterations.any()


def test_cg_stops_at_negative_curvature():
    result = reference.cg(np.diag([1.0, -1.0]), np.array([[0.0], [1.0]]))
    assert result.iterations.tolist() == [0]
    assert not result.converged.any()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.floats(1e-6, 1e3), st.integers(0, 2**31), st.booleans()
)
def test_primal_equals_dual(m, n, damping, seed, masked):
    rng = np.random.default_rng(seed)
    Z, R = rng.standard_normal((m, n)), rng.standard_normal((3, m))
    S = rng.standard_normal((3, m)) * (rng.random((3, m)) < 0.5 if masked else 1.0)
    primal = reference.ridge(Z, R, slopes=S, damping=damping)
    dual = reference.scaled_gram_solve(Z @ Z.T, S, R, damping=damping) @ Z
    assert np.abs(primal - dual).max() <= 1e-8 * (1 + np.abs(primal).max())
