"""Arguments, inputs, losses and nets that a sweep must refuse, and that it then changes nothing."""

import pytest
import torch
from sweep_nets import batch, net, square
from torch import nn

import backmatch as bm


def test_a_loss_that_reaches_parameters_otherwise_is_refused():
    model = net()
    with pytest.raises(ValueError, match="its gradient would be lost"):
        bm.BackMatching(model).backward(
            batch(), lambda out: square(out) + model[0].weight.square().sum()
        )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda out: out, ValueError, "scalar, got shape"),
        (lambda out: 1.0, TypeError, "return a tensor, got float"),
        (lambda out: out.detach().sum(), ValueError, "depend on the network's output"),
        (3, TypeError, "loss must be a callable"),
        (lambda out: out.sum() / 0, bm.NonFiniteError, "loss"),
    ],
)
def test_unusable_losses(loss, error, text):
    with pytest.raises(error, match=text):
        bm.BackMatching(net()).backward(batch(), loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_named_with_count_and_block(value):
    x = batch()
    x[2, 3] = value
    with pytest.raises(bm.NonFiniteError, match=r"x has 1 non-finite .* of 30 entries") as caught:
        bm.BackMatching(net()).backward(x, square)
    assert (caught.value.tensor, caught.value.count) == ("x", 1)
    model = net()
    model[2].weight.data[0, :2] = value
    with pytest.raises(bm.NonFiniteError, match=r"2 non-finite .* in block '2'") as caught:
        bm.BackMatching(model).backward(batch(), square)
    assert caught.value.block == "2"


def test_cg_at_its_cap_warns_once_or_raises_when_strict():
    solver = bm.CG(damping=1e-9, max_steps=2)
    matcher = bm.BackMatching(net(), weights=solver)
    with pytest.warns(bm.ConvergenceWarning, match=r"weight problem of block '0'.*residual"):
        step = matcher.backward(batch(), square)
    matcher.backward(batch(), square)  # a second warning would be an error
    assert not step.blocks[0].weight.converged
    assert step.blocks[0].weight.iterations == 2
    model = net()
    with pytest.raises(bm.NotConvergedError, match="raise max_steps"):
        bm.BackMatching(model, weights=solver, strict=True).backward(batch(), square)
    assert all(p.grad is None for p in model.parameters())
    exactly = bm.CG(damping=1e-9, max_steps=2, rtol=0)
    step = bm.BackMatching(net(), weights=exactly, strict=True).backward(batch(), square)
    assert step.blocks[0].weight.iterations == 2


def test_a_block_too_large_for_a_direct_solve_names_cg():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1))
    x = torch.zeros(64, 1, 40, 40)
    with pytest.raises(ValueError, match=r"weight problem of block '1' \(Conv2d\).*use CG"):
        bm.BackMatching(model, weights=bm.Cholesky(0.1), inputs=bm.Gradient()).backward(x, square)


def test_a_map_too_large_for_an_explicit_operator_names_cg():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    x = torch.zeros(1, 1, 60, 60)
    with pytest.raises(ValueError, match=r"input problem of block '1' \(Conv2d\).*use CG"):
        bm.BackMatching(model, weights=bm.Gradient(), inputs=bm.Cholesky(0.1)).backward(x, square)


def test_layer_inverse_names_auto_on_other_blocks():
    model = net(nn.Linear(5, 4), nn.Linear(4, 7), nn.ReLU())
    with pytest.raises(ValueError, match=r"use Auto\(damping\)"):
        bm.BackMatching(bm.partition(model), inputs=bm.LayerInverse(0.1)).backward(batch(), square)
    with pytest.raises(ValueError, match="input problems only"):
        bm.BackMatching(model, weights=bm.LayerInverse(0.1))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"weights": "auto"}, TypeError, "weights must be a solver .* got 'auto'"),
        ({"inputs": bm.Gradient}, TypeError, "got the class Gradient"),
        ({"target_step": 0}, ValueError, "target_step must be > 0"),
        ({"target_step": float("nan")}, ValueError, "target_step"),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
        ({"order": "both"}, ValueError, "order must be one of"),
        ({"passes": 2}, ValueError, 'passes=2 needs order="sequential"'),
        ({"passes": 0, "order": "sequential"}, ValueError, "passes must be at least 1"),
        ({"newton_steps": 1.5}, TypeError, "newton_steps must be an int, got float"),
        ({"process_group": object()}, ValueError, "process_group must be None"),
        ({"strict": 1}, TypeError, "strict must be a bool"),
        ({"blocks": []}, ValueError, "at least one module"),
        ({"blocks": 5}, TypeError, "got int"),
        ({"blocks": nn.Linear(2, 2)}, TypeError, r"pass \[block, ...\]"),
        ({"blocks": [nn.Linear(2, 2), 3]}, TypeError, "block '1' must be an nn.Module, got int"),
    ],
)
def test_wrong_arguments(change, error, text):
    with pytest.raises(error, match=text):
        bm.BackMatching(**{"blocks": net(), **change})


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([1.0], TypeError, "x must be a torch.Tensor, got list"),
        (torch.zeros(0, 5).double(), ValueError, r"at least one sample.*\(0, 5\)"),
        (torch.zeros(2, 4).double(), ValueError, r"\(batch, ..., 5\), got \(2, 4\)"),
        (torch.zeros(5).double(), ValueError, r"got \(5,\)"),
        (torch.zeros(2, 5), TypeError, "dtype of x .float32., got float64"),
        (torch.zeros(2, 5).to_sparse(), TypeError, "dense"),
        (torch.zeros(2, 5).numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
        (torch.zeros(2, 5).half(), TypeError, "float32 or float64, got float16"),
        (torch.tensor(1.0).double(), ValueError, "at least one sample|got \\(\\)"),
        (torch.zeros(2, 5, dtype=torch.cfloat), TypeError, "float32 or float64"),
        (torch.zeros(2, 5, dtype=torch.long), TypeError, "dtype"),
        (torch.zeros(2, 5, device="meta").double(), TypeError, "CPU or CUDA"),
    ],
)
def test_wrong_inputs(x, error, text):
    with pytest.raises(error, match=text):
        bm.BackMatching(net()).backward(x, square)
