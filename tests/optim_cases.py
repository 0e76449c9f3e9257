"""A small model, batches and both optimizers for the tests of ``backmatch.optim``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as modules

import backmatch as bm

BOTH = [bm.optim.ScaleAmendedSGD, bm.optim.LayerwiseAdaptiveSGD]


def model(dtype=torch.float64):
    """Two Linears with batch norm, in-place activation and dropout between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(7, 3)
    ).to(dtype)


def batches(count, dtype=torch.float64, m=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(m, 5, generator=generator).to(dtype),
            torch.randint(3, (m,), generator=generator),
        )
        for _ in range(count)
    ]


def backward(net, x, y):
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    return loss


def train(net, optimizer, data, seed=3):
    """A few steps from a seeded dropout."""
    torch.manual_seed(seed)
    for x, y in data:
        optimizer.zero_grad()
        backward(net, x, y)
        optimizer.step()
    return net


def values(net):
    return [v.clone() for v in net.state_dict().values()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hook_tables(net):
    """Every hook there is: on the model's modules, and global ones."""
    own = [
        hook
        for part in net.modules()
        for table in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        for hook in table.values()
    ]
    tables = (
        modules._global_forward_hooks,
        modules._global_forward_pre_hooks,
        modules._global_forward_hooks_always_called,
    )
    return own, [hook for table in tables for hook in table]
