"""The studies on real nets: their blocks' systems against bm.local_hessian, and what they find."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import backmatch as bm
from backmatch import analysis
from backmatch.analysis.nets import ACTIVATIONS, FAMILIES, net, spectra
from backmatch.analysis.result import InterruptedStudyError
from backmatch.analysis.spectra import Spectra
from backmatch.analysis.systems import systems
from backmatch.blocks import Residual

pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(7), dtype=dtype) + 0.5


def blocks(n_in: int, n_out: int) -> dict[str, nn.Module]:
    torch.manual_seed(n_in)
    frozen = nn.Linear(n_in, n_out)
    frozen.bias.requires_grad_(False)
    made = {
        "linear": nn.Linear(n_in, n_out),
        "relu": nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU()),
        "frozen": nn.Sequential(frozen, nn.Tanh()),
        "norm": nn.Sequential(nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()),
        "pre": nn.Sequential(nn.Tanh(), nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out)),
    }
    if n_in == n_out:
        made["skip"] = Residual(nn.Sequential(nn.ReLU(), nn.Linear(n_in, n_out)))
        made["after"] = Residual(nn.Linear(n_in, n_out, bias=False), activation=nn.Tanh())
        body = nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out))
        made["skip norm"] = Residual(body, activation=nn.ReLU())
    return made


def agree(found: Spectra, H: bm.analysis.LocalHessian) -> None:
    """The systems' eigenvalues together, each as often as it stands there, are the Hessian's."""
    values = found.eigenvalues.flatten()
    copies = H.size // len(values)
    expected = values.repeat_interleave(copies).sort(descending=True).values
    assert (H.eigenvalues - expected).abs().max() <= 1e-12 * H.spectral_norm
    whole = found.whole()
    assert whole["spectral_norm"] == pytest.approx(H.spectral_norm, rel=1e-12)
    assert whole["trace_mean"] == pytest.approx(H.trace_mean, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for shape in ((5, 5), (6, 3)) for name in blocks(*shape)]
)
def test_systems_are_the_local_hessian(name: str, shape: tuple[int, int]) -> None:
    block = blocks(*shape)[name].double()
    z = uniform(19, shape[0])
    H = bm.local_hessian(block, z, "weight")
    found = systems(block, z, "weight")
    agree(found, H)
    assert len(systems(block, z, "weight", most=2).eigenvalues) == min(2, len(found.eigenvalues))
    if H.method == "svd":  # the other routes cut the rank elsewhere
        copies = H.size // found.eigenvalues.numel()
        assert int(found.ranks.sum()) * copies == H.rank
    block.eval()
    agree(systems(block, z, "input"), bm.local_hessian(block, z))
    first = systems(block, z[:1], "input").eigenvalues
    assert torch.allclose(systems(block, z, "input", most=1).eigenvalues, first, atol=1e-12)


def test_float32() -> None:
    block, z = blocks(5, 5)["skip"], uniform(19, 5, torch.float32)
    found = systems(block, z, "weight").condition_numbers.double()
    expected = systems(copy.deepcopy(block).double(), z.double(), "weight").condition_numbers
    assert torch.allclose(found, expected, rtol=1e-3)


def test_blocks_that_do_not_fall_apart() -> None:
    z = uniform(9, 4)
    deep = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    with pytest.raises(ValueError, match="depends on parameters of another one"):
        systems(deep, z, "weight")
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    with pytest.raises(ValueError, match="no units of its own"):
        systems(other, z, "weight")
    with pytest.raises(ValueError, match="one joint system on the input side"):
        systems(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double(), z, "input")
    layer_norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double()
    with pytest.raises(ValueError, match="another one"):
        systems(layer_norm, z, "weight")


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_spectra_along_a_net(family: str, activation: str) -> None:
    """Each block at the input that the blocks below give it; the net stays as it is."""
    model = net(family, activation, [7, 6, 6], torch.Generator().manual_seed(1), classes=3)
    x = uniform(30, 7)
    state = copy.deepcopy(model.state_dict())
    weights, inputs = (spectra(model, x, side) for side in ("weight", "input"))
    assert len(weights) == len(inputs) == 3
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert model.training
    z = x
    for block, found, below in zip(model, weights, inputs, strict=True):
        agree(found, bm.local_hessian(block, z, "weight"))
        if any(isinstance(part, nn.BatchNorm1d) for part in block.modules()):
            # Weights, gamma and beta, less the one direction in which gamma undoes the weights.
            assert int(found.ranks.max()) == found.eigenvalues.shape[1] - 1
        else:
            agree(below, bm.local_hessian(block, z))
        z = block(z).detach()


def test_depth_finds_what_each_remedy_does() -> None:
    study = analysis.depth(size=24, blocks=4, nets=2)

    def kappa(family: str, activation: str, side: str) -> float:
        found = study.find(family=family, activation=activation, side=side, block=4)
        return float(found["kappa"]["median"])

    assert kappa("orthonormal", "relu", "input") == pytest.approx(1, abs=1e-9)
    assert 20 * kappa("skip", "tanh", "input") < kappa("plain", "tanh", "input")
    for activation in ACTIVATIONS:
        others = [kappa(f, activation, "weight") for f in ("plain", "orthonormal", "skip")]
        assert 5 * kappa("batch norm", activation, "weight") < min(others)
    assert len(study.rows) == 2 * 4 * 2 * 4
    half = study.find(family="orthonormal", activation="relu", side="input", block=4)["rank"]
    assert 6 <= half["median"] <= 18


def test_width_makes_the_plain_net_worse() -> None:
    study = analysis.width(widths=[6, 32], nets=2)

    def growth(family: str, side: str) -> float:
        case = {"family": family, "activation": "tanh", "side": side}
        low, high = (study.find(**case, width=n)["kappa"]["median"] for n in (6, 32))
        return float(high / low)

    assert growth("plain", "input") > 10
    assert growth("skip", "input") < 2
    assert growth("plain", "weight") > 3
    assert analysis.width(widths=[6], nets=2).rows == study.rows[:16]


@pytest.mark.parametrize("method", ["bp", "backmatch"])
def test_training(method: str) -> None:
    before = torch.get_rng_state()
    call: dict[str, Any] = {"size": 9, "nets": 1, "steps": 20, "methods": [method]}
    study = analysis.training(data="synthetic", **call)
    assert torch.equal(torch.get_rng_state(), before)
    for family in FAMILIES:
        case = {"family": family, "method": method}
        first, last = (
            next(row for row in study.rows if row["case"] == {**case, "step": step})
            for step in (0, 20)
        )
        assert last["loss"]["median"] < first["loss"]["median"]
        for side, count in (("weight", 9), ("input", 32)):
            row = study.find(**case, step=20, block=2, side=side)
            assert row["count"] == count
            assert row["whole"]["spectral_norm"] >= row["spectral_norm"]["q90"] * (1 - 1e-9)
            assert row["whole"]["kappa"] >= row["kappa"]["median"]
    start = study.find(family="orthonormal", method=method, step=0, block=2, side="input")
    assert start["kappa"]["median"] == pytest.approx(1, abs=1e-9)
    assert study == analysis.training(data="synthetic", **call)


def test_interrupted_training() -> None:
    calls = [0]

    def stop() -> None:
        calls[0] += 1
        if calls[0] > 6:
            raise InterruptedStudyError

    with pytest.raises(InterruptedStudyError) as caught:
        analysis.training(size=4, nets=1, steps=3, data="synthetic", check_stop=stop)
    assert caught.value.partial is not None
    families = {row["case"]["family"] for row in caught.value.partial.rows}
    assert families == {"plain"}


@pytest.mark.parametrize(
    ("study", "arguments", "error", "told"),
    [
        ("depth", {"blocks": 0}, ValueError, "blocks must be at least 1"),
        ("depth", {"nets": 0}, ValueError, "nets must be at least 1"),
        ("depth", {"size": 1}, ValueError, "size must be at least 2"),
        ("width", {"widths": []}, ValueError, "widths must hold at least one width"),
        ("width", {"widths": [4, 4]}, ValueError, "each once, got"),
        ("width", {"widths": 8}, TypeError, "widths must be a sequence of ints, got int"),
        ("width", {"widths": "8"}, TypeError, "widths must be a sequence of ints, got str"),
        ("width", {"widths": [8.0]}, TypeError, "widths must be an int, got float"),
        ("training", {"steps": 0}, ValueError, "steps must be at least 1"),
        ("training", {"methods": ["adam"]}, ValueError, "methods must be one of bp, backmatch"),
        ("training", {"methods": "bp"}, TypeError, "methods must be a sequence of names, got str"),
        ("training", {"methods": None}, TypeError, "methods must be a sequence of names"),
        ("training", {"methods": []}, ValueError, "methods must hold some of bp, backmatch"),
        ("training", {"methods": ["bp", "bp"]}, ValueError, "each once"),
        ("training", {"data": "mnist"}, ValueError, "data must be one of digits, synthetic or"),
        ("training", {"data": 3}, TypeError, "data must be a name or a path as a str, got int"),
    ],
)
def test_bad_arguments(study: str, arguments: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        getattr(analysis, study)(**arguments)


def test_too_few_samples(tmp_path: Path) -> None:
    few = {"x": np.ones((9, 4)), "y": np.arange(9) % 3}
    named = {f"{key}_{part}": value for key, value in few.items() for part in ("train", "test")}
    np.savez(tmp_path / "few.npz", **named)
    with pytest.raises(ValueError, match="data must have at least 128 samples, got 9"):
        analysis.training(data=str(tmp_path / "few.npz"))
