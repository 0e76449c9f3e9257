"""What a sweep does to a vision model: buffers, RNG, hooks, frozen parts, layouts, failures."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from sweep_nets import ORDERS, batch, close, grads, square
from torch import Tensor, nn
from vision_modules import Residual, stirred

import backmatch as bm

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

Conv = nn.Conv2d
EXACT = {"weights": bm.Cholesky(0.1), "inputs": bm.Cholesky(0.1)}
#: Options under which blocks are evaluated again and again.
REPEATS = [
    {},
    {"newton_steps": 3},
    {"order": "sequential"},
    {"order": "sequential", "passes": 2},
    {"order": "sequential", "passes": 2, "newton_steps": 2},
]


def net(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """The layers with seeded parameters and statistics; by default one of every kind."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(
            layers
            or (
                nn.Sequential(Conv(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)),
                nn.MaxPool2d(2),
                Residual(nn.Sequential(Conv(3, 3, 1), nn.BatchNorm2d(3, momentum=None))),
                nn.Dropout(0.3),
                nn.Flatten(),
                nn.Linear(12, 4),
                nn.BatchNorm1d(4, eps=0.1),
            )
        )
    )
    for part in model.modules():
        part.reset_parameters() if hasattr(part, "reset_parameters") else None
    stirred([model])
    return model.double()


def maps(m: int = 5, channels: int = 2, seed: int = 1) -> Tensor:
    return batch(m, channels, 4, 5, seed=seed)


def everything(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, grads, buffers and the RNG state."""
    yield from model.parameters()
    yield from (p.grad for p in model.parameters() if p.grad is not None)
    yield from model.buffers()
    yield torch.get_rng_state()


@pytest.mark.parametrize("options", REPEATS, ids=str)
@pytest.mark.parametrize("by", ["activation", "layer", "whole"])
def test_buffers_and_rng_are_as_after_one_forward_pass(by, options):
    model, plain = net(), net()
    torch.manual_seed(3)
    want = plain(maps())
    state = torch.get_rng_state()
    torch.manual_seed(3)
    blocks = [model] if by == "whole" else bm.partition(model, by=by)
    step = bm.BackMatching(blocks, **EXACT, **options).backward(maps(), square)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(step.output, want, rtol=1e-12)
    bottom = model[0][1]
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        if name.startswith("0."):
            assert torch.equal(ours, theirs), name  # nothing above it can have rounded otherwise
        else:
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14), name
    assert int(bottom.num_batches_tracked) == 1


@pytest.mark.parametrize("options", REPEATS, ids=str)
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(2),
        lambda: nn.BatchNorm2d(2, momentum=None),
        lambda: nn.BatchNorm2d(2, momentum=0.7, affine=False),
        lambda: nn.BatchNorm2d(2).eval(),
    ],
)
def test_statistics_of_a_norm_move_once_bit_for_bit(norm, options):
    model, plain = net(norm(), Conv(2, 2, 2)), net(norm(), Conv(2, 2, 2))
    matcher = bm.BackMatching(model, **EXACT, **options)
    for seed in (1, 2, 3):
        matcher.backward(maps(seed=seed), square)
        plain(maps(seed=seed))
        for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", ["conv", "norm", "everything", "weight"])
def test_frozen_parts_keep_their_grads_and_pass_displacements_on(part, order):
    model = net(Conv(2, 3, 3), nn.Sequential(Conv(3, 2, 2), nn.BatchNorm2d(2, eps=0.1), nn.ReLU()))
    block = model[1]
    chosen = {
        "conv": [*block[0].parameters()],
        "norm": [*block[1].parameters()],
        "everything": [*block.parameters()],
        "weight": [block[0].weight],
    }[part]
    for p in chosen:
        p.requires_grad_(False)
        p.grad = torch.full_like(p, 7.0)
    before = copy.deepcopy(model.state_dict())
    step = bm.BackMatching(model, **EXACT, order=order).backward(maps(), square, keep=True)
    for p in chosen:
        assert (p.grad == 7.0).all()
    trainable = {n for n, p in block.named_parameters() if p.requires_grad}
    assert set(step.blocks[1].weight_step or {}) == trainable
    assert (step.blocks[1].weight is None) == (part == "everything")
    assert model[0].weight.grad.abs().max() > 0
    assert int(block[1].num_batches_tracked) == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_dropout_keeps_the_mask_that_it_drew():
    """What was dropped hands nothing down and moves nothing, in every evaluation."""
    model = net(Conv(2, 2, 2), nn.Sequential(nn.Dropout(0.5), Conv(2, 2, 2)))
    torch.manual_seed(5)
    z = model[0](maps())
    mask = nn.functional.dropout(torch.ones_like(z), 0.5) > 0
    for options in REPEATS:
        torch.manual_seed(5)
        step = bm.BackMatching(model, **EXACT, **options).backward(maps(), square, keep=True)
        assert not step.blocks[1].input_step[~mask].any()
        assert step.blocks[1].input_step[mask].all()


@pytest.mark.parametrize("order", ORDERS)
def test_hooks_fire_once_and_change_nothing(order):
    calls: list[str] = []
    model, plain = net(), net()
    model[0][0].register_forward_hook(lambda *_: calls.append("conv"))
    model[0][1].register_forward_pre_hook(lambda *_: calls.append("norm"))
    model[1].register_forward_hook(lambda *_: calls.append("pool"))
    model[2].register_forward_hook(lambda *_: calls.append("residual"))
    model[4].register_full_backward_hook(lambda *_: calls.append("never"))
    for each in (model, plain):
        torch.manual_seed(2)
        bm.BackMatching(bm.partition(each), **EXACT, order=order).backward(maps(), square)
    assert calls == ["conv", "norm", "pool", "residual"]
    assert close(grads(model), grads(plain))
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Conv(2, 2, 2, padding="same"),
        lambda: nn.Sequential(Conv(2, 3, 2), nn.BatchNorm2d(3, eps=0.1), nn.ReLU()),
        lambda: nn.BatchNorm2d(2, eps=0.1),
        lambda: nn.GroupNorm(2, 2, 0.1),
        lambda: nn.MaxPool2d(3, stride=1),
        lambda: nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
        lambda: nn.AdaptiveAvgPool2d((2, 3)),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_that_changes_the_output_is_part_of_the_block(order, layer):
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z: Tensor) -> Tensor:
            return 2 * self.inner(z)

    hooked, plain = net(Conv(2, 2, 1), layer()), net(Conv(2, 2, 1), layer())
    hooked[1].register_forward_hook(lambda module, args, out: 2 * out)
    plain[1] = Doubled(plain[1])
    for model in (hooked, plain):
        bm.BackMatching(model, **EXACT, order=order).backward(maps(), square)
    assert close(grads(hooked), grads(plain))


def test_replaced_forwards_and_parametrizations_are_honoured():
    model = net(Conv(2, 2, 1), Conv(2, 2, 3), nn.MaxPool2d(2))
    model[1].forward = lambda z: nn.functional.conv2d(z, model[1].weight.square())
    model[2].forward = lambda z: nn.functional.avg_pool2d(z, 2)
    nn.utils.parametrizations.weight_norm(model[0])
    x = maps()
    options = {"weights": bm.Gradient(), "inputs": bm.Gradient()}
    step = bm.BackMatching(model, **options).backward(x, square)
    ours = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert torch.allclose(step.output, model(x))
    square(model(x)).backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(a, torch.zeros_like(p) if p.grad is None else p.grad, atol=1e-13)


@pytest.mark.parametrize("kind", ["conv", "norm", "tied-weight"])
def test_sharing_between_blocks_is_refused(kind):
    conv, norm = Conv(2, 2, 1), nn.BatchNorm2d(2)
    blocks = {
        "conv": [conv, nn.ReLU(), nn.Sequential(conv, nn.ReLU())],
        "norm": [nn.Sequential(Conv(2, 2, 1), norm), nn.Sequential(Conv(2, 2, 1), norm)],
        "tied-weight": [conv, Conv(2, 2, 1)],
    }[kind]
    if kind == "tied-weight":
        blocks[1].weight = conv.weight
    with pytest.raises(ValueError, match=r"blocks '\d' and '\d' share the parameter '.*weight'"):
        bm.BackMatching(blocks)


@pytest.mark.parametrize("options", REPEATS, ids=str)
def test_a_module_may_stand_twice_in_a_block(options):
    """Shared parameters take the sum of both uses; the norm's statistics move twice a pass."""

    def make() -> nn.Sequential:
        conv, norm = Conv(2, 2, 3, padding=1), nn.BatchNorm2d(2, eps=0.1)
        return net(nn.Sequential(conv, norm, nn.Tanh(), conv, norm), nn.Flatten())

    model, plain = make(), make()
    plain(maps())
    step = bm.BackMatching(model, **EXACT, **options).backward(maps(), square, keep=True)
    assert set(step.blocks[0].weight_step) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert int(model[0][1].num_batches_tracked) == 2
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_audit_leaves_everything_as_it_was():
    model = net()
    before = [t.clone() for t in everything(model)]
    bm.audit(bm.BackMatching(bm.partition(model), **EXACT), maps(), square)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model), strict=True))
    assert all(p.grad is None for p in model.parameters())


LAYOUTS = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "flipped-batch-view": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_layout_of_memory_does_not_matter(order, layout):
    x = LAYOUTS[layout](maps())
    model, plain = net(), net()
    for each, z in ((model, x), (plain, x.clone(memory_format=torch.contiguous_format))):
        each[3].eval()  # masks are drawn in the order of memory
        bm.BackMatching(bm.partition(each, by="layer"), **EXACT, order=order).backward(z, square)
    assert close(grads(model), grads(plain))
    for p in model.parameters():
        assert p.grad.shape == p.shape


def test_channels_last_parameters_keep_their_numbers():
    model, plain = net(), net()
    model = model.to(memory_format=torch.channels_last)
    for each in (model, plain):
        each[3].eval()
        bm.BackMatching(bm.partition(each), **EXACT).backward(maps(), square)
    assert close(grads(model), grads(plain))
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    assert close(model.parameters(), plain.parameters())


GROUP_NORM_CHILD = """
import sys, torch, backmatch as bm
from torch import nn
class Inside(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, z):
        return z + self.inner(z)
torch.manual_seed(0)
norm = nn.GroupNorm(2, 4).double()
if sys.argv[1] == "hooked":
    norm.register_forward_hook(lambda *_: None)
block = Inside(norm) if sys.argv[1] == "inside" else norm
x = torch.randn(3, 4, 3, 4).double()
grads = []
for z in (x, x.contiguous(memory_format=torch.channels_last)):
    norm.zero_grad()
    matcher = bm.BackMatching([nn.Identity(), block], weights=bm.Auto(0.1), inputs=bm.Auto(0.1))
    matcher.backward(z, lambda out: 0.5 * out.square().sum() / 3)
    grads.append(norm.weight.grad.clone())
assert torch.allclose(*grads, rtol=1e-9)
"""


@pytest.mark.parametrize("route", ["plain", "hooked", "inside"])
def test_group_norm_on_channels_last_maps_does_not_crash(route):
    """In a process of its own: torch's backward for the parameters alone, without that of the
    input, writes to address 0 when the input is channels_last."""
    command = [sys.executable, "-c", GROUP_NORM_CHILD, route]
    child = subprocess.run(command, capture_output=True)
    assert child.returncode == 0, child.stderr.decode()[-500:]
