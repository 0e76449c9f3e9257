"""One block as a plain function of two displacements, and its dense Jacobians.

The only file of the reference that runs torch: rows of a Jacobian come from one
``torch.autograd.grad`` per output entry, everything after that is NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .linalg import Array


class BlockMap:
    """(d_W, d_z) -> T(W + d_W, z + d_z) for one block and one batch, flattened, in float64.

    Every evaluation starts from the random state and the buffers found at construction, so
    dropout keeps its mask and running statistics do not pile up. The constructor makes the block's
    one forward pass (it advances the random state as that pass does).

    Args:
        module: the block; its parameters are overwritten, so hand over a float64 copy.
        z: its input, dimension 0 the sample.

    Attributes:
        out: z_b of shape (m, ...).
        m: number of samples.
        names: the trainable parameters' names, in the order of the columns of J_W.

    >>> f = BlockMap(nn.Linear(1, 2).double(), torch.ones(3, 1).double())
    >>> f.weight_jacobian(f.zero_w, f.zero_z).shape, f.input_jacobian(f.zero_w, f.zero_z).shape
    ((6, 4), (6, 3))
    """

    def __init__(self, module: nn.Module, z: Tensor) -> None:
        self.module, self.z = module, z.detach()
        self._rng = torch.get_rng_state()
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()]
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.names = list(trainable)
        self._parameters = list(trainable.values())
        self._start = [p.detach().clone() for p in self._parameters]
        self.m = z.shape[0]
        self.zero_w = np.zeros(sum(p.numel() for p in self._parameters))
        self.zero_z = np.zeros(z.numel() if z.is_floating_point() else 0)
        self.out = self._run(self.zero_w, self.z).detach()

    def value(self, d_w: Array, d_z: Array) -> Array:
        """T(W + d_W, z + d_z), shape (m * n_out,)."""
        return _numpy(self._run(d_w, self._moved(d_z)))

    def weight_jacobian(self, d_w: Array, d_z: Array) -> Array:
        """J_W at (W + d_W, z + d_z): shape (m * n_out, P), columns in the order of ``names``."""
        return _rows(self._run(d_w, self._moved(d_z)), self._parameters)

    def input_jacobian(self, d_w: Array, d_z: Array) -> Array:
        """J_z of the whole batch at (W + d_W, z + d_z): shape (m * n_out, m * n_in)."""
        z = self._moved(d_z).requires_grad_()
        return _rows(self._run(d_w, z), [z])

    def unflatten(self, d_w: Array) -> dict[str, Array]:
        """The pieces of d_W by parameter name, each in its parameter's shape."""
        ends = np.cumsum([p.numel() for p in self._parameters], dtype=np.int64)
        pieces = np.split(d_w, ends[:-1]) if self.names else []
        return {
            n: piece.reshape(tuple(p.shape))
            for n, piece, p in zip(self.names, pieces, self._parameters, strict=True)
        }

    def _moved(self, d_z: Array) -> Tensor:
        if not self.z.is_floating_point():
            return self.z
        return self.z + torch.from_numpy(d_z).reshape(self.z.shape)

    def _run(self, d_w: Array, z: Tensor) -> Tensor:
        torch.set_rng_state(self._rng)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
            steps = self.unflatten(d_w).values()
            for p, start, d in zip(self._parameters, self._start, steps, strict=True):
                p.copy_(start + torch.from_numpy(d))
        with torch.enable_grad():
            out = self.module(z.clone())  # an in-place module may overwrite its input
        if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != self.m:
            raise ValueError(f"a block must return a tensor of {self.m} samples, got {out!r}")
        return out


def is_coupled(module: nn.Module, J_z: Array, m: int) -> bool:
    """Whether one sample's output depends on another sample's input.

    True for a batch norm that uses batch statistics, for ``batch_coupled = True``, and whenever
    a cross-sample entry of the dense Jacobian is not exactly zero.

    >>> is_coupled(nn.Identity(), np.eye(4), 2), is_coupled(nn.Identity(), np.ones((4, 4)), 2)
    (False, True)
    """
    for child in module.modules():
        norm = isinstance(child, nn.modules.batchnorm._BatchNorm)
        if norm and (child.training or child.running_mean is None):
            return True
        if getattr(child, "batch_coupled", False):
            return True
    blocks = J_z.reshape(m, J_z.shape[0] // max(m, 1), m, J_z.shape[1] // max(m, 1))
    return any(blocks[i, :, k].any() for i in range(m) for k in range(m) if i != k)


def _rows(out: Tensor, inputs: Sequence[Tensor]) -> Array:
    """d out.flatten() / d inputs, one reverse pass per row."""
    columns = sum(i.numel() for i in inputs)
    J = np.zeros((out.numel(), columns))
    if columns == 0 or not out.requires_grad:
        return J
    for row, entry in zip(J, out.reshape(-1), strict=True):
        grads = torch.autograd.grad(
            entry, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        row[:] = np.concatenate([_numpy(g) for g in grads])
    return J


def _numpy(value: Tensor) -> Array:
    return value.detach().reshape(-1).numpy().astype(np.float64)
