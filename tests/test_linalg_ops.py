"""The operators as torch sees them: opcheck, derivatives, torch.compile, the missing extension."""

from __future__ import annotations

import linalg_cases as lc
import pytest
import torch

from backmatch import linalg
from backmatch.errors import MissingExtensionError, NotPositiveDefiniteError
from backmatch.linalg import _library

pytestmark = pytest.mark.usefixtures("two_threads")

ops = torch.ops.backmatch
F64 = torch.float64


def spd_arguments(dtype=F64, *, lead=(3,), damping=(3,), grad=True):
    A, B = lc.spd(*lead, 5, dtype=dtype), lc.normal(*lead, 5, 2, dtype=dtype, seed=1)
    shift = lc.normal(*damping, dtype=dtype, seed=2).abs() + 0.1
    return tuple(value.requires_grad_(grad) for value in (A, B, shift))


def family_arguments(dtype=F64):
    Z, D, R = (lc.normal(*s, dtype=dtype, seed=i) for i, s in enumerate([(5, 7), (4, 5), (4, 5)]))
    return Z @ Z.mT, D, R, torch.full((4,), 0.5, dtype=dtype)


def ridge_arguments(dtype=F64, *, slopes=True):
    Z, R = lc.normal(7, 4, dtype=dtype), lc.normal(3, 7, dtype=dtype, seed=1)
    S = lc.normal(3, 7, dtype=dtype, seed=2) if slopes else None
    return Z, R, S, torch.tensor(0.5, dtype=dtype)


def gram_arguments(dtype=F64):
    return lc.normal(6, 4, dtype=dtype), lc.normal(3, 6, dtype=dtype), torch.zeros((), dtype=dtype)


def cg_arguments(dtype=F64):
    return (*spd_arguments(dtype, grad=False), 1e-8 if dtype == F64 else 1e-4, 40)


@pytest.mark.parametrize("dtype", lc.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("spd_solve", spd_arguments),
        ("spd_solve", lambda dtype: (*spd_arguments(dtype, grad=False), True)),
        ("spd_solve", lambda dtype: spd_arguments(dtype, lead=(2, 3), damping=(2, 1))),
        ("spd_solve", lambda dtype: spd_arguments(dtype, lead=(0,), damping=())),
        ("min_norm_solve", lambda dtype: spd_arguments(dtype, grad=False)[:2]),
        ("scaled_gram_solve", family_arguments),
        ("scaled_gram_solve", lambda dtype: (*family_arguments(dtype), True)),
        ("weighted_gram", gram_arguments),
        ("ridge", ridge_arguments),
        ("ridge", lambda dtype: ridge_arguments(dtype, slopes=False)),
        ("cg", cg_arguments),
        ("cg", lambda dtype: (*cg_arguments(dtype), torch.ones(3, 5, 2, dtype=dtype))),
    ],
)
def test_opcheck(name, arguments, dtype):
    results = torch.library.opcheck(getattr(ops, name).default, arguments(dtype))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("a", "b", "damping"),
    [((), (), ()), ((3,), (3,), (3,)), ((), (3,), ()), ((2, 1), (3,), (2, 3)), ((3,), (), (1,))],
)
def test_gradcheck(a, b, damping):
    A = lc.spd(*a, 4, condition=10.0).requires_grad_()
    B = lc.normal(*b, 4, 2, seed=1).requires_grad_()
    shift = (lc.normal(*damping, seed=2).abs() + 0.1).requires_grad_()

    def solve(A, B, shift):
        return linalg.spd_solve(A, B, damping=shift)

    assert torch.autograd.gradcheck(solve, (A, B, shift))
    assert torch.autograd.gradgradcheck(solve, (A, B, shift))


def test_gradient_fills_the_lower_triangle_and_equals_torchs():
    A, B, shift = spd_arguments()
    linalg.spd_solve(A, B, damping=shift).square().sum().backward()
    mine = [value.grad.clone() for value in (A, B, shift)]
    assert torch.equal(mine[0], mine[0].tril())
    for value in (A, B, shift):
        value.grad = None
    full = A.tril() + A.tril(-1).mT + shift[:, None, None] * torch.eye(5, dtype=F64)
    torch.linalg.solve(full, B).square().sum().backward()
    for got, value in zip(mine, (A, B, shift), strict=True):
        torch.testing.assert_close(got, value.grad, rtol=1e-9, atol=1e-11)


def test_only_the_asked_gradients():
    A, B, shift = spd_arguments(grad=False)
    for value in (A, B, shift):
        value.requires_grad_()
        X, info = linalg.spd_solve_ex(A, B, damping=shift)
        assert not info.requires_grad
        X.sum().backward()
        assert value.grad.shape == value.shape
        assert all(v.grad is None for v in (A, B, shift) if v is not value)
        value.grad = None
        value.requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("min_norm_solve", lambda A: linalg.min_norm_solve(A, torch.ones(5, 1, dtype=F64))),
        (
            "scaled_gram_solve",
            lambda A: linalg.scaled_gram_solve(A, A, torch.ones(5, dtype=F64), damping=1.0),
        ),
        ("weighted_gram", lambda A: linalg.weighted_gram(A, torch.ones(5, dtype=F64))),
        ("ridge", lambda A: linalg.ridge(A, torch.ones(5, dtype=F64), damping=1.0)),
        ("cg", lambda A: linalg.cg(A, torch.ones(5, 1, dtype=F64)).x),
    ],
)
def test_backward_through_the_others_is_an_error(name, call):
    A = lc.spd(5).requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"linalg\.{name} is not differentiable"):
        call(A).sum().backward()
    assert A.grad is None


COMPILED = {
    "spd_solve": (
        lambda A, B, d: linalg.spd_solve(A, B, damping=d),
        lambda: spd_arguments(grad=False),
    ),
    "spd_solve_ex": (
        lambda A, B, d: linalg.spd_solve_ex(A, B, damping=d),
        lambda: spd_arguments(grad=False),
    ),
    "spd_solve_number": (
        lambda A, B: linalg.spd_solve(A, B, damping=0.5),
        lambda: spd_arguments(grad=False)[:2],
    ),
    "min_norm_solve": (linalg.min_norm_solve, lambda: spd_arguments(grad=False)[:2]),
    "scaled_gram_solve": (
        lambda K, D, R, d: linalg.scaled_gram_solve(K, D, R, damping=d),
        family_arguments,
    ),
    "scaled_gram_solve_ex": (
        lambda K, D, R, d: linalg.scaled_gram_solve_ex(K, D, R, damping=d),
        family_arguments,
    ),
    "weighted_gram": (
        lambda Z, w, d: linalg.weighted_gram(Z, w, damping=d) + 1,
        gram_arguments,
    ),
    "ridge": (
        lambda Z, R, S, d: linalg.ridge(Z, R, slopes=S, damping=d) * 2,
        ridge_arguments,
    ),
    "cg": (
        lambda A, B, d: tuple(linalg.cg(A, B, damping=d)),
        lambda: spd_arguments(grad=False),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compile(name):
    """One graph, no break, the same numbers."""
    function, arguments = COMPILED[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(*arguments()), function(*arguments()))


def test_compile_with_changing_sizes_and_damping():
    torch.compiler.reset()

    def function(A, B, damping):
        return linalg.spd_solve(A, B, damping=damping)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, n, damping in ((2, 4, 0.5), (3, 4, 0.25), (5, 9, 0.0)):
        A, B = lc.spd(batch, n), lc.normal(batch, n, 1)
        torch.testing.assert_close(compiled(A, B, damping), function(A, B, damping))


def test_compiled_backward():
    torch.compiler.reset()

    def loss(A, B, shift):
        return linalg.spd_solve(A, B, damping=shift).square().sum()

    plain, compiled = spd_arguments(), spd_arguments()
    loss(*plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_compiled_code_raises_typed_errors():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda A, B: linalg.spd_solve(A, B) + 1, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(NotPositiveDefiniteError, match="batch index 1"):
        compiled(torch.stack([torch.eye(2), -torch.eye(2)]), torch.ones(2, 1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compile_with_inductor():
    torch.compiler.reset()

    def function(A, B, shift):
        return linalg.spd_solve(2 * A, B.sin(), damping=shift).mT + 1

    arguments = spd_arguments(grad=False)
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), function(*arguments))


def test_operators_check_their_arguments_too():
    """torch.ops is public: no shape may reach the native code unchecked."""
    A, B, shift = spd_arguments(grad=False)
    with pytest.raises(ValueError, match=r"B must have shape \(\.\.\., 5, k\)"):
        ops.spd_solve(A, B[:, :4], shift)
    with pytest.raises(TypeError, match="damping must have the dtype of A"):
        ops.spd_solve(A, B, shift.float())
    with pytest.raises(ValueError, match=r"damping must .* broadcast"):
        ops.spd_solve(A, B, shift[:2])
    with pytest.raises(ValueError, match=r"w must have shape \(\.\.\., 6\), got \(3, 5\)"):
        ops.weighted_gram(lc.normal(6, 4), lc.normal(3, 5), torch.zeros((), dtype=F64))


def test_fake_tensors_compute_nothing():
    with torch._subclasses.FakeTensorMode():
        A, B = torch.empty(7, 5, 5), torch.empty(7, 5, 2)
        X, info = ops.spd_solve(A, B, torch.empty(()))
        assert (X.shape, info.shape, info.dtype) == ((7, 5, 2), (7,), torch.int32)


def test_missing_extension(monkeypatch):
    monkeypatch.setattr(_library, "_extension", None)
    monkeypatch.setattr(_library, "_import_error", ImportError("No module named 'backmatch._C'"))
    with pytest.raises(
        MissingExtensionError, match=r"backmatch\._C is missing .* `pip install \.`"
    ):
        linalg.spd_solve(torch.eye(2), torch.ones(2, 1))
    A = linalg.min_norm_solve(torch.eye(2), torch.ones(2, 1))
    assert A.tolist() == [[1.0], [1.0]]  # needs no kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_missing_cuda_half(monkeypatch):
    monkeypatch.setattr(_library, "_extension", object())
    with pytest.raises(MissingExtensionError, match="no CUDA kernels; rebuild it with nvcc"):
        _library.native_cuda()


def test_solves_in_plain_torch_do_not_pass_for_differentiable():
    """Not even partly: D * y would otherwise give D a gradient that leaves out y's."""
    K = torch.eye(3, dtype=torch.float64)
    D = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    R = torch.ones(2, 3, dtype=torch.float64)
    B = torch.ones(1, 3, 1, dtype=torch.float64, requires_grad=True)
    found = {
        "scaled_gram_cg": linalg.scaled_gram_cg(K, D, R, damping=1.0).x,
        "cg": linalg.cg(lambda X: 2 * X, B).x,
    }
    for name, x in found.items():
        with pytest.raises(NotImplementedError, match=rf"linalg\.{name} is not differentiable"):
            x.sum().backward()
    with torch.no_grad():
        assert not linalg.scaled_gram_cg(K, D, R, damping=1.0).x.requires_grad
    assert not linalg.scaled_gram_cg(K, D.detach(), R, damping=1.0).x.requires_grad
