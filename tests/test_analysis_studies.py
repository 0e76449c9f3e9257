"""The studies' figures: those of the papers' claims, closed forms, and real blocks draw by draw."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import backmatch as bm
from backmatch import analysis
from backmatch.analysis import initialisation, normalisation, skip_connections
from backmatch.analysis.draws import Draws
from backmatch.analysis.result import InterruptedStudyError, quantiles
from backmatch.analysis.schemes import SCHEMES, drawn
from backmatch.analysis.spectra import Spectra
from backmatch.blocks import Residual

pytestmark = pytest.mark.usefixtures("one_thread")

NONE, RELU, TANH = (initialisation.SLOPES[name] for name in ("none", "relu", "tanh"))


def median(spectra: Spectra) -> float:
    return float(spectra.condition_numbers.median())


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data.copy_(weight)
    return layer


@pytest.fixture
def draws() -> Draws:
    return Draws(64, 1000, 0)


# The figures of the claims, n = 64, W_ij ~ N(0, 1/n), X 256 x 64 uniform on [0.5, 1.5].


def test_gaussian_input_side(draws: Draws) -> None:
    """The limit law of n large has the median 13.48 n^2 = 5.52e4 (Edelman 1988)."""
    found = initialisation.input_side(draws.fourfold, "gaussian", NONE)
    assert len(found.eigenvalues) == 4000
    assert median(found) == pytest.approx(5.5e4, rel=0.15)


def test_orthonormal_input_side() -> None:
    found = initialisation.input_side(Draws(64, 50, 0), "orthonormal", NONE)
    assert float(found.condition_numbers.max()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("a", "expected"), [(0.1, 1.72), (0.25, 3.97), (0.5, 18.8)])
def test_skip_input_side(draws: Draws, a: float, expected: float) -> None:
    found = median(skip_connections.input_side(draws, "z + aWz", a))
    assert found == pytest.approx(expected, rel=0.02)
    assert found < skip_connections.large_n_kappa(a) < 1.25 * found


@pytest.mark.parametrize(
    ("form", "bias", "expected"),
    [
        ("raw", False, 2.8e3),
        ("raw", True, 6.8e4),
        ("centred", False, 8.1),
        ("batch norm before", False, 8.0),
        ("batch norm before", True, 8.0),
        (normalisation.BEHIND, False, 8.0),
    ],
)
def test_weight_side(draws: Draws, form: str, bias: bool, expected: float) -> None:
    parts = [normalisation.weight_side(W, X, form, bias) for W, X in draws.pairs()]
    assert median(Spectra.joined(parts)) == pytest.approx(expected, rel=0.03)


def test_who_acts_on_which_side() -> None:
    """Batch norm and centring on the weight side, orthonormal and skip on the input side."""
    init = analysis.init(size=32, draws=60)
    skip = analysis.skip(size=32, draws=60)
    norm = analysis.norm(size=32, draws=60)

    def kappa(study: analysis.Study, **case: object) -> float:
        return float(study.find(**case)["kappa"]["median"])

    plain = {"activation": "none", "side": "input"}
    gaussian = kappa(init, scheme="gaussian", **plain)
    for scheme in SCHEMES:
        found = kappa(init, scheme=scheme, **plain)
        assert found < 1 + 1e-9 if scheme == "orthonormal" else 0.5 < found / gaussian < 2
    assert 100 * kappa(skip, block="z + aWz", weight=0.25, side="input") < gaussian
    # The other side: the same numbers, not only similar ones.
    sides = [kappa(init, scheme=s, activation="none", side="weight") for s in ("gaussian",)]
    sides.append(kappa(init, scheme="orthonormal", activation="none", side="weight"))
    sides += [kappa(skip, block=b, weight=a, side="weight") for b, a in (("Wz", None),)]
    sides.append(kappa(skip, block="z + aWz", weight=0.5, side="weight"))
    uniform = {"inputs": "uniform", "bias": False}
    sides.append(kappa(norm, form="raw", side="weight", **uniform))
    assert sides == pytest.approx([sides[0]] * len(sides), rel=1e-9)
    for form in ("centred", "batch norm before", "batch norm behind"):
        assert 50 * kappa(norm, form=form, side="weight", **uniform) < sides[0]
    behind = {"form": "batch norm behind", "side": "input", **uniform}
    assert 0.5 < kappa(norm, scheme="gaussian", **behind) / gaussian < 2


def test_centring_keeps_unequal_scales_and_batch_norm_does_not() -> None:
    study = analysis.norm(size=16, draws=40)
    found = {
        form: study.find(inputs="scaled", form=form, bias=False, side="weight")["kappa"]["median"]
        for form in ("centred", "batch norm before")
    }
    assert found["centred"] > 100 * found["batch norm before"]


# Draw by draw the same as bm.local_hessian on a real block.


def pairs(size: int, count: int = 3) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    made = Draws(size, count, 5)
    (W,), (X,), (z,) = made.weights(), made.inputs(), made.samples()
    yield from ((i, W[i], X[i], z[i].mT) for i in range(count))


def same(spectra: Spectra, at: int, found: bm.analysis.LocalHessian) -> None:
    """System ``at`` is the whole Hessian, or stands in it several times."""
    own = Spectra(spectra.eigenvalues[at : at + 1], spectra.cut)
    values = found.eigenvalues
    largest = float(values[0])
    copies = len(values) // own.eigenvalues.shape[1]
    expected = own.eigenvalues[0].repeat_interleave(copies)
    assert (values - expected).abs().max() <= 1e-12 * largest
    assert found.rank == int(own.ranks) * copies
    kappa = float(own.condition_numbers)  # NaN for a unit that no sample activates
    assert found.condition_number == pytest.approx(kappa, rel=1e-6, nan_ok=True)
    assert found.trace_mean == pytest.approx(float(own.trace_means), rel=1e-12)
    assert found.spectral_norm == pytest.approx(float(own.spectral_norms), rel=1e-12)


@pytest.mark.parametrize("size", [7, 33])
@pytest.mark.parametrize(("slope", "act"), [(NONE, None), (RELU, nn.ReLU()), (TANH, nn.Tanh())])
def test_initialisation_is_local_hessian(size: int, slope: Any, act: nn.Module | None) -> None:
    made = Draws(size, 3, 5)
    inputs = initialisation.input_side(made, "gaussian", slope)
    weights = initialisation.weight_side(made, "gaussian", slope)
    for i, W, X, z in pairs(size):
        block = nn.Sequential(linear(W), *([] if act is None else [act]))
        same(inputs, i, bm.local_hessian(block, z))
        unit = nn.Sequential(linear(W[:1]), *([] if act is None else [act]))
        same(weights, i, bm.local_hessian(unit, X, "weight"))


@pytest.mark.parametrize("size", [7, 33])
@pytest.mark.parametrize("name", list(skip_connections.BLOCKS))
def test_skip_is_local_hessian(size: int, name: str) -> None:
    made, a = Draws(size, 3, 5), 0.5
    inputs = skip_connections.input_side(made, name, a)
    weights = skip_connections.weight_side(made, a)
    scheme = skip_connections.BLOCKS[name][0]
    (drawn_weights,) = made.weights(scheme)
    for i, _, X, z in pairs(size):
        branch = linear(a * drawn_weights[i])
        if name == "relu(z + aWz)":
            block = Residual(branch, activation=nn.ReLU())
        elif "relu" in name:
            block, z = Residual(nn.Sequential(nn.ReLU(), branch)), z - 1
        else:
            block = Residual(branch)
            # J_w is that of the branch: the factor a stands in front of it.
            same(weights, i, bm.local_hessian(linear(branch.weight[:1].detach()), a * X, "weight"))
        same(inputs, i, bm.local_hessian(block, z))


@pytest.mark.parametrize("size", [6, 21])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", list(normalisation.FORMS))
def test_norm_before_is_local_hessian(size: int, bias: bool, form: str) -> None:
    for _, W, X, _ in pairs(size):
        found = normalisation.weight_side(W[None], X[None], form, bias)
        layer = nn.Linear(size, 1, bias=bias).double()
        Z = X - X.mean(0) if form == "centred" else X
        if form == "batch norm before":
            Z = nn.BatchNorm1d(size).double()(X).detach()
        same(found, 0, bm.local_hessian(layer, Z, "weight"))


@pytest.mark.parametrize("size", [6, 21])
def test_norm_behind_is_local_hessian(size: int) -> None:
    """All but the unit's own scale, which is left out."""
    for _, W, X, _ in pairs(size):
        found = normalisation.weight_side(W[None], X[None], normalisation.BEHIND, False)
        norm = nn.BatchNorm1d(1, affine=False).double()
        H = bm.local_hessian(nn.Sequential(linear(W[:1]), norm), X, "weight")
        expected = found.eigenvalues[0, : size - 1]
        assert torch.allclose(H.eigenvalues[: size - 1], expected, rtol=1e-10)
        assert H.kappa(size - 1) == pytest.approx(float(found.condition_numbers), rel=1e-10)
        assert H.eigenvalues[-1] < 1e-6 * H.eigenvalues[0]


@pytest.mark.parametrize(("n", "n_out", "m"), [(5, 4, 13), (4, 4, 9), (7, 2, 5)])
def test_norm_behind_on_the_input_side_in_closed_form(n: int, n_out: int, m: int) -> None:
    """m > 2 n_out: kappa of the joint problem is kappa(S W W^T S), S the reciprocal deviations."""
    torch.manual_seed(n)
    W, X = torch.randn(n_out, n).double(), torch.rand(m, n).double()
    eps = 1e-9
    norm = nn.BatchNorm1d(n_out, affine=False, eps=eps).double()
    H = bm.local_hessian(nn.Sequential(linear(W), norm), X)
    assert H.is_complete
    scales = ((X @ W.mT).var(0, unbiased=False) + eps).rsqrt()
    singular = torch.linalg.svdvals(scales.unsqueeze(1) * W)
    assert H.spectral_norm == pytest.approx(float(singular[0]) ** 2, rel=1e-6)
    # A unit gives m - 2 directions, and one that is eps / (variance + eps) of them.
    counted = (m - 2) * n_out
    assert H.kappa(counted) == pytest.approx(float(singular[0] / singular[-1]) ** 2, rel=1e-6)
    assert H.eigenvalues[counted] < 1e-12 * H.spectral_norm


def test_large_n_limit_is_approached() -> None:
    """From below, and at n = 512 to a few per cent."""
    limit = skip_connections.large_n_kappa(0.25)
    errors = []
    for n, count in ((16, 200), (512, 2)):
        found = median(skip_connections.input_side(Draws(n, count, 1), "z + aWz", 0.25))
        errors.append((limit - found) / limit)
    assert 0 < errors[1] < errors[0]
    assert errors[1] < 0.04


def test_orthonormal_branch_in_closed_form() -> None:
    """The eigenvalues of Q fill the unit circle: kappa is at most ((1 + a) / (1 - a))^2."""
    found = skip_connections.input_side(Draws(64, 30, 0), "z + aQz", 0.5).condition_numbers
    assert float(found.max()) <= 9 + 1e-9
    assert float(found.median()) > 8.8


# What a study promises.


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_schemes_have_their_variances(scheme: str) -> None:
    own = torch.Generator().manual_seed(0)
    weights = drawn(scheme, 40, (20, 50), own)
    expected = {
        "gaussian": 1 / 50,
        "xavier-normal": 2 / 70,
        "xavier-uniform": 2 / 70,
        "he-normal": 2 / 50,
        "he-uniform": 2 / 50,
        "torch-default": 1 / 150,
        "orthonormal": 1 / 50,
    }[scheme]
    assert float(weights.var()) == pytest.approx(expected, rel=0.03)
    if "uniform" in scheme or scheme == "torch-default":
        assert float(weights.abs().max()) <= math.sqrt(3 * expected) * (1 + 1e-6)


def test_torch_default_is_that_of_linear() -> None:
    torch.manual_seed(3)
    layer = nn.Linear(9, 6, bias=False, dtype=torch.float64)
    assert torch.equal(layer.weight, drawn("torch-default", 1, (6, 9), torch.manual_seed(3))[0])


@pytest.mark.parametrize("study", ["init", "skip", "norm"])
def test_same_seed_same_rows_and_no_trace(study: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    call = getattr(analysis, study)
    first = call(size=9, draws=7, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == call(size=9, draws=7, seed=4)
    assert first.rows != call(size=9, draws=7, seed=5).rows
    assert json.loads(json.dumps(first.as_dict(), allow_nan=False)) == first.as_dict()


def test_draws_do_not_depend_on_how_many_there_are() -> None:
    few, many = ([torch.cat(list(Draws(24, n, 0).inputs()))] for n in (5, 1100))
    assert torch.equal(few[0], many[0][:5])


def test_quantiles_leave_out_what_is_undefined() -> None:
    assert quantiles(torch.tensor([math.nan]))["median"] is None
    found = quantiles(torch.tensor([1.0, 2.0, math.nan, 3.0], dtype=torch.float64))
    assert (found["median"], found["undefined"]) == (2.0, 1)


def test_zero_and_rank_deficient_systems() -> None:
    J = torch.zeros(2, 3, 4).double()
    J[1, :2, :2] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    found = Spectra.of_jacobians(J)
    assert found.ranks.tolist() == [0, 2]
    assert math.isnan(found.condition_numbers[0])
    assert float(found.condition_numbers[1]) == pytest.approx(9)
    assert found.whole() == {"kappa": 9.0, "spectral_norm": 9.0, "trace_mean": 10 / 8}
    assert found.without_smallest().ranks.tolist() == [0, 1]
    assert math.isnan(Spectra(torch.zeros(1, 2), 1e-9).whole()["kappa"])


def test_interrupted_study_keeps_its_rows() -> None:
    calls = [0]

    def stop() -> None:
        calls[0] += 1
        if calls[0] > 12:
            raise InterruptedStudyError

    with pytest.raises(InterruptedStudyError) as caught:
        analysis.init(size=5, draws=3, check_stop=stop)
    partial = caught.value.partial
    assert partial is not None
    assert 0 < len(partial.rows) < len(analysis.init(size=5, draws=3).rows)
    assert partial.rows == analysis.init(size=5, draws=3).rows[: len(partial.rows)]


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"size": 1}, ValueError, "size must be at least 2, got 1"),
        ({"size": 2.0}, TypeError, "size must be an int, got float"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": True}, TypeError, "draws must be an int, got bool"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "0"}, TypeError, "seed must be an int, got str"),
    ],
)
@pytest.mark.parametrize("study", ["init", "skip", "norm"])
def test_bad_arguments(study: str, arguments: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        getattr(analysis, study)(**arguments)


def test_find_wants_one_row() -> None:
    study = analysis.init(size=3, draws=2)
    with pytest.raises(LookupError, match="init: 0 rows"):
        study.find(scheme="zero")
    with pytest.raises(LookupError, match="rows have"):
        study.find(scheme="gaussian")


def test_the_figure_has_its_own_settings_and_any_file_name() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from backmatch.analysis import figure

    study = analysis.skip(size=6, draws=4).as_dict()
    study["options"]["data"] = "a$b$\\frac{\n.npz"
    result = {"studies": {"skip": study}}
    drawn = figure.draw(result)
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30}):
        assert figure.draw(result) == drawn
