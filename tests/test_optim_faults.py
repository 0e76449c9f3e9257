"""What the optimizers refuse, and that nothing has changed then."""

from __future__ import annotations

import copy

import pytest
import torch
from optim_cases import BOTH, backward, batches, equal, model, train, values
from torch import nn
from torch.utils.checkpoint import checkpoint

import backmatch as bm
from backmatch.optim import ScaleAmendedSGD

KINDS = ("trace", "spectral", "rayleigh")


@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind):
    """A scale that is NaN or Inf is named; nothing moves; the next batch goes on."""
    net, (x, y) = model(), batches(1)[0]
    with ScaleAmendedSGD(bm.partition(net), lr=0.1, momentum=0.5, kind=kind) as optimizer:
        train(net, optimizer, batches(1))
        before, state = values(net), copy.deepcopy(optimizer.state_dict())
        net[4].weight.data[0, 0] = float("nan")
        net.zero_grad()
        backward(net, x, y)
        net[0].weight.grad.zero_()
        for p in net.parameters():
            p.grad.nan_to_num_()
        with pytest.raises(bm.NonFiniteError, match=r"has \d+ non-finite .* in block '\d'"):
            optimizer.step()
        assert str(optimizer.state_dict()) == str(state)
        net[4].weight.data[0, 0] = before[-2][0, 0]
        assert equal(values(net)[:2], before[:2])
        train(net, optimizer, batches(1))


def test_a_gradient_that_is_not_finite():
    net = model()
    with ScaleAmendedSGD(bm.partition(net), lr=0.1) as optimizer:
        backward(net, *batches(1)[0])
        net[4].bias.grad[1] = float("inf")
        before = values(net)
        with pytest.raises(bm.NonFiniteError, match=r"grad of shape \(3,\) has 1 .* block '1'"):
            optimizer.step()
        assert equal(values(net), before)


def test_changed_between_forward_and_step():
    net, (x, y) = model(), batches(1)[0]
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        backward(net, x, y)
        x.add_(1)
        with pytest.raises(RuntimeError, match="changed in place between the forward pass"):
            optimizer.step()


def test_something_between_the_blocks_is_noticed():
    net = model()

    def between(x):
        return net[1:](2 * net[0](x))

    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        between(batches(1)[0][0]).square().mean().backward()
        with pytest.raises(RuntimeError, match="output of block '0', computed again"):
            optimizer.step()


def test_a_head_on_a_trunk_without_gradients():
    net = model()
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        with torch.no_grad():
            z = net[:4](batches(1)[0][0])
        net[4](z).square().mean().backward()
        optimizer.step()
        assert [name for name, s in optimizer.scales.items() if s.factor is not None] == ["4"]


def test_autocast_half_and_sparse_are_refused():
    net, (x, y) = model(torch.float32), batches(1, torch.float32)[0]
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        with pytest.raises(TypeError, match="ran under autocast"):
            optimizer.step()
    net.to(torch.bfloat16)
    with pytest.raises(TypeError, match="got bfloat16"):
        ScaleAmendedSGD(net, lr=0.1)
    words = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    with ScaleAmendedSGD(words, lr=0.1) as optimizer:
        words(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(TypeError, match="sparse=False"):
            optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant):
    """What runs again in the backward pass is no pass of its own."""
    net, twin = model(), model()
    x, y = batches(1)[0]
    x.requires_grad_()
    with ScaleAmendedSGD(twin, lr=0.1) as plain:
        torch.manual_seed(1)
        nn.functional.cross_entropy(twin(x), y).backward()
        plain.step()
    with ScaleAmendedSGD(net, lr=0.1) as optimizer:
        torch.manual_seed(1)
        z = checkpoint(net[:4], x, use_reentrant=reentrant)
        nn.functional.cross_entropy(net[4](z), y).backward()
        if reentrant:  # runs without gradients first: what a block was given is not known
            with pytest.raises(RuntimeError, match="under no_grad"):
                optimizer.step()
            return
        optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10)


def test_a_shared_parameter_is_refused():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="share the parameter"):
        ScaleAmendedSGD(tied, lr=0.1)


@pytest.mark.parametrize("kind", BOTH)
def test_a_zero_scale_gives_no_step(kind):
    """A dead layer: its own weights stay, and so does what only acts through it."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    net[0].bias.data.fill_(-100.0)
    before = values(net)
    with kind(bm.partition(net), lr=1.0) as optimizer:
        net(torch.ones(2, 4, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    assert equal(values(net)[:2], before[:2])
    assert optimizer.scales["0"].factor == 0.0
    assert not torch.equal(net[2].bias, before[3])
