"""Max and average pooling as blocks of their own and inside composites."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_checks import (
    LayerCase,
    check_descent,
    check_float32,
    check_generic,
    check_lstsq,
    check_products,
    check_reference,
    deviation,
    map_of,
    sweep,
)
from torch import nn

import backmatch as bm
from backmatch import problems
from backmatch.blocks.layers import is_known

MAX = {
    "max": LayerCase(lambda: nn.MaxPool2d(2), (2, 3, 4, 4)),
    "max-odd": LayerCase(lambda: nn.MaxPool2d(2), (2, 2, 5, 3)),
    "max-overlap": LayerCase(lambda: nn.MaxPool2d(3, 1, 1), (2, 2, 4, 4)),
    "max-resnet": LayerCase(lambda: nn.MaxPool2d(3, 2, 1), (2, 2, 5, 5)),
    "max-gaps": LayerCase(lambda: nn.MaxPool2d(2, 3), (2, 1, 5, 7)),
    "max-dilated": LayerCase(lambda: nn.MaxPool2d(2, 1, dilation=2), (2, 2, 4, 5)),
    "max-ceil": LayerCase(lambda: nn.MaxPool2d((3, 2), 2, ceil_mode=True), (1, 2, 6, 5)),
    "max-whole": LayerCase(lambda: nn.MaxPool2d(3), (3, 2, 3, 3)),
    "max-1x1": LayerCase(lambda: nn.MaxPool2d(1), (2, 2, 1, 1)),
    "max-no-channels": LayerCase(lambda: nn.MaxPool2d(2, 1), (3, 3, 3)),
    "max-1d": LayerCase(lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 2, 6)),
    "max-1d-dilated": LayerCase(lambda: nn.MaxPool1d(2, 1, dilation=3), (2, 2, 6)),
    "adaptive-max": LayerCase(lambda: nn.AdaptiveMaxPool2d((2, 3)), (2, 2, 5, 4)),
    "adaptive-max-one": LayerCase(lambda: nn.AdaptiveMaxPool2d(1), (2, 3, 3, 2)),
    "adaptive-max-own": LayerCase(lambda: nn.AdaptiveMaxPool2d((None, 2)), (2, 2, 3, 3)),
    "adaptive-max-1d": LayerCase(lambda: nn.AdaptiveMaxPool1d(3), (2, 2, 7)),
}
AVG = {
    "avg": LayerCase(lambda: nn.AvgPool2d(2), (2, 3, 4, 4)),
    "avg-overlap": LayerCase(lambda: nn.AvgPool2d(3, 1), (2, 2, 5, 4)),
    "avg-padded": LayerCase(lambda: nn.AvgPool2d(3, 2, 1), (2, 2, 5, 4)),
    "avg-inside": LayerCase(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 2, 5, 4)),
    "avg-ceil": LayerCase(lambda: nn.AvgPool2d((2, 3), 2, (1, 0), ceil_mode=True), (2, 1, 5, 6)),
    "avg-divisor": LayerCase(lambda: nn.AvgPool2d(2, 1, 1, divisor_override=3), (2, 2, 3, 3)),
    "avg-gaps": LayerCase(lambda: nn.AvgPool2d(2, 3), (2, 1, 5, 7)),
    "avg-1x1": LayerCase(lambda: nn.AvgPool2d(1), (2, 2, 1, 1)),
    "avg-no-channels": LayerCase(lambda: nn.AvgPool2d(2, 1), (3, 3, 3)),
    "avg-1d": LayerCase(lambda: nn.AvgPool1d(3, 2, 1), (2, 2, 7)),
    "avg-1d-inside": LayerCase(
        lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 2, 6)
    ),
    "adaptive-avg": LayerCase(lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 2, 5, 5)),
    "adaptive-avg-one": LayerCase(lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 3, 2)),
    "adaptive-avg-up": LayerCase(lambda: nn.AdaptiveAvgPool2d((4, None)), (1, 2, 3, 2)),
    "adaptive-avg-1d": LayerCase(lambda: nn.AdaptiveAvgPool1d(3), (2, 2, 7)),
}
CASES = {**MAX, **AVG}
DAMPINGS = (0.0, 1e-3, bm.Relative(0.1))
ORDERS = ("simultaneous", "sequential")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_by_its_closed_form(name):
    case = CASES[name]
    for damping in DAMPINGS:
        for order in ORDERS:
            record = check_reference(case, bm.Auto(damping), 1e-8, order=order).input
            assert (record.solver, record.structure) == ("cholesky", "sample")
            assert record.systems == case.shape[0]
            assert damping != bm.Relative(0.1) or record.trace == "exact"
    layer, z, r = case.make()
    kind = problems.Diagonal if name in MAX else problems.Kronecker
    assert type(map_of(layer, z).input_problem(r)) is kind


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_with_its_rank(name):
    for damping in DAMPINGS:
        check_lstsq(CASES[name], damping, 1e-8)


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_autograd(name):
    check_products(CASES[name])


@pytest.mark.parametrize("name", MAX)
def test_source_is_where_each_output_comes_from(name):
    layer, z, _ = CASES[name].make()
    found = map_of(layer, z)
    assert found.source.dtype == torch.int64
    assert found.source.shape == found.output.shape
    dims = 1 if "1d" in name else 2
    maps, picks = z.flatten(-dims), found.source.flatten(-dims)
    assert torch.equal(maps.gather(-1, picks).view(found.output.shape), found.output)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ORDERS)
def test_newton_steps(name, order):
    check_descent(CASES[name], 0.3, order)


@pytest.mark.parametrize("seed", range(6))
def test_newton_sees_what_the_selection_cannot_reach(seed):
    """Large displacements change the selection, and with it the part of |r|^2 out of reach."""

    def spread(layer, z):
        torch.manual_seed(seed)
        z.copy_(0.1 * torch.randn_like(z))

    case = LayerCase(lambda: nn.MaxPool2d(3, 1, 1), (3, 1, 4, 4), spread)
    # Undamped, two entries of a window meet at its target, and rounding says which is selected.
    for damping in (0.03, bm.Relative(0.1)):
        check_reference(case, bm.Auto(damping), 1e-8, newton_steps=4)


def test_outside_completes_the_square():
    layer, z, r = MAX["max-overlap"].make()
    problem = map_of(layer, z).input_problem(r)
    squares = problem.residual.square().sum(-1) + problem.outside
    torch.testing.assert_close(squares, r.reshape(len(r), -1).square().sum(-1))
    layer, z, r = MAX["max"].make()
    problem = map_of(layer, z).input_problem(r)
    assert problem.outside is None
    torch.testing.assert_close(problem.residual.square().sum(), r.square().sum())


@pytest.mark.parametrize("name", ["max-overlap", "avg-padded", "adaptive-avg"])
def test_other_solvers(name):
    for solver in (bm.Scalar("spectral", damping=0.1), bm.Scalar("trace"), bm.Gradient()):
        check_reference(CASES[name], solver, 1e-8)
    check_reference(CASES[name], bm.CG(bm.Relative(0.1), rtol=1e-13), 1e-8)


@pytest.mark.parametrize("name", ["max-resnet", "max-dilated", "avg-padded", "adaptive-avg"])
def test_float32(name):
    check_float32(CASES[name])


@pytest.mark.parametrize("name", ["max-overlap", "adaptive-max", "avg-padded", "adaptive-avg-1d"])
def test_equals_the_generic_route(name):
    for damping in (0.0, bm.Relative(0.1)):
        check_generic(CASES[name], bm.Cholesky(damping), 1e-8)


COMPOSITES = {
    "relu-max": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
    "max-tanh": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Tanh()),
    "avg-flatten": lambda: nn.Sequential(nn.Tanh(), nn.AvgPool2d(2, 1), nn.Flatten()),
    "max-avg": lambda: nn.Sequential(nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(2)),
    "global": lambda: nn.Sequential(nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name):
    case = LayerCase(COMPOSITES[name], (2, 2, 4, 4))
    for order in ORDERS:
        for damping in DAMPINGS:
            check_reference(case, bm.Auto(damping), 1e-8, order=order)
    check_reference(case, bm.Auto(0.3), 1e-7, newton_steps=3)


@pytest.mark.parametrize("name", ["max-overlap", "adaptive-max", "avg-padded", "adaptive-avg"])
def test_memory_formats(name):
    layer, z, r = CASES[name].make()
    want = sweep(layer, z, r, bm.Auto(bm.Relative(0.1))).input_step
    strided = torch.randn(*z.shape[:-1], 2 * z.shape[-1]).double()[..., ::2].copy_(z)
    for view in (z.to(memory_format=torch.channels_last), strided):
        got = sweep(layer, view, r, bm.Auto(bm.Relative(0.1))).input_step
        assert deviation(got, want.numpy()) < 1e-12


def test_long_signals_are_solved_without_decomposing_their_axis():
    case = LayerCase(lambda: nn.AvgPool1d(2), (1, 1, 1500))
    layer, z, r = case.make()
    assert map_of(layer, z).input_problem(r) is None
    step = sweep(layer, z, r, bm.CG(0.0, rtol=1e-12)).input_step
    torch.testing.assert_close(step, r.repeat_interleave(2, -1))


def test_indices_take_the_generic_route():
    assert not is_known(nn.MaxPool2d(2, return_indices=True))
    assert not is_known(nn.AdaptiveMaxPool1d(2, return_indices=True))


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)])
def test_wrong_shapes_are_refused(layer):
    matcher = bm.BackMatching([nn.Identity(), layer], weights=bm.Auto(0.1), inputs=bm.Auto(0.1))
    name = type(layer).__name__
    text = rf"block '1': {name} expects .*height, width\).*, got \(4, 4\)"
    with pytest.raises(ValueError, match=text):
        matcher.backward(torch.randn(4, 4), lambda out: out.sum())


@st.composite
def geometries(draw, dims: int):
    """Options of a window and sides of a map that torch takes."""
    sides = [draw(st.integers(1, 7)) for _ in range(dims)]
    kernel = [draw(st.integers(1, 4)) for _ in range(dims)]
    stride = [draw(st.integers(1, 4)) for _ in range(dims)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    options = {"stride": tuple(stride), "padding": tuple(padding), "ceil_mode": draw(st.booleans())}
    return tuple(sides), tuple(kernel), options


def check_geometry(layer: nn.Module, sides: tuple[int, ...]) -> None:
    case = LayerCase(lambda: copy.deepcopy(layer), (2, 2, *sides))
    try:
        layer(torch.zeros(case.shape))
    except RuntimeError:
        assume(False)
    check_products(case)
    for damping in (0.0, bm.Relative(0.1)):
        assert check_lstsq(case, damping, 1e-8).input.solver == "cholesky"


fuzz = settings(max_examples=40, deadline=None, derandomize=True)


@fuzz
@given(geometries(2), st.integers(1, 2))
def test_max_pooling_of_any_geometry(geometry, dilation):
    sides, kernel, options = geometry
    check_geometry(nn.MaxPool2d(kernel, dilation=dilation, **options), sides)


@fuzz
@given(geometries(2), st.booleans(), st.sampled_from([None, None, 1, 5]))
def test_average_pooling_of_any_geometry(geometry, include_pad, divisor):
    sides, kernel, options = geometry
    extra = {"count_include_pad": include_pad, "divisor_override": divisor}
    check_geometry(nn.AvgPool2d(kernel, **options, **extra), sides)


@fuzz
@given(geometries(1), st.booleans())
def test_flat_pooling_of_any_geometry(geometry, maximum):
    sides, kernel, options = geometry
    kind = nn.MaxPool1d if maximum else nn.AvgPool1d
    plain = {k: v[0] if isinstance(v, tuple) else v for k, v in options.items()}
    check_geometry(kind(kernel[0], **plain), sides)


@fuzz
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.booleans(),
)
def test_adaptive_pooling_of_any_geometry(sides, pooled, maximum):
    kind = nn.AdaptiveMaxPool2d if maximum else nn.AdaptiveAvgPool2d
    check_geometry(kind(pooled), sides)


def test_a_map_too_small_for_the_window_names_block_and_shape():
    matcher = bm.BackMatching([nn.Identity(), nn.MaxPool2d(4)])
    with pytest.raises(ValueError, match=r"block '1': MaxPool2d cannot pool .*\(2, 3, 2, 2\)"):
        matcher.backward(torch.ones(2, 3, 2, 2), lambda out: out.sum())
