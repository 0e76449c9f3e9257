"""Checks of one layer as a block of its own: against the reference sweep and plain NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

import backmatch as bm
from backmatch import reference
from backmatch.blocks.layers import LayerMap, Point, compose

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of its input; ``make`` builds it seeded, in float64."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    prepare: Callable[[nn.Module, Tensor], None] = lambda layer, z: None
    coupled: bool = False

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        """Layer with random parameters and buffers, its input, and a displacement."""
        torch.manual_seed(0)
        layer = self.layer().double()
        for p in layer.parameters():
            nn.init.normal_(p)
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + ("var" in name))
        z = torch.randn(self.shape, dtype=torch.float64)
        with torch.no_grad():
            self.prepare(layer, z)
        r = torch.randn_like(copy.deepcopy(layer)(z.clone()))
        return layer.to(dtype), z.to(dtype), r.to(dtype)


def matching(r: Tensor) -> Callable[[Tensor], Tensor]:
    """A loss whose displacement at the top is ``r``."""
    return lambda out: -(r * out).sum() / len(out)


def sweep(layer: nn.Module, z: Tensor, r: Tensor, solver: Any, **options: Any) -> Any:
    """The report of ``layer`` as the block above an identity."""
    matcher = bm.BackMatching([nn.Identity(), layer], weights=solver, inputs=solver, **options)
    return matcher.backward(z, matching(r), keep=True).blocks[1]


def check_reference(
    case: LayerCase, solver: Any, tolerance: float, dtype: torch.dtype = torch.float64, **options
) -> Any:
    """Every tensor of the sweep against the reference's; returns the block's report."""
    layer, z, r = case.make()
    want = reference.sweep(
        [nn.Identity(), layer], z, matching(r), weights=solver, inputs=solver, **options
    ).blocks[1]
    layer, z, r = case.make(dtype)
    got = sweep(layer, z, r, solver, **options)
    # An exact sequential weight step may leave nothing: sizes count from the displacement too.
    floor = float(r.abs().max()) / 10
    error = deviation(got.input_step, want.input_step, floor)
    assert error < tolerance, f"input step off by {error:.1e}"
    assert got.weight_step.keys() == want.weight_step.keys()
    for name, value in want.weight_step.items():
        error = deviation(got.weight_step[name], value, floor)
        assert error < tolerance, f"{name} off by {error:.1e}"
    return got


def deviation(got: Tensor, want: np.ndarray, floor: float = 0.0) -> float:
    """Largest deviation relative to the largest entry (or ``floor``)."""
    assert tuple(got.shape) == want.shape
    size = max(np.abs(want).max(initial=0.0), floor) or 1.0
    return float(np.abs(got.detach().double().numpy() - want).max(initial=0.0)) / size


def input_systems(layer: nn.Module, z: Tensor, coupled: bool) -> np.ndarray:
    """J_z by autograd, (systems, rows, n) in float64."""
    module = copy.deepcopy(layer).double()
    J = torch.autograd.functional.jacobian(module, z.double())
    if coupled:
        return J.reshape(1, -1, z.numel()).numpy()
    m = z.shape[0]
    J = J.reshape(m, -1, m, z[0].numel())
    return torch.stack([J[i, :, i] for i in range(m)]).numpy()


def weight_system(layer: nn.Module, z: Tensor) -> np.ndarray:
    """J_W by autograd, (rows, all trainable parameters)."""
    module = copy.deepcopy(layer)
    trainable = {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
    rows = torch.autograd.functional.jacobian(
        lambda *values: functional_call(module, dict(zip(trainable, values, strict=True)), z),
        tuple(trainable.values()),
    )
    return torch.cat(
        [J.reshape(-1, p.numel()) for J, p in zip(rows, trainable.values(), strict=True)], 1
    ).numpy()


def lstsq(J: np.ndarray, r: np.ndarray, damping: float) -> tuple[np.ndarray, int]:
    """Step and rank by NumPy, with the cut of the specification."""
    cut = float(np.sqrt(max(J.shape) * EPS))
    rank = int(np.linalg.matrix_rank(J, tol=cut * np.linalg.norm(J, 2)))
    if damping:
        J = np.vstack([J, np.sqrt(damping) * np.eye(J.shape[1])])
        r, cut = np.concatenate([r, np.zeros(J.shape[1])]), 0.0
    return np.linalg.lstsq(J, r, rcond=cut)[0], rank


def check_lstsq(case: LayerCase, damping: float | bm.Relative, tolerance: float) -> Any:
    """Both problems against NumPy's least squares on autograd's Jacobians."""
    layer, z, r = case.make()
    systems = input_systems(layer, z, case.coupled)
    has_weights = any(p.requires_grad for p in layer.parameters())
    joint = weight_system(layer, z) if has_weights else None
    got = sweep(layer, z, r, bm.Auto(damping))
    rows = r.reshape(len(systems), -1).numpy()
    found = [lstsq(J, one, _damping(damping, J, 1.0)) for J, one in zip(systems, rows, strict=True)]
    want = np.stack([step for step, _ in found]).reshape(tuple(z.shape))
    error = deviation(got.input_step, want)
    assert error < tolerance, f"input step off by {error:.1e}"
    assert damping != 0.0 or got.input.rank == sum(rank for _, rank in found)
    if joint is not None:
        m = len(z)
        step, rank = lstsq(joint, r.numpy().ravel(), m * _damping(damping, joint, 1 / m))
        flat = torch.cat([v.reshape(-1) for v in got.weight_step.values()])
        assert deviation(flat, step) < tolerance
        assert damping != 0.0 or got.weight.rank == rank
    return got


def _damping(damping: float | bm.Relative, J: np.ndarray, scale: float) -> float:
    if isinstance(damping, bm.Relative):
        mean = scale * float((J**2).sum()) / J.shape[1]
        return damping.factor * mean or 1.0
    return damping


def check_descent(case: LayerCase, damping: float, order: str) -> None:
    """Three Gauss-Newton steps match the reference and leave no system's objective higher."""
    solver = bm.Auto(damping)
    got = check_reference(case, solver, 1e-7, order=order, newton_steps=3)
    if order == "sequential":
        return
    layer, z, r = case.make()
    for moved in ((z + got.input_step, {}), (z, got.weight_step)):
        if moved[1] is not None:
            _check_not_risen(layer, z, r, *moved, damping)


def _check_not_risen(
    layer: nn.Module, z: Tensor, r: Tensor, at: Tensor, step: dict[str, Tensor], damping: float
) -> None:
    module = copy.deepcopy(layer).requires_grad_(False)
    before = copy.deepcopy(module)(z.clone())
    values = {k: p.detach() + step.get(k, 0.0) for k, p in module.named_parameters()}
    left = r - (functional_call(module, values, at.clone()) - before)
    size = damping * (at - z).square().sum()
    size = size + damping * len(z) * sum(float(d.square().sum()) for d in step.values())
    assert float(left.square().sum() + size) <= float(r.square().sum()) * (1 + 1e-12)


def map_of(layer: nn.Module, z: Tensor) -> LayerMap:
    """The layer's map at z, as a block "b" has it."""
    names = {id(p): name for name, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        return compose([layer], z, Point("b", names, None))


def check_products(case: LayerCase) -> None:
    """Output, J_z d, J_z^T u, J_W d and J_W^T u against autograd."""
    layer, z, _ = case.make()
    plain = copy.deepcopy(layer)
    found = map_of(layer, z)
    leaf = z.clone().requires_grad_()
    out = plain(leaf)
    assert torch.equal(found.output, out.detach())
    u, dz = torch.randn_like(out), torch.randn_like(z)
    named = {k: p for k, p in plain.named_parameters() if p.requires_grad}
    step = {k: torch.randn_like(p) for k, p in named.items()}
    wanted = torch.autograd.grad(out, [leaf, *named.values()], u)
    torch.testing.assert_close(found.pull(u), wanted[0], rtol=1e-9, atol=1e-9)
    assert found.parameters == {k: tuple(p.shape) for k, p in named.items()}
    pulled = found.pull_parameters(u)
    assert list(pulled) == list(named)
    for got, want in zip(pulled.values(), wanted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    # Adjoint to a transpose that is right: right as well.
    inner = float((found.push(dz) * u).sum())
    assert abs(inner - float((dz * wanted[0]).sum())) < 1e-9 * max(abs(inner), 1.0)
    if named:
        inner = float((found.push_parameters(step) * u).sum())
        other = sum(float((step[k] * g).sum()) for k, g in pulled.items())
        assert abs(inner - other) < 1e-9 * max(abs(inner), 1.0)


def check_generic(case: LayerCase, solver: Any, tolerance: float) -> None:
    """The same module with a hook takes the generic route and gives the same."""
    layer, z, r = case.make()
    got = sweep(layer, z, r, solver)
    layer, z, r = case.make()
    layer.register_forward_hook(lambda *_: None)
    want = sweep(layer, z, r, solver)
    assert deviation(got.input_step, want.input_step.numpy()) < tolerance
    for name, value in want.weight_step.items():
        assert deviation(got.weight_step[name], value.numpy()) < tolerance


def check_float32(case: LayerCase) -> None:
    """Relative(0.1) in float32: off by no more than the condition of the damped systems allows."""
    layer, z, _ = case.make()
    eps = float(np.finfo(np.float32).eps)
    systems = input_systems(layer, z, case.coupled)
    # J itself is known to eps relative to its norm, and J^T J to twice that.
    condition = max(1 + J.shape[1] / 0.1 for J in systems)
    check_reference(case, bm.Auto(bm.Relative(0.1)), 4 * eps * condition, torch.float32)
