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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_update_is_the_sweep(name, kind):
    check(ALL[name], kind)
