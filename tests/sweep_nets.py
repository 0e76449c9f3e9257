"""Small seeded nets, batches and a loss for the tests of the sweep."""

import torch
from torch import nn

ORDERS = ["simultaneous", "sequential"]


def net(*layers):
    """The layers with seeded parameters."""
    model = nn.Sequential(*(layers or (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def batch(*shape, seed=1):
    """A seeded batch, (6, 5) by default."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (6, 5)), generator=generator, dtype=torch.float64)


def square(out):
    return 0.5 * out.square().flatten(1).sum(1).mean()


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(a, b, strict=True))
