"""The networks that ``--model`` names, and the data that each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .. import models
from .data import Dataset
from .failures import UsageError, show

#: (channels, classes) -> network for images.
ImageFactory = Callable[[int, int], nn.Sequential]


@dataclass(frozen=True)
class Images:
    """A network for images and the height and width that it takes; ``most`` ``None``: no limit."""

    make: ImageFactory
    least: int
    most: int | None = None

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether a sample of shape (channels, height, width) or (height, width) fits."""
        sides = shape[-2:]
        fits = all(self.least <= side <= (self.most or side) for side in sides)
        return len(shape) in (2, 3) and fits

    def sides(self) -> str:
        """``32 to 63``."""
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


def _vgg(make: ImageFactory) -> Images:
    # Five 2x2 pools must leave one position.
    return Images(make, 32, 63)


#: Every network but ``mlp``, which takes any shape and the sizes of its hidden layers.
IMAGE_MODELS: dict[str, Images] = {
    "cnn": Images(models.cnn, 4),
    "vgg11": _vgg(models.vgg11),
    "vgg13": _vgg(models.vgg13),
    "vgg16": _vgg(models.vgg16),
    "vgg11_bn": _vgg(models.vgg11_bn),
    "vgg13_bn": _vgg(models.vgg13_bn),
    "vgg16_bn": _vgg(models.vgg16_bn),
    # From 5x5 on the last stage has more than one position, as batch norm needs of one image.
    "resnet20": Images(models.resnet20, 5),
}


def create(
    name: str, data: Dataset, hidden: Sequence[int] | None, activation: str | None = None
) -> nn.Sequential:
    """The network ``name`` for data in the shape that :func:`fitted` gives it.

    >>> import torch
    >>> x, y = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    >>> len(create("mlp", Dataset(x, y, x, y, 10), [128, 128]))
    6
    """
    shape = tuple(data.x_train.shape[1:])
    if name == "mlp":
        return models.mlp(shape, hidden or [], data.classes, activation=activation or "relu")
    return IMAGE_MODELS[name].make(shape[0], data.classes)


def fitted(name: str, source: str, data: Dataset) -> Dataset:
    """The data in the shape that a model takes: images without channels get one.

    Raises:
        UsageError: the samples are no images, or too small or too large.
    """
    if name == "mlp":
        return data
    shape, model = tuple(data.x_train.shape[1:]), IMAGE_MODELS[name]
    if not model.takes(shape):
        others = ["mlp", *(other for other, its in IMAGE_MODELS.items() if its.takes(shape))]
        raise UsageError(
            f"--model {name}: expected images of shape (channels, height, width), {model.sides()} "
            f"pixels a side, got samples of shape {shape} from --data {show(source, 200)}; "
            f"choose --model {', '.join(others)}, or other data"
        )
    if len(shape) == 3:
        return data
    return replace(data, x_train=data.x_train.unsqueeze(1), x_test=data.x_test.unsqueeze(1))
