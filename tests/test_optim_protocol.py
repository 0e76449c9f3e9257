"""The optimizers keep torch's protocol: groups, state, schedulers, closures, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optim_cases import BOTH, backward, batches, equal, hook_tables, model, train, values
from torch import nn

import backmatch as bm
from backmatch.optim import LayerwiseAdaptiveSGD, ScaleAmendedSGD

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "normalize": True},
    "held": {"momentum": 0.5, "every": 3, "average": 0.6, "kind": "spectral"},
    "estimated": {"estimate": "hutchinson", "probes": 2, "average": 0.5, "every": 2},
    "rayleigh": {"kind": "rayleigh", "damping": 0.1, "normalize": True},
}


def make(chosen, net, /, **options):
    return chosen(bm.partition(net), **{"lr": 0.05, "damping": 0.1, **options})


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ["state_dict", "saved", "deepcopy", "pickle"])
def test_a_run_taken_up_goes_on_exactly(kind, name, way):
    """Interrupted after 4 of 9 steps, between two measurements where they are held."""
    whole, data = model(), batches(9)
    with make(kind, whole, **OPTIONS[name]) as optimizer:
        train(whole, optimizer, data)
    first = model()
    with make(kind, first, **OPTIONS[name]) as optimizer:
        train(first, optimizer, data[:4])
        rng = torch.get_rng_state()
        if way == "state_dict":
            second = copy.deepcopy(first)
            taken_up = make(kind, second, **OPTIONS[name])
            taken_up.load_state_dict(optimizer.state_dict())
        elif way == "saved":
            second, buffer = copy.deepcopy(first), io.BytesIO()
            torch.save(optimizer.state_dict(), buffer)
            buffer.seek(0)
            taken_up = make(kind, second, **OPTIONS[name])
            taken_up.load_state_dict(torch.load(buffer, weights_only=True))
        elif way == "deepcopy":
            second, taken_up = copy.deepcopy((first, optimizer))
        else:
            second, taken_up = pickle.loads(pickle.dumps((first, optimizer)))
    with taken_up:
        torch.set_rng_state(rng)
        for x, y in data[4:]:
            taken_up.zero_grad()
            backward(second, x, y)
            taken_up.step()
    assert equal(values(second), values(whole))
    assert taken_up.scales == optimizer_scales(whole, kind, name, data)
    assert hook_tables(second) == ([], [])


def optimizer_scales(net, kind, name, data):
    """The scales at the end of an uninterrupted run."""
    again = model()
    with make(kind, again, **OPTIONS[name]) as optimizer:
        train(again, optimizer, data)
    assert equal(values(again), values(net))
    return optimizer.scales


def test_a_copy_is_open_as_its_original_was():
    net = model()
    with make(ScaleAmendedSGD, net) as optimizer:
        twin = copy.deepcopy(optimizer)
        twin.close()
        (x, y), *_ = batches(1)
        backward(net, x, y)
        optimizer.step()
    assert len(pickle.loads(pickle.dumps(optimizer)).blocks) == 2
    assert hook_tables(net) == ([], [])


@pytest.mark.parametrize("kind", BOTH)
def test_groups_of_blocks(kind):
    """Own rates and decays per group equal hand-made SGD groups on divided gradients."""
    net, twin, data = model(), model(), batches(3)
    low, high = bm.partition(net)
    groups = [{"blocks": [low], "lr": 0.02, "weight_decay": 0.1}, {"blocks": [high]}]
    with kind(groups, lr=0.05, momentum=0.5) as optimizer:
        assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.05]
        assert all("blocks" not in g for g in optimizer.param_groups)
        train(net, optimizer, data)
        assert set(optimizer.scales) == {"0", "1"}
    low, high = bm.partition(twin)
    plain = torch.optim.SGD(
        [
            {"params": low.parameters(), "lr": 0.02, "weight_decay": 0.1},
            {"params": high.parameters(), "lr": 0.05},
        ],
        momentum=0.5,
    )
    solver = bm.Scalar()
    inputs = solver if kind is ScaleAmendedSGD else bm.Gradient()
    matcher = bm.BackMatching([low, high], weights=solver, inputs=inputs)
    torch.manual_seed(3)
    for x, y in data:
        plain.zero_grad()
        matcher.backward(x, lambda out, y=y: nn.functional.cross_entropy(out, y))
        plain.step()
    for a, b in zip(values(net), values(twin), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_groups_of_parameters_with_blocks_beside():
    """No decay on biases and norms, as is usual; frozen parameters may be among them."""
    net, data = model(), batches(2)
    thin = [p for p in net.parameters() if p.dim() == 1]
    wide = [p for p in net.parameters() if p.dim() > 1]
    groups = [{"params": wide, "weight_decay": 0.3}, {"params": thin, "lr": 0.01}]
    with ScaleAmendedSGD(groups, lr=0.05, blocks=bm.partition(net)) as optimizer:
        train(net, optimizer, data)
    with ScaleAmendedSGD(net.parameters(), lr=0.05, blocks=bm.partition(net)) as optimizer:
        train(net, optimizer, data)
    named = model()
    with ScaleAmendedSGD(named.named_parameters(), lr=0.05, blocks=named) as optimizer:
        train(named, optimizer, data)


def test_add_param_group():
    net = model()
    low, high = bm.partition(net)
    parameters = list(high.parameters())
    optimizer = ScaleAmendedSGD(parameters, lr=0.05, blocks=[low, high])
    with optimizer:
        optimizer.add_param_group({"params": low.parameters(), "lr": 0.5})
        assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.5]
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": low.parameters()})
        with pytest.raises(ValueError, match="in none of the blocks"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(ValueError, match="one for the whole chain"):
            optimizer.add_param_group({"blocks": nn.Linear(3, 2).double(), "kind": "trace"})
        assert len(optimizer.blocks) == 2
        top = nn.Linear(3, 3).double()
        optimizer.add_param_group({"blocks": top, "lr": 0.1})
        assert list(optimizer.blocks) == ["0", "1", "2"]
        grown = nn.Sequential(*net, top)
        train(grown, optimizer, batches(2))
        assert optimizer.scales["2"].weight is not None


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("every", [1, 4])
def test_unfreezing_later(kind, every):
    """An unfrozen layer gets a scale with its first gradient, measurements due or not."""
    net = model()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    with make(kind, net, every=every) as optimizer:
        train(net, optimizer, batches(2))
        assert optimizer.scales["0"].weight is None
        net[0].requires_grad_(True)
        before = net[0].weight.detach().clone()
        train(net, optimizer, batches(1))
        assert optimizer.scales["0"].weight is not None
        assert not torch.equal(before, net[0].weight)


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers(make_scheduler, as_tensor):
    """Rates follow the scheduler: the moves are those of the scheduled rate."""
    net = model()
    lr = torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05
    with make(ScaleAmendedSGD, net, lr=lr, momentum=0.5) as optimizer:
        scheduler = make_scheduler(optimizer)
        for x, y in batches(4):
            optimizer.zero_grad()
            backward(net, x, y)
            before = [p.detach().clone() for p in net.parameters()]
            rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            for p, b in zip(net.parameters(), before, strict=True):
                moved = -rate * optimizer.state[p]["momentum_buffer"]
                assert torch.allclose(p.detach() - b, moved, rtol=1e-9, atol=1e-14)
            scheduler.step()


def test_closure():
    net, twin, data = model(), model(), batches(2)
    with make(ScaleAmendedSGD, twin) as optimizer:
        train(twin, optimizer, data)
    with make(ScaleAmendedSGD, net) as optimizer:
        torch.manual_seed(3)
        for x, y in data:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                return backward(net, x, y)

            assert optimizer.step(closure).requires_grad
    assert equal(values(net), values(twin))


def test_step_hooks_and_zero_grad():
    net, seen = model(), []
    with make(LayerwiseAdaptiveSGD, net) as optimizer:
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        train(net, optimizer, batches(1))
        assert seen == ["before", "after"]
        grads = [p.grad.clone() for p in net.parameters()]
        assert any(g.any() for g in grads)  # the user's grads are left as they are
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())


def test_a_state_of_others_is_refused():
    net = model()
    with make(ScaleAmendedSGD, net) as optimizer:
        train(net, optimizer, batches(1))
        state, before = optimizer.state_dict(), optimizer.scales
        for other, told in [
            (torch.optim.SGD(net.parameters(), 0.1).state_dict(), "must hold 'scales'"),
            ({**state, "scales": {**state["scales"], "kind": "spectral"}}, "kind='spectral'"),
            ({**state, "scales": {**state["scales"], "blocks": 7}}, "blocks=7"),
            ({**state, "param_groups": []}, "parameter group"),
        ]:
            with pytest.raises(ValueError, match=told):
                optimizer.load_state_dict(other)
            assert optimizer.scales == before
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (lambda n: n.parameters(), TypeError, r"got parameters.*blocks=\.\.\."),
        (lambda n: list(n.named_parameters()), TypeError, "got parameters"),
        (lambda n: [{"params": n.parameters()}], TypeError, "group 0 must have 'blocks'"),
        (lambda n: n[0].weight, TypeError, "got parameters"),
        (lambda n: nn.ReLU(), TypeError, "nn.Sequential or an iterable of modules"),
        (lambda n: [], ValueError, "at least one module"),
        (lambda n: [nn.ReLU()], ValueError, "must have parameters"),
        (lambda n: {"blocks": n}, TypeError, "must be blocks, got dict"),
        (lambda n: 3, TypeError, "must be blocks, got int"),
        (lambda n: "abc", TypeError, "must be blocks, got str"),
        (lambda n: [3], TypeError, "must hold blocks, got int"),
        (lambda n: [n[0], n[0]], ValueError, "more than one|share"),
        (lambda n: [n[4].half()], TypeError, "float32 or float64, got float16"),
        (lambda n: [n[4].to(torch.complex64)], TypeError, "got complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_no_blocks(given, error, told):
    net = model()
    with pytest.raises(error, match=told):
        ScaleAmendedSGD(given(net), lr=0.1)
    assert hook_tables(net) == ([], [])


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"lr": torch.ones(2)}, TypeError, "lr must be a number"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay"),
        ({"nesterov": True}, ValueError, "nesterov=True needs momentum > 0"),
        ({"nesterov": 1}, TypeError, "nesterov must be a bool"),
        ({"kind": "norm"}, ValueError, "kind must be one of trace, spectral, rayleigh"),
        ({"damping": -1.0}, ValueError, "damping must be finite and >= 0"),
        ({"damping": bm.Relative(0.1)}, TypeError, "damping must be a number, got Relative"),
        ({"normalize": 1}, TypeError, "normalize must be a bool"),
        ({"estimate": "lanczos"}, ValueError, "estimate must be one of exact, hutchinson, power"),
        ({"estimate": "power"}, ValueError, 'estimate="power" needs kind="spectral"'),
        ({"estimate": "hutchinson", "kind": "rayleigh"}, ValueError, 'needs kind="trace"'),
        ({"probes": 0}, ValueError, "probes must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be an int"),
        ({"average": 1.0}, ValueError, r"average must be in \[0, 1\)"),
    ],
)
@pytest.mark.parametrize("kind", BOTH)
def test_bad_options(kind, options, error, told):
    net = model()
    with pytest.raises(error, match=told):
        kind(net, **{"lr": 0.1, **options})
    assert hook_tables(net) == ([], [])


def test_parameters_beside_blocks_must_be_theirs():
    net = model()
    with pytest.raises(ValueError, match="in none of the blocks"):
        ScaleAmendedSGD(net.parameters(), 0.1, blocks=[net[0]])
    with pytest.raises(TypeError, match=r"use model.parameters\(\)"):
        ScaleAmendedSGD(net, 0.1, blocks=net)
    assert hook_tables(net) == ([], [])
