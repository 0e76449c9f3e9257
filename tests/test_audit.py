"""Requested and attained displacements."""

import copy

import pytest
import torch
from sweep_nets import batch, net, square
from torch import nn

import backmatch as bm


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
