"""The usual augmentation of small images: a random crop after padding, and a random mirror image.

What happens to an image is a function of (seed, epoch, its position in the epoch) alone: not of
the global generator, which dropout draws from, nor of the batch size or the device. So a run can
be taken up anywhere, and training on a GPU sees what the CPU would.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

#: Pixels added on each side before the crop.
PADDING = 4
#: Keeps these draws apart from those of the sample order, which has no spawn key.
_STREAM = 1


def draw(seed: int, epoch: int, count: int) -> Tensor:
    """Row offset, column offset (0 to 8) and mirrored or not (0, 1) for every position.

    Returns:
        int64, shape (count, 3), on the CPU. The rows of a smaller count are the first of a larger.

    >>> draw(0, 1, 2).tolist() == draw(0, 1, 5)[:2].tolist()
    True
    """
    sequence = np.random.SeedSequence([seed, epoch], spawn_key=(_STREAM,))
    highs = [2 * PADDING + 1, 2 * PADDING + 1, 2]
    random = np.random.default_rng(sequence)
    return torch.from_numpy(random.integers(0, highs, (count, 3), dtype=np.int64))


def move(images: Tensor, moves: Tensor) -> Tensor:
    """Crop and mirror each image as its row of :func:`draw` says, all in one gather.

    Args:
        images: shape (m, channels, height, width), any dtype and device; what a crop takes from
            outside of an image is 0.
        moves: shape (m, 3).

    Returns:
        The shape, dtype and device of ``images``, contiguous.

    >>> move(torch.arange(1, 4).view(1, 1, 1, 3), torch.tensor([[4, 5, 0]])).flatten().tolist()
    [2, 3, 0]
    >>> move(torch.arange(1, 4).view(1, 1, 1, 3), torch.tensor([[4, 4, 1]])).flatten().tolist()
    [3, 2, 1]
    """
    count, channels, height, width = images.shape
    place = images.device
    padded = pad(images, (PADDING,) * 4)
    down, right, mirrored = moves.to(place).unbind(1)
    rows = down[:, None] + torch.arange(height, device=place)
    columns = torch.arange(width, device=place).expand(count, width)
    columns = right[:, None] + torch.where(mirrored[:, None] == 1, columns.flip(1), columns)
    return padded[
        torch.arange(count, device=place)[:, None, None, None],
        torch.arange(channels, device=place)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
