"""Small stand-ins for CIFAR-10 and CIFAR-100 in the exact layouts of the originals."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}
ARCHIVES = {
    ("cifar10", "binary"): "cifar-10-binary.tar.gz",
    ("cifar10", "python"): "cifar-10-python.tar.gz",
    ("cifar100", "binary"): "cifar-100-binary.tar.gz",
    ("cifar100", "python"): "cifar-100-python.tar.gz",
}
CASES = list(FOLDERS)


@dataclass
class Batch:
    """The images of one file, bytes (n, 3, 32, 32), and their labels."""

    x: np.ndarray[Any, Any]
    coarse: list[int]
    fine: list[int]


def draw(name: str, per_file: int, seed: int = 0) -> dict[str, Batch]:
    """File stem -> its images; a pattern per class, so that a net can learn something."""
    random = np.random.default_rng(seed)
    classes = 10 if name == "cifar10" else 100
    patterns = random.integers(0, 200, (classes, 3, 32, 32))
    batches = {}
    for stem in BATCHES if name == "cifar10" else ["train", "test"]:
        fine = random.integers(0, classes, per_file)
        x = patterns[fine] + random.integers(0, 56, (per_file, 3, 32, 32))
        batches[stem] = Batch(x.astype(np.uint8), (fine // 5).tolist(), fine.tolist())
    return batches


def contents(name: str, version: str, batches: dict[str, Batch]) -> dict[str, bytes]:
    """File name -> content, as distributed."""
    if version == "binary":
        return {f"{stem}.bin": binary(name, batch) for stem, batch in batches.items()}
    return {stem: python2(as_dict(name, stem, batch)) for stem, batch in batches.items()}


def binary(name: str, batch: Batch) -> bytes:
    """Records: label (CIFAR-100: coarse, fine), then 1024 red, 1024 green, 1024 blue."""
    columns = [batch.fine] if name == "cifar10" else [batch.coarse, batch.fine]
    labels = np.array(columns, np.uint8).T
    return np.hstack([labels, batch.x.reshape(len(labels), -1)]).tobytes()


def as_dict(name: str, stem: str, batch: Batch) -> dict[str, Any]:
    """What the python version pickles."""
    labels: dict[str, Any] = {"labels": batch.fine}
    if name == "cifar100":
        labels = {"fine_labels": batch.fine, "coarse_labels": batch.coarse}
    return {
        "batch_label": stem,
        **labels,
        "data": batch.x.reshape(len(batch.x), -1),
        "filenames": [f"image_{i}.png" for i in range(len(batch.x))],
    }


def python2(value: Any) -> bytes:
    """The bytes that cPickle of Python 2 wrote in protocol 2 with NumPy 1."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: Any) -> bytes:
    if isinstance(value, dict):
        items = b"".join(_python2(k) + _python2(v) for k, v in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_python2(v) for v in value) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    if isinstance(value, int):
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)
    raw = value.tobytes()
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ"
    dtype += b"\xff\xff\xff\xffK\x00tb"
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01(" + b"".join(_python2(n) for n in value.shape) + b"t" + dtype
        + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip


def write(
    directory: Path, name: str, version: str, *, per_file: int = 20, form: str = "folder"
) -> dict[str, Batch]:
    """Write a stand-in below ``directory``: its ``folder``, ``plain`` files or the ``archive``."""
    batches = draw(name, per_file)
    files = contents(name, version, batches)
    directory.mkdir(parents=True, exist_ok=True)
    if form == "archive":
        (directory / ARCHIVES[name, version]).write_bytes(packed(FOLDERS[name, version], files))
        return batches
    folder = directory / FOLDERS[name, version] if form == "folder" else directory
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return batches


def packed(folder: str, files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    """A ``.tar.gz`` like the original: a folder, its files in another order, a page of text."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for member in more:
            archive.addfile(member)
        for name, content in reversed([*files.items(), ("readme.html", b"<html></html>")]):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def modern(value: dict[str, Any], protocol: int) -> bytes:
    """The same dictionary pickled by this Python and NumPy."""
    return pickle.dumps(value, protocol)
