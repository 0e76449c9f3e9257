"""Images kept as bytes, a quarter of the memory, and made numbers batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Images whose sums are taken at once; bounds the memory of the statistics.
_CHUNK = 512


@dataclass(frozen=True)
class Normalization:
    """(byte - mean) / std of each channel.

    Attributes:
        mean: one per channel, in units of a byte (0 to 255).
        std: likewise; standard deviation over the training pixels.
        dtype: of the numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Numbers of shape (m, channels, height, width) from bytes of that shape.

        >>> Normalization((1.0,), (2.0,), torch.float64)(torch.tensor([[[[5]]]]).byte()).item()
        2.0
        """
        shape = (len(self.mean), 1, 1)
        place = {"dtype": self.dtype, "device": pixels.device}
        mean = torch.tensor(self.mean, **place).view(shape)  # type: ignore[arg-type]
        std = torch.tensor(self.std, **place).view(shape)  # type: ignore[arg-type]
        return pixels.to(self.dtype).sub(mean).div_(std)


def statistics(pixels: np.ndarray[Any, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of bytes (n, channels, height, width).

    The sums are whole numbers, so that the result does not depend on how they are taken.

    Raises:
        ValueError: a channel has the same value everywhere.

    >>> statistics(np.array([[[[0, 2]]]], dtype=np.uint8))
    ((1.0,), (1.0,))
    """
    channels = pixels.shape[1]
    sums, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK].astype(np.int64)
        sums += part.sum((0, 2, 3))
        squares += (part * part).sum((0, 2, 3))
    count = pixels.size // channels
    # n sum x^2 - (sum x)^2 in whole numbers: nothing cancels.
    spreads = [count * int(q) - int(s) ** 2 for s, q in zip(sums, squares, strict=True)]
    if not all(spreads):
        raise ValueError(f"channel {spreads.index(0)} has the same value everywhere")
    mean = tuple(int(s) / count for s in sums)
    return mean, tuple(math.sqrt(spread) / count for spread in spreads)
