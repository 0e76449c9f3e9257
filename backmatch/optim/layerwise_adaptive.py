"""Layer-wise rates: each block's gradient divided by the scalar of its own weights alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._base import BlockScaledSGD
from .options import Options


class LayerwiseAdaptiveSGD(BlockScaledSGD):
    """SGD whose gradient of block b is divided by ``c_W,b + damping``, without a chain.

    The displacement that a block is asked for is the one that back-propagation hands it; its
    weights answer with ``g / c_W``, the scalar approximation of the least-squares step on them
    (derived here; the idea is the first paper's, Zhang, Chen and Liu, arXiv 1802.09750, 2018).
    With ``normalize=False``, ``lr=1`` and no momentum the step equals that of
    ``BackMatching(blocks, weights=Scalar(kind, damping), inputs=Gradient())``.

    Arguments, the catching of passes, errors and cost are those of :class:`ScaleAmendedSGD`, less
    the input sides: they are never measured.

    >>> import torch, backmatch as bm
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> optimizer = LayerwiseAdaptiveSGD(bm.partition(model), lr=0.1, kind="spectral")
    >>> model(torch.ones(5, 3)).square().mean().backward()
    >>> optimizer.step()
    >>> [scale.input for scale in optimizer.scales.values()]
    [None, None]
    >>> optimizer.close()
    """

    _chained = False

    def __init__(
        self,
        params_or_blocks: Any,
        lr: float | Tensor,
        momentum: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        kind: str = "trace",
        damping: float = 0.0,
        normalize: bool = False,
        *,
        estimate: str = "exact",
        probes: int = 8,
        every: int = 1,
        average: float = 0.0,
        blocks: nn.Module | Iterable[nn.Module] | None = None,
    ) -> None:
        options = Options(kind, damping, normalize, estimate, probes, every, average)
        defaults = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params_or_blocks, lr, defaults, options, blocks)
