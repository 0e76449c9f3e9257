"""A user's own vision modules, and norms that look trained, for the tests of vision nets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Blocks
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

#: What follows a convolution.
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.Tanh,
    nn.ReLU,
    lambda: nn.LeakyReLU(0.1, inplace=True),
    nn.GELU,
    lambda: nn.ReLU(inplace=True),
]


class Residual(nn.Module):
    """A user's module: activation of shortcut(z) + body(z)."""

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        return self.after(self.shortcut(z) + self.body(z))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)

    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(self.gate(z.mean((2, 3))))[:, :, None, None]


class Turned(nn.Module):
    """Rows and columns swapped: hands a strided view on."""

    def forward(self, z: Tensor) -> Tensor:
        return z.transpose(2, 3)


class ChannelsLast(nn.Module):
    """The same numbers in another order of memory."""

    def forward(self, z: Tensor) -> Tensor:
        return z.contiguous(memory_format=torch.channels_last)


class Standardised(nn.Conv2d):
    """A subclass of Conv2d that computes something else: no structured route may take it."""

    def forward(self, z: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(z, weight, self.bias, self.stride, self.padding)


def stirred(blocks: Blocks) -> Blocks:
    """Norms as after some training: gamma of both signs, beta and running statistics apart."""
    for part in nn.ModuleList(blocks).modules():
        if not isinstance(part, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            continue
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
        if part.weight is not None:
            signs = torch.randint(2, part.weight.shape) * 2 - 1
            part.weight.data.uniform_(0.5, 1.5).mul_(signs)
        if part.bias is not None:
            part.bias.data.normal_()
    return blocks
