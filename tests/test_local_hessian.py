"""``bm.local_hessian`` against dense autograd: every kind of block, both sides, both Hessians."""

from __future__ import annotations

import cases
import pytest
import torch
import vision_cases
from hessian_cases import SEED, blocks_of, dense_hessian, displacement_for, has_side
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import backmatch as bm

CATALOGUE = {**cases.NETS, **vision_cases.NETS}

#: One of every route and every awkward feature: see docs/blocks.md.
NAMES = [
    *("tanh", "relu-inplace", "silu", "linear-no-bias", "features-3d", "flatten", "wide"),
    *("activation-first", "activation-chain", "batch-1", "one-unit", "dropout", "dropout-eval"),
    *("frozen-block", "parameterless", "residual", "tied", "unused-parameter", "two-linears"),
    *("coupled-probed", "coupled-declared", "batch-norm", "batch-norm-eval", "layer-norm"),
    *("embedding", "prelu", "conv-plain-act", "conv-grouped-uneven", "conv-same-even-oblong"),
    *("conv-dilated-strided-padded-act", "conv-depthwise-multiplied", "conv-kernel-above-map"),
    *("bn-train", "bn-eval", "bn1d-spread", "conv-bn-relu", "conv-bn-eval", "bn-relu-conv"),
    *("layer-norm-no-bias", "squeeze-excite", "subclass", "reflecting", "transposed"),
    *("by-layer", "by-activation", "1x1-maps-bn", "strided-view", "channels-last-pool"),
    *("dropout2d", "frozen-weight", "frozen-gamma", "frozen-group-beta", "batch-1-bn"),
]


def check(block: nn.Module, z: Tensor, side: str, displacement: Tensor | None) -> None:
    """Matrix, product, eigenvalues, trace and rank of one side."""
    want = dense_hessian(block, z, side, displacement)
    torch.manual_seed(SEED)
    got = bm.local_hessian(block, z, side=side, displacement=displacement)
    # Some Hessians are rounding and nothing else: the mean of a normalised map.
    size = max(float(want.abs().max()), 1e-6)
    v = torch.randn(len(want), 2, dtype=want.dtype)
    values = torch.linalg.eigvalsh(want).flip(0)
    dense = got.to_dense()
    assert got.shape == tuple(dense.shape) == tuple(want.shape)
    assert torch.equal(dense, dense.mT)
    assert (dense - want).abs().max() < 1e-10 * size
    assert (got @ v - want @ v).abs().max() < 1e-9 * size
    assert got.is_complete
    assert (got.eigenvalues - values).abs().max() < 1e-10 * size
    assert got.spectral_norm == pytest.approx(float(values.abs().max()), rel=1e-9, abs=1e-10 * size)
    assert got.trace_is_exact
    assert got.trace == pytest.approx(float(want.trace()), abs=1e-9 * len(want) * size)
    assert got.trace_mean == pytest.approx(got.trace / len(want))
    if float(want.abs().max()) > 1e-6:
        # This oracle knows its zeros to n eps only; ranks are in test_local_hessian_spectrum.py.
        assert got.rank >= int((values.abs() > 1e-12 * values.abs().max()).sum())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("full", [False, True], ids=["gauss-newton", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_matches_dense_autograd(name: str, full: bool) -> None:
    for block, z in list(blocks_of(CATALOGUE[name]))[-3:]:
        for side in ("input", "weight"):
            if has_side(block, z, side):
                check(block, z, side, displacement_for(block, z) if full else None)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), vision=st.booleans(), full=st.booleans())
def test_matches_dense_autograd_on_random_nets(seed: int, vision: bool, full: bool) -> None:
    net = vision_cases.random_vision_net(seed) if vision else cases.random_net(seed)
    block, z = list(blocks_of(net))[-1]
    for side in ("input", "weight"):
        if has_side(block, z, side):
            check(block, z, side, displacement_for(block, z) if full else None)


@pytest.mark.parametrize("side", ["input", "weight"])
def test_residual_module_and_hooked_module_agree(side: str) -> None:
    """Structure and the generic route (a hook forces it) give the same matrix."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
    block, z = bm.blocks.Residual(body, activation=nn.Softplus()).double(), torch.randn(6, 5)
    z = z.double()
    r = torch.randn(6, 5).double()
    for displacement in (None, r):
        got = bm.local_hessian(block, z, side, displacement).to_dense()
        handle = block.register_forward_hook(lambda *_: None)
        want = bm.local_hessian(block, z, side, displacement).to_dense()
        handle.remove()
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-12)


def test_order_of_the_unknowns() -> None:
    """named_parameters, each flattened; the input sample by sample."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()).double()
    z = torch.randn(4, 2, 3, 3).double()
    H = bm.local_hessian(block, z, "weight")
    assert H.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    named = H.unflatten(torch.arange(H.size))
    assert [tuple(v.shape) for v in named.values()] == [(3, 2, 2, 2), (3,), (3,), (3,)]
    assert torch.equal(torch.cat([v.reshape(-1) for v in named.values()]), torch.arange(H.size))
    assert bm.local_hessian(block, z).unflatten(torch.zeros(72))["z"].shape == z.shape


def test_gradient_of_the_local_loss_moves_by_the_full_hessian() -> None:
    """A third oracle: central differences of autograd's gradient."""
    torch.manual_seed(0)
    linear = nn.Linear(4, 3).double()
    z, r = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    target = torch.tanh(linear(z)).detach() + r
    H = bm.local_hessian(nn.Sequential(linear, nn.Tanh()), z, "weight", displacement=r)
    v = torch.randn(H.size).double()

    def gradient(step: Tensor) -> Tensor:
        W, b = (linear.weight + step[:12].view(3, 4)), (linear.bias + step[12:])
        leaves = [W.detach().requires_grad_(), b.detach().requires_grad_()]
        loss = (torch.tanh(z @ leaves[0].T + leaves[1]) - target).square().sum() / (2 * len(z))
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves)])

    moved = (gradient(1e-5 * v) - gradient(-1e-5 * v)) / 2e-5
    assert torch.allclose(H @ v, moved, rtol=1e-7, atol=1e-9)


# Its imports, and torch's own for its first forward-mode product, warn.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", ["tanh", "conv", "batch-norm"])
def test_matches_curvlinops(module: str) -> None:
    """Its GGN and Hessian of the summed squared error are 2 m times ours on the weight side."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    block, z = {
        "tanh": (nn.Sequential(nn.Linear(6, 5), nn.Tanh()), torch.randn(7, 6)),
        "conv": (
            nn.Sequential(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Flatten()),
            torch.randn(4, 2, 3, 3),
        ),
        "batch-norm": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval()), torch.randn(5, 4)),
    }[module]
    block, z = block.double(), z.double()
    r = displacement_for(block, z)
    data = [(z, (block(z) + r).detach())]
    loss = nn.MSELoss(reduction="sum")
    operators = (curvlinops.GGNLinearOperator, curvlinops.HessianLinearOperator)
    for operator, displacement in zip(operators, (None, r), strict=True):
        theirs = operator(block, loss, list(block.parameters()), data)
        eye = torch.eye(theirs.shape[0], dtype=torch.float64)
        ours = bm.local_hessian(block, z, "weight", displacement)
        assert torch.allclose(ours.to_dense(), (theirs @ eye) / (2 * len(z)), rtol=1e-9, atol=1e-11)
