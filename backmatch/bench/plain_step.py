"""The exact step of a net of Linear and ReLU layers written with torch.linalg alone.

What a careful user would write today: the smaller of the primal and the dual matrices, formed in
batches, batched Cholesky, all in the dtype of the net. It knows nothing of this package, so that it
also serves as the second opinion on its answers. Formulas as in docs/method.md, derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

#: Bytes of the matrices that are formed at a time.
_CHUNK_BYTES = 128 * 2**20

Loss = Callable[[Tensor], Tensor]


def plain_step(
    model: nn.Sequential, x: Tensor, loss: Loss, *, weights: float, inputs: float
) -> list[Tensor]:
    """Minus the exact steps of all weights and biases, in the order of the parameters.

    Blocks are Linear with the ReLU that follows it; damping is relative to the mean eigenvalue, on
    the weight side of the block, on the input side of the sample.

    Args:
        model: Linear layers with at most one ReLU between two of them.
        x: shape (m, features).
        loss: output -> mean over the batch.
        weights: factor of the weight problems' damping.
        inputs: factor of the input problems' damping.
    """
    with torch.no_grad():
        layers, zs, slopes, out = _forward(model, x)
    leaf = out.detach().requires_grad_()
    r = -x.shape[0] * torch.autograd.grad(loss(leaf), leaf)[0]
    steps: list[Tensor] = []
    with torch.no_grad():
        for layer, z, D in zip(reversed(layers), reversed(zs), reversed(slopes), strict=True):
            d = _weight_steps(z, D, r, weights)
            steps[:0] = [-d[:, :-1], -d[:, -1]]
            if layer is not layers[0]:
                r = _input_steps(layer.weight, D, r, inputs)
    return steps


def _forward(
    model: nn.Sequential, x: Tensor
) -> tuple[list[nn.Linear], list[Tensor], list[Tensor | None], Tensor]:
    """Linear layers, their inputs, the slopes of the ReLU behind each (or ``None``), the output."""
    layers, zs, slopes, z = [], [], [], x
    for module, after in pairwise([*model, None]):
        if isinstance(module, nn.Linear):
            layers.append(module)
            zs.append(z)
            z = module(z)
            slopes.append((z > 0).to(z.dtype) if isinstance(after, nn.ReLU) else None)
        else:
            assert isinstance(module, nn.ReLU)
            z = z.relu()
    return layers, zs, slopes, z


def _weight_steps(z: Tensor, D: Tensor | None, r: Tensor, factor: float) -> Tensor:
    """Rows [weights, bias] of every output unit: (Z' D_j^2 Z + m lambda I) d_j = Z' D_j r_j."""
    m, units = len(z), r.shape[1]
    Z = torch.cat([z, z.new_ones(m, 1)], 1)
    norms = Z.square().sum(1)
    trace = norms.sum() * units if D is None else (D.square().T @ norms).sum()
    shift = factor * trace / (units * Z.shape[1])  # m lambda
    if D is None:
        H = Z.T @ Z
        H.diagonal().add_(shift)
        return torch.cholesky_solve(Z.T @ r, torch.linalg.cholesky(H)).T
    return _family(Z, D.T, r.T, shift.expand(units))


def _input_steps(W: Tensor, D: Tensor | None, r: Tensor, factor: float) -> Tensor:
    """Rows d_i of every sample: (W' D_i^2 W + mu_i I) d_i = W' D_i r_i."""
    norms, n = W.square().sum(1), W.shape[1]
    if D is None:
        H = W.T @ W
        H.diagonal().add_(factor * norms.sum() / n)
        return torch.cholesky_solve(W.T @ r.T, torch.linalg.cholesky(H)).T
    shift = factor * (D.square() @ norms) / n
    return _family(W, D, r, torch.where(shift > 0, shift, 1.0))


def _family(Z: Tensor, D: Tensor, R: Tensor, shift: Tensor) -> Tensor:
    """(Z' D_j^2 Z + shift_j I) d_j = Z' D_j R_j for all rows j, in the smaller of the two forms."""
    m, n = Z.shape
    K = Z @ Z.T if m < n else None
    found = []
    for part in _chunks(len(D), min(m, n) ** 2 * Z.element_size()):
        scale = D[part].unsqueeze(-1)
        A = scale * K * scale.mT if K is not None else Z.T @ (scale.square() * Z)
        A.diagonal(dim1=1, dim2=2).add_(shift[part].unsqueeze(-1))
        b = R[part] if K is not None else (D[part] * R[part]) @ Z
        y = torch.cholesky_solve(b.unsqueeze(-1), torch.linalg.cholesky(A)).squeeze(-1)
        found.append((D[part] * y) @ Z if K is not None else y)
    return torch.cat(found)


def _chunks(batch: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // bytes_each)
    return (slice(start, start + step) for start in range(0, batch, step))
