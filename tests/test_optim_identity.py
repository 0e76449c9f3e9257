"""Identity 11: the optimizers' updates equal sweeps with ``Scalar``, on every kind of net."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import NETS, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_cases import CASES
from torch import nn
from vision_cases import NETS as VISION
from vision_cases import random_vision_net

import backmatch as bm

KINDS = ("trace", "spectral", "rayleigh")
ALL = {**NETS, **VISION, **{f"residual-{name}": net for name, net in CASES.items()}}


def swept(net, kind, damping, inputs, dtype):
    """Parameters after one simultaneous sweep and SGD with lr 1, and the buffers."""
    blocks, x, loss = net.make(dtype)
    scalar = bm.Scalar(kind, damping)
    matcher = bm.BackMatching(blocks, weights=scalar, inputs=scalar if inputs else bm.Gradient())
    step = matcher.backward(x, loss, keep=True)
    moves = [
        report.weight_step[name]
        for block, report in zip(blocks, step.blocks, strict=True)
        for name, p in block.named_parameters()
        if p.requires_grad
    ]
    return blocks, moves


def amended(net, kind, damping, inputs, dtype):
    """What the optimizer adds to the same parameters."""
    blocks, x, loss = net.make(dtype)
    chosen = bm.optim.ScaleAmendedSGD if inputs else bm.optim.LayerwiseAdaptiveSGD
    parameters = [p for block in blocks for p in block.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    with chosen(blocks, lr=1.0, kind=kind, damping=damping) as optimizer:
        z = x
        for block in blocks:
            z = block(z)
        value = loss(z)
        if value.requires_grad:
            value.backward()
            optimizer.step()
    return blocks, [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def check(net, kind, damping=0.0, inputs=True, dtype=torch.float64):
    theirs, expected = swept(net, kind, damping, inputs, dtype)
    ours, got = amended(net, kind, damping, inputs, dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for name, a, b in zip(range(len(got)), got, expected, strict=True):
        size = 1.0 + float(b.abs().max()) if b.numel() else 1.0
        assert torch.isfinite(a).all()
        assert float((a - b.reshape(a.shape)).abs().max()) <= tolerance * size, name
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.buffers(), b.buffers(), strict=True):
            assert torch.allclose(x, y, equal_nan=True)


def trains(net):
    return any(p.requires_grad for block in net.blocks() for p in block.parameters())


TRAINED = [name for name, net in ALL.items() if trains(net)]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("kind", KINDS)
def test_update_is_the_sweep(name, kind):
    check(ALL[name], kind)


@pytest.mark.parametrize("name", TRAINED[::8])
@pytest.mark.parametrize("kind", KINDS)
def test_damping_and_no_chain(name, kind):
    check(ALL[name], kind, damping=0.3)
    check(ALL[name], kind, damping=0.1, inputs=False)


@pytest.mark.parametrize("name", ["relu", "dropout", "batch-norm", "conv", "embedding", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32(name, kind):
    check(ALL[name], kind, damping=0.1, dtype=torch.float32)


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.0, 0.2]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_nets(seed, kind, damping, inputs):
    check(random_net(seed), kind, damping, inputs)


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.0, 0.2]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_random_vision_nets(seed, kind, damping):
    net = random_vision_net(seed)
    if trains(net):
        check(net, kind, damping)


def vision_model():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(12, 6), nn.LayerNorm(6)),
        bm.blocks.Residual(nn.Linear(6, 6), activation=nn.Tanh()),
        nn.Linear(6, 4),
    ).double()


@pytest.mark.parametrize("by", ["activation", "layer"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_training_of_the_users_model(by, kind, nesterov):
    """Several steps, the model called as a whole, with momentum and weight decay behind."""
    ours, theirs = vision_model(), vision_model()
    options = {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1, "nesterov": nesterov}
    scalar = bm.Scalar(kind, 0.05)
    matcher = bm.BackMatching(bm.partition(theirs, by=by), weights=scalar, inputs=scalar)
    plain = torch.optim.SGD(theirs.parameters(), **options)
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(5, 1, 4, 4, generator=generator).double(), torch.randint(4, (5,)))
        for _ in range(4)
    ]
    torch.manual_seed(11)
    for x, y in batches:
        plain.zero_grad()
        matcher.backward(x, lambda out, y=y: nn.functional.cross_entropy(out, y))
        plain.step()
    torch.manual_seed(11)
    blocks = bm.partition(ours, by=by)
    with bm.optim.ScaleAmendedSGD(blocks, kind=kind, damping=0.05, **options) as optimizer:
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(ours(x), y).backward()
            optimizer.step()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_a_module_that_stands_twice():
    """The same activation object between all layers, each leaf a block."""
    act = nn.Tanh()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 4), act, nn.Linear(4, 2)).double()

    x = torch.randn(6, 4, dtype=torch.float64)
    ours, theirs, scalar = make(), make(), bm.Scalar()
    bm.BackMatching(theirs, weights=scalar, inputs=scalar).backward(x, lambda z: z.square().mean())
    with bm.optim.ScaleAmendedSGD(ours, lr=1.0) as optimizer:
        for _ in range(2):  # an abandoned pass first
            with pytest.raises(RuntimeError, match="stop"):
                interrupted(ours, x)
        ours(x).square().mean().backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q - q.grad, rtol=1e-10, atol=1e-12)


def interrupted(model, x):
    z = x
    for module in list(model)[:2]:
        z = module(z)
    raise RuntimeError("stop")


class Gain(nn.Module):
    """A user's module that writes to its input."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, z):
        return z.mul_(2.0) * self.gain


def test_a_block_that_writes_to_its_input():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 5), Gain(), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()
    theirs, x = copy.deepcopy(ours), torch.randn(6, 4, dtype=torch.float64)
    scalar = bm.Scalar("rayleigh")
    bm.BackMatching(theirs, weights=scalar, inputs=scalar).backward(x, lambda z: z.square().mean())
    with bm.optim.ScaleAmendedSGD(ours, lr=1.0, kind="rayleigh") as optimizer:
        ours(x).square().mean().backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q - q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("between", [nn.Identity(), nn.Flatten(), nn.Dropout(0.5).eval()])
@pytest.mark.parametrize("last", [nn.ReLU(inplace=True), Gain()])
def test_a_block_that_hands_its_input_on_to_one_that_writes_to_it(between, last):
    torch.manual_seed(0)
    parts = [nn.Linear(4, 5), nn.Identity(), between, last, nn.Linear(5, 2)]
    ours = copy.deepcopy(nn.Sequential(*parts)).double()
    theirs, x = copy.deepcopy(ours), torch.randn(6, 4, dtype=torch.float64)
    scalar = bm.Scalar("spectral")
    bm.BackMatching(theirs, weights=scalar, inputs=scalar).backward(x, lambda z: z.square().mean())
    with bm.optim.ScaleAmendedSGD(ours, lr=1.0, kind="spectral") as optimizer:
        ours(x).square().mean().backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q - q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "norm", ["weight_norm", "parametrization", "spectral", "spectral-hook", "scaling-hook"]
)
def test_reparametrised_and_hooked_blocks(norm):
    """Hooks that are part of a block's function are part of its local Hessian."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 5).double()
    if norm == "weight_norm":
        with pytest.warns((FutureWarning, UserWarning)):
            layer = torch.nn.utils.weight_norm(layer)
    elif norm == "parametrization":
        torch.nn.utils.parametrizations.weight_norm(layer)
    elif norm == "spectral":
        torch.nn.utils.parametrizations.spectral_norm(layer)
    elif norm == "spectral-hook":
        layer = torch.nn.utils.spectral_norm(layer)
    else:
        layer.register_forward_hook(lambda module, args, out: 3 * out)
    ours = nn.Sequential(nn.Linear(4, 5).double(), layer, nn.Linear(5, 2).double())
    x, scalar = torch.randn(6, 4, dtype=torch.float64), bm.Scalar()
    before = [p.detach().clone() for p in ours.parameters()]
    buffers = [b.clone() for b in ours.buffers()]
    matcher = bm.BackMatching(ours, weights=scalar, inputs=scalar)
    matcher.backward(x, lambda z: z.square().mean())
    expected = [b - p.grad for b, p in zip(before, ours.parameters(), strict=True)]
    ours.zero_grad()
    for b, old in zip(ours.buffers(), buffers, strict=True):
        b.data.copy_(old)
    with bm.optim.ScaleAmendedSGD(ours, lr=1.0) as optimizer:
        ours(x).square().mean().backward()
        optimizer.step()
    for p, q in zip(ours.parameters(), expected, strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


class Warming(nn.Module):
    """A user's module that counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, z):
        self.calls += 1
        return self.calls * self.layer(z)


def test_a_block_that_is_another_function_the_second_time_is_refused():
    torch.manual_seed(0)
    ours = nn.Sequential(Warming(), nn.Linear(4, 2))
    before = [p.detach().clone() for p in ours.parameters()]
    with bm.optim.ScaleAmendedSGD(ours, lr=1.0) as optimizer:
        ours(torch.randn(6, 4)).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"block '0'.*buffers and torch's global random"):
            optimizer.step()
    assert all(map(torch.equal, before, ours.parameters()))
