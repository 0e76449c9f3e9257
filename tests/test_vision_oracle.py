"""Vision nets against the dense-Jacobian reference: every net, solver, order and damping."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from cases import Net
from oracle import Oracle, canonical, deviation, largest
from torch import nn
from vision_cases import NETS, random_vision_net

import backmatch as bm
from backmatch import reference
from backmatch.reference.jacobian import BlockMap
from backmatch.reference.sweep import weight_systems

# torch says so in a plain forward pass too.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

DAMPINGS = (0.0, 1e-3, 0.3, bm.Relative(0.1))
ORDERS = ("simultaneous", "sequential")
#: Norms of a single value, means of normalised maps: Jacobians that are rounding and nothing else.
DEGENERATE = {2, 12, 32}
RANDOM = [f"random-{seed}" for seed in range(72) if seed not in DEGENERATE]

#: Solver pairs as functions of one damping. The reference answers all exact ones alike.
EXACT_PAIRS = {
    "cholesky": lambda d: (bm.Cholesky(d), bm.Cholesky(d)),
    "auto": lambda d: (bm.Auto(d), bm.Auto(d)),
    "cg": lambda d: (bm.CG(d, rtol=1e-13), bm.CG(d, rtol=1e-13)),
    "mixed": lambda d: (bm.CG(d, rtol=1e-13), bm.Cholesky(d)),
}

OTHER_PAIRS = {
    "gradient": (bm.Gradient(), bm.Gradient()),
    "gradient-exact": (bm.Gradient(), bm.Cholesky(bm.Relative(1e-2))),
    "exact-gradient": (bm.Auto(bm.Relative(0.1)), bm.Gradient()),
    "trace": (bm.Scalar("trace"), bm.Scalar("trace", damping=0.2)),
    "spectral": (bm.Scalar("spectral"), bm.Scalar("spectral", damping=0.2)),
    "rayleigh": (bm.Scalar("rayleigh"), bm.Scalar("rayleigh", damping=0.2)),
}

#: One or two of each kind of block, for the options that need many reference sweeps.
CHOSEN = [
    "conv-padded", "conv-same-even-act", "conv-grouped-act", "conv-dilated-strided-padded-act",
    "bn-train", "conv-bn-relu", "layer-norm", "conv-gn-relu", "pool-max-overlapping",
    "pool-avg-ceil-padded", "conv-relu-max", "basic-block", "tied", "dropout", "frozen-weight",
    "by-layer", "batch-1-bn", "conv-bn-eval", "conv-max-relu", "conv-avg-tanh", "residual",
    "bn-relu-conv", "frozen-norm", "frozen-bias", "conv-depthwise-act", "pool-max-ceil",
    "known-basic-block",
    "random-7", "random-21", "random-45",
]  # fmt: skip


@functools.cache
def net(name: str) -> Net:
    """A net of the catalogue, or a random one: "random-SEED"."""
    return NETS[name] if name in NETS else random_vision_net(int(name.removeprefix("random-")))


ORACLE = Oracle(net)
check, expected = ORACLE.check, ORACLE.expected


@functools.cache
def has_clear_ranks(name: str) -> bool:
    """Whether no singular value lies near the rank cut, nor so low that a chain loses digits."""
    blocks, z, _ = net(name).make()
    for block in blocks:
        f = BlockMap(block, z)
        J_w, J_z = f.weight_jacobian(f.zero_w, f.zero_z), f.input_jacobian(f.zero_w, f.zero_z)
        for J in [*(J_w[np.ix_(r, c)] for r, c in weight_systems(f)), J_z]:
            if J.size:
                values = np.linalg.svd(J, compute_uv=False)
                if ((1e-12 * values[0] < values) & (values < 1e-4 * values[0])).any():
                    return False
        z = f.out
    return True


def settings(name: str) -> list[tuple[str, Any]]:
    """Orders and dampings for a net; bare and activated convolutions share the list."""
    turn = list(NETS).index(name)
    every = [(ORDERS[(turn + i) % 2], damping) for i, damping in enumerate(DAMPINGS)]
    if name.startswith("conv-") and name.removesuffix("-act") in NETS:
        return every[:2] if (turn // 2 + turn) % 2 else every[2:]
    return every


@pytest.mark.parametrize("name", NETS)
def test_exact_solvers(name):
    for i, (order, damping) in enumerate(settings(name)):
        if damping == 0.0 and not has_clear_ranks(name):
            continue
        check(name, *EXACT_PAIRS["cholesky"](damping), order=order)
        if damping != 0.0:  # there the condition number is unbounded
            check(name, *EXACT_PAIRS["cg"](damping), order=order)
        if i == 0:
            check(name, *EXACT_PAIRS["auto"](damping), order=order)


@pytest.mark.parametrize("name", RANDOM)
def test_random_nets(name):
    seed = int(name.removeprefix("random-"))
    rng = np.random.default_rng(seed)
    dampings = DAMPINGS if has_clear_ranks(name) else DAMPINGS[1:]
    for i in range(2):
        damping = dampings[(seed + i) % len(dampings)]
        pair = str(rng.choice(["cholesky", "auto"] if damping == 0.0 else list(EXACT_PAIRS)))
        check(name, *EXACT_PAIRS[pair](damping), order=ORDERS[(seed // 2 + i) % 2])


def test_damping_zero_is_tested_where_ranks_are_clear():
    clear = [name for name in [*NETS, *RANDOM] if has_clear_ranks(name)]
    assert len(clear) > 0.85 * (len(NETS) + len(RANDOM)), sorted({*NETS} - {*clear})


@pytest.mark.parametrize("pair", OTHER_PAIRS)
@pytest.mark.parametrize("name", CHOSEN)
def test_other_solvers(name, pair):
    turn = list(OTHER_PAIRS).index(pair) + CHOSEN.index(name)
    check(name, *OTHER_PAIRS[pair], order=ORDERS[turn % 2])


@pytest.mark.parametrize("name", [*NETS, *RANDOM])
def test_gradient_on_both_sides_is_back_propagation(name):
    blocks, x, loss = net(name).make()
    state = torch.get_rng_state()
    bm.BackMatching(blocks, weights=bm.Gradient(), inputs=bm.Gradient(), target_step=0.7).backward(
        x, loss
    )
    torch.set_rng_state(state)
    others, _, _ = net(name).make()
    torch.set_rng_state(state)
    with torch.enable_grad():
        output = nn.Sequential(*others)(x.clone())
        if output.requires_grad:
            loss(output).backward()
    pairs = list(
        zip(nn.ModuleList(blocks).parameters(), nn.ModuleList(others).parameters(), strict=True)
    )
    size = largest(q.grad.numpy() for _, q in pairs if q.grad is not None)
    for p, q in pairs:
        if p.requires_grad:
            grad = torch.zeros_like(q) if q.grad is None else q.grad
            assert deviation(p.grad - 0.7 * grad, np.zeros(p.shape), size or 1.0) < 1e-12
        else:
            assert p.grad is None


@pytest.mark.parametrize("name", CHOSEN)
def test_passes(name):
    solver = bm.Auto(bm.Relative(0.1))
    check(name, solver, solver, order="sequential", passes=2)
    check(name, bm.Cholesky(0.3), bm.Gradient(), order="sequential", passes=2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHOSEN)
def test_newton_steps(name, order):
    solver = bm.Cholesky(0.3 if order == "sequential" else bm.Relative(0.1))
    check(name, solver, solver, order=order, newton_steps=3, tolerance=1e-7)


def conditions(f: BlockMap, want: Any) -> tuple[float, float, float]:
    """Largest condition number of a block's damped normal matrices, and the sizes of its steps.

    Sizes as of ``|J| |r| scale / (|J|^2 scale + damping)``: what a solve answers whose right-hand
    side does not cancel, and so what its rounding errors are relative to.
    """
    r, dampings = want.displacement.ravel(), want.input_damping
    J = f.weight_jacobian(f.zero_w, f.zero_z)
    sides = [[(J, r, want.weight_damping[:1], 1 / f.m)]]
    if want.input_step is not None:
        J, n = f.input_jacobian(f.zero_w, f.zero_z), len(dampings)
        rows, columns = (np.array_split(np.arange(k), n) for k in J.shape)
        sides.append(
            [
                (J[np.ix_(i, j)], r[i], dampings[k : k + 1], 1.0)
                for k, (i, j) in enumerate(zip(rows, columns, strict=True))
            ]
        )
    kappa, sizes = 1.0, [0.0, 0.0]
    for side, systems in enumerate(sides):
        for part, residual, damping, scale in systems:
            if not part.any():
                continue
            norm = np.linalg.norm(part, 2)
            top = scale * norm**2 + damping[0]
            kappa = max(kappa, top / damping[0])
            sizes[side] = max(sizes[side], scale * norm * np.linalg.norm(residual) / top)
    return kappa, sizes[0] or 1.0, sizes[1] or 1.0


@pytest.mark.parametrize("name", [*NETS, *RANDOM[:40]])
def test_float32(name):
    """Errors stay below C eps kappa, summed over the blocks from the top down.

    A solve of (H + lambda I) d = g with relative errors of a few eps in H and g is off by a few
    eps kappa, kappa that of H + lambda I; what is handed down carries its error on. Sums rather
    than products, because errors of generic direction are not amplified like the worst one.
    C stands for "a few", and for what norms add when they divide by a small spread.
    """
    C = 8.0  # measured: at most 0.7 of this
    solver = bm.Auto(bm.Relative(0.1))
    blocks, x, loss = net(name).make()
    for part in nn.ModuleList(blocks).modules():
        if isinstance(part, (nn.Dropout, nn.Dropout2d)):
            part.eval()  # masks drawn in float32 and in float64 differ
    single, x = [block.float() for block in blocks], x.float()
    wide = reference.sweep(single, x, loss, weights=canonical(solver), inputs=canonical(solver))
    maps, z = [], x.double()
    for block in copy.deepcopy(single):
        maps.append(BlockMap(block.double(), z))
        z = maps[-1].out
    step = bm.BackMatching(single, weights=solver, inputs=solver).backward(
        x, lambda out: loss(out.double()), keep=True
    )
    kappas = 0.0
    for f, got, want in reversed(list(zip(maps, step.blocks, wide.blocks, strict=True))):
        kappa, weight_size, input_size = conditions(f, want)
        kappas += kappa
        tolerance = C * torch.finfo(torch.float32).eps * kappas
        for parameter, value in want.weight_step.items():
            assert got.weight_step[parameter].dtype == torch.float32
            error = deviation(got.weight_step[parameter], value, weight_size)
            assert error < tolerance, f"{name} {want.name}: {parameter} off by {error:.1e}"
        if want.input_step is not None:
            error = deviation(got.input_step, want.input_step, input_size)
            assert error < tolerance, f"{name} {want.name}: input step off by {error:.1e}"
