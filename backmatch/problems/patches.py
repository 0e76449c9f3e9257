"""The patch matrix of a convolution, never formed for a whole batch.

Row (i, l) of Z_g holds what the kernel sees of sample i at position l in the channels of group g:
N = samples * positions rows of K = (channels per group) * (kernel size) entries. All output
channels of a group share it, so a convolution is Z_g W_g^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..linalg import _library

Pair = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """Patches of ``x``, shape (samples, channels, height, width), already padded where needed.

    Attributes:
        x: what the kernel runs over.
        units: output channels, a multiple of ``groups``.
        kernel, stride, padding, dilation, groups: as of ``torch.nn.functional.conv2d``.
    """

    x: Tensor
    units: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def width(self) -> int:
        """K, the length of a patch."""
        return self.x.shape[1] // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def map(self) -> Pair:
        """Height and width of the output."""
        return self._side(0), self._side(1)

    def _side(self, axis: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (self.x.shape[2 + axis] + 2 * self.padding[axis] - reach) // self.stride[axis] + 1

    @property
    def rows(self) -> int:
        """N, samples times positions."""
        high, wide = self.map
        return self.x.shape[0] * high * wide

    def shifted(self) -> Patches:
        """The same with every channel's mean taken off ``x``, in two steps: a large one is rounded.

        Without padding this moves all rows of a group by one vector, which batch statistics take
        off anyway, with more digits lost.
        """
        x = self.x.sub(self.x.mean((0, 2, 3), keepdim=True))
        return replace(self, x=x.sub_(x.mean((0, 2, 3), keepdim=True)))

    def apply(self, weight: Tensor) -> Tensor:
        """Z W^T: weight (units, K) -> (samples, units, height, width)."""
        kernel = weight.reshape(self.units, -1, *self.kernel)
        return nnf.conv2d(
            self.x, kernel, None, self.stride, self.padding, self.dilation, self.groups
        )

    def adjoint(self, u: Tensor) -> Tensor:
        """Z^T u per channel: (samples, units, height, width) -> (units, K)."""
        return self._adjoint(u, self.units)

    def _adjoint(self, u: Tensor, units: int) -> Tensor:
        shape = (units, self.x.shape[1] // self.groups, *self.kernel)
        options = (self.stride, self.padding, self.dilation, self.groups)
        kernel: Tensor = conv2d_weight(self.x, shape, u, *options)  # type: ignore[no-untyped-call]
        return kernel.reshape(units, -1)

    def squares(self) -> Tensor:
        """|row|^2 of every group's rows, shape (samples, groups, height, width)."""
        ones = self.x.new_ones(self.groups, self.x.shape[1] // self.groups, *self.kernel)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return nnf.conv2d(self.x.square(), ones, None, *options)

    def mean(self) -> Tensor:
        """The mean row of every group, shape (groups, K)."""
        u = self.x.new_full((self.x.shape[0], self.groups, *self.map), 1 / self.rows)
        return self._adjoint(u, self.groups)

    def chunks(self, group: int, *, columns: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """The rows of one group, some samples at a time: (rows, patches (rows, K + columns)).

        ``columns`` constant ones stand behind every patch. A chunk and what unfolding needs beside
        it stay within a quarter of the workspace.
        """
        channels = self._channels(group)
        positions = self.rows // self.x.shape[0]
        size = 2 * positions * (self.width + columns) * self.x.element_size()
        step = max(1, _library.WORKSPACE_BYTES // 4 // max(size, 1))
        for start in range(0, self.x.shape[0], step):
            part = self._unfold(self.x[start : start + step, channels])
            rows = part.new_ones(part.shape[0], positions, self.width + columns)
            rows[..., : self.width] = part.transpose(1, 2)
            begin = start * positions
            yield slice(begin, begin + len(rows) * positions), rows.flatten(0, 1)

    def dual(self, group: int, *, centred: bool = False) -> Tensor:
        """Z_g Z_g^T, shape (N, N), summed over a few channels at a time.

        ``centred`` takes the mean row off every row.
        """
        channels = self._channels(group)
        taps = self.kernel[0] * self.kernel[1]
        size = 2 * self.rows * taps * self.x.element_size()
        step = max(1, _library.WORKSPACE_BYTES // 4 // size)
        K = self.x.new_zeros(self.rows, self.rows)
        for start in range(channels.start, channels.stop, step):
            part = self.x[:, start : min(start + step, channels.stop)]
            Z = self._unfold(part).transpose(1, 2).reshape(self.rows, -1)
            if centred:  # twice: a large mean is rounded
                Z.sub_(Z.mean(0)).sub_(Z.mean(0))
            K.addmm_(Z, Z.t())
        return K

    def of_group(self, group: int) -> slice:
        """The output channels of a group."""
        each = self.units // self.groups
        return slice(group * each, (group + 1) * each)

    def to_rows(self, native: Tensor) -> Tensor:
        """(samples, units, height, width) -> (units, N)."""
        return native.transpose(0, 1).reshape(native.shape[1], -1)

    def to_map(self, rows: Tensor) -> Tensor:
        """(units, N) -> (samples, units, height, width), a view."""
        return rows.reshape(rows.shape[0], self.x.shape[0], *self.map).transpose(0, 1)

    def _channels(self, group: int) -> slice:
        each = self.x.shape[1] // self.groups
        return slice(group * each, (group + 1) * each)

    def _unfold(self, x: Tensor) -> Tensor:
        """(samples, channels, ..) -> (samples, channels * taps, positions)."""
        return nnf.unfold(x, self.kernel, self.dilation, self.padding, self.stride)
