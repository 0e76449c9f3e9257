"""A run with ``--device cuda``, on tensors that only say they are on a GPU: the run of the CPU."""

from __future__ import annotations

import json

import fake_cifar
import pytest
import torch
from pretend_device import PretendCuda

from backmatch.cli import main
from backmatch.training import checkpoint

ARGUMENTS = [
    *("train", "--data", "synthetic", "--hidden", "16", "--batch-size", "512", "--epochs", "2"),
    *("--dtype", "float64", "--threads", "1", "--quiet"),
]
METHODS = {
    "backmatch": [],
    "cg": ["--weights", "cg", "--inputs", "cg"],
    "adam": ["--method", "bp", "--optimizer", "adam"],
}


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for key, value in row.items() if key.endswith("loss")]


@pytest.mark.parametrize("method", METHODS)
def test_run_on_a_gpu(pretend_cuda, monkeypatch, tmp_path, method):
    """Started, stopped after an epoch, resumed: the losses of the run on the CPU."""
    command = [*ARGUMENTS, *METHODS[method]]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0
    gpu = tmp_path / "gpu"
    with PretendCuda():
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", stop_after_first(checkpoint.save))
            assert main([*command, "--device", "cuda", "--out", str(gpu)]) == 1
        assert main(["train", "--resume", str(gpu), "--quiet"]) == 0
    expected = losses(tmp_path / "cpu")
    assert len(expected) > 4
    torch.testing.assert_close(torch.tensor(losses(gpu)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert json.loads((gpu / "config.json").read_text())["device"] == "cuda"


def test_augmented_images_on_a_gpu(pretend_cuda, tmp_path):
    """Bytes are moved, cropped and normalised there, with the draws of the CPU."""
    fake_cifar.write(tmp_path / "data", "cifar10", "binary", per_file=20)
    command = ["train", "--data", "cifar10", "--data-dir", str(tmp_path / "data"), "--epochs", "2"]
    command += ["--hidden", "8", "--method", "bp", "--schedule", "cosine", "--batch-size", "32"]
    command += ARGUMENTS[-5:]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "cpu")]) == 0
    with PretendCuda():
        assert main([*command, "--device", "cuda", "--out", str(tmp_path / "gpu")]) == 0
    expected = losses(tmp_path / "cpu")
    got = torch.tensor(losses(tmp_path / "gpu"))
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)


def stop_after_first(save):
    calls = []

    def stopping(*arguments, **options):
        if calls:
            raise RuntimeError("stopped here")
        calls.append(1)
        return save(*arguments, **options)

    return stopping
