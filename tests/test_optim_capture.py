"""What is caught, what is not, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from optim_cases import backward, batches, equal, hook_tables, model, train, values
from torch import nn

import backmatch as bm
from backmatch.blocks import adapt
from backmatch.blocks.generic import GenericBlock
from backmatch.optim import LayerwiseAdaptiveSGD, ScaleAmendedSGD

KINDS = ("trace", "spectral", "rayleigh")


def test_hooks_come_off():
    net = model()
    optimizer = ScaleAmendedSGD(net, lr=0.1)
    assert hook_tables(net)[0] == []
    assert hook_tables(net)[1] != []
    optimizer.close()
    optimizer.close()
    assert hook_tables(net) == ([], [])
    with pytest.raises(ZeroDivisionError), ScaleAmendedSGD(net, lr=0.1):
        raise ZeroDivisionError
    assert hook_tables(net) == ([], [])
    inner = LayerwiseAdaptiveSGD(net, lr=0.1)
    backward(net, *batches(1)[0])
    with pytest.raises(KeyboardInterrupt), inner:
        raise KeyboardInterrupt
    assert hook_tables(net) == ([], [])
    assert inner._watcher.found is None


def test_hooks_go_with_a_dropped_optimizer():
    net = model()
    optimizer = ScaleAmendedSGD(net, lr=0.1)
    train(net, optimizer, batches(1))
    del optimizer
    gc.collect()
    assert hook_tables(net) == ([], [])


def test_closed_and_unfed_optimizers_say_so():
    net = model()
    before = values(net)
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            optimizer.step()
        with torch.no_grad():
            net(batches(1)[0][0])
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            optimizer.step()
    backward(net, *batches(1)[0])
    with pytest.raises(RuntimeError, match="this ScaleAmendedSGD is closed"):
        optimizer.step()
    assert equal(before[:2], values(net)[:2])


def test_a_step_without_a_new_pass_is_refused():
    net = model()
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        train(net, optimizer, batches(1))
        before = values(net)
        with pytest.raises(RuntimeError, match="since the last step"):
            optimizer.step()
        assert equal(values(net), before)


def test_an_interrupt_in_a_forward_pass():
    """Torch tells no hook of it; the next pass is caught all the same."""

    class Stop(nn.Module):
        stop = True

        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, z):
            if self.stop:
                raise KeyboardInterrupt
            return self.act(z)

    net = model()
    net.insert(1, Stop())
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                net(batches(1)[0][0])
        Stop.stop = False
        train(net, optimizer, batches(2))
        assert optimizer.scales["0"].factor > 0


def test_opened_again():
    net, data = model(), batches(2)
    optimizer = ScaleAmendedSGD(net, lr=0.1)
    optimizer.close()
    with optimizer, optimizer:
        train(net, optimizer, data)
    assert hook_tables(net) == ([], [])


@pytest.mark.filterwarnings("ignore")  # torch's own while it compiles
@pytest.mark.slow
def test_a_compiled_model():
    net, twin, data = model(), model(), batches(2)
    with ScaleAmendedSGD(bm.partition(twin), lr=0.1, kind="rayleigh") as optimizer:
        train(twin, optimizer, data)
    compiled = torch.compile(net, backend="eager")
    with ScaleAmendedSGD(bm.partition(compiled), lr=0.1, kind="rayleigh") as optimizer:
        train(compiled, optimizer, data)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_tracing_and_functional_transforms_are_no_passes():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = batches(1)[0][0]
    with ScaleAmendedSGD(net, lr=0.1, kind="rayleigh") as optimizer:
        plain = net(x)
        assert torch.equal(torch.jit.trace(net, x)(x), plain)
        assert torch.allclose(torch.func.vmap(net)(x), plain)
        assert torch.func.jacrev(net)(x).shape == (6, 2, 6, 5)
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            optimizer.step()


def other_passes(net, x):
    """Passes that are no training: without gradients, in evaluation, abandoned, for the input."""
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    net.eval()
    net(x).sum()
    net.train()
    net(x).sum()  # in training mode with gradients, never back-propagated
    with pytest.raises(RuntimeError):
        net(torch.ones(2, 99, dtype=x.dtype))
    net[0](x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_other_passes_do_not_count(kind, when):
    """Only dropout masks and running statistics move, as they do without the optimizer."""
    net, twin, data = model(), model(), batches(1)
    noise = 3 * torch.randn(4, 5, dtype=torch.float64)
    for each, disturbed in ((net, True), (twin, False)):
        with ScaleAmendedSGD(bm.partition(each), lr=0.1, kind=kind) as optimizer:
            x, y = data[0]
            if disturbed and when == "before":
                other_passes(each, noise)
            torch.manual_seed(1)
            loss = nn.functional.cross_entropy(each(x), y)
            if disturbed and when == "between":
                other_passes(each, noise)
            loss.backward()
            if disturbed and when == "after":
                other_passes(each, noise)
                each.eval()  # a mode that is not that of the pass
            optimizer.step()
            scales = optimizer.scales
        if disturbed:
            expected = scales
    assert scales == expected
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_last_micro_batch_gives_the_scales():
    net, twin, data = model(), model(), batches(2)
    for each in (net, twin):
        each[3].p = 0.0
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        for x, y in data:
            backward(net, x, y)
        optimizer.step()
    with ScaleAmendedSGD(twin, lr=0.1) as last:
        backward(twin, *data[1])
        last.step()
    assert optimizer.scales == last.scales


def test_two_backward_passes_through_one_graph():
    """Rayleigh's direction is that of the sum, as the grads are."""
    data = batches(1)[0]
    found = []
    for split in (False, True):
        net = model()
        torch.manual_seed(1)
        with ScaleAmendedSGD(net, lr=0.1, kind="rayleigh") as optimizer:
            out = net(data[0])
            one, two = nn.functional.cross_entropy(out, data[1]), out.square().mean()
            if split:
                one.backward(retain_graph=True)
                two.backward()
            else:
                (one + two).backward()
            optimizer.step()
        found.append(values(net))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rng_buffers_modes_and_grads_are_left(kind):
    net = model()
    net.append(User())
    with ScaleAmendedSGD(bm.partition(net), lr=0.0, kind=kind) as optimizer:
        torch.manual_seed(5)
        backward(net, *batches(1)[0])
        state, before = torch.get_rng_state(), values(net)
        grads = [p.grad.clone() for p in net.parameters()]
        buffers = [id(b) for b in net.buffers()]
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert equal(values(net), before)
        assert equal([p.grad for p in net.parameters()], grads)
        assert [id(b) for b in net.buffers()] == buffers
        assert all(part.training for part in net.modules())


class User(nn.Module):
    """Noise, a counter and a parameter: nothing that a structured route knows."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, z):
        self.count += 1
        return z * self.gain + torch.rand_like(z)


def test_users_hooks_fire_once():
    net, seen = model(), []
    net[0].register_forward_hook(lambda *_: seen.append("forward"))
    net[4].register_full_backward_hook(lambda *_: seen.append("backward"))
    with ScaleAmendedSGD(bm.partition(net), lr=0.1) as optimizer:
        train(net, optimizer, batches(1))
    assert sorted(seen) == ["backward", "forward"]


def test_a_watched_model_keeps_its_structured_routes():
    """And a matcher beside the optimizer is none of its business."""
    net, twin = model(), model()
    x, y = batches(1)[0]
    with ScaleAmendedSGD(bm.partition(net), lr=0.1) as optimizer:
        for block in bm.partition(net):
            assert not isinstance(adapt("0", block), GenericBlock)
        for each in (net, twin):
            torch.manual_seed(2)
            matcher = bm.BackMatching([*bm.partition(each), User()])
            step = matcher.backward(x, lambda out: nn.functional.cross_entropy(out, y))
            matcher.backward(x, lambda out: nn.functional.cross_entropy(out, y))
        assert [b.weight.solver for b in step.blocks]
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_copies_of_a_watched_model_are_unwatched():
    net = model()
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
        for twin in (copied, pickled):
            assert equal(values(twin), values(net))
            backward(twin, *batches(1)[0])
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            optimizer.step()


def test_two_optimizers_watch_one_model():
    net = model()
    low, high = net[:4], net[4:]
    with (
        ScaleAmendedSGD(net[0].parameters(), lr=0.1, blocks=[low, high]) as first,
        LayerwiseAdaptiveSGD(high, lr=0.1) as second,
    ):
        backward(net, *batches(1)[0])
        second.step()
        before = net[0].weight.detach().clone()
        with pytest.raises(RuntimeError, match="parameters must stay as they are"):
            first.step()  # the second has moved a block that the first looks through
        assert torch.equal(before, net[0].weight)


@pytest.mark.parametrize("every", [1, 3])
def test_nothing_that_was_caught_stays(every):
    net, alive = model(), []
    with ScaleAmendedSGD(bm.partition(net), lr=0.01, kind="rayleigh", every=every) as optimizer:
        for x, y in batches(7):
            optimizer.zero_grad()
            net(x)  # abandoned
            backward(net, x, y)
            if optimizer._watcher.found is not None:
                run = optimizer._watcher.found
                alive += [weakref.ref(entry.z) for entry in run.entries.values()]
                alive += [weakref.ref(u) for u in run.pulled.values()]
                del run
            optimizer.step()
    assert len(alive) == (7 if every == 1 else 3) * 4
    assert not any(ref() is not None for ref in alive)


def test_memory_does_not_grow():
    net, data = model(), batches(2)

    def tensors():
        gc.collect()
        with warnings.catch_warnings():  # some objects warn when they are looked at
            warnings.simplefilter("ignore")
            return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    with ScaleAmendedSGD(bm.partition(net), lr=1e-3, momentum=0.5, kind="rayleigh") as optimizer:
        train(net, optimizer, data)
        before = tensors()
        for _ in range(20):
            train(net, optimizer, data)
        assert tensors() <= before
