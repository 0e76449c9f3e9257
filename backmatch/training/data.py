"""Data sets as four tensors, and the order in which a run sees their samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import augmentation, cifar
from .failures import UsageError, show
from .npz import read_arrays
from .pixels import Normalization, statistics

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Dataset:
    """A classification task in memory.

    Attributes:
        x_train: inputs, shape (n, ...), of the run's dtype, or bytes where there is a
            ``normalization``; :meth:`inputs` turns them into what a net is given.
        y_train: labels 0 .. classes - 1, shape (n,), int64.
        x_test: inputs of the test set.
        y_test: labels of the test set.
        classes: number of classes.
        normalization: for data kept as bytes.
        note: what a user should know about this data, or nothing.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    normalization: Normalization | None = None
    note: str = ""

    def inputs(self, stored: Tensor) -> Tensor:
        """What a net is given for some rows of ``x_train`` or ``x_test``."""
        return stored if self.normalization is None else self.normalization(stored)

    def digest(self) -> str:
        """SHA-256 over shapes and values: tells whether a resumed run sees the same data."""
        digest = hashlib.sha256()
        for part in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(repr((part.dtype, tuple(part.shape))).encode())
            digest.update(part.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> Dataset:
        parts = (self.x_train, self.y_train, self.x_test, self.y_test)
        x_train, y_train, x_test, y_test = (part.to(device) for part in parts)
        return replace(self, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def load(source: str, dtype: torch.dtype, directory: str | None = None) -> Dataset:
    """The data set called ``source``, or the one in the ``.npz`` file of that path.

    Args:
        directory: where the files of CIFAR are; no other data reads it.

    Raises:
        UsageError: a file (or scikit-learn, for digits) is missing or unusable.
    """
    if source in cifar.KINDS:
        return _from_images(source, dtype, Path(directory or "."))
    arrays = _SOURCES[source]() if source in _SOURCES else _from_file(Path(source))
    x_train, y_train, x_test, y_test = arrays
    return Dataset(
        torch.as_tensor(x_train, dtype=dtype),
        torch.as_tensor(y_train, dtype=torch.int64),
        torch.as_tensor(x_test, dtype=dtype),
        torch.as_tensor(y_test, dtype=torch.int64),
        classes=int(max(y_train.max(), y_test.max())) + 1,
    )


def _from_images(name: str, dtype: torch.dtype, directory: Path) -> Dataset:
    images = cifar.load(name, directory)
    try:
        mean, std = statistics(images.x_train)
    except ValueError as error:
        raise UsageError(
            f"--data {name}: {show(str(directory), 200)}: in the training images {error}; "
            "get the files anew"
        ) from None
    return Dataset(
        torch.from_numpy(images.x_train),
        torch.from_numpy(images.y_train),
        torch.from_numpy(images.x_test),
        torch.from_numpy(images.y_test),
        images.classes,
        Normalization(mean, std, dtype),
        images.note,
    )


def batches(
    data: Dataset, *, batch_size: int, seed: int, epoch: int, start: int, augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch from position ``start`` on; the last partial one is dropped.

    The order is a function of (seed, epoch) alone, what augmentation makes of a sample one of
    (seed, epoch, its place in the order), so a run can be taken up anywhere.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(data.x_train))
    moves = augmentation.draw(seed, epoch, len(order)) if augment else None
    for position in range(start, len(order) // batch_size):
        part = slice(position * batch_size, (position + 1) * batch_size)
        chosen = torch.from_numpy(order[part]).to(data.x_train.device)
        x = data.x_train[chosen]
        if moves is not None:
            x = augmentation.move(x, moves[part])
        yield data.inputs(x), data.y_train[chosen]


def _digits() -> tuple[Array, Array, Array, Array]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UsageError(
            "--data digits needs scikit-learn, which is not installed; "
            "pip install scikit-learn, or choose --data synthetic or FILE.npz"
        ) from None
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        x / 16.0, y, test_size=360, random_state=0, stratify=y
    )
    return x_train.reshape(-1, 1, 8, 8), y_train, x_test.reshape(-1, 1, 8, 8), y_test


def _synthetic() -> tuple[Array, Array, Array, Array]:
    """Ten classes of two Gaussian clusters each in 32 dimensions; 2048 train, 512 test."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((10, 2, 32))
    y = np.arange(2560) % 10
    x = centres[y, random.integers(0, 2, 2560)] + 0.6 * random.standard_normal((2560, 32))
    order = random.permutation(2560)
    x, y = x[order], y[order]
    return x[:2048], y[:2048], x[2048:], y[2048:]


_SOURCES: dict[str, Callable[[], tuple[Array, Array, Array, Array]]] = {
    "digits": _digits,
    "synthetic": _synthetic,
}


def _from_file(path: Path) -> tuple[Array, Array, Array, Array]:
    arrays = read_arrays(path)
    where = f"--data {show(str(path), 200)}"
    for part in ("train", "test"):
        _check_part(where, part, arrays[f"x_{part}"], arrays[f"y_{part}"])
    shape, other = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if shape != other:
        raise UsageError(
            f"{where}: x_test must have samples of shape {shape} like x_train, got {other}"
        )
    return arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"]


#: More classes than any labelled set has; beyond it y is no label (and the net's output a bomb).
MAX_CLASSES = 100_000


def _check_part(where: str, part: str, x: Array, y: Array) -> None:
    if x.ndim < 2 or x.size == 0:
        raise UsageError(
            f"{where}: x_{part} must have shape (samples, features, ..), none of them 0, "
            f"got {x.shape}"
        )
    if y.shape != x.shape[:1]:
        raise UsageError(f"{where}: y_{part} must have shape {x.shape[:1]}, got {y.shape}")
    if y.dtype.kind not in "iu":
        raise UsageError(f"{where}: y_{part} must hold integer labels, got dtype {y.dtype}")
    if y.min() < 0 or y.max() >= MAX_CLASSES:
        raise UsageError(
            f"{where}: y_{part} must hold labels from 0 to {MAX_CLASSES - 1}, "
            f"got {y.min()} to {y.max()}"
        )
    bad = x.size - int(np.isfinite(x).sum())
    if bad:
        raise UsageError(
            f"{where}: x_{part} holds {bad} NaN or Inf of {x.size} values; remove them first"
        )
