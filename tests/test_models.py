"""The public networks: shapes, sizes, blocks, and one step of each kind."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import backmatch as bm
from backmatch.blocks import Residual

IMAGES = ["cnn", *(f"vgg{depth}{norm}" for depth in (11, 13, 16) for norm in ("", "_bn"))]
IMAGES.append("resnet20")

#: Parameters with 3 channels and 10 classes; VGG and ResNet-20 as published for 32x32 images,
#: ResNet-20 with 1x1 convolutions as shortcuts.
PARAMETERS = {
    "vgg11": 9_225_610,
    "vgg13": 9_410_122,
    "vgg16": 14_719_818,
    "vgg13_bn": 9_413_066,
    "resnet20": 272_474,
}


def kinds(block: nn.Module) -> list[str]:
    leaves = block if type(block) is nn.Sequential else [block]
    return [type(leaf).__name__ for leaf in leaves]


def make(name: str, *arguments: int) -> nn.Sequential:
    torch.manual_seed(0)
    net: nn.Sequential = getattr(bm.models, name)(*arguments)
    return net


@pytest.mark.parametrize("name", IMAGES)
def test_plain_chains_with_logits(name: str) -> None:
    net = make(name, 2, 7)
    assert type(net) is nn.Sequential
    assert net(torch.zeros(2, 2, 32, 32)).shape == (2, 7)
    assert name in bm.models.__all__


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name: str) -> None:
    assert sum(p.numel() for p in make(name, 3, 10).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("argument", ["in_channels", "classes"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_sizes_that_are_none(name: str, argument: str, value: float) -> None:
    with pytest.raises((TypeError, ValueError), match=argument):
        getattr(bm.models, name)(**{argument: value})


@pytest.mark.parametrize("sizes", [{"shape": 0}, {"shape": (2, 0)}, {"shape": 2, "hidden": [0]}])
def test_mlp_of_nothing(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        bm.models.mlp(**sizes)


def test_mlp_flattens_what_has_dimensions() -> None:
    assert kinds(bm.models.mlp(4, (3,), 2)) == ["Linear", "ReLU", "Linear"]
    assert kinds(bm.models.mlp((2, 2), (), 2)) == ["Flatten", "Linear"]


def test_blocks_of_the_residual_net() -> None:
    blocks = bm.partition(make("resnet20"))
    assert [kinds(block) for block in blocks] == [
        ["Conv2d", "BatchNorm2d", "ReLU"],
        *[["Residual"]] * 9,
        ["AdaptiveAvgPool2d", "Flatten"],
        ["Linear"],
    ]
    blocks = bm.partition(make("resnet20"), by="layer")
    counted = Counter(kind for block in blocks for kind in kinds(block))
    assert len(blocks) == 15
    assert counted["Residual"] == 9
    assert counted["Conv2d"] == counted["ReLU"] == counted["Linear"] == 1


def test_blocks_of_a_vgg() -> None:
    blocks = [kinds(block) for block in bm.partition(make("vgg11_bn"))]
    conv = ["Conv2d", "BatchNorm2d", "ReLU"]
    pooled = [*conv, "MaxPool2d"]
    assert blocks[:4] == [pooled, pooled, conv, pooled]
    assert blocks[-2:] == [[*pooled, "Flatten"], ["Linear"]]
    assert len(bm.partition(make("vgg11_bn"), by="layer")) == 8 * 3 + 5 + 2


def test_a_residual_without_parameters_follows_its_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Residual(nn.Tanh()), nn.Linear(3, 2))
    assert [kinds(block) for block in bm.partition(model)] == [["Linear", "Residual"], ["Linear"]]


def small_resnet() -> nn.Sequential:
    def residual(n_in: int, n_out: int, stride: int) -> Residual:
        body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()
        )
        skip = None if stride == 1 else nn.Conv2d(n_in, n_out, 1, stride)
        return Residual(body, skip, nn.ReLU())

    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU()),
        residual(3, 3, 1),
        nn.Sequential(residual(3, 4, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


@pytest.mark.parametrize("by", ["activation", "layer"])
def test_a_step_lowers_the_loss_of_its_batch(by: str) -> None:
    torch.manual_seed(0)
    net = small_resnet().double()
    x, y = torch.randn(12, 1, 6, 6).double(), torch.arange(12) % 3
    matcher = bm.BackMatching(bm.partition(net, by=by))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        step = matcher.backward(x, lambda out: cross_entropy(out, y))
        optimizer.step()
        losses.append(float(step.loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", ["cnn", "resnet20"])
def test_gradient_solvers_are_back_propagation(name: str) -> None:
    net = make(name, 1, 4).double()
    x, y = torch.randn(5, 1, 8, 8).double(), torch.arange(5) % 4
    want = torch.autograd.grad(cross_entropy(net(x), y), list(net.parameters()))
    net = make(name, 1, 4).double()
    matcher = bm.BackMatching(bm.partition(net), weights=bm.Gradient(), inputs=bm.Gradient())
    matcher.backward(x, lambda out: cross_entropy(out, y))
    size = max(float(grad.abs().max()) for grad in want)
    for p, grad in zip(net.parameters(), want, strict=True):
        assert p.grad is not None
        assert float((p.grad - grad).abs().max()) < 1e-11 * size
