"""How a sweep treats the model: RNG, buffers, hooks, frozen and shared parameters, grad modes."""

import copy
import gc
import weakref

import pytest
import torch
from sweep_nets import ORDERS, batch, close, grads, net, square
from torch import nn

import backmatch as bm


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
        assert not any(p.grad.requires_grad for p in model.parameters())
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
