"""CIFAR from disk: every layout gives the same tensors; what is missing or cut is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fake_cifar
import numpy as np
import pytest
import torch

from backmatch.training import cifar, data
from backmatch.training.data import Dataset
from backmatch.training.failures import UsageError
from backmatch.training.pixels import Normalization, statistics


def load(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Dataset:
    return data.load(name, dtype, str(directory))


def refused(name: str, directory: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load(name, directory)
    message = str(caught.value)
    assert message.startswith(f"--data {name}: ")
    assert "\n" not in message
    assert len(message) < 480
    return message


@pytest.mark.parametrize("form", ["folder", "plain", "archive"])
@pytest.mark.parametrize(("name", "version"), fake_cifar.CASES)
def test_every_layout(name: str, version: str, form: str, tmp_path: Path) -> None:
    *train, test = fake_cifar.write(tmp_path, name, version, per_file=7, form=form).values()
    loaded = load(name, tmp_path)
    assert loaded.x_train.dtype == loaded.x_test.dtype == torch.uint8
    assert torch.equal(loaded.x_train, torch.from_numpy(np.concatenate([b.x for b in train])))
    assert torch.equal(loaded.x_test, torch.from_numpy(test.x))
    assert loaded.y_train.tolist() == [y for batch in train for y in batch.fine]
    assert loaded.y_test.tolist() == test.fine
    assert loaded.y_test.dtype == torch.int64
    assert loaded.classes == (10 if name == "cifar10" else 100)
    assert f"stand-in with {7 * len(train)} training and 7 test images" in loaded.note
    if form == "archive":  # nothing was extracted
        assert [path.name for path in tmp_path.iterdir()] == [fake_cifar.ARCHIVES[name, version]]


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("columns_first", [False, True])
def test_pickles_of_this_python(tmp_path: Path, protocol: int, columns_first: bool) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    batches = fake_cifar.draw("cifar100", 5)
    for stem, batch in batches.items():
        value = fake_cifar.as_dict("cifar100", stem, batch)
        if columns_first:
            value["data"] = np.asfortranarray(value["data"])
        if protocol == 3:  # as from a file of Python 2 read with encoding="bytes"
            value = {key.encode(): content for key, content in value.items()}
        (folder / stem).write_bytes(fake_cifar.modern(value, protocol))
    loaded = load("cifar100", tmp_path)
    assert torch.equal(loaded.x_test, torch.from_numpy(batches["test"].x))
    assert loaded.y_train.tolist() == batches["train"].fine


def test_labels_may_be_an_array_of_bytes(tmp_path: Path) -> None:
    for stem, batch in fake_cifar.draw("cifar10", 3).items():
        value = fake_cifar.as_dict("cifar10", stem, batch)
        value["labels"] = np.array(value["labels"], np.uint8)
        (tmp_path / stem).write_bytes(fake_cifar.modern(value, 4))
    assert load("cifar10", tmp_path).y_test.dtype == torch.int64


def test_binary_comes_before_python_and_files_before_archives(tmp_path: Path) -> None:
    fake_cifar.write(tmp_path, "cifar10", "python", per_file=3)
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=4, form="archive")
    assert len(load("cifar10", tmp_path).x_test) == 3
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=5)
    assert len(load("cifar10", tmp_path).x_test) == 5


def test_an_archive_serves_where_the_folder_is_incomplete(tmp_path: Path) -> None:
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=4)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    assert "cifar-10-batches-bin' has no data_batch_3.bin" in refused("cifar10", tmp_path)
    fake_cifar.write(tmp_path, "cifar10", "python", per_file=6, form="archive")
    assert len(load("cifar10", tmp_path).x_test) == 6


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_nothing_there(name: str, tmp_path: Path) -> None:
    told = refused(name, tmp_path)
    for version in ("binary", "python"):
        assert fake_cifar.FOLDERS[name, version] in told
        assert fake_cifar.ARCHIVES[name, version] in told
    assert "data_batch_1.bin .. test_batch.bin" in told or "train.bin, test.bin" in told
    assert "nothing is downloaded" in told
    assert "--data-dir" in told
    assert "no such folder" in refused(name, tmp_path / "missing")
    (tmp_path / "file").write_text("")
    assert "no such folder" in refused(name, tmp_path / "file")
    assert refused(name, tmp_path / ("x" * 400))


def test_a_folder_in_the_place_of_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert "found none of" in refused("cifar100", tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=1)
    monkeypatch.setattr(Path, "open", forbidden)
    assert "data_batch_1.bin': cannot read it: Permission denied" in refused("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "version", "file"),
    [
        ("cifar10", "binary", "data_batch_4.bin"),
        ("cifar10", "python", "test_batch"),
        ("cifar100", "binary", "train.bin"),
        ("cifar100", "python", "train"),
    ],
)
@pytest.mark.parametrize("left", [0, 1, 100, 3072, -1])
def test_a_file_cut_short(name: str, version: str, file: str, left: int, tmp_path: Path) -> None:
    fake_cifar.write(tmp_path, name, version, per_file=3)
    path = tmp_path / fake_cifar.FOLDERS[name, version] / file
    path.write_bytes(path.read_bytes()[:left])
    told = refused(name, tmp_path)
    assert file in told
    assert told.endswith("; get the file anew")


def small_truth(name: str, *samples: int) -> Any:
    return {**cifar.KINDS, name: dataclasses.replace(cifar.KINDS[name], samples=samples)}


def test_the_true_sizes_need_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cifar.KINDS["cifar10"].samples == (10_000,) * 6
    assert cifar.KINDS["cifar100"].samples == (50_000, 10_000)
    fake_cifar.write(tmp_path, "cifar100", "binary", per_file=8)
    monkeypatch.setattr(cifar, "KINDS", small_truth("cifar100", 8, 8))
    assert load("cifar100", tmp_path).note == ""


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((6, 6, 6, 5, 6, 6), "data_batch_4.bin has 5 images, expected 6"),
        ((6, 6, 6, 6, 6, 5), "test_batch.bin has 5 images, expected 6"),
        ((5, 5, 5, 5, 5, 5), "data_batch_1.bin has 5 images, expected 6"),
        ((7, 6, 6, 6, 6, 6), "data_batch_1.bin has 7 images, expected 6"),
        ((2, 2, 2, 1, 2, 2), "data_batch_1.bin has 2 images, expected 6"),
    ],
)
def test_whole_records_are_missing(
    counts: tuple[int, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A true file cut between two records is no stand-in; here 6 is true and up to 3 are few."""
    monkeypatch.setattr(cifar, "KINDS", small_truth("cifar10", 6, 6, 6, 6, 6, 6))
    monkeypatch.setattr(cifar, "FEW", 2)
    batches = fake_cifar.draw("cifar10", 7)
    for (file, content), count in zip(
        fake_cifar.contents("cifar10", "binary", batches).items(), counts, strict=True
    ):
        (tmp_path / file).write_bytes(content[: count * 3073])
    assert told in refused("cifar10", tmp_path)


def rewrite(tmp_path: Path, **changed: Any) -> None:
    for stem, batch in fake_cifar.draw("cifar100", 4).items():
        value = {**fake_cifar.as_dict("cifar100", stem, batch), **changed}
        value = {key: content for key, content in value.items() if content is not None}
        (tmp_path / stem).write_bytes(fake_cifar.modern(value, 4))


PIXELS = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"data": None}, "the pickle has no data"),
        ({"coarse_labels": None}, "the pickle has no coarse_labels"),
        ({"data": PIXELS.reshape(-1)}, "data must have shape (n, 3072), got (12288,)"),
        ({"data": PIXELS[:, 1:]}, "data must have shape (n, 3072), got (4, 3071)"),
        ({"data": [1, 2]}, "data must have shape (n, 3072), got list"),
        ({"data": PIXELS[:3]}, "3 images have coarse_labels of shape (4,)"),
        ({"data": PIXELS[:0]}, "data must have shape (n, 3072), got (0, 3072)"),
        ({"data": PIXELS.astype(np.int8)}, "dtype i1, not uint8"),
        ({"data": PIXELS.astype(np.float32)}, "dtype f4, not uint8"),
        ({"fine_labels": [0, 1, 2]}, "4 images have fine_labels of shape (3,)"),
        ({"fine_labels": [0, 1, 2, 100]}, "fine_labels must be from 0 to 99, got 100"),
        ({"coarse_labels": [0, 1, 2, 20]}, "coarse_labels must be from 0 to 19, got 20"),
        ({"fine_labels": [0, 1, 2, -1]}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": [0, 1, 2, 10**40]}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": [0, 1, 2, True]}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": [0, 1, 2, "3"]}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": [0, 1, 2, [3]]}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": "0123"}, "fine_labels must be a list of whole numbers"),
        ({"fine_labels": PIXELS}, "4 images have fine_labels of shape (4, 3072)"),
        ({"data": PIXELS}, "channel 0 has the same value everywhere"),
    ],
)
def test_unusable_content(changed: dict[str, Any], told: str, tmp_path: Path) -> None:
    rewrite(tmp_path, **changed)
    assert told in refused("cifar100", tmp_path)


def test_labels_of_the_binary_version_are_checked(tmp_path: Path) -> None:
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=4, form="plain")
    path = tmp_path / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)
    assert "data_batch_2.bin': labels must be from 0 to 9, got 10" in refused("cifar10", tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalized_training_images_have_mean_0_and_variance_1(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=110)  # more than one chunk of sums
    loaded = load("cifar10", tmp_path, dtype)
    x = loaded.inputs(loaded.x_train)
    assert x.dtype == dtype
    assert x.is_contiguous()
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    assert (x.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    pixels = loaded.x_train.double().numpy()
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(x, torch.from_numpy(expected).to(dtype), rtol=1e-5, atol=1e-5)
    assert loaded.x_train.dtype == torch.uint8  # as it was


def test_statistics_against_numpy() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 2, 3, 5)).astype(np.uint8)
    mean, std = statistics(pixels)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_a_data_set_keeps_what_it_knows_on_its_way_to_a_device(tmp_path: Path) -> None:
    fake_cifar.write(tmp_path, "cifar10", "binary", per_file=2)
    loaded = load("cifar10", tmp_path)
    moved = loaded.to(torch.device("cpu"))
    assert isinstance(moved.normalization, Normalization)
    assert moved == loaded or moved.note == loaded.note
    assert moved.digest() == loaded.digest()
