"""Random layers for ``vision_cases.random_vision_net``, drawn so that they fit each other."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from vision_modules import ACTIVATIONS, Residual


class Draw:
    """Layers drawn one by one on a map whose shape is tracked; what does not fit is left out."""

    MAX_ENTRIES = 36  # of one sample, after any layer: the reference makes a pass for each
    MAX_PARAMETERS = 150  # of one layer

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
        self.rng, self.shape = rng, shape
        self.layers: list[Callable[[], nn.Module]] = []

    def one(self, *options: object) -> object:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def pair(self, *options: int) -> object:
        """A number for both directions, or one for each."""
        numbers = int(self.one(*options)), int(self.one(*options))
        return numbers if self.rng.random() < 0.4 else numbers[0]

    def add(self, layer: Callable[[], nn.Module]) -> bool:
        """Append the layer if it takes the current shape and answers with a small one."""
        try:
            with torch.random.fork_rng(), torch.no_grad():
                shape = tuple(layer().eval()(torch.zeros(self.shape)).shape)
        except (RuntimeError, ValueError):
            return False
        if 0 in shape or np.prod(shape[1:]) > self.MAX_ENTRIES:
            return False
        if sum(p.numel() for p in layer().parameters()) > self.MAX_PARAMETERS:
            return False
        self.layers.append(layer)
        self.shape = shape
        return True

    def convolution(self) -> Callable[[], nn.Module]:
        channels = self.shape[1]
        groups = int(self.one(1, 1, *(g for g in range(1, channels + 1) if channels % g == 0)))
        kernel, bias = self.pair(1, 2, 3), bool(self.rng.random() < 0.7)
        dilation, out = self.pair(1, 1, 2), groups * int(self.one(1, 2, 3))
        stride, padding = (
            self.pair(1, 1, 2, 3),
            self.one("same", "valid", *[self.pair(0, 1, 2)] * 3),
        )
        stride = 1 if padding == "same" else stride
        return lambda: nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)

    def norm(self) -> Callable[[], nn.Module]:
        channels, affine = self.shape[1], bool(self.rng.random() < 0.8)
        eps, seen = float(self.one(1e-5, 0.1)), int(np.prod(self.shape) // channels)
        train = bool(seen >= 4 and self.rng.random() < 0.6)
        groups = int(self.one(*(g for g in range(1, channels + 1) if channels % g == 0)))
        shape = self.shape[int(self.rng.integers(1, len(self.shape))) :]
        return self.one(
            lambda: nn.BatchNorm2d(channels, eps, affine=affine).train(train),
            lambda: nn.BatchNorm2d(channels, eps, affine=affine).train(train),
            lambda: nn.GroupNorm(groups, channels, max(eps, 1e-2), affine),
            lambda: nn.LayerNorm(shape, max(eps, 1e-2), affine),
        )

    def pool(self) -> Callable[[], nn.Module]:
        kernel, stride, ceil = self.pair(1, 2, 3), self.pair(1, 2, 3), bool(self.one(0, 1))
        padding, count, size = int(self.one(0, 0, 1)), bool(self.one(0, 1)), self.pair(1, 2, 3)
        return self.one(
            lambda: nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil),
            lambda: nn.AvgPool2d(kernel, stride, padding, ceil, count),
            lambda: nn.AdaptiveAvgPool2d(size),
        )

    def stage(self) -> None:
        """Convolution and what may follow it."""
        while not self.add(self.convolution()):
            pass
        if self.rng.random() < 0.5:
            self.add(self.norm())
        self.add(self.one(*ACTIVATIONS, nn.Identity))
        if self.rng.random() < 0.5:
            self.add(self.pool())
        if self.rng.random() < 0.2:
            self.add(lambda: nn.Dropout(0.3))
        if self.rng.random() < 0.25:
            channels, act = self.shape[1], self.one(*ACTIVATIONS)
            conv = functools.partial(nn.Conv2d, channels, channels, 3, padding=1)
            self.add(lambda: Residual(nn.Sequential(conv(), act())))
