"""Scale-amended SGD: gradients divided by the scalars of their own and of all blocks above."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ._base import BlockScaledSGD
from .options import Options


class ScaleAmendedSGD(BlockScaledSGD):
    """SGD whose gradient of block b is divided by
    ``(c_W,b + damping) * prod_{k > b} (c_z,k + damping)``.

    Back-propagation hands ``J_z^T r`` down from block to block; back-matching hands down
    ``(J_z^T J_z)^+ J_z^T r``. With each local Hessian replaced by one number c, the second is the
    first divided by c, and the divisions of the blocks above b multiply up in its gradient
    (derived here; the idea is Zhang, Chen and Liu's, NeurIPS 2018). With ``normalize=False``,
    ``lr=1`` and no momentum the step equals that of
    ``BackMatching(blocks, weights=Scalar(kind, damping), inputs=Scalar(kind, damping))`` for a
    loss that is a mean over the batch. Behind the division stands ``torch.optim.SGD``'s rule;
    weight decay is not divided.

    Used with ordinary ``model(x)`` and ``loss.backward()``: hooks catch what every block was
    given, until :meth:`close` or the end of a ``with``. The scales of a step are those of the last
    pass that was back-propagated (of the last micro-batch, where gradients accumulate); other
    passes, in whatever mode, do not count. A scale of 0 gives a step of 0.

    Args:
        params_or_blocks: the blocks as :class:`backmatch.BackMatching` takes them, or groups
            ``{"blocks": [...], "lr": ...}`` in the order in which their blocks are applied, each
            with its own ``lr``, ``momentum``, ``weight_decay`` and ``nesterov``; or parameters or
            groups of parameters as for any torch optimizer, with ``blocks``.
        lr: step size, >= 0; a float or a tensor of one number.
        momentum, weight_decay, nesterov: as for ``torch.optim.SGD``.
        kind: ``"trace"``: c is the mean eigenvalue of the local Hessian over the whole batch;
            ``"spectral"``: its largest; ``"rayleigh"``: ``g^T H g / g^T g`` along the gradient.
        damping: a float >= 0, added to every c.
        normalize: multiply all divided gradients by one number, so that together they have the
            norm of the plain gradient: directions change, learning rates of plain SGD stay usable.
        estimate: ``"exact"``: as :class:`backmatch.Scalar` finds them; ``"hutchinson"``: traces
            from ``probes`` backward passes over each block; ``"power"``: largest eigenvalues from
            ``probes`` steps of the power iteration, from below.
        probes: see ``estimate``.
        every: steps between measurements; between them the scales stay and nothing is caught.
        average: beta of an exponential moving average of every c, in [0, 1); 0 for none.
        blocks: the chain, where ``params_or_blocks`` holds parameters.

    Cost of a measurement: one more forward pass, and per block and side what its c takes: a
    weighted sum of squares for the trace of Linear and convolution blocks, ``probes`` products
    for estimates, a Lanczos process for the exact largest eigenvalue. Memory: the inputs of the
    blocks stay until :meth:`step`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, parameters come without
            blocks, or the blocks are none that a sweep would take.

    >>> import torch, backmatch as bm
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    >>> x = torch.randn(8, 5).double()
    >>> scalar = bm.Scalar("trace")
    >>> matcher = bm.BackMatching(bm.partition(model), weights=scalar, inputs=scalar)
    >>> step = matcher.backward(x, lambda out: out.square().sum(1).mean(), keep=True)
    >>> expected = model[0].weight.detach() + step.blocks[0].weight_step["0.weight"]
    >>> model.zero_grad()
    >>> with ScaleAmendedSGD(bm.partition(model), lr=1.0) as optimizer:
    ...     model(x).square().sum(1).mean().backward()
    ...     optimizer.step()
    >>> bool(torch.allclose(model[0].weight, expected, rtol=1e-12))
    True
    """

    _chained = True

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
