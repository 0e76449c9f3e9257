"""Optimizers that divide gradients by scalars of the local Hessians, for ``loss.backward()``.

>>> import torch, backmatch as bm
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
>>> with ScaleAmendedSGD(bm.partition(model), lr=0.1, normalize=True) as optimizer:
...     model(torch.ones(4, 3)).square().mean().backward()
...     optimizer.step()
"""

from .divisors import BlockScale
from .layerwise_adaptive import LayerwiseAdaptiveSGD
from .scale_amended import ScaleAmendedSGD

__all__ = ["BlockScale", "LayerwiseAdaptiveSGD", "ScaleAmendedSGD"]
