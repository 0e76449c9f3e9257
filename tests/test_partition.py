"""Which modules form a block."""

import pytest
import torch
from torch import nn

import backmatch as bm


def kinds(blocks):
    return [[type(m).__name__ for m in (b if type(b) is nn.Sequential else [b])] for b in blocks]


def test_a_block_starts_at_each_layer_and_takes_what_follows():
    model = nn.Sequential(
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Identity())),
        nn.Linear(4, 2),
    )
    blocks = bm.partition(model)
    assert kinds(blocks) == [
        ["Flatten", "Dropout", "Linear", "BatchNorm1d", "ReLU"],
        ["Linear", "Tanh", "Identity"],
        ["Linear"],
    ]
    assert blocks[0][2] is model[2]
    assert blocks[2] is model[6]


def test_other_modules_with_parameters_are_blocks_of_their_own():
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 4), nn.PReLU(), nn.Tanh(), nn.Linear(4, 4)
    )
    assert kinds(bm.partition(model)) == [
        ["Embedding"],
        ["Flatten", "Linear"],
        ["PReLU"],
        ["Tanh"],
        ["Linear"],
    ]


def test_convolutions_start_blocks_and_norms_follow():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(2, 2),
    )  # fmt: skip
    assert [len(b) for b in kinds(bm.partition(model))] == [5, 1]


def test_by_layer_makes_every_leaf_a_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    assert kinds(bm.partition(model, by="layer")) == [["Linear"], ["ReLU"], ["Linear"]]


def test_a_sequential_with_hooks_stays_whole():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))
    blocks = bm.partition(model)
    assert blocks[1] is inner
    bm.BackMatching(blocks).backward(torch.randn(3, 4), lambda out: out.square().mean())
    assert calls == [1]


def test_the_model_still_trains_through_the_shared_modules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x, y = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    matcher = bm.BackMatching(bm.partition(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        step = matcher.backward(x, lambda out: 0.5 * (out - y).square().sum(1).mean())
        optimizer.step()
        losses.append(float(step.loss))
    assert losses[-1] < 0.5 * losses[0]


class Custom(nn.Sequential):
    def forward(self, z):
        return 2 * super().forward(z)


@pytest.mark.parametrize(
    ("model", "by", "error", "text"),
    [
        (nn.Linear(2, 2), "activation", TypeError, "expects an nn.Sequential, got Linear; pass"),
        (Custom(nn.Linear(2, 2)), "activation", TypeError, "got Custom"),
        (nn.Sequential(), "layer", ValueError, "empty Sequential"),
        (nn.Sequential(nn.ReLU()), "block", ValueError, "by must be one of activation, layer"),
    ],
)
def test_refusals(model, by, error, text):
    with pytest.raises(error, match=text):
        bm.partition(model, by=by)


def test_hooks_on_the_whole_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="would not fire"):
        bm.partition(model)
