"""How a sweep treats the model: RNG, buffers, hooks, frozen and shared parameters, grad modes."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import backmatch as bm

ORDERS = ["simultaneous", "sequential"]


def net(*layers):
    """The layers with seeded parameters."""
    model = nn.Sequential(*(layers or (nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))).double()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def batch(m=6, n=5, seed=1):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(out):
    return 0.5 * out.square().flatten(1).sum(1).mean()


def grads(model):
    return [p.grad.clone() for p in model.parameters()]


def close(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-11) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("newton_steps", [1, 2])
def test_rng_and_buffers_are_as_after_one_forward_pass(order, newton_steps):
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.4), nn.Linear(7, 3))
    plain = copy.deepcopy(model)
    x = batch()
    torch.manual_seed(3)
    want = plain(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    matcher = bm.BackMatching(bm.partition(model), order=order, newton_steps=newton_steps)
    step = matcher.backward(x, square)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(step.output, want, rtol=1e-13)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_user_hooks_fire_once_and_take_the_generic_route(order):
    model = net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    model[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    options = {"order": order, "weights": bm.Cholesky(0.1), "inputs": bm.Cholesky(0.1)}
    step = bm.BackMatching(bm.partition(model), **options).backward(batch(), square)
    assert calls == ["forward", "pre"]
    # One joint problem instead of one per unit, the same answer.
    assert step.blocks[0].weight.structure == "joint"
    plain = net()
    bm.BackMatching(bm.partition(plain), **options).backward(batch(), square)
    assert close(grads(model), grads(plain))


@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_that_changes_the_output_is_part_of_the_function(order):
    """In every evaluation, though it may be called more than once for that."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            return 2 * self.inner(z)

    hooked, plain = net(), net()
    hooked[0].register_forward_hook(lambda module, args, out: 2 * out)
    plain[0] = Doubled(plain[0])
    for model in (hooked, plain):
        bm.BackMatching(model, order=order, weights=bm.Cholesky(0.1)).backward(batch(), square)
    assert close(grads(hooked), grads(plain))


@pytest.mark.parametrize("order", ORDERS)
def test_a_hook_that_removes_itself_stays_removed(order):
    model = net()
    calls = []

    def once(*_):
        calls.append(1)
        handle.remove()

    handle = model[0].register_forward_hook(once)
    matcher = bm.BackMatching(model, order=order)
    matcher.backward(batch(), square)
    matcher.backward(batch(), square)
    assert calls == [1]
    assert not model[0]._forward_hooks


def test_replaced_forward_is_called():
    model, plain = net(), net()
    model[0].forward = lambda z: nn.functional.linear(z, model[0].weight, 2 * model[0].bias)
    step = bm.BackMatching(model).backward(batch(), square)
    plain[0].bias.data.mul_(2)
    assert torch.allclose(step.output, plain(batch()))
    assert step.blocks[0].weight.structure == "joint"


@pytest.mark.parametrize("order", ORDERS)
def test_parametrizations_take_the_generic_route(order):
    model = net()
    nn.utils.parametrizations.weight_norm(model[0])
    step = bm.BackMatching(
        bm.partition(model), weights=bm.Gradient(), inputs=bm.Gradient(), order="simultaneous"
    ).backward(batch(), square)
    assert step.blocks[0].weight.structure == "joint"
    ours = grads(model)
    model.zero_grad()
    square(model(batch())).backward()
    assert close(ours, grads(model))
    model.zero_grad()
    bm.BackMatching(bm.partition(model), order=order).backward(batch(), square)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile raises its own
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_blocks_are_unwrapped(whole):
    model = net()
    blocks = torch.compile(model) if whole else [torch.compile(block) for block in model]
    plain = net()
    bm.BackMatching(blocks).backward(batch(), square)
    bm.BackMatching(plain).backward(batch(), square)
    assert close(grads(model), grads(plain))


def test_data_parallel_wrappers_are_refused():
    with pytest.raises(TypeError, match="process_group"):
        bm.BackMatching([nn.DataParallel(net())])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inplace", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU])
def test_in_place_modules_give_the_same_result(order, inplace):
    results = []
    for flag in (False, True):
        model = net(nn.Linear(5, 7), inplace(inplace=flag), nn.Linear(7, 3), inplace(inplace=flag))
        x = batch()
        step = bm.BackMatching(model, order=order).backward(x, square)  # every leaf a block
        assert torch.equal(x, batch())
        results.append((step.output, *grads(model)))
    # Not bit for bit: the matrix library's rounding depends on where an array lies in memory.
    assert close(*results)


@pytest.mark.parametrize("block", ["structured", "generic"])
def test_works_under_no_grad_and_leaves_no_graph(block):
    layer = nn.Linear(5, 7) if block == "structured" else nn.GRUCell(5, 7)
    model, other = net(layer, nn.Linear(7, 3)), None
    other = copy.deepcopy(model)
    bm.BackMatching(model).backward(batch(), square)
    with torch.no_grad():
        step = bm.BackMatching(other).backward(batch(), square, keep=True)
        assert not torch.is_grad_enabled()
    assert close(grads(model), grads(other))
    assert not any(p.grad.requires_grad for p in other.parameters())
    assert not step.loss.requires_grad
    assert not step.output.requires_grad


def test_refuses_autocast_half_and_inference_mode():
    matcher = bm.BackMatching(net())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="autocast"):
        matcher.backward(batch(), square)
    with torch.inference_mode(), pytest.raises(TypeError, match="inference"):
        matcher.backward(batch(), square)
    with pytest.raises(TypeError, match="x must have dtype float32 or float64, got float16"):
        matcher.backward(batch().half(), square)
    with pytest.raises(TypeError, match=r"'weight' of block '0'.*got bfloat16"):
        bm.BackMatching(net().bfloat16()).backward(torch.zeros(2, 5, dtype=torch.long), square)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_frozen_parameter_keeps_its_grad_and_is_not_in_h(frozen, order):
    model = net()
    for name in ("weight", "bias"):
        if frozen in (name, "both"):
            parameter = getattr(model[0], name)
            parameter.requires_grad_(False)
            parameter.grad = torch.full_like(parameter, 7.0)
    step = bm.BackMatching(model, order=order).backward(batch(), square, keep=True)
    trainable = {name for name, p in model[0].named_parameters() if p.requires_grad}
    assert set(step.blocks[0].weight_step) == trainable
    if frozen == "both":
        assert step.blocks[0].weight is None
    else:
        assert step.blocks[0].weight.unknowns == (1 if frozen == "weight" else 5)
    for name, parameter in model[0].named_parameters():
        if name not in trainable:
            assert (parameter.grad == 7.0).all()


def test_a_parameter_shared_by_two_blocks_is_refused():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="blocks '0' and '2' share the parameter 'weight'"):
        bm.BackMatching(nn.Sequential(layer, nn.ReLU(), layer))
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    with pytest.raises(ValueError, match="share the parameter"):
        bm.BackMatching([layer, tied])


def test_sharing_inside_one_block_takes_the_generic_route():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer).double()
    x = batch(6, 4)
    step = bm.BackMatching([model], weights=bm.Gradient()).backward(x, square)
    ours = grads(model)
    model.zero_grad()
    square(model(x)).backward()
    assert step.blocks[0].weight.structure == "joint"
    assert close(ours, grads(model))


def test_a_parameterless_module_may_stand_twice():
    act = nn.Tanh()
    model = net(nn.Linear(5, 7), act, nn.Linear(7, 3), act)
    step = bm.BackMatching(model).backward(batch(), square)
    assert [each.name for each in step.blocks] == ["0", "1", "2", "3"]
    assert torch.allclose(step.output, model(batch()))


def test_grads_accumulate():
    model = net()
    matcher = bm.BackMatching(bm.partition(model))
    matcher.backward(batch(), square)
    once = grads(model)
    matcher.backward(batch(), square)
    assert close(grads(model), [2 * g for g in once])


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


class Explodes(nn.Module):
    """Fails on request, after moving everything that a forward pass may move."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        self.calls += 1
        torch.rand(3)
        if isinstance(self.error, BaseException):
            raise self.error
        return z * self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), float("nan"), 1e200])
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_changes_when_a_sweep_fails(error, order):
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(), Explodes(error))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = copy.deepcopy(model)
    before_grads = grads(model)
    state = torch.get_rng_state()
    expected = type(error) if isinstance(error, BaseException) else bm.NonFiniteError
    with pytest.raises(expected):
        bm.BackMatching(bm.partition(model), order=order).backward(batch(), square)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(grads(model), before_grads, strict=True))


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
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3))
    x = torch.zeros(64, 1, 40, 40)
    with pytest.raises(ValueError, match=r"weight problem of block '1' \(Conv2d\).*use CG"):
        bm.BackMatching(model, weights=bm.Cholesky(0.1), inputs=bm.Gradient()).backward(x, square)


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
        (torch.zeros(2, 5, dtype=torch.cfloat), TypeError, "float32 or float64"),
        (torch.zeros(2, 5, dtype=torch.long), TypeError, "dtype"),
        (torch.zeros(2, 5, device="meta").double(), TypeError, "CPU or CUDA"),
    ],
)
def test_wrong_inputs(x, error, text):
    with pytest.raises(error, match=text):
        bm.BackMatching(net()).backward(x, square)


def test_solvers_may_be_chosen_per_block():
    seen = []

    def choose(name, block):
        seen.append((name, type(block).__name__))
        return bm.Gradient() if name == "0" else bm.Cholesky(0.1)

    step = bm.BackMatching(net(), weights=choose, inputs=choose).backward(batch(), square)
    assert ("1", "Tanh") in seen
    assert [each.weight and each.weight.solver for each in step.blocks] == [
        "gradient",
        None,
        "cholesky",
    ]
    with pytest.raises(TypeError, match="must return a solver for block '0', got str"):
        bm.BackMatching(net(), weights=lambda *_: "cg").backward(batch(), square)


def test_integer_input_of_an_embedding():
    model = net(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 3))
    x = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 0, 10]])
    step = bm.BackMatching(bm.partition(model)).backward(x, square)
    assert [each.input is None for each in step.blocks] == [True, False]
    untouched = torch.ones(11, dtype=torch.bool)
    untouched[x.flatten()] = False
    assert (model[0].weight.grad[untouched] == 0).all()
    assert (model[0].weight.grad[~untouched] != 0).any()


def test_a_module_without_double_backward_uses_forward_mode():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(z):
            return z**3

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * 3 * ctx.saved_tensors[0] ** 2

        @staticmethod
        def jvp(ctx, tangent):
            return tangent * 3 * ctx.saved_tensors[0] ** 2

    class Custom(nn.Module):
        def forward(self, z):
            return Cube.apply(z)

    class Plain(nn.Module):
        def forward(self, z):
            return z**3

    results = []
    for kind in (Custom, Plain):
        model = net(nn.Linear(5, 7), kind(), nn.Linear(7, 3))
        bm.BackMatching(model, inputs=bm.Cholesky(0.1)).backward(batch(), square)
        results.append(grads(model))
    assert close(*results)


def test_attention_is_solved_like_anything_else():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Flatten(), nn.Linear(24, 3)).double()
    x = batch(5, 12).view(5, 3, 4)
    ours = bm.BackMatching(model, weights=bm.Gradient(), inputs=bm.Gradient())
    torch.manual_seed(2)
    ours.backward(x, square)
    found = grads(model)
    model.zero_grad()
    torch.manual_seed(2)
    square(model(x)).backward()
    assert close(found, grads(model))
    step = bm.BackMatching(model, inputs=bm.Auto(0.1), weights=bm.CG(0.1)).backward(x, square)
    assert step.blocks[1].input.structure == "sample"
    assert step.blocks[1].input.residual < 1e-8


def test_coupling_is_declared_known_or_probed():
    class Centre(nn.Module):
        def forward(self, z):
            return z - 0.5 * z.mean(0, keepdim=True)

    class Declared(nn.Identity):
        batch_coupled = True

    def structure(middle):
        model = net(nn.Linear(5, 7), middle, nn.Linear(7, 3))
        return bm.BackMatching(model).backward(batch(), square).blocks[1].input.structure

    assert structure(Centre()) == "joint"
    assert structure(Declared()) == "joint"
    assert structure(nn.BatchNorm1d(7)) == "joint"
    assert structure(nn.BatchNorm1d(7).eval()) == "sample"
    assert structure(nn.LayerNorm(7)) == "sample"


def test_a_step_holds_no_graph_or_model_state():
    model = net(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    matcher = bm.BackMatching(model)
    step = matcher.backward(batch(), square)
    reference = weakref.ref(step)
    assert step.blocks[0].displacement is None
    del step
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_audit_restores_everything(optimizer):
    model = net(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(), nn.Linear(7, 3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    chosen = optimizer(model.parameters(), lr=0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before_optimizer = copy.deepcopy(chosen.state_dict())
    found = bm.audit(bm.BackMatching(bm.partition(model)), batch(), square, optimizer=chosen)
    assert [each.name for each in found] == ["0", "1"]
    for ours, theirs in zip(model.state_dict().values(), before.values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 1).all() for p in model.parameters())
    assert chosen.state_dict() == before_optimizer


def test_audit_reports_what_the_new_net_does():
    model = net()
    x = batch()
    matcher = bm.BackMatching(bm.partition(model))
    step = matcher.backward(x, square, keep=True)
    old = model(x)
    found = bm.audit(matcher, x, square)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    top = found[-1]
    moved = (model(x) - old).detach()
    asked = step.blocks[-1].displacement
    assert top.propagated.norm == pytest.approx(float(moved.norm()), rel=1e-10)
    cosine = float((moved * asked).sum() / moved.norm() / asked.norm())
    assert top.propagated.cosine == pytest.approx(cosine, rel=1e-10)
    assert top.requested == pytest.approx(float(asked.norm()), rel=1e-12)
    z = model[1](nn.functional.linear(x, *(p + p.grad for p in model[0].parameters())))
    joint = (model[2](z + step.blocks[1].input_step) - old).detach()
    assert top.joint.norm == pytest.approx(float(joint.norm()), rel=1e-10)
