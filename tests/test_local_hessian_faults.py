"""``bm.local_hessian`` on wrong arguments and in awkward surroundings; it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backmatch as bm

Z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


class Failing(nn.Module):
    """Moves its buffers, an attribute and the RNG, then raises."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        self.count = torch.rand(())
        self.register_buffer("another", z)
        raise KeyboardInterrupt


class OnceDifferentiable(torch.autograd.Function):
    """A backward pass that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class WithForwardMode(torch.autograd.Function):
    """The same with a forward-mode derivative: its Gauss-Newton Hessian can be had."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    backward = OnceDifferentiable.backward

    @staticmethod
    def jvp(ctx: Any, dz: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dz


class Squared(nn.Module):
    def __init__(self, kind: type[torch.autograd.Function] = OnceDifferentiable) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, z: Tensor) -> Tensor:
        return self.kind.apply(z)


class Exploding(nn.Module):
    """A finite output with an infinite slope."""

    def forward(self, z: Tensor) -> Tensor:
        return (z - z.detach()).abs().sqrt()


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def nan_weight() -> nn.Module:
    module = layer()
    module.weight.data[0, 0] = torch.nan
    return module


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: bm.local_hessian([layer()], Z), TypeError, "block must be one nn.Module"),
    "list": (lambda: bm.local_hessian(nn.ModuleList([layer()]), Z), TypeError, "got ModuleList"),
    "no tensor": (lambda: bm.local_hessian(layer(), Z.numpy()), TypeError, "z must be a torch.T"),
    "side": (lambda: bm.local_hessian(layer(), Z, "output"), ValueError, "side must be one of inp"),
    "k": (lambda: bm.local_hessian(layer(), Z, k=0), ValueError, "k must be at least 1"),
    "k type": (lambda: bm.local_hessian(layer(), Z, k=2.0), TypeError, "k must be an int"),
    "rcond": (lambda: bm.local_hessian(layer(), Z, rcond=-1.0), ValueError, "rcond must be finite"),
    "shape": (lambda: bm.local_hessian(layer(), Z[:, :3]), ValueError, r"\(batch, ..., 4\)"),
    "empty": (lambda: bm.local_hessian(layer(), Z[:0]), ValueError, "z must hold at least one"),
    "dtype": (lambda: bm.local_hessian(layer(), Z.float()), TypeError, "must have the dtype of z"),
    "half": (lambda: bm.local_hessian(layer().half(), Z.half()), TypeError, "float16"),
    "complex": (lambda: bm.local_hessian(layer(), Z + 0j), TypeError, "complex128"),
    "sparse": (lambda: bm.local_hessian(layer(), Z.to_sparse()), TypeError, "layout"),
    "meta": (lambda: bm.local_hessian(layer(), Z.to("meta")), TypeError, "meta"),
    "integers": (
        lambda: bm.local_hessian(nn.Embedding(5, 3), torch.ones(4, 2).long()),
        TypeError,
        'side="input" needs a z of dtype float32 or float64, got torch.int64',
    ),
    "nothing trainable": (
        lambda: bm.local_hessian(frozen(layer()), Z, "weight"),
        ValueError,
        'side="weight" needs a block with trainable parameters',
    ),
    "no parameters": (lambda: bm.local_hessian(nn.Tanh(), Z, "weight"), ValueError, "trainable"),
    "r shape": (
        lambda: bm.local_hessian(layer(), Z, displacement=Z),
        ValueError,
        r"displacement must have the shape of the block's output, \(5, 3\), got \(5, 4\)",
    ),
    "r dtype": (
        lambda: bm.local_hessian(layer(), Z, displacement=torch.ones(5, 3)),
        TypeError,
        "displacement must have the dtype",
    ),
    "r type": (lambda: bm.local_hessian(layer(), Z, displacement=1.0), TypeError, "displacement"),
    "r NaN": (
        lambda: bm.local_hessian(layer(), Z, displacement=torch.full((5, 3), torch.nan).double()),
        bm.NonFiniteError,
        "displacement has 15",
    ),
    "z NaN": (lambda: bm.local_hessian(layer(), Z / 0), bm.NonFiniteError, "z has 20"),
    "W NaN": (lambda: bm.local_hessian(nan_weight(), Z), bm.NonFiniteError, "'weight' has 1"),
    "output": (
        lambda: bm.local_hessian(nn.Sequential(layer(), nn.Unflatten(0, (1, 5))), Z),
        ValueError,
        "must keep dimension 0",
    ),
    "slope": (lambda: bm.local_hessian(Exploding(), Z).rank, bm.NonFiniteError, "non-finite"),
    "overflow": (
        lambda: bm.local_hessian(layer(), 1e200 * Z, "weight").rank,
        bm.NonFiniteError,
        "eigenvalues",
    ),
    "no second derivative": (
        lambda: bm.local_hessian(Squared(), Z, displacement=Z).rank,
        TypeError,
        "no second derivative, so that only its Gauss-Newton",
    ),
    "v": (lambda: bm.local_hessian(layer(), Z) @ Z, ValueError, r"\(20,\) or \(20, columns\)"),
    "v dtype": (lambda: bm.local_hessian(layer(), Z) @ torch.ones(20), TypeError, "v must have"),
    "v array": (lambda: bm.local_hessian(layer(), Z).matvec(np.ones(20)), TypeError, "v must be a"),
    "v complex": (
        lambda: bm.local_hessian(layer(), Z).to_scipy() @ (np.ones(20) * 1j),
        TypeError,
        "v must be real",
    ),
    "v NaN": (
        lambda: bm.local_hessian(layer(), Z) @ torch.full((20,), torch.nan).double(),
        bm.NonFiniteError,
        "H @ v",
    ),
    "unflatten": (lambda: bm.local_hessian(layer(), Z).unflatten(Z), ValueError, r"shape \(20,\)"),
    "too dense": (
        lambda: bm.local_hessian(nn.ReLU(), torch.ones(20, 1000)).to_dense(),
        ValueError,
        "at most 16384",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_name_what_is_wrong(name: str) -> None:
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call()


def test_a_backward_pass_that_differentiates_to_nothing_is_noticed() -> None:
    """torch answers with 0 instead of an error; forward mode knows better."""
    block = Squared(WithForwardMode)
    H = bm.local_hessian(block, Z)
    assert torch.allclose(H @ torch.ones(20).double(), 4 * Z.square().flatten())
    with pytest.raises(TypeError, match="its backward pass cannot be differentiated"):
        bm.local_hessian(block, Z, displacement=Z)


def test_refuses_autocast_and_inference_mode() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        bm.local_hessian(layer(), Z)
    with torch.inference_mode(), pytest.raises(TypeError, match="z must be no inference tensor"):
        bm.local_hessian(layer(), Z)


def test_same_under_no_grad_and_detached() -> None:
    block = nn.Sequential(layer(), nn.Tanh())
    r = torch.ones(5, 3).double()
    want = bm.local_hessian(block, Z, "weight", r).to_dense()
    with torch.no_grad():
        H = bm.local_hessian(block, Z, "weight", r)
        assert torch.equal(H.to_dense(), want)
    for found in (H.to_dense(), H.eigenvalues, H @ torch.ones(H.size).double().requires_grad_()):
        assert not found.requires_grad


@pytest.mark.parametrize("side", ["input", "weight"])
def test_layouts_of_the_input_do_not_matter(side: str) -> None:
    block = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU()).double()
    z = torch.randn(3, 4, 5, 2).double().permute(0, 3, 1, 2)
    expanded = torch.randn(1, 2, 4, 5).double().expand(3, -1, -1, -1)
    for given in (z, z.to(memory_format=torch.channels_last), expanded):
        got = bm.local_hessian(block, given, side).to_dense()
        want = bm.local_hessian(block, given.contiguous().clone(), side).to_dense()
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-14)


def state_of(block: nn.Module) -> list[Any]:
    tensors = [*block.named_parameters(), *block.named_buffers()]
    return [(name, id(t), t.clone(), t._version, t.grad) for name, t in tensors]


def same_state(before: list[Any], after: list[Any]) -> bool:
    pairs = zip(before, after, strict=True)
    return all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) and a[3] == b[3] and a[4] is b[4]
        for a, b in pairs
    )


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_leaves_no_trace(hooked: bool, full: bool) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.4), nn.Linear(6, 3))
    block = block.double()
    calls: list[int] = []
    if hooked:
        block[0].register_forward_hook(lambda *_: calls.append(1))
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    block[3].bias.requires_grad_(False)
    r = torch.ones(5, 3).double() if full else None
    before, rng = state_of(block), torch.get_rng_state()
    for side in ("input", "weight"):
        H = bm.local_hessian(block, Z, side, r)
        _ = (H.eigenvalues, H.trace, H.rank, H.to_dense(), H @ torch.ones(H.size).double())
        assert same_state(before, state_of(block))
        assert torch.equal(torch.get_rng_state(), rng)
        assert block.training
    assert len(calls) == 2 * hooked
    assert "3.bias" not in bm.local_hessian(block, Z, "weight").names


def test_leaves_no_trace_on_an_interrupt() -> None:
    block = Failing()
    before, rng = state_of(block), torch.get_rng_state()
    for r in (None, Z):
        with pytest.raises(KeyboardInterrupt):
            bm.local_hessian(block, Z, "weight", r)
        assert block.calls == 0
        assert same_state(before, state_of(block))
        assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_stays_true_to_its_moment(hooked: bool, full: bool) -> None:
    """A step of an optimizer afterwards, in place, does not move a Hessian already posed."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Tanh()).double()
    if hooked:
        block.register_forward_hook(lambda *_: None)
    z, r = Z.clone(), torch.ones(5, 4).double() if full else None
    for side in ("input", "weight"):
        want = bm.local_hessian(block, z, side, r).to_dense()
        H = bm.local_hessian(block, z, side, r)
        z0, state = z.clone(), copy.deepcopy(block.state_dict())
        with torch.no_grad():
            for tensor in (z, *block.parameters(), *(b for b in block.buffers() if b.dim())):
                tensor.add_(1.0)
        assert torch.equal(H.to_dense(), want)
        assert not torch.allclose(bm.local_hessian(block, z, side, r).to_dense(), want)
        z.copy_(z0)
        block.load_state_dict(state)


class Recomputed(nn.Module):
    """Runs its forward pass again in every backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return checkpoint(self.body, z, use_reentrant=False)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("side", ["input", "weight"])
def test_recomputation_sees_the_moment(side: str, full: bool) -> None:
    """Activation checkpointing: neither a moved model nor its buffers are touched, or seen."""
    torch.manual_seed(0)
    block = Recomputed().double()
    r = torch.ones(5, 4).double() if full else None
    torch.manual_seed(1)
    want = bm.local_hessian(block.body, Z, side, r).to_dense()
    torch.manual_seed(1)
    H = bm.local_hessian(block, Z, side, r)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(1.0)
    block.eval()
    before, rng = state_of(block), torch.get_rng_state()
    assert torch.allclose(H.to_dense(), want, rtol=1e-10, atol=1e-12)
    assert torch.isfinite(H.eigenvalues).all()
    assert same_state(before, state_of(block))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not block.training


def test_dropout_keeps_one_mask() -> None:
    """The mask is that of the block's next run: columns and structure see the same one."""
    block = nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.5)).double()
    torch.manual_seed(3)
    H = bm.local_hessian(block, Z)
    full = bm.local_hessian(block, Z, displacement=torch.ones(5, 40).double())
    torch.manual_seed(3)
    out = block(Z)
    scale = 2.0 * (out != 0).double()
    want = torch.stack([block[0].weight.T @ (s[:, None] ** 2 * block[0].weight) for s in scale])
    assert torch.allclose(H.to_dense(), torch.block_diag(*want), rtol=1e-10)
    assert torch.allclose(full.to_dense(), H.to_dense(), rtol=1e-10)


def test_wrappers_and_recurrent_modules() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 2, batch_first=True)

        def forward(self, z: Tensor) -> Tensor:
            return self.lstm(z)[0][:, -1]

    torch.manual_seed(0)
    block, z = Last().double(), torch.randn(4, 5, 3).double()
    flat = [id(w) for w in block.lstm._flat_weights]
    H = bm.local_hessian(block, z, "weight")
    assert [id(w) for w in block.lstm._flat_weights] == flat
    J = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(
            block, dict(zip(dict(block.named_parameters()), p, strict=True)), (z,)
        ),
        tuple(p.detach() for p in block.parameters()),
    )
    rows = torch.cat([j.reshape(8, -1) for j in J], 1)
    assert torch.allclose(H.to_dense(), rows.T @ rows / 4, rtol=1e-9, atol=1e-12)
    normed = torch.nn.utils.parametrizations.weight_norm(layer())
    assert bm.local_hessian(normed, Z, "weight").size == 3 + 3 + 12
    compiled = torch.compile(layer(), backend="eager")
    want = bm.local_hessian(layer(), Z).to_dense()
    assert torch.equal(bm.local_hessian(compiled, Z).to_dense(), want)


def test_scipy_operator() -> None:
    """eigsh on it agrees; matrices too, in the block's dtype."""
    from scipy.sparse.linalg import eigsh

    block = nn.Sequential(layer(), nn.Tanh()).float()
    H = bm.local_hessian(block, Z.float(), "weight")
    operator = H.to_scipy()
    assert operator.shape == H.shape
    assert operator.dtype == np.float32
    X = np.random.default_rng(0).standard_normal((15, 2))
    np.testing.assert_allclose(operator @ X, H.to_dense().numpy() @ X, rtol=1e-4, atol=1e-5)
    top = eigsh(operator, k=2, return_eigenvectors=False)[::-1]
    np.testing.assert_allclose(top, H.eigenvalues[:2].numpy(), rtol=1e-4)


def test_repr_names_what_it_is() -> None:
    text = repr(bm.local_hessian(layer(), Z, "weight"))
    assert text == (
        "LocalHessian(block='Linear', side='weight', kind='gauss-newton', size=15, samples=5, "
        "dtype=torch.float64)"
    )
