"""The sweep on a GPU, as far as that can be seen without one.

Every net of the catalogues runs with tensors that only say they are on a GPU: the branches that a
device chooses are executed, nothing may mix devices, and the step is that of the CPU.
"""

from __future__ import annotations

import cases
import pytest
import torch
import vision_cases
from pretend_device import PretendCuda, pretend, pretend_modules, pretends
from torch import nn

import backmatch as bm

NETS = {**cases.NETS, **vision_cases.NETS}
SOLVERS = {
    "auto": bm.Auto,
    "cholesky": bm.Cholesky,
    "cg": lambda damping: bm.CG(damping, rtol=1e-12, max_steps=2000),
}


def test_two_devices_must_not_meet():
    a, b = torch.ones(2), torch.ones(2)
    pretend(a)
    with PretendCuda():
        assert (a.is_cuda, a.is_cpu, b.is_cuda, (a + 1).device.type) == (True, False, False, "cuda")
        assert pretends(torch.zeros(2, device="cuda"))
        assert pretends(b.to("cuda"))
        assert not pretends(a.cpu())
        with pytest.raises(RuntimeError, match="on cuda meet"):
            a + b
        with pytest.raises(ValueError, match="B must be on the device of A"):
            bm.linalg.spd_solve(torch.eye(2, device="cuda"), b.unsqueeze(-1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NETS)
def test_step_on_a_gpu_is_that_of_the_cpu(pretend_cuda, name, solver):
    expected = step(NETS[name], SOLVERS[solver], on_gpu=False)
    got = step(NETS[name], SOLVERS[solver], on_gpu=True)
    assert all(pretends(grad) for grad in got)
    scale = max((float(grad.abs().max()) for grad in expected), default=0.0)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_waits_for_the_gpu_are_few(pretend_cuda, solver):
    """Two for each local problem, its damping and its residual, and six for the sweep.

    Conjugate gradient polls copies that arrive by themselves.
    """
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU())]
    net = cases.Net("deep", lambda: bm.partition(nn.Sequential(*layers)), labels=True)
    blocks, x, loss = net.make()
    matcher = bm.BackMatching(
        blocks,
        weights=SOLVERS[solver](bm.Relative(0.1)),
        inputs=SOLVERS[solver](bm.Relative(1e-2)),
    )
    pretend_modules(blocks)
    pretend(x)
    with PretendCuda() as gpu:
        matcher.backward(x, quietly(loss))
    assert 0 < gpu.waits <= 6 + 2 * (2 * len(blocks) - 1)


def test_direct_solves_reach_the_kernels(pretend_cuda):
    for name in ("relu", "linear"):
        step(NETS[name], bm.Cholesky, on_gpu=True)
    assert {"spd_solve", "scaled_gram_solve"} & set(pretend_cuda)


def quietly(loss):
    """The target in the loss's closure stays on the CPU."""

    def computed(out):
        with torch._C.DisableTorchFunction():
            return loss(out)

    return computed


def step(net, solver, *, on_gpu):
    """One sweep; returns the gradients of all parameters that have one."""
    blocks, x, loss = net.make()
    matcher = bm.BackMatching(
        blocks, weights=solver(bm.Relative(0.1)), inputs=solver(bm.Relative(1e-2))
    )
    if not on_gpu:
        matcher.backward(x, loss)
    else:
        pretend_modules(blocks)
        pretend(x)

        with PretendCuda():
            output = matcher.backward(x, quietly(loss)).output
        assert pretends(output)
    parameters = [p for block in blocks for p in block.parameters()]
    return [p.grad for p in parameters if p.grad is not None]
