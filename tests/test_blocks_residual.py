"""``Residual``: the module, its products, and its two problems against the dense reference."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from cases import Net
from residual_cases import CASES, around, mlp_body
from torch import nn
from torch.nn.utils import parametrizations

import backmatch as bm
from backmatch import reference
from backmatch.blocks import Residual, adapt
from backmatch.blocks.chain import ChainBlock
from backmatch.blocks.generic import GenericBlock
from backmatch.blocks.layers import Point, compose

ORDERS = ("simultaneous", "sequential")


def check(net: Net, solver: Any, tolerance: float = 1e-8, **options: Any) -> None:
    """Every displacement and step against the dense reference."""
    blocks, x, loss = net.make()
    want = reference.sweep(blocks, x, loss, weights=solver, inputs=solver, **options)
    state = torch.get_rng_state()
    blocks, x, loss = net.make()
    matcher = bm.BackMatching(blocks, weights=solver, inputs=solver, **options)
    step = matcher.backward(x, loss, keep=True)
    assert torch.equal(torch.get_rng_state(), state)
    # What an exact sequential step leaves is rounding, times pinv(J) of the blocks below.
    least = 1e-1 if options.get("order") == "sequential" else 1e-6
    floor = least * max(np.abs(block.displacement).max() for block in want.blocks)
    for got, block in zip(step.blocks, want.blocks, strict=True):
        pairs = [(got.displacement, block.displacement)]
        pairs += [(got.weight_step[name], value) for name, value in block.weight_step.items()]
        if block.input_step is not None:
            pairs.append((got.input_step, block.input_step))
        size = max(floor, *(np.abs(value).max(initial=0.0) for _, value in pairs))
        for tensor, value in pairs:
            assert np.abs(tensor.numpy() - value).max(initial=0.0) < tolerance * size, block.name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_dense_reference(name: str, order: str) -> None:
    for damping in (0.0, 1e-3, bm.Relative(0.1)):
        check(CASES[name], bm.Auto(damping), order=order)


@pytest.mark.parametrize("name", ["projection", "nested", "batch-norm", "conv"])
def test_cg_passes_and_newton(name: str) -> None:
    check(CASES[name], bm.CG(bm.Relative(0.1), rtol=1e-13))
    check(CASES[name], bm.Cholesky(0.1), order="sequential", passes=2)
    check(CASES[name], bm.Cholesky(0.3), newton_steps=2, tolerance=1e-7)


class ByHand(nn.Module):
    """What a user writes: the generic route."""

    def __init__(self, parts: Residual) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = parts.body, parts.shortcut, parts.activation

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        total = self.body(z.clone())
        total = total + (z if self.shortcut is None else self.shortcut(z.clone()))
        return total if self.activation is None else self.activation(total)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_a_module_written_by_hand(name: str, order: str) -> None:
    blocks, x, loss = CASES[name].make()
    others = [ByHand(b) if isinstance(b, Residual) else b for b in copy.deepcopy(blocks)]
    for chain in (blocks, others):
        torch.manual_seed(5)
        solver = bm.Cholesky(bm.Relative(0.1))
        bm.BackMatching(chain, weights=solver, inputs=solver, order=order).backward(x, loss)
    grads = [
        {n: p.grad for n, p in nn.ModuleList(chain).named_parameters()}
        for chain in (blocks, others)
    ]
    assert grads[0].keys() == grads[1].keys()
    size = max(float(g.abs().max()) for g in grads[0].values() if g is not None)
    for key, grad in grads[0].items():
        assert (grad is None) == (grads[1][key] is None)
        if grad is not None:
            assert float((grad - grads[1][key]).abs().max()) < 1e-9 * size, key


@pytest.mark.parametrize("name", ["batch-norm", "batch-norm-eval", "conv", "dropout"])
@pytest.mark.parametrize("order", ORDERS)
def test_buffers_are_those_of_one_plain_forward_pass(name: str, order: str) -> None:
    blocks, x, loss = CASES[name].make()
    plain = nn.Sequential(*copy.deepcopy(blocks))
    state = torch.get_rng_state()
    out = plain(x).detach()
    torch.set_rng_state(state)
    step = bm.BackMatching(blocks, order=order).backward(x, loss)
    assert torch.allclose(step.output, out, rtol=1e-12, atol=1e-12)
    moved = dict(nn.Sequential(*blocks).named_buffers())
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffer, moved[key]), key


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_autograd(name: str) -> None:
    blocks, x, _ = CASES[name].make()
    at = next(i for i, b in enumerate(blocks) if any(isinstance(m, Residual) for m in b.modules()))
    block, z = blocks[at], nn.Sequential(*copy.deepcopy(blocks[:at]))(x).detach()
    trainable = {n: p for n, p in block.named_parameters() if p.requires_grad}
    leaves = list(block) if isinstance(block, nn.Sequential) else [block]
    state = torch.get_rng_state()
    layer = compose(leaves, z, Point("0", {id(p): n for n, p in trainable.items()}, None))
    torch.set_rng_state(state)
    leaf = z.clone().requires_grad_()
    out = block(leaf)
    assert torch.allclose(out.detach(), layer.output, rtol=1e-12, atol=1e-12)
    u, dz = torch.randn_like(out), torch.randn_like(z)
    step = {n: torch.randn_like(p) for n, p in trainable.items()}
    dw = sum((d * g).sum() for d, g in zip(step.values(), _vjp(out, trainable, u), strict=True))
    if trainable:
        assert float((layer.push_parameters(step) * u).sum()) == pytest.approx(float(dw))
        pulled = layer.pull_parameters(u)
        assert pulled.keys() == trainable.keys()
        for grad, key in zip(_vjp(out, trainable, u), trainable, strict=True):
            assert torch.allclose(pulled[key], grad, rtol=1e-9, atol=1e-12), key
    (grad,) = torch.autograd.grad(out, leaf, u)
    assert torch.allclose(layer.pull(u), grad, rtol=1e-9, atol=1e-12)
    assert float((layer.push(dz) * u).sum()) == pytest.approx(float((grad * dz).sum()))


def _vjp(
    out: torch.Tensor, trainable: dict[str, nn.Parameter], u: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    parameters = list(trainable.values())
    return torch.autograd.grad(out, parameters, u, retain_graph=True) if parameters else ()


def parts(block: nn.Module) -> type:
    return type(adapt("0", block.double()))


def hooked() -> Residual:
    residual = Residual(mlp_body())
    residual.body[1].register_forward_hook(lambda *_: None)
    return residual


def tied() -> Residual:
    layer = nn.Linear(5, 5)
    return Residual(nn.Sequential(layer, nn.Tanh(), layer))


def tied_across() -> Residual:
    layer = nn.Linear(5, 5)
    return Residual(layer, layer)


def with_parameter() -> Residual:
    residual = Residual(mlp_body())
    residual.gain = nn.Parameter(torch.ones(()))
    return residual


def replaced() -> Residual:
    residual = Residual(mlp_body())
    residual.forward = lambda z: 2 * z
    return residual


class Custom(Residual):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(z)


class Double(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 2 * z


GENERIC = {
    "hook": hooked,
    "tied": tied,
    "tied-across": tied_across,
    "own-parameter": with_parameter,
    "replaced-forward": replaced,
    "subclass": lambda: Custom(mlp_body()),
    "unknown-leaf": lambda: Residual(nn.Sequential(nn.Linear(5, 5), Double())),
    "unknown-activation": lambda: Residual(mlp_body(), activation=Double()),
    "parametrization": lambda: Residual(parametrizations.weight_norm(nn.Linear(5, 5))),
    "empty-body": lambda: Residual(nn.Sequential(), activation=nn.Tanh()),
}


@pytest.mark.parametrize("name", GENERIC)
def test_what_is_not_transparent_stays_generic(name: str) -> None:
    assert parts(GENERIC[name]()) is GenericBlock
    make = around(GENERIC[name])
    check(Net(name, make, (6, 4)), bm.Cholesky(bm.Relative(0.1)))


@pytest.mark.parametrize("name", CASES)
def test_known_parts_take_the_structured_route(name: str) -> None:
    blocks, _, _ = CASES[name].make()
    kinds = [type(adapt(str(i), block)) for i, block in enumerate(blocks)]
    assert GenericBlock not in kinds
    assert ChainBlock in kinds


def test_hooks_inside_fire_once() -> None:
    residual, calls = Residual(mlp_body()).double(), []
    residual.body[0].register_forward_hook(lambda *_: calls.append(1))
    blocks = [nn.Linear(4, 5).double(), residual]
    matcher = bm.BackMatching(blocks, order="sequential")
    matcher.backward(torch.randn(6, 4).double(), lambda z: z.square().mean())
    assert calls == [1]


def test_forward_keeps_its_input() -> None:
    torch.manual_seed(0)
    residual = Residual(
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), activation=nn.ReLU(inplace=True)
    )
    z = torch.randn(4, 3)
    before = z.clone()
    out = residual(z)
    assert torch.equal(z, before)
    assert torch.equal(out, torch.relu(residual.body[1](torch.relu(before)) + before))


def sweep(block: nn.Module, x: torch.Tensor) -> None:
    bm.BackMatching([block]).backward(x, lambda z: z.sum())


@pytest.mark.parametrize("route", ["plain", "structured", "generic"])
def test_shapes_that_differ(route: str) -> None:
    residual = Residual(nn.Sequential(nn.Linear(5, 1)))
    told = r"same shape, got \(6, 1\) from the body and \(6, 5\) from the shortcut"
    if route == "generic":
        residual.body[0].register_forward_hook(lambda *_: None)
    run = residual if route == "plain" else functools.partial(sweep, residual)
    with pytest.raises(ValueError, match=told):
        run(torch.zeros(6, 5))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((None,), "Residual body must be an nn.Module, got NoneType"),
        ((nn.Tanh, None), "Residual body must be an nn.Module, got type"),
        ((nn.Tanh(), 1), "Residual shortcut must be an nn.Module or None, got int"),
        ((nn.Tanh(), None, torch.relu), "Residual activation must be an nn.Module or None"),
    ],
)
def test_parts_that_are_no_modules(parts: tuple[Any, ...], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        Residual(*parts)


def test_reached_through_the_package() -> None:
    assert bm.blocks.Residual is Residual
