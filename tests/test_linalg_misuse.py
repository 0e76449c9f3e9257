"""Wrong calls: every message names the argument, what was expected and what came."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from backmatch import linalg

pytestmark = pytest.mark.usefixtures("two_threads")

A = torch.eye(4).repeat(3, 1, 1)
B = torch.ones(3, 4, 2)
K, D, R = torch.eye(4), torch.ones(3, 4), torch.ones(3, 4)
Z, w = torch.ones(5, 4), torch.ones(3, 5)
META = torch.empty(3, 4, 2, device="meta")
COO = torch.eye(4).to_sparse()
with warnings.catch_warnings():  # prototypes, says torch
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.ones(4, 2)] * 3)
    CSR = torch.eye(4).to_sparse_csr()
    QUANTISED = torch.quantize_per_tensor(B, 0.1, 0, torch.qint8)

CASES = [
    # not a tensor, wrong dtype, layout or device
    (lambda: linalg.spd_solve(A.numpy(), B), TypeError, "A must be a torch.Tensor, got ndarray"),
    (lambda: linalg.spd_solve(A, [1.0]), TypeError, "B must be a torch.Tensor, got list"),
    (lambda: linalg.spd_solve_ex(None, B), TypeError, "A must be a torch.Tensor, got NoneType"),
    (
        lambda: linalg.spd_solve(A.half(), B),
        TypeError,
        "A must have dtype float32 or float64, got float16",
    ),
    (
        lambda: linalg.spd_solve(A.long(), B),
        TypeError,
        "A must have dtype float32 or float64, got int64",
    ),
    (
        lambda: linalg.spd_solve(A + 0j, B),
        TypeError,
        "A must have dtype float32 or float64, got complex64",
    ),
    (
        lambda: linalg.spd_solve(A, B.double()),
        TypeError,
        "B must have the dtype of A (float32), got float64",
    ),
    (
        lambda: linalg.spd_solve(COO, B),
        TypeError,
        "A must be a dense (strided) tensor, got layout torch.sparse_coo",
    ),
    (
        lambda: linalg.spd_solve(CSR, B),
        TypeError,
        "A must be a dense (strided) tensor, got layout torch.sparse_csr",
    ),
    (
        lambda: linalg.spd_solve(A, NESTED),
        TypeError,
        "B must be a dense (strided) tensor, got a nested tensor",
    ),
    (
        lambda: linalg.cg(A, NESTED),
        TypeError,
        "B must be a dense (strided) tensor, got a nested tensor",
    ),
    (
        lambda: linalg.ridge(NESTED, R, damping=1),
        TypeError,
        "Z must be a dense (strided) tensor, got a nested tensor",
    ),
    (
        lambda: linalg.min_norm_solve(A, QUANTISED),
        TypeError,
        "B must have dtype float32 or float64, got qint8",
    ),
    (
        lambda: linalg.ridge(Z, w.bfloat16(), damping=1),
        TypeError,
        "R must have dtype float32 or float64, got bfloat16",
    ),
    (
        lambda: linalg.scaled_gram_cg(K, D.numpy(), R, damping=1),
        TypeError,
        "D must be a torch.Tensor, got ndarray",
    ),
    (
        lambda: linalg.weighted_gram(Z.to("meta"), w),
        TypeError,
        "Z must live on a CPU or CUDA device, got meta",
    ),
    (
        lambda: linalg.spd_solve(A, torch.empty(0)),
        ValueError,
        "B must have shape (..., 4, k), got (0,)",
    ),
    (
        lambda: linalg.min_norm_solve(A, torch.tensor(1.0)),
        ValueError,
        "B must have shape (..., 4, k), got ()",
    ),
    (lambda: linalg.spd_solve(A, META), TypeError, "B must live on a CPU or CUDA device, got meta"),
    (
        lambda: linalg.min_norm_solve(A, B.double()),
        TypeError,
        "B must have the dtype of A (float32), got float64",
    ),
    (
        lambda: linalg.scaled_gram_solve(K, D.bool(), R, damping=1),
        TypeError,
        "D must have dtype float32 or float64, got bool",
    ),
    (
        lambda: linalg.scaled_gram_solve(K, D, R.double(), damping=1),
        TypeError,
        "R must have the dtype of K (float32), got float64",
    ),
    (
        lambda: linalg.weighted_gram(Z, w.bool()),
        TypeError,
        "w must have dtype float32 or float64, got bool",
    ),
    (
        lambda: linalg.ridge(Z, w, slopes=w.double(), damping=1),
        TypeError,
        "slopes must have the dtype of Z (float32), got float64",
    ),
    (
        lambda: linalg.ridge(Z, w, slopes=0.5, damping=1),
        TypeError,
        "slopes must be a torch.Tensor, got float",
    ),
    (lambda: linalg.cg("A", B), TypeError, "A must be a torch.Tensor, got str"),
    (lambda: linalg.cg(A, B, x0=0), TypeError, "x0 must be a torch.Tensor, got int"),
    (
        lambda: linalg.cg(A, B, preconditioner="shared"),
        TypeError,
        "preconditioner must be callable or None, got str",
    ),
    # shapes
    (
        lambda: linalg.spd_solve(A[:, :3], B),
        ValueError,
        "A must have shape (..., n, n), got (3, 3, 4)",
    ),
    (lambda: linalg.spd_solve(A[0, 0], B), ValueError, "A must have shape (..., n, n), got (4,)"),
    (
        lambda: linalg.spd_solve(A, B[:, :3]),
        ValueError,
        "B must have shape (..., 4, k), got (3, 3, 2)",
    ),
    (
        lambda: linalg.spd_solve(A, B[0, :, 0]),
        ValueError,
        "B must have shape (..., 4, k), got (4,)",
    ),
    (
        lambda: linalg.spd_solve(A, B[:2]),
        ValueError,
        "B must have leading dimensions that broadcast with (3,), got (2,)",
    ),
    (
        lambda: linalg.spd_solve(A, B, damping=torch.ones(2)),
        ValueError,
        "damping must have leading dimensions that broadcast with (3,), got (2,)",
    ),
    (
        lambda: linalg.min_norm_solve(A, B[:, :3]),
        ValueError,
        "B must have shape (..., 4, k), got (3, 3, 2)",
    ),
    (
        lambda: linalg.scaled_gram_solve(K[:3], D, R, damping=1),
        ValueError,
        "K must have shape (..., n, n), got (3, 4)",
    ),
    (
        lambda: linalg.scaled_gram_solve(K, D[:, :3], R, damping=1),
        ValueError,
        "D must have shape (..., 4), got (3, 3)",
    ),
    (
        lambda: linalg.scaled_gram_solve(K, D, R[:2], damping=1),
        ValueError,
        "R must have leading dimensions that broadcast with (3,), got (2,)",
    ),
    (
        lambda: linalg.scaled_gram_solve(A, D[0], R, damping=1),
        ValueError,
        "D must have shape (..., batch, 4), got (4,)",
    ),
    (
        lambda: linalg.scaled_gram_solve_ex(K, D, R, damping=torch.ones(4)),
        ValueError,
        "damping must have leading dimensions that broadcast with (3,), got (4,)",
    ),
    (
        lambda: linalg.scaled_gram_cg(K, D, R[:, :2], damping=1),
        ValueError,
        "R must have shape (..., 4), got (3, 2)",
    ),
    (
        lambda: linalg.weighted_gram(Z, w[:, :4]),
        ValueError,
        "w must have shape (..., 5), got (3, 4)",
    ),
    (lambda: linalg.weighted_gram(Z[0], w), ValueError, "Z must have shape (..., m, n), got (4,)"),
    (lambda: linalg.ridge(Z, R, damping=1), ValueError, "R must have shape (..., 5), got (3, 4)"),
    (
        lambda: linalg.ridge(Z, w, slopes=w[:2], damping=1),
        ValueError,
        "slopes must have leading dimensions that broadcast with (3,), got (2,)",
    ),
    (lambda: linalg.cg(A, B[:, :3]), ValueError, "A must have shape (..., 3, 3), got (3, 4, 4)"),
    (
        lambda: linalg.cg(A, B, x0=B[:, :, :1]),
        ValueError,
        "x0 must have shape (..., 4, 2), got (3, 4, 1)",
    ),
    (lambda: linalg.cg(A, B[0, 0]), ValueError, "B must have shape (..., n, k), got (2,)"),
    # values
    (
        lambda: linalg.spd_solve(A, B, damping=-1.0),
        ValueError,
        "damping must be finite and >= 0, got -1.0",
    ),
    (
        lambda: linalg.spd_solve(A, B, damping=np.nan),
        ValueError,
        "damping must be finite and >= 0, got nan",
    ),
    (
        lambda: linalg.spd_solve_ex(A, B, damping=np.inf),
        ValueError,
        "damping must be finite and >= 0, got inf",
    ),
    (lambda: linalg.spd_solve(A, B, damping="0.1"), TypeError, "damping must be a number, got str"),
    (lambda: linalg.spd_solve(A, B, damping=True), TypeError, "damping must be a number, got bool"),
    (
        lambda: linalg.spd_solve(A, B, damping=torch.tensor([1.0, -2.0, 0.0])),
        ValueError,
        "damping must be finite and >= 0, got a tensor that holds -2.0",
    ),
    (
        lambda: linalg.ridge(Z, w, damping=torch.tensor([1.0, np.nan, 0.0])),
        ValueError,
        "damping must be finite and >= 0, got a tensor that holds nan",
    ),
    (
        lambda: linalg.cg(A, B, damping=torch.tensor(np.inf)),
        ValueError,
        "damping must be finite and >= 0, got a tensor that holds inf",
    ),
    (
        lambda: linalg.weighted_gram(Z, w, damping=torch.tensor(-1.0)),
        ValueError,
        "damping must be finite and >= 0, got a tensor that holds -1.0",
    ),
    (
        lambda: linalg.scaled_gram_solve(K, D, R, damping=torch.tensor([1, 1, 1])),
        TypeError,
        "damping must have dtype float32 or float64, got int64",
    ),
    (
        lambda: linalg.scaled_gram_cg(K, D, R, damping=torch.ones(3).double()),
        TypeError,
        "damping must have the dtype of K (float32), got float64",
    ),
    (
        lambda: linalg.min_norm_solve(A, B, rcond=-1e-3),
        ValueError,
        "rcond must be finite and >= 0, got -0.001",
    ),
    (
        lambda: linalg.ridge(Z, w, damping=0.0, rcond=np.nan),
        ValueError,
        "rcond must be finite and >= 0, got nan",
    ),
    (lambda: linalg.cg(A, B, rtol=-1.0), ValueError, "rtol must be finite and >= 0, got -1.0"),
    (lambda: linalg.cg(A, B, max_steps=0), ValueError, "max_steps must be at least 1, got 0"),
    (lambda: linalg.cg(A, B, max_steps=2.5), TypeError, "max_steps must be an int, got float"),
    (
        lambda: linalg.scaled_gram_cg(K, D, R, damping=1, preconditioner="jacobi"),
        ValueError,
        "preconditioner must be None, 'shared' or a callable, got 'jacobi'",
    ),
]


def test_there_are_over_50_wrong_calls():
    assert len(CASES) > 50
    assert {error for _, error, _ in CASES} == {TypeError, ValueError}


class Labelled(torch.Tensor):
    """A subclass without behaviour of its own."""


def test_a_plain_subclass_is_a_tensor():
    assert torch.equal(linalg.spd_solve(A, B.as_subclass(Labelled)), linalg.spd_solve(A, B))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_masked_tensor_is_refused():
    """Its hidden entries are unknown to every operator, ours included."""
    masked = torch.masked.masked_tensor(B, torch.ones_like(B, dtype=torch.bool))
    with pytest.raises(TypeError):
        linalg.spd_solve(A, masked)


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[case[2] for case in CASES])
def test_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "call",
    [
        lambda: linalg.scaled_gram_solve(K, D, R),
        lambda: linalg.ridge(Z, w),
        lambda: linalg.scaled_gram_cg(K, D, R),
    ],
)
def test_damping_is_required(call):
    with pytest.raises(TypeError, match="damping"):
        call()


def test_damping_is_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        linalg.spd_solve(A, B, 0.5)


def test_arguments_are_left_as_they_were():
    for value, fresh in ((A, torch.eye(4).repeat(3, 1, 1)), (B, torch.ones(3, 4, 2))):
        assert torch.equal(value, fresh)
