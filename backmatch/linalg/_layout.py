"""Leading batch dimensions: broadcast them by name, bring them down to one without copying."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor

from .. import checks


def broadcast(**shapes: Size) -> Size:
    """Broadcast named leading shapes; the error names the first that does not fit.

    Raises:
        ValueError: the shapes do not broadcast.
    """
    result: Size | None = None
    for name, shape in shapes.items():
        if result is None or shape == result or not result:
            result = shape
        elif shape:
            try:
                result = torch.broadcast_shapes(result, shape)  # type: ignore[no-untyped-call]
            except RuntimeError as error:
                raise ValueError(
                    f"{name} must have leading dimensions that broadcast with {tuple(result)}, "
                    f"got {tuple(shape)}"
                ) from error
    assert result is not None
    return torch.Size(result)


def damping_tensor(damping: float | Tensor, like: Tensor) -> Tensor:
    """``damping`` as a tensor of the dtype and device of ``like``.

    Raises:
        TypeError: neither a number nor a float32/float64 tensor, or another dtype.
        ValueError: a number that is negative, NaN or infinite. The values of a tensor are
            looked at by :func:`require_damping`, since that synchronises on CUDA.
    """
    if isinstance(damping, Tensor):
        return checks.tensor("damping", damping)
    return torch.full(
        (), checks.non_negative("damping", damping), dtype=like.dtype, device=like.device
    )


def require_damping(damping: Tensor) -> None:
    """Refuse negative, NaN or infinite values in a damping tensor."""
    if damping.numel() == 0:
        return
    low, high = (float(v) for v in damping.aminmax()) if damping.dim() else (damping.item(),) * 2
    if not 0 <= low <= high < math.inf:
        worst = low if not low >= 0 else high
        raise ValueError(f"damping must be finite and >= 0, got a tensor that holds {worst}")


def flat(value: Tensor, lead: Size, tail: int) -> Tensor:
    """``value`` expanded to ``(*lead, *inner)`` and viewed as ``(batch, *inner)``.

    ``inner`` are its last ``tail`` dimensions. Expanded dimensions keep stride 0; a copy is made
    only where several leading dimensions have no common stride.
    """
    split = value.dim() - tail
    if split == 1 == len(lead) and value.shape[0] == lead[0]:
        return value
    inner = value.shape[split:]
    if split == 0:
        return value.expand((math.prod(lead), *inner))
    return value.expand((*lead, *inner)).reshape((math.prod(lead), *inner))


def families(shared: Tensor, lead: Size, *systems: tuple[Tensor, int]) -> Iterator[tuple[Any, ...]]:
    """One matrix and the batch of systems that share it, for every matrix.

    Args:
        shared: shape ``(p, q)``, or ``(*lead[:-1], p, q)`` after broadcasting.
        lead: leading shape of the systems.
        systems: pairs of a tensor and its number of trailing (non-batch) dimensions.

    Yields:
        Tensors: the matrix ``(p, q)``, then each system tensor as ``(batch, ...)``. A contiguous
        one is yielded as a view, so results may be written through it.
    """
    flattened = [flat(value, lead, tail) for value, tail in systems]
    if shared.dim() == 2:
        yield shared, *flattened
        return
    matrices = flat(shared, lead[:-1], 2)
    for i in range(matrices.shape[0]):
        part = slice(i * lead[-1], (i + 1) * lead[-1])
        yield matrices[i], *(value[part] for value in flattened)


def family_lead(shared_name: str, shared: Tensor, **leads: Size) -> Size:
    """Leading shape of systems that share the last two dimensions of ``shared``."""
    if shared.dim() > 2:
        leads[shared_name] = torch.Size((*shared.shape[:-2], 1))
    return broadcast(**leads)
