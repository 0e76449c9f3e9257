"""Argument checks with one message form: argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteError

#: The dtypes that every solver and kernel supports.
DTYPES = (torch.float32, torch.float64)


def tensor(name: str, value: object) -> Tensor:
    """Refuse anything but a dense float32/float64 CPU or CUDA tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense (strided) tensor, got a nested tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype float32 or float64, got {_short(value.dtype)}")
    if value.device.type not in ("cpu", "cuda") and not torch.compiler.is_compiling():
        raise TypeError(f"{name} must live on a CPU or CUDA device, got {value.device}")
    return value


def same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two tensors that differ in dtype or device."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name} must have the dtype of {other_name} ({_short(other.dtype)}), "
            f"got {_short(value.dtype)}"
        )
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def shape(name: str, value: Tensor, expected: Sequence[int | str]) -> None:
    """Compare the trailing dimensions; a string entry matches any size and names it."""
    got = tuple(value.shape)
    tail = got[len(got) - len(expected) :] if len(got) >= len(expected) else ()
    ok = len(got) >= len(expected) and all(
        isinstance(e, str) or e == g for e, g in zip(expected, tail, strict=True)
    )
    if not ok:
        want = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name} must have shape (..., {want}), got {got}")


def square(name: str, value: Tensor) -> int:
    """Refuse what is no batch of square matrices; return their size."""
    got = value.shape
    if len(got) < 2 or got[-1] != got[-2]:
        raise ValueError(f"{name} must have shape (..., n, n), got {tuple(got)}")
    return got[-1]


def non_negative(name: str, value: object) -> float:
    """A finite float >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:  # false for NaN; torch.compile can trace it
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return float(value)


def positive_int(name: str, value: object) -> int:
    """An int >= 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """One of a few strings."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
    assert isinstance(value, str)
    return value


def finite(name: str, value: Tensor, *, block: str | None = None) -> None:
    """Raise :class:`NonFiniteError` when ``value`` holds NaN or Inf; counts only then."""
    if value.numel() == 0 or not value.dtype.is_floating_point:
        return
    # One reduction on the good path: a NaN or Inf survives a sum, an overflow of
    # finite entries is told apart by the exact count below.
    if math.isfinite(value.detach().sum().item()):
        return
    bad = int((~torch.isfinite(value.detach())).sum())
    if bad:
        raise NonFiniteError(name, bad, value.numel(), block=block)


def all_finite(values: Iterable[tuple[str, Tensor, str | None]]) -> None:
    """:func:`finite` of (name, value, block) each, in that order, with one wait for the device."""
    floating = [v for v in values if v[1].numel() and v[1].dtype.is_floating_point]
    if not floating:
        return
    sums = torch.stack([value.detach().sum() for _, value, _ in floating])
    if not math.isfinite(sums.sum().item()):
        for name, value, block in floating:
            finite(name, value, block=block)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
