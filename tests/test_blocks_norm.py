"""Batch, layer and group norm as blocks of their own and inside composites."""

from __future__ import annotations

import copy

import pytest
import torch
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
    matching,
    sweep,
)
from torch import nn

import backmatch as bm
from backmatch import problems


def constant_channel(layer, z):
    z[:, 1] = 0.7


def zero_gamma(layer, z):
    layer.weight.view(-1)[0] = 0.0


def no_gamma(layer, z):
    layer.weight.zero_()


def frozen(*names):
    def freeze(layer, z):
        for name in names:
            getattr(layer, name).requires_grad_(False)

    return freeze


def batch(layer, *shape, prepare=lambda layer, z: None):
    return LayerCase(layer, shape, prepare, coupled=True)


def evaluated(layer):
    return lambda: layer().eval()


def bn1(**options):
    return lambda: nn.BatchNorm1d(4, **options)


def bn2(**options):
    return lambda: nn.BatchNorm2d(3, **options)


BATCH = {
    "bn1d": batch(bn1(), 6, 4),
    "bn1d-length": batch(bn1(), 3, 4, 5),
    "bn1d-two-samples": batch(bn1(), 2, 4),
    "bn1d-large-eps": batch(bn1(eps=0.5), 5, 4),
    "bn1d-frozen-gamma": batch(bn1(), 5, 4, prepare=frozen("weight")),
    "bn1d-frozen": batch(bn1(), 5, 4, prepare=frozen("weight", "bias")),
    "bn1d-frozen-beta": batch(bn1(), 5, 4, prepare=frozen("bias")),
    "bn2d": batch(bn2(), 4, 3, 2, 2),
    "bn2d-1x1": batch(bn2(), 5, 3, 1, 1),
    "bn2d-batch-1": batch(bn2(), 1, 3, 3, 2),
    "bn2d-one-channel": batch(lambda: nn.BatchNorm2d(1), 3, 1, 2, 2),
    "bn2d-plain": batch(bn2(affine=False), 3, 3, 2, 2),
    "bn2d-constant": batch(bn2(), 3, 3, 2, 2, prepare=constant_channel),
    "bn2d-zero-gamma": batch(bn2(), 3, 3, 2, 2, prepare=zero_gamma),
    "bn2d-no-gamma": batch(bn2(), 3, 3, 2, 2, prepare=no_gamma),
    "bn2d-untracked-eval": batch(evaluated(bn2(track_running_stats=False)), 3, 3, 2, 2),
}
FIXED = {
    "bn1d-eval": LayerCase(evaluated(bn1()), (3, 4)),
    "bn2d-eval": LayerCase(evaluated(bn2()), (2, 3, 2, 2)),
    "bn2d-eval-plain": LayerCase(evaluated(bn2(affine=False)), (2, 3, 2, 2)),
    "bn2d-eval-zero-gamma": LayerCase(evaluated(bn2()), (2, 3, 2, 2), zero_gamma),
    "bn1d-eval-batch-1": LayerCase(evaluated(bn1()), (1, 4)),
}
GROUPS = {
    "ln": LayerCase(lambda: nn.LayerNorm(5), (3, 5)),
    "ln-batch-1": LayerCase(lambda: nn.LayerNorm(5), (1, 5)),
    "ln-positions": LayerCase(lambda: nn.LayerNorm(4), (2, 3, 4)),
    "ln-two-dims": LayerCase(lambda: nn.LayerNorm((2, 3)), (2, 2, 2, 3)),
    "ln-two-entries": LayerCase(lambda: nn.LayerNorm(2), (3, 2)),
    "ln-one-entry": LayerCase(lambda: nn.LayerNorm(1), (3, 1)),
    "ln-plain": LayerCase(lambda: nn.LayerNorm(5, elementwise_affine=False), (3, 5)),
    "ln-no-bias": LayerCase(lambda: nn.LayerNorm(5, bias=False), (3, 5)),
    "ln-constant": LayerCase(lambda: nn.LayerNorm(5), (3, 4, 5), constant_channel),
    "ln-zero-gamma": LayerCase(lambda: nn.LayerNorm(5), (3, 5), zero_gamma),
    "ln-no-gamma": LayerCase(lambda: nn.LayerNorm(5), (3, 5), no_gamma),
    "ln-frozen-gamma": LayerCase(lambda: nn.LayerNorm(5), (3, 5), frozen("weight")),
    "ln-frozen": LayerCase(lambda: nn.LayerNorm(5), (3, 5), frozen("weight", "bias")),
    "ln-large-eps": LayerCase(lambda: nn.LayerNorm(6, eps=0.5), (3, 6)),
    "gn": LayerCase(lambda: nn.GroupNorm(2, 4), (3, 4, 2, 2)),
    "gn-flat": LayerCase(lambda: nn.GroupNorm(2, 6), (3, 6)),
    "gn-one-group": LayerCase(lambda: nn.GroupNorm(1, 3), (2, 3, 3)),
    "gn-instance": LayerCase(lambda: nn.GroupNorm(3, 3), (2, 3, 2, 2)),
    "gn-plain": LayerCase(lambda: nn.GroupNorm(2, 4, affine=False), (2, 4, 3)),
    "gn-zero-gamma": LayerCase(lambda: nn.GroupNorm(2, 4), (2, 4, 3), zero_gamma),
    "gn-constant": LayerCase(lambda: nn.GroupNorm(4, 4), (2, 4, 3), constant_channel),
    "gn-frozen-beta": LayerCase(lambda: nn.GroupNorm(2, 4), (2, 4, 3), frozen("bias")),
}
CASES = {**BATCH, **FIXED, **GROUPS}
DAMPINGS = (0.0, 1e-3, bm.Relative(0.1))
ORDERS = ("simultaneous", "sequential")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_by_its_closed_form(name):
    case = CASES[name]
    for damping in DAMPINGS:
        for order in ORDERS:
            # What an exact weight step leaves is rounding, which 1 / e = (v + eps) / eps enlarges.
            exact = order == "sequential" and damping == 0.0
            tolerance = 1e-6 if exact else 1e-8
            got = check_reference(case, bm.Auto(damping), tolerance, order=order)
            assert got.input.solver == "cholesky"
            joint = case.coupled and case.shape[0] > 1
            assert got.input.structure == ("joint" if joint else "sample")
            assert got.input.systems == (1 if case.coupled else case.shape[0])
            if got.weight is not None:
                record = got.weight
                assert (record.solver, record.structure, record.systems) == ("cholesky", "joint", 1)
            assert damping != bm.Relative(0.1) or got.input.trace == "exact"


@pytest.mark.parametrize("name", CASES)
def test_equals_numpy_with_its_rank(name):
    for damping in DAMPINGS:
        check_lstsq(CASES[name], damping, 1e-8)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bn2d", problems.BatchNormInputs),
        ("bn2d-eval", problems.Diagonal),
        ("ln-positions", problems.LayerNormInputs),
        ("gn", problems.LayerNormInputs),
    ],
)
def test_problem_types(name, kind):
    layer, z, r = CASES[name].make()
    found = map_of(layer, z)
    assert type(found.input_problem(r)) is kind
    assert found.solves_weights
    assert type(found.weight_problem(r)) is problems.ScaleShift


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_autograd(name):
    check_products(CASES[name])


@pytest.mark.parametrize("name", ["bn1d", "bn2d-batch-1", "ln-positions", "gn", "gn-instance"])
@pytest.mark.parametrize("order", ORDERS)
def test_newton_steps(name, order):
    check_descent(CASES[name], 0.3, order)


@pytest.mark.parametrize("name", ["bn1d", "bn2d", "bn2d-eval", "ln-two-dims", "gn", "gn-instance"])
def test_other_solvers(name):
    case = CASES[name]
    for solver in (bm.Scalar("spectral", damping=0.1), bm.Scalar("trace"), bm.Gradient()):
        check_reference(case, solver, 1e-8)
    check_reference(case, bm.CG(bm.Relative(0.1), rtol=1e-13), 1e-8)


@pytest.mark.parametrize("name", ["bn1d", "bn2d", "bn2d-eval", "ln-positions", "ln-no-bias", "gn"])
def test_float32(name):
    check_float32(CASES[name])


def test_float32_cuts_the_direction_of_the_input():
    """eps / (v + eps) lies between the cuts of float32 and float64: ranks N - 2 and N - 1."""
    for case, systems in ((BATCH["bn2d"], 3), (GROUPS["ln-positions"], 6)):
        ranks = []
        for dtype in (torch.float32, torch.float64):
            layer, z, r = case.make(dtype)
            layer.weight.data.fill_(1.0)
            found = sweep(layer, z, r, bm.Cholesky(0.0))
            ranks.append(found.input.rank)
            assert found.input_step.abs().max() < 1e7 * r.abs().max()
        assert ranks == [z.numel() - 2 * systems, z.numel() - systems]


@pytest.mark.parametrize("name", ["bn1d", "bn2d", "bn2d-eval", "ln-positions", "gn"])
def test_equals_the_generic_route(name):
    for damping in (0.0, bm.Relative(0.1)):
        check_generic(CASES[name], bm.Cholesky(damping), 1e-8)


COMPOSITES = {
    "relu-after": (lambda: nn.Sequential(bn2()(), nn.ReLU()), (3, 3, 2, 2)),
    "relu-before": (lambda: nn.Sequential(nn.Tanh(), bn1()(), nn.Tanh()), (5, 4)),
    "two-norms": (lambda: nn.Sequential(nn.GroupNorm(1, 3), bn2()()), (3, 3, 2, 2)),
    "frozen-between": (
        lambda: nn.Sequential(bn2()().requires_grad_(False), nn.GELU(), nn.GroupNorm(3, 3)),
        (3, 3, 2, 2),
    ),
    "layer-norm": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.LayerNorm(4)), (3, 2, 4)),
    "pooled": (lambda: nn.Sequential(bn2()(), nn.ReLU(), nn.MaxPool2d(2)), (2, 3, 4, 4)),
    "eval": (lambda: nn.Sequential(bn2()(), nn.ReLU()).eval(), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name):
    case = LayerCase(*COMPOSITES[name])
    for order in ORDERS:
        for damping in (1e-3, bm.Relative(0.1)):
            check_reference(case, bm.Auto(damping), 1e-8, order=order)
    # Nearly converged, what is left of a step is rounding: on the generic route as well.
    check_reference(case, bm.Auto(0.3), 1e-6, newton_steps=3)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bn1d", "bn2d"])
def test_running_statistics_move_once(name, training, momentum):
    layer, z, r = BATCH[name].make()
    layer.momentum = momentum
    layer.train(training)
    once = copy.deepcopy(layer)
    once(z)
    for block in (layer, nn.Sequential(layer, nn.ReLU())):
        before = copy.deepcopy(layer.state_dict())
        matcher = bm.BackMatching(
            [nn.Identity(), block],
            weights=bm.Auto(0.1),
            inputs=bm.Auto(0.1),
            order="sequential",
            passes=2,
            newton_steps=2,
        )
        matcher.backward(z, matching(r))
        for key, value in once.named_buffers():
            assert torch.equal(layer.get_buffer(key), value), key
        layer.load_state_dict(before)


@pytest.mark.parametrize("name", ["bn2d", "bn2d-eval", "gn", "gn-instance"])
def test_memory_formats(name):
    layer, z, r = CASES[name].make()
    want = sweep(copy.deepcopy(layer), z, r, bm.Auto(bm.Relative(0.1)))
    strided = torch.randn(*z.shape[:-1], 2 * z.shape[-1]).double()[..., ::2].copy_(z)
    for view in (z.to(memory_format=torch.channels_last), strided):
        got = sweep(copy.deepcopy(layer), view, r, bm.Auto(bm.Relative(0.1)))
        assert deviation(got.input_step, want.input_step.numpy()) < 1e-12
        for key, step in want.weight_step.items():
            assert deviation(got.weight_step[key], step.numpy()) < 1e-12


def test_layer_norm_over_the_batch_is_one_joint_system():
    case = LayerCase(lambda: nn.LayerNorm((3, 4)), (3, 4), coupled=True)
    check_products(case)
    for damping in (0.0, bm.Relative(0.1)):
        assert check_reference(case, bm.Cholesky(damping), 1e-8).input.structure == "joint"


@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (
            nn.BatchNorm1d(4),
            (3, 5),
            r"block '1': BatchNorm1d expects .*\(batch, 4\).* got \(3, 5\)",
        ),
        (nn.BatchNorm1d(4), (3, 4, 2, 2), "BatchNorm1d expects"),
        (nn.BatchNorm2d(4), (3, 4), r"\(batch, 4, height, width\), got \(3, 4\)"),
        (nn.BatchNorm1d(4), (1, 4), "more than one value per channel"),
        (nn.LayerNorm((2, 3)), (3, 3), r"\(batch, ..., 2, 3\), got \(3, 3\)"),
        (nn.GroupNorm(2, 4), (3, 3, 2), r"\(batch, 4, ...\), got \(3, 3, 2\)"),
        (nn.GroupNorm(4, 4), (1, 4), "more than one value per group"),
    ],
)
def test_wrong_shapes_are_refused(layer, shape, text):
    before = copy.deepcopy(layer.state_dict())
    matcher = bm.BackMatching([nn.Identity(), layer], weights=bm.Auto(0.1), inputs=bm.Auto(0.1))
    with pytest.raises(ValueError, match=text):
        matcher.backward(torch.randn(shape), lambda out: out.sum())
    for key, value in layer.state_dict().items():
        assert torch.equal(before[key], value)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)])
def test_another_dtype_is_refused(layer):
    matcher = bm.BackMatching(
        [nn.Identity(), layer.double()], weights=bm.Auto(0.1), inputs=bm.Auto(0.1)
    )
    with pytest.raises(TypeError, match=r"expects an input of dtype torch.float64|float32"):
        matcher.backward(torch.randn(3, 4), lambda out: out.sum())
