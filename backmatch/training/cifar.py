"""CIFAR-10 and CIFAR-100 from files on disk: binary or python version, unpacked or as the archive.

Nothing is downloaded, nothing is extracted, and no file is trusted: sizes, shapes and labels are
checked, pickles are read by :mod:`.pickles`, archives by :mod:`.archives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import archives, pickles
from .failures import UsageError, show

Array = np.ndarray[Any, Any]

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
#: A file of a small stand-in for a data set, as tests use them, has at most this part of the true
#: number of images. A true file that was cut short has more, or is no whole number of images.
FEW = 10


@dataclass(frozen=True)
class Version:
    """One form in which a data set is distributed; the last of ``files`` is the test set."""

    folder: str
    archive: str
    files: tuple[str, ...]
    read: Callable[[bytes, Kind], tuple[Array, list[Array]]]


@dataclass(frozen=True)
class Kind:
    """A data set: how many images a file has, which labels, and the forms it comes in.

    Attributes:
        name: as ``--data`` has it.
        samples: images of each file.
        labels: name in the python version and number of classes of every kind of label, in the
            order of the binary version; the last one is what a net learns.
        versions: binary first, as it needs no unpickling.
    """

    name: str
    samples: tuple[int, ...]
    labels: tuple[tuple[str, int], ...]
    versions: tuple[Version, ...]

    @property
    def classes(self) -> int:
        return self.labels[-1][1]


@dataclass(frozen=True)
class Images:
    """Bytes of shape (n, 3, 32, 32) and labels (n,) of both sets; ``note`` is for the user."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: int
    note: str


def load(name: str, directory: Path) -> Images:
    """Read the data set ``name`` (``cifar10`` or ``cifar100``) from ``directory``.

    Raises:
        UsageError: no such files there, or they are unusable; one line says which and why.
    """
    kind = KINDS[name]
    try:
        parts = _read(kind, directory)
    except MemoryError:
        raise UsageError(f"--data {name}: does not fit into memory") from None
    note = _check_counts(kind, directory, {file: len(x) for file, (x, _) in parts.items()})
    *train, test = parts.values()
    return Images(
        np.concatenate([x for x, _ in train]),
        np.concatenate([y for _, y in train]),
        test[0].copy(),
        test[1],
        kind.classes,
        note,
    )


def _read(kind: Kind, directory: Path) -> dict[str, tuple[Array, Array]]:
    """Images and labels of every file, in the data set's order."""
    version, place = _find(kind, directory)
    parts: dict[str, tuple[Array, Array]] = {}
    try:
        for file, content in _contents(version, place):
            parts[file] = _parsed(version, kind, place / file, content)
    except OSError as error:
        reason, path = error.strerror or show(str(error)), error.filename or place
        raise UsageError(f"{_where(kind, path)}: cannot read it: {reason}") from None
    except archives.RefusedError as error:
        raise UsageError(f"{_where(kind, place)}: {error}; get the file anew") from None
    missing = [file for file in version.files if file not in parts]
    if missing:
        raise UsageError(f"{_where(kind, place)}: it has no {version.folder}/{missing[0]}")
    return {file: parts[file] for file in version.files}


def _parsed(version: Version, kind: Kind, path: Path, content: bytes) -> tuple[Array, Array]:
    """Images and labels of one file, checked."""
    try:
        x, labels = version.read(content, kind)
        return x.reshape(-1, *SHAPE), _checked(kind, len(x), labels)
    except (pickles.RefusedError, ValueError) as error:
        raise UsageError(f"{_where(kind, path)}: {error}; get the file anew") from None


def _find(kind: Kind, directory: Path) -> tuple[Version, Path]:
    """A version and its folder or archive."""
    incomplete = ""
    try:
        for version in kind.versions:
            for folder in (directory / version.folder, directory):
                missing = [file for file in version.files if not (folder / file).is_file()]
                if not missing:
                    return version, folder
                if len(missing) < len(version.files):
                    incomplete = incomplete or f"; {show(str(folder), 100)} has no {missing[0]}"
        for version in kind.versions:
            if (directory / version.archive).is_file():
                return version, directory / version.archive
    except OSError as error:
        raise UsageError(f"{_where(kind, directory)}: {error.strerror}") from None
    raise UsageError(_not_found(kind, directory) + incomplete)


def _not_found(kind: Kind, directory: Path) -> str:
    looked = [
        f"{', '.join(v.files) if len(v.files) < 3 else f'{v.files[0]} .. {v.files[-1]}'} "
        f"(or in {v.folder}/)"
        for v in kind.versions
    ]
    looked += [version.archive for version in kind.versions]
    what = "found none of" if directory.is_dir() else "no such folder; looked for"
    return (
        f"{_where(kind, directory)}: {what} {'; '.join(looked)}; nothing is downloaded: put one "
        "there, or name its folder with --data-dir"
    )


def _where(kind: Kind, path: Path | str) -> str:
    return f"--data {kind.name}: {show(str(path), 150)}"


def _contents(version: Version, place: Path) -> Iterator[tuple[str, bytes]]:
    if place.name == version.archive and place.is_file():
        wanted = {f"{version.folder}/{file}" for file in version.files}
        for name, content in archives.members(place, wanted):
            yield name.rpartition("/")[2], content
        return
    for file in version.files:
        with (place / file).open("rb") as opened:
            content = opened.read(archives.MOST_BYTES + 1)
        if len(content) > archives.MOST_BYTES:
            raise archives.RefusedError(f"{file} is larger than {archives.MOST_BYTES // 2**20} MiB")
        yield file, content


def _read_binary(content: bytes, kind: Kind) -> tuple[Array, list[Array]]:
    """Records of one byte per label and 3072 of red, green and blue, row by row."""
    count = len(kind.labels)
    size = count + PIXELS
    if not content or len(content) % size:
        raise ValueError(f"{len(content)} bytes are no whole number of records of {size} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, count:], [records[:, i] for i in range(count)]


def _read_python(content: bytes, kind: Kind) -> tuple[Array, list[Array]]:
    """A pickled dictionary with ``data`` (n, 3072) and lists of labels."""
    batch = pickles.load(content)
    missing = [key for key in ("data", *(name for name, _ in kind.labels)) if key not in batch]
    if missing:
        raise ValueError(f"the pickle has no {missing[0]}")
    x = batch["data"]
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != PIXELS or not len(x):
        got = x.shape if isinstance(x, np.ndarray) else type(x).__name__
        raise ValueError(f"data must have shape (n, {PIXELS}), got {got}")
    return x, [_label_list(name, batch[name]) for name, _ in kind.labels]


def _label_list(name: str, labels: Any) -> Array:
    if isinstance(labels, np.ndarray):
        return labels
    if type(labels) is not list or not all(type(y) is int and 0 <= y < 2**31 for y in labels):
        raise ValueError(f"{name} must be a list of whole numbers")
    return np.array(labels, dtype=np.int64)


def _checked(kind: Kind, count: int, labels: list[Array]) -> Array:
    """The labels that a net learns; all kinds are checked."""
    for (name, classes), values in zip(kind.labels, labels, strict=True):
        if values.shape != (count,):
            raise ValueError(f"{count} images have {name} of shape {values.shape}")
        if values.max() >= classes:
            raise ValueError(f"{name} must be from 0 to {classes - 1}, got {values.max()}")
    return labels[-1].astype(np.int64)


def _check_counts(kind: Kind, directory: Path, counts: dict[str, int]) -> str:
    """Refuse what is neither the data set nor a small stand-in; returns a note about the latter."""
    if tuple(counts.values()) == kind.samples:
        return ""
    *train, test = counts.values()
    pairs = zip(counts.values(), kind.samples, strict=True)
    if any(FEW * count > true for count, true in pairs) or len(set(train)) > 1:
        file, count, expected = next(
            (file, count, expected)
            for (file, count), expected in zip(counts.items(), kind.samples, strict=True)
            if count != expected
        )
        raise UsageError(
            f"{_where(kind, directory)}: {file} has {count} images, expected {expected}; "
            "get the file anew"
        )
    return (
        f"{kind.name} here is a stand-in with {sum(train)} training and {test} test images, "
        f"not {sum(kind.samples[:-1])} and {kind.samples[-1]}"
    )


_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

KINDS = {
    "cifar10": Kind(
        "cifar10",
        (10_000,) * 6,
        (("labels", 10),),
        (
            Version(
                "cifar-10-batches-bin",
                "cifar-10-binary.tar.gz",
                tuple(f"{name}.bin" for name in _BATCHES),
                _read_binary,
            ),
            Version("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, _read_python),
        ),
    ),
    "cifar100": Kind(
        "cifar100",
        (50_000, 10_000),
        (("coarse_labels", 20), ("fine_labels", 100)),
        (
            Version(
                "cifar-100-binary",
                "cifar-100-binary.tar.gz",
                ("train.bin", "test.bin"),
                _read_binary,
            ),
            Version("cifar-100-python", "cifar-100-python.tar.gz", ("train", "test"), _read_python),
        ),
    ),
}
