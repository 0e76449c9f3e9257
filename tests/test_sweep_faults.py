"""Corners where a sweep could go wrong without saying so."""

import copy
import warnings

import pytest
import torch
from sweep_nets import ORDERS, batch, net, square
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import backmatch as bm


def state(model):
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    return [None if t is None else t.detach().clone() for t in tensors]


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_relative_damping_of_a_shared_matrix_is_one_number():
    """Then one factorisation serves all samples and units; each on its own would cost m times."""
    model = net(nn.Linear(5, 7), nn.Linear(7, 3))
    top = bm.BackMatching(model).backward(batch(6, 5), square).blocks[1]
    assert isinstance(top.input.damping, float)
    W = model[1].weight.detach()
    assert top.input.damping == pytest.approx(1e-2 * float(W.square().sum()) / 7, rel=1e-12)


def test_scalar_trace_of_a_shared_matrix_is_the_mean_eigenvalue():
    model = net(nn.Linear(5, 7), nn.Linear(7, 3))
    solver = bm.Scalar("trace")
    top = bm.BackMatching(model, inputs=solver).backward(batch(6, 2, 5), square).blocks[1]
    assert top.input.scale == pytest.approx(float(model[1].weight.detach().square().sum()) / 7)


@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_that_changes_its_output_in_place_is_part_of_the_function(order):
    class Tripled(nn.Linear):
        def forward(self, z):
            return 3 * super().forward(z)

    hooked = net(nn.Linear(5, 7), nn.Linear(7, 3))
    plain = net(Tripled(5, 7), nn.Linear(7, 3))

    def triple(module, args, out):
        out.mul_(3)

    hooked[0].register_forward_hook(triple)
    for model in (hooked, plain):
        bm.BackMatching(model, weights=bm.Cholesky(0.1), order=order).backward(batch(6, 5), square)
    for ours, theirs in zip(hooked.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_global_hooks_fire_once_per_module(order):
    model = net(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    calls = []
    handle = register_module_forward_hook(lambda module, args, out: calls.append(module))
    try:
        bm.BackMatching(model, order=order, newton_steps=2).backward(batch(6, 5), square)
    finally:
        handle.remove()
    assert calls == list(model)


def test_a_warning_turned_into_an_error_changes_nothing():
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3))
    matcher = bm.BackMatching(model, weights=bm.CG(1e-9, max_steps=1))
    before, random = state(model), torch.get_rng_state()
    for _ in range(2):  # and the warning is not used up
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(bm.ConvergenceWarning):
                matcher.backward(batch(6, 5), square)
    assert same(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_sparse_grad_is_refused_before_anything_is_written():
    model = net(nn.Linear(5, 7), nn.Linear(7, 3))
    model[1].weight.grad = torch.zeros(3, 7, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="grad of parameter 'weight' of block '1' must be dense"):
        bm.BackMatching(model).backward(batch(6, 5), square)
    assert model[0].weight.grad is None


class Moving(nn.Module):
    """Reassigns its buffer instead of writing into it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, z):
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean()
        return z - 0.5 * z.square()


def test_reassigned_buffers_are_restored():
    model = net(nn.Linear(5, 7), Moving(), nn.Linear(7, 3))
    matcher = bm.BackMatching(model)
    with pytest.raises(bm.NonFiniteError):
        matcher.backward(batch(6, 5), lambda out: out.sum() / 0)
    assert float(model[1].mean) == 0
    bm.audit(matcher, batch(6, 5), square)
    assert float(model[1].mean) == 0
    plain = copy.deepcopy(model)
    plain(batch(6, 5))
    matcher.backward(batch(6, 5), square)
    assert torch.equal(model[1].mean, plain[1].mean)


def test_an_early_solve_that_did_not_converge_is_not_forgotten():
    model = net(nn.Linear(5, 7), nn.Tanh())
    solver = bm.CG(1e-3, max_steps=2)
    for options in ({"newton_steps": 3}, {"order": "sequential", "passes": 3}):
        strict = bm.BackMatching([model], weights=solver, strict=True, **options)
        with pytest.raises(bm.NotConvergedError):
            strict.backward(batch(6, 5), square)


class Root(nn.Module):
    """Infinite slope at 0."""

    def forward(self, z):
        return (z * 0).sqrt()


@pytest.mark.parametrize("solver", [bm.Auto(0.1), bm.CG(0.1), bm.Scalar(), bm.Gradient()])
def test_infinite_slopes_are_named(solver):
    model = net(nn.Linear(5, 7), Root())
    with pytest.raises(bm.NonFiniteError, match="in block '1'"):
        bm.BackMatching(model, inputs=solver).backward(batch(6, 5), lambda out: out.sum())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "solver", [bm.Auto(bm.Relative(0.1)), bm.CG(bm.Relative(0.1)), bm.Scalar()]
)
def test_overflow_is_no_lack_of_damping(solver):
    model = net(nn.Linear(5, 7), nn.ReLU()).float()
    x = batch(6, 5).float() * 1e25
    with pytest.raises(bm.NonFiniteError, match=r"weight problem.* in block '0'"):
        bm.BackMatching([model], weights=solver).backward(x, lambda out: out.tanh().sum())


def test_a_singular_system_names_block_and_side():
    model = net(nn.Linear(5, 7), nn.Linear(7, 3))
    model[1].weight.data.zero_()[:, 0] = 1.0
    with pytest.raises(bm.NotPositiveDefiniteError, match=r"input problem of block '1'.*damping"):
        bm.BackMatching(
            model, weights=bm.Gradient(), inputs=lambda *_: bm.Cholesky(1e-30)
        ).backward(batch(6, 5), square)


class Halved(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, z):
        return z.to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128, torch.long])
def test_outputs_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match=r"block '1' \(Halved\) must return"):
        bm.BackMatching(net(nn.Linear(5, 7), Halved(dtype))).backward(batch(6, 5), square)


def test_sparse_embedding_gives_dense_grads():
    x = torch.tensor([[0, 3], [3, 1]])
    grads = []
    for sparse in (False, True):
        model = net(nn.Embedding(5, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 2))
        bm.BackMatching(bm.partition(model)).backward(x, square)
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0, 5), (4, 0)])
def test_empty_inputs_are_refused(shape):
    with pytest.raises(ValueError, match="at least one sample"):
        bm.BackMatching(net(nn.Linear(5, 7))).backward(batch(*shape), square)


def test_checkpointed_blocks_move_their_statistics_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7))

        def forward(self, z):
            return torch.utils.checkpoint.checkpoint(self.inner, z, use_reentrant=False)

    model = net(nn.Linear(5, 7), Checkpointed(), nn.Linear(7, 3))
    solvers = {"weights": bm.Gradient(), "inputs": bm.Gradient()}
    bm.BackMatching(model, **solvers).backward(batch(6, 5), square)
    assert int(model[1].inner[1].num_batches_tracked) == 1


def test_a_loss_may_draw_random_numbers():
    model = net(nn.Linear(5, 3))
    drawn = []

    def noisy(out):
        drawn.append(torch.rand(()))
        return square(out)

    matcher = bm.BackMatching(model)
    matcher.backward(batch(6, 5), noisy)
    matcher.backward(batch(6, 5), noisy)
    assert drawn[0] != drawn[1]


def test_a_loss_that_writes_to_its_argument_does_not_reach_the_step():
    model = net(nn.Linear(5, 3))

    def rude(out):
        value = square(out)
        out.data.zero_()
        return value

    step = bm.BackMatching(model).backward(batch(6, 5), rude)
    assert torch.allclose(step.output, model(batch(6, 5)))


def test_parameters_tied_after_construction_are_refused():
    model = net(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    matcher = bm.BackMatching(model)
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="share the parameter 'weight'"):
        matcher.backward(batch(6, 5), square)


def test_callables_are_asked_only_where_there_is_a_problem():
    asked = {"weights": [], "inputs": []}

    def choose(side):
        return lambda name, block: asked[side].append(name) or bm.Gradient()

    model = net(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    bm.BackMatching(model, weights=choose("weights"), inputs=choose("inputs")).backward(
        batch(6, 5), square
    )
    assert asked == {"weights": ["0", "2"], "inputs": ["1", "2"]}


class Sine(torch.autograd.Function):
    """Neither a second derivative nor forward mode."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class FirstOrderOnly(nn.Module):
    def forward(self, z):
        return Sine.apply(z)


def test_a_module_with_first_derivatives_only_still_back_propagates():
    model = net(nn.Linear(5, 7), FirstOrderOnly(), nn.Linear(7, 3))
    gradient = {"weights": bm.Gradient(), "inputs": bm.Gradient()}
    bm.BackMatching(model, **gradient).backward(batch(6, 5), square)
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    square(model(batch(6, 5))).backward()
    for a, p in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-12, atol=1e-14)
    with pytest.raises(
        TypeError, match=r"block '1' \(FirstOrderOnly\).*only Gradient\(\) can work"
    ):
        bm.BackMatching(model, inputs=bm.CG(0.1)).backward(batch(6, 5), square)
