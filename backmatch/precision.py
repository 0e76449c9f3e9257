"""float32 means float32 while a sweep solves, whatever speed the process asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

#: Settings through which torch may round float32 products to TF32 or bfloat16 (torch >= 2.9).
_PRECISIONS = ("cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
#: The same before torch 2.9.
_SWITCHES = ("cudnn", "cuda.matmul")


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, convolutions and matrix products of float32 keep its 24 bits.

    cuDNN's convolutions round to TF32 by default, with 11 bits: conjugate gradient would stop at
    its cap, and a direct solve would answer another problem than the residual check asks.

    >>> with full_precision():
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    changed = []
    try:
        for owner, name, value in _settings():
            changed.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)


@cache
def _settings() -> tuple[tuple[object, str, object], ...]:
    """What to set: owner, attribute and value."""
    return tuple(_find_settings())


def _find_settings() -> Iterator[tuple[object, str, object]]:
    if hasattr(torch.backends.cudnn, "conv"):
        for path in _PRECISIONS:
            owner = _owner(path)
            if hasattr(owner, "fp32_precision"):
                yield owner, "fp32_precision", "ieee"
    else:
        for path in _SWITCHES:
            yield _owner(path), "allow_tf32", False


def _owner(path: str) -> object:
    owner: object = torch.backends
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner
