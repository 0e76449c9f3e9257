"""Networks as plain ``nn.Sequential`` chains, ready for :func:`backmatch.partition`.

All have torch's default initialisation; the running averages of their batch norms have a momentum
of 0.5, because exact steps move the weights far. Inputs have shape (m, channels, height, width),
for :func:`mlp` (m, ...); outputs are logits of shape (m, classes). The VGG nets follow Simonyan and
Zisserman (arXiv 1409.1556, 2014) with the one-layer head usual for 32x32 images, the residual net
He, Zhang, Ren and Sun (arXiv 1512.03385, 2015), section 4.2.

>>> import torch
>>> cnn()(torch.zeros(2, 1, 8, 8)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from . import checks
from .blocks import Residual

__all__ = [
    "cnn",
    "mlp",
    "resnet20",
    "vgg11",
    "vgg11_bn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
]

#: Of :func:`mlp`, by the names of torch's functions.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
#: Convolutions per stage; every stage ends in a 2x2 max pool.
_VGG = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3)}
_VGG_CHANNELS = (64, 128, 256, 512, 512)
#: Of the running averages of batch norm: exact steps move the weights so far that averages with
#: torch's 0.1 lag behind them for dozens of steps.
_MOMENTUM = 0.5


def mlp(
    shape: int | Sequence[int],
    hidden: Sequence[int] = (128, 128),
    classes: int = 10,
    *,
    activation: str = "relu",
) -> nn.Sequential:
    """Linear layers with an activation between them.

    Args:
        shape: features of a sample, or its shape; more than one dimension is flattened first.
        hidden: sizes of the hidden layers.
        classes: outputs.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"``, ``"softplus"``,
            ``"elu"``, ``"gelu"`` or ``"silu"``, each as torch has it by default.

    Raises:
        TypeError, ValueError: a size is no positive int, or the activation is none of these.

    >>> mlp((1, 8, 8))
    Sequential(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=64, out_features=128, bias=True)
      (2): ReLU()
      (3): Linear(in_features=128, out_features=128, bias=True)
      (4): ReLU()
      (5): Linear(in_features=128, out_features=10, bias=True)
    )
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    width = math.prod(checks.positive_int("shape", size) for size in sizes)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    layers: list[nn.Module] = [] if len(sizes) == 1 else [nn.Flatten()]
    for size in hidden:
        layers += [
            nn.Linear(width, checks.positive_int("hidden", size)),
            _ACTIVATIONS[activation](),
        ]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, checks.positive_int("classes", classes)))


def cnn(in_channels: int = 1, classes: int = 10) -> nn.Sequential:
    """A small conv net for small images: three 3x3 convolutions with batch norm and ReLU.

    Args:
        in_channels: channels of the images, which must be 2x2 or larger.
        classes: outputs.

    Raises:
        TypeError, ValueError: an argument is no positive int.

    >>> sum(p.numel() for p in cnn().parameters())
    14458
    """
    return nn.Sequential(
        *_conv(in_channels, 16, momentum=_MOMENTUM),
        *_conv(16, 32, momentum=_MOMENTUM),
        nn.MaxPool2d(2),
        *_conv(32, 32, momentum=_MOMENTUM),
        *_head(32, classes),
    )


def vgg11(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG with 8 convolutions and one Linear for 32x32 images.

    Args:
        in_channels: channels of the images; height and width must be from 32 to 63.
        classes: outputs.

    Raises:
        TypeError, ValueError: an argument is no positive int.

    >>> sum(p.numel() for p in vgg11().parameters())
    9225610
    """
    return _vgg(11, in_channels, classes, norm=False)


def vgg13(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG with 10 convolutions; see :func:`vgg11`.

    >>> sum(isinstance(layer, nn.Conv2d) for layer in vgg13())
    10
    """
    return _vgg(13, in_channels, classes, norm=False)


def vgg16(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """VGG with 13 convolutions; see :func:`vgg11`.

    >>> sum(isinstance(layer, nn.Conv2d) for layer in vgg16())
    13
    """
    return _vgg(16, in_channels, classes, norm=False)


def vgg11_bn(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """:func:`vgg11` with batch norm after every convolution.

    >>> sum(isinstance(layer, nn.BatchNorm2d) for layer in vgg11_bn())
    8
    """
    return _vgg(11, in_channels, classes, norm=True)


def vgg13_bn(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """:func:`vgg13` with batch norm after every convolution.

    >>> sum(isinstance(layer, nn.BatchNorm2d) for layer in vgg13_bn())
    10
    """
    return _vgg(13, in_channels, classes, norm=True)


def vgg16_bn(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """:func:`vgg16` with batch norm after every convolution.

    >>> sum(isinstance(layer, nn.BatchNorm2d) for layer in vgg16_bn())
    13
    """
    return _vgg(16, in_channels, classes, norm=True)


def resnet20(in_channels: int = 3, classes: int = 10) -> nn.Sequential:
    """The residual net for small images: 3 stages of 3 blocks with 16, 32 and 64 channels.

    The shortcut of a block that changes channels and size is a 1x1 convolution with batch norm.

    Args:
        in_channels: channels of the images; with height and width of 5 or more every batch norm
            sees more than one position.
        classes: outputs.

    Raises:
        TypeError, ValueError: an argument is no positive int.

    >>> net = resnet20()
    >>> sum(isinstance(part, Residual) for part in net), sum(p.numel() for p in net.parameters())
    (9, 272474)
    """
    blocks: list[nn.Module] = []
    channels = 16
    for width in (16, 32, 64):
        for _ in range(3):
            blocks.append(_residual(channels, width))
            channels = width
    stem = _conv(in_channels, 16, momentum=_MOMENTUM)
    return nn.Sequential(*stem, *blocks, *_head(64, classes))


def _conv(n_in: int, n_out: int, *, momentum: float | None) -> list[nn.Module]:
    """3x3 convolution that keeps the size, batch norm unless ``momentum`` is ``None``, ReLU."""
    n_in = checks.positive_int("in_channels", n_in)
    if momentum is None:
        return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
    # The norm takes any bias away again.
    layer = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(n_out, momentum=momentum), nn.ReLU()]


def _head(n_in: int, classes: int) -> list[nn.Module]:
    """Mean over all positions, then one Linear."""
    classes = checks.positive_int("classes", classes)
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes)]


def _vgg(depth: int, channels: int, classes: int, *, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for count, width in zip(_VGG[depth], _VGG_CHANNELS, strict=True):
        for _ in range(count):
            layers += _conv(channels, width, momentum=_MOMENTUM if norm else None)
            channels = width
        layers.append(nn.MaxPool2d(2))
    head = nn.Linear(channels, checks.positive_int("classes", classes))
    return nn.Sequential(*layers, nn.Flatten(), head)


def _residual(n_in: int, n_out: int) -> Residual:
    stride = n_out // n_in
    body = nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
        nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
    )
    if stride == 1:
        return Residual(body, activation=nn.ReLU())
    projection = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
    return Residual(body, nn.Sequential(projection, nn.BatchNorm2d(n_out)), nn.ReLU())
