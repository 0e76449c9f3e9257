"""Data sets, hostile ``.npz`` files, and the order of the samples."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backmatch.training import cifar, data, schedules
from backmatch.training.failures import UsageError
from backmatch.training.models import IMAGE_MODELS
from backmatch.training.optimizers import OPTIMIZERS
from backmatch.training.options import CIFAR, DATA, SCHEDULES
from backmatch.training.options import MODELS as MODEL_NAMES
from backmatch.training.options import OPTIMIZERS as OPTIMIZER_NAMES

GOOD: dict[str, Any] = {
    "x_train": np.arange(12.0).reshape(6, 2),
    "y_train": np.arange(6) % 3,
    "x_test": np.ones((2, 2)),
    "y_test": np.array([0, 3]),
}


def write(tmp_path: Path, **changed: Any) -> str:
    path = tmp_path / "data.npz"
    arrays = {key: value for key, value in {**GOOD, **changed}.items() if value is not None}
    np.savez(path, **arrays)
    return str(path)


def refused(source: str) -> str:
    with pytest.raises(UsageError) as caught:
        data.load(source, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_the_options_name_what_there_is() -> None:
    assert {*data._SOURCES, *cifar.KINDS} == set(DATA)
    assert set(cifar.KINDS) == set(CIFAR)
    assert {"constant", *schedules.FACTORS} == set(SCHEDULES)
    assert {"mlp", *IMAGE_MODELS} == set(MODEL_NAMES)
    assert set(OPTIMIZERS) == set(OPTIMIZER_NAMES)


def test_digits_split() -> None:
    digits = data.load("digits", torch.float64)
    assert digits.x_train.shape == (1437, 1, 8, 8)
    assert digits.x_test.shape == (360, 1, 8, 8)
    assert (float(digits.x_train.min()), float(digits.x_train.max())) == (0.0, 1.0)
    assert digits.classes == 10
    counts = torch.bincount(digits.y_test)
    assert int(counts.min()) >= 34
    assert int(counts.max()) <= 37


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert "pip install scikit-learn, or choose --data synthetic" in refused("digits")


def test_synthetic_is_the_same_every_time() -> None:
    first, second = (data.load("synthetic", torch.float32) for _ in range(2))
    assert first.digest() == second.digest()
    assert first.x_train.shape == (2048, 32)
    assert first.classes == 10


@pytest.mark.parametrize("kind", ["uint8", "int64", "float16", "float32", "float64", "bool"])
def test_npz_of_every_kind_of_number(tmp_path: Path, kind: str) -> None:
    source = write(tmp_path, x_train=np.ones((6, 2), dtype=kind), y_train=np.uint8([0] * 6))
    loaded = data.load(source, torch.float64)
    assert loaded.x_train.dtype == torch.float64
    assert loaded.y_train.dtype == torch.int64
    assert loaded.classes == 4


def test_npz_keeps_dimensions_and_layout(tmp_path: Path) -> None:
    x = np.asfortranarray(np.arange(36.0).reshape(6, 2, 3))
    loaded = data.load(write(tmp_path, x_train=x, x_test=np.ones((2, 2, 3))), torch.float64)
    assert torch.equal(loaded.x_train, torch.from_numpy(np.ascontiguousarray(x)))


def with_one(value: float) -> Any:
    x = GOOD["x_train"].copy()
    x[1, 1] = value
    return x


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"y_test": None}, "has no array y_test; needed are x_train, y_train"),
        ({"x_train": None, "x_test": None}, "has no array x_train, x_test"),
        ({"x_train": np.ones(6)}, "x_train must have shape (samples, features, ..)"),
        ({"x_train": np.float64(1)}, "x_train must have shape"),
        ({"x_train": np.ones((0, 2)), "y_train": np.ones(0, int)}, "none of them 0, got (0, 2)"),
        ({"x_test": np.ones((2, 3))}, "samples of shape (2,) like x_train, got (3,)"),
        ({"y_train": np.zeros(5, int)}, "y_train must have shape (6,), got (5,)"),
        ({"y_train": np.zeros((6, 1), int)}, "y_train must have shape (6,), got (6, 1)"),
        ({"y_train": np.zeros(6)}, "y_train must hold integer labels, got dtype float64"),
        ({"y_train": np.arange(6) - 1}, "labels from 0 to 99999, got -1 to 4"),
        ({"y_test": np.array([0, 10**12])}, "labels from 0 to 99999, got 0 to 1000000000000"),
        ({"x_train": with_one(np.nan)}, "x_train holds 1 NaN or Inf of 12 values"),
        ({"x_train": with_one(np.inf)}, "x_train holds 1 NaN or Inf of 12 values"),
        ({"x_train": np.ones((6, 2), complex)}, "x_train must hold real numbers, got dtype"),
        ({"x_train": np.full((6, 2), "a")}, "x_train must hold real numbers, got dtype <U1"),
        ({"x_train": np.full((6, 2), "2020-01", "M8[M]")}, "x_train must hold real numbers"),
        ({"x_train": np.full((6, 2), {})}, "x_train must hold real numbers, got dtype object"),
    ],
)
def test_unusable_arrays(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    assert told in refused(write(tmp_path, **changed))


def header(shape: str, descr: str = "<f8") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(tmp_path: Path, x_train: bytes) -> str:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, value in GOOD.items():
            buffer = io.BytesIO()
            np.save(buffer, value)
            file.writestr(f"{key}.npy", x_train if key == "x_train" else buffer.getvalue())
    return str(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (header("(1000000000000, 64)"), "x_train is truncated"),
        (header("(6, 2)") + bytes(40), "x_train is truncated"),
        (header("(-6, 2)"), "not an intact .npz file"),
        (header("__import__('os').system('true')"), "not an intact .npz file"),
        (header("(6, 2)", "|O") + b"cos\nsystem\n(S'true'\ntR.", "must hold real numbers"),
        (b"", "not an intact .npz file"),
        (b"\x93NUMPY", "not an intact .npz file"),
        (b"\x80\x04K\x01.", "not an intact .npz file"),
    ],
    ids=["bomb", "short", "negative", "code", "pickle", "empty", "magic-only", "bare-pickle"],
)
def test_hostile_members(tmp_path: Path, content: bytes, told: str) -> None:
    assert told in refused(archive(tmp_path, content))


@pytest.mark.parametrize("size", [0, 1, 20, 200, 700])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    path = Path(write(tmp_path))
    path.write_bytes(path.read_bytes()[:size])
    assert "not an intact .npz file" in refused(str(path))


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_load_or_are_refused(tmp_path: Path, seed: int) -> None:
    path = Path(write(tmp_path))
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(0, len(content), 3):
        content[position] ^= 1 << int(random.integers(8))
    path.write_bytes(content)
    with contextlib.suppress(UsageError):  # any other exception fails the test
        data.load(str(path), torch.float32)


def test_not_a_zip_file_not_a_file_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("x_train = 1")
    assert "not an intact .npz file" in refused(str(tmp_path / "text.npz"))
    (tmp_path / "folder.npz").mkdir()
    assert "not a regular file" in refused(str(tmp_path / "folder.npz"))
    assert "no such file" in refused(str(tmp_path / "missing.npz"))


def test_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path)
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    assert "does not fit into memory" in refused(source)


def collect(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
    n = 70
    index = torch.arange(n)
    numbered = data.Dataset(index[:, None].double(), index, index[:, None].double(), index, n)
    return [
        y.tolist()
        for _, y in data.batches(numbered, batch_size=16, seed=seed, epoch=epoch, start=start)
    ]


def test_batches_are_a_function_of_seed_epoch_and_position() -> None:
    whole = collect(seed=3, epoch=2)
    assert [len(batch) for batch in whole] == [16] * 4  # the last partial batch is dropped
    assert len({index for batch in whole for index in batch}) == 64
    for start in range(5):
        assert collect(seed=3, epoch=2, start=start) == whole[start:]
    assert collect(seed=3, epoch=1) != whole
    assert collect(seed=2, epoch=2) != whole


def test_digest_sees_every_part() -> None:
    synthetic = data.load("synthetic", torch.float32)
    before = synthetic.digest()
    for part in (synthetic.x_train, synthetic.y_test):
        part[-1] += 1
        assert synthetic.digest() != before
        part[-1] -= 1
    assert data.load("synthetic", torch.float64).digest() != before
