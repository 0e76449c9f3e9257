"""Ways to initialise a weight matrix, all through ``torch.nn.init``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import init

#: Fills a matrix (n_out, n_in) from a generator.
Scheme = Callable[[Tensor, torch.Generator], object]

#: name -> scheme; in brackets the variance of an entry.
SCHEMES: dict[str, Scheme] = {
    # N(0, 1/n_in)
    "gaussian": lambda w, g: init.normal_(w, std=w.shape[1] ** -0.5, generator=g),
    # Glorot and Bengio 2010: 2 / (n_in + n_out)
    "xavier-normal": lambda w, g: init.xavier_normal_(w, generator=g),
    "xavier-uniform": lambda w, g: init.xavier_uniform_(w, generator=g),
    # He et al. 2015: 2 / n_in
    "he-normal": lambda w, g: init.kaiming_normal_(w, nonlinearity="relu", generator=g),
    "he-uniform": lambda w, g: init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    # What nn.Linear does when it is made: 1 / (3 n_in)
    "torch-default": lambda w, g: init.kaiming_uniform_(w, a=math.sqrt(5), generator=g),
    # Saxe et al. 2014: 1 / max(n_in, n_out)
    "orthonormal": lambda w, g: init.orthogonal_(w, generator=g),
}


def drawn(scheme: str, count: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``count`` float64 matrices, shape (count, n_out, n_in), one after the other.

    >>> g = torch.Generator().manual_seed(0)
    >>> Q = drawn("orthonormal", 2, (3, 3), g)
    >>> bool((Q @ Q.mT - torch.eye(3)).abs().max() < 1e-12)
    True
    """
    weights = torch.empty(count, *shape, dtype=torch.float64)
    for weight in weights:
        SCHEMES[scheme](weight, generator)
    return weights
