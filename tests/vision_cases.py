"""Catalogue of small vision nets: convolutions, norms, pooling, residual and composite blocks.

Rows of ``cases.Net``, as lazy, named and seeded as those. Maps are tiny, so that the reference's
dense Jacobians stay cheap; norms have parameters and running statistics that are not 1 and 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Blocks, Net, frozen, in_eval
from torch import nn
from vision_draw import Draw
from vision_modules import (
    ACTIVATIONS,
    ChannelsLast,
    Residual,
    SqueezeExcite,
    Standardised,
    Turned,
    stirred,
)

import backmatch as bm
from backmatch.blocks import Residual as Known

Conv = nn.Conv2d
S = nn.Sequential


def vision(
    name: str, blocks: Callable[[], Blocks], shape: tuple[int, ...] = (3, 1, 3, 4), seed: int = 0
) -> Net:
    """A net with stirred norms."""
    return Net(name, lambda: stirred(blocks()), shape, seed=seed)


def above(*layers: nn.Module, channels: int = 2) -> Blocks:
    """The layers as one block on the maps of a 1x1 convolution, so that both problems exist."""
    return [Conv(1, channels, 1), layers[0] if len(layers) == 1 else S(*layers)]


def split(by: str, *layers: nn.Module) -> Blocks:
    """The layers as ``backmatch.partition`` groups them."""
    return bm.partition(S(*layers), by=by)


def same_module_twice() -> Blocks:
    """One convolution and one norm, each used twice inside one block."""
    conv, norm = Conv(2, 2, 1), nn.BatchNorm2d(2, eps=0.1)
    return above(conv, norm, nn.Tanh(), conv, norm)


#: name -> arguments of the Conv2d on maps of 3 x 4.
CONVOLUTIONS: dict[str, Callable[[], Conv]] = {
    "plain": lambda: Conv(2, 3, 2),
    "padded": lambda: Conv(2, 2, 3, padding=1),
    "padded-by-two": lambda: Conv(2, 2, 3, stride=2, padding=2),
    "padded-1x1": lambda: Conv(2, 1, 1, padding=1),
    "strided": lambda: Conv(2, 3, 2, stride=2),
    "stride-above-kernel": lambda: Conv(2, 3, 2, stride=3),
    "stride-skips-the-edge": lambda: Conv(2, 2, (2, 2), stride=(1, 2), padding=(0, 1)),
    "one-sided-stride": lambda: Conv(2, 2, (1, 2), stride=(2, 1), bias=False),
    "1x1": lambda: Conv(2, 3, 1),
    "1x1-strided": lambda: Conv(2, 3, 1, stride=2),
    "oblong": lambda: Conv(2, 2, (3, 1), padding=(1, 0)),
    "dilated": lambda: Conv(2, 2, 2, dilation=2),
    "dilated-strided-padded": lambda: Conv(2, 2, (2, 3), (2, 1), (1, 2), (2, 1)),
    "same": lambda: Conv(2, 2, 3, padding="same"),
    "same-even": lambda: Conv(2, 2, 2, padding="same"),
    "same-even-oblong": lambda: Conv(2, 2, (4, 2), padding="same", bias=False),
    "same-dilated": lambda: Conv(2, 2, (2, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: Conv(2, 2, (2, 3), padding="valid"),
    "grouped": lambda: Conv(4, 2, 2, groups=2),
    "grouped-uneven": lambda: Conv(4, 6, (3, 2), (1, 2), (1, 0), groups=2, bias=False),
    "depthwise": lambda: Conv(2, 2, 3, padding=1, groups=2),
    "depthwise-multiplied": lambda: Conv(2, 4, 2, stride=2, groups=2),
    "kernel-is-map": lambda: Conv(2, 3, (3, 4)),
    "kernel-above-map": lambda: Conv(2, 2, 5, padding=2, stride=2),
    "no-bias": lambda: Conv(2, 3, 2, bias=False),
}


def _convolutions() -> list[Net]:
    nets = []
    for i, (name, conv) in enumerate(CONVOLUTIONS.items()):
        channels, act = conv().in_channels, ACTIVATIONS[i % len(ACTIVATIONS)]
        nets.append(vision(f"conv-{name}", lambda c=conv, n=channels: above(c(), channels=n)))
        nets.append(
            vision(
                f"conv-{name}-act",
                lambda c=conv, n=channels, a=act: above(c(), a(), channels=n),
                seed=i,
            )
        )
    return nets


NORMS = [
    vision("bn-train", lambda: above(nn.BatchNorm2d(2, eps=0.1))),
    vision("bn-default-eps", lambda: above(nn.BatchNorm2d(2), nn.ReLU())),
    vision("bn-eval", lambda: in_eval(above(nn.BatchNorm2d(2), nn.ReLU()))),
    vision("bn-not-affine", lambda: above(nn.BatchNorm2d(2, eps=0.1, affine=False), nn.Tanh())),
    vision(
        "bn-no-statistics",
        lambda: in_eval(above(nn.BatchNorm2d(2, eps=0.1, track_running_stats=False))),
    ),
    vision("bn-cumulative", lambda: above(nn.BatchNorm2d(2, eps=0.1, momentum=None))),
    vision("bn1d", lambda: [nn.Linear(4, 3), nn.BatchNorm1d(3, eps=0.1), nn.Linear(3, 2)], (5, 4)),
    vision("bn1d-spread", lambda: [nn.Linear(4, 3), nn.BatchNorm1d(2, eps=0.1)], (3, 2, 4)),
    vision("bn1d-eval", lambda: in_eval([nn.Linear(4, 3), nn.BatchNorm1d(3)]), (5, 4)),
    vision("conv-bn-relu", lambda: above(Conv(2, 3, 2), nn.BatchNorm2d(3, eps=0.1), nn.ReLU())),
    vision("conv-bn-eval", lambda: in_eval(above(Conv(2, 3, 2), nn.BatchNorm2d(3), nn.GELU()))),
    vision("bn-relu-conv", lambda: above(nn.BatchNorm2d(2, eps=0.1), nn.ReLU(True), Conv(2, 2, 2))),
    vision("layer-norm", lambda: above(nn.LayerNorm((2, 3, 4), 0.1), nn.Tanh())),
    vision("layer-norm-last", lambda: above(nn.LayerNorm(4, 0.1), channels=3)),
    vision("layer-norm-maps", lambda: above(nn.LayerNorm((3, 4), 0.1, elementwise_affine=False))),
    vision("layer-norm-no-bias", lambda: above(nn.LayerNorm((3, 4), 0.1, bias=False))),
    vision("layer-norm-default-eps", lambda: above(nn.LayerNorm((2, 3, 4)))),
    vision("group-norm", lambda: above(nn.GroupNorm(2, 4, 0.1), channels=4)),
    vision("group-norm-one", lambda: above(nn.GroupNorm(1, 3, 0.1), nn.ReLU(), channels=3)),
    vision("group-norm-each", lambda: above(nn.GroupNorm(2, 2, 0.1))),
    vision("group-norm-bare", lambda: above(nn.GroupNorm(2, 4, 0.1, affine=False), channels=4)),
    vision("group-norm-default-eps", lambda: above(nn.GroupNorm(1, 2), nn.Tanh())),
    vision("conv-gn-relu", lambda: above(Conv(2, 4, 2), nn.GroupNorm(2, 4, 0.1), nn.ReLU())),
    vision(
        "linear-ln", lambda: [nn.Linear(4, 3), S(nn.Linear(3, 4), nn.LayerNorm(4, 0.1))], (5, 4)
    ),
]

#: name -> pooling module on maps of 3 x 4.
POOLS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "max-overlapping": lambda: nn.MaxPool2d(3, stride=1, padding=1),
    "max-stride-above-kernel": lambda: nn.MaxPool2d(1, stride=2),
    "max-ceil": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "max-dilated": lambda: nn.MaxPool2d((2, 2), stride=1, dilation=(1, 2)),
    "max-oblong": lambda: nn.MaxPool2d((1, 3), stride=(2, 1), padding=(0, 1)),
    "avg": lambda: nn.AvgPool2d(2),
    "avg-overlapping": lambda: nn.AvgPool2d(3, stride=1, padding=1),
    "avg-valid-count": lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "avg-stride-above-kernel": lambda: nn.AvgPool2d((1, 2), stride=3),
    "avg-ceil": lambda: nn.AvgPool2d((2, 3), stride=(2, 2), ceil_mode=True),
    "avg-ceil-padded": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg-divisor": lambda: nn.AvgPool2d(2, stride=1, divisor_override=3),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
    "adaptive-one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive-oblong": lambda: nn.AdaptiveAvgPool2d((None, 3)),
    "adaptive-growing": lambda: nn.AdaptiveAvgPool2d((2, 5)),
    "adaptive-max": lambda: nn.AdaptiveMaxPool2d((2, 3)),
}

POOLED = [
    *(vision(f"pool-{name}", lambda p=p: above(p())) for name, p in POOLS.items()),
    vision("conv-relu-max", lambda: above(Conv(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1))),
    vision("conv-max-relu", lambda: above(Conv(2, 2, 2), nn.MaxPool2d((2, 1), 1), nn.ReLU(True))),
    vision("conv-avg", lambda: above(Conv(2, 3, 2, bias=False), nn.AvgPool2d(2, 1))),
    vision(
        "conv-bn-relu-avg",
        lambda: above(
            Conv(2, 3, 2), nn.BatchNorm2d(3, eps=0.1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        ),
    ),
    vision("conv-avg-tanh", lambda: above(Conv(2, 3, 2), nn.AvgPool2d(2, 1), nn.Tanh())),
    vision("ties", lambda: split("layer", Conv(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2, 1))),
]

COMPOSITES = [
    vision(
        "nested",
        lambda: above(
            S(S(Conv(2, 2, 2), nn.ReLU()), nn.Identity()), S(S(Conv(2, 3, 2)), nn.GELU())
        ),
    ),
    vision("conv-head", lambda: above(Conv(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))),
    vision("conv-flatten", lambda: [*above(Conv(2, 3, 2), nn.ReLU(), nn.Flatten()), nn.Tanh()]),
    vision("flatten-middle", lambda: above(Conv(2, 2, 2), nn.Flatten(2), nn.ReLU())),
    vision("linear-on-maps", lambda: above(Conv(2, 2, 2), nn.Linear(3, 2), nn.Tanh())),
    vision("residual", lambda: above(Residual(S(Conv(2, 2, 3, padding=1), nn.Tanh())))),
    vision("residual-in-place", lambda: above(Residual(Conv(2, 2, 1), after=nn.ReLU(True)))),
    vision(
        "basic-block",
        lambda: above(
            Residual(
                S(Conv(2, 2, 3, 2, 1), nn.BatchNorm2d(2, eps=0.1), nn.ReLU(True), Conv(2, 3, 1)),
                S(Conv(2, 3, 1, 2, bias=False), nn.BatchNorm2d(3, eps=0.1)),
                nn.ReLU(),
            )
        ),
    ),
    vision("basic-block-around", lambda: above(Conv(2, 2, 2), Residual(Conv(2, 2, 1)), nn.ReLU())),
    vision("known-residual", lambda: above(Known(S(Conv(2, 2, 3, padding=1), nn.Tanh())))),
    vision("known-nested", lambda: above(Known(S(Known(Conv(2, 2, 1)), nn.GELU(), Conv(2, 2, 1))))),
    vision("known-around", lambda: above(Conv(2, 2, 2), Known(Conv(2, 2, 1)), nn.ReLU(True))),
    vision(
        "known-basic-block",
        lambda: above(
            Known(
                S(Conv(2, 2, 3, 2, 1), nn.BatchNorm2d(2, eps=0.1), nn.ReLU(True), Conv(2, 3, 1)),
                S(Conv(2, 3, 1, 2, bias=False), nn.BatchNorm2d(3, eps=0.1)),
                S(nn.BatchNorm2d(3, eps=0.1), nn.Tanh()),
            )
        ),
    ),
    vision("squeeze-excite", lambda: above(Conv(2, 3, 2), SqueezeExcite(3))),
    vision("subclass", lambda: above(Standardised(2, 2, 2), nn.ReLU())),
    vision("reflecting", lambda: above(Conv(2, 2, 3, padding=1, padding_mode="reflect"))),
    vision("conv1d", lambda: [nn.Flatten(2), S(nn.Conv1d(1, 2, 3), nn.ReLU()), nn.Conv1d(2, 2, 2)]),
    vision("transposed", lambda: above(nn.ConvTranspose2d(2, 1, 2, stride=2), nn.ReLU())),
    vision("tied", same_module_twice),
    vision(
        "by-layer",
        lambda: split(
            "layer",
            Conv(1, 2, 2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.BatchNorm2d(2, eps=0.1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
    ),
    vision(
        "by-activation",
        lambda: split(
            "activation",
            nn.AvgPool2d(1),
            Conv(1, 2, 2),
            nn.BatchNorm2d(2, eps=0.1),
            nn.ReLU(),
            nn.AvgPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(4, 3),
            nn.Tanh(),
        ),
    ),
]

EDGES = [
    vision("1x1-maps", lambda: [Conv(3, 2, 1), S(Conv(2, 3, 1), nn.Tanh())], (5, 3, 1, 1)),
    vision("1x1-maps-padded", lambda: [Conv(3, 2, 1), Conv(2, 2, 3, padding=1)], (4, 3, 1, 1)),
    vision("1x1-maps-pooled", lambda: above(nn.AvgPool2d(1), Conv(2, 2, 1)), (4, 1, 1, 1)),
    vision("1x1-maps-bn", lambda: above(Conv(2, 2, 1), nn.BatchNorm2d(2, eps=0.1)), (5, 1, 1, 1)),
    vision("batch-1", lambda: above(Conv(2, 3, 2), nn.ReLU()), (1, 1, 3, 4)),
    vision("batch-1-bn", lambda: above(Conv(2, 2, 2), nn.BatchNorm2d(2, eps=0.1)), (1, 1, 3, 4)),
    vision("batch-11", lambda: above(Conv(2, 2, 2), nn.Tanh()), (11, 1, 2, 3)),
    vision("one-channel", lambda: above(Conv(1, 1, 2), nn.ReLU(), channels=1)),
    vision("one-row", lambda: above(Conv(2, 2, (1, 3)), nn.MaxPool2d((1, 2), 1)), (3, 1, 1, 5)),
    vision("strided-view", lambda: [Conv(1, 2, 1), Turned(), Conv(2, 2, (2, 3)), nn.Tanh()]),
    vision("strided-pooled", lambda: [Conv(1, 2, 1), Turned(), nn.MaxPool2d(2), nn.ReLU(True)]),
    vision("strided-view-bn", lambda: [Conv(1, 2, 1), Turned(), nn.BatchNorm2d(2, eps=0.1)]),
    vision("channels-last", lambda: [Conv(1, 2, 1), ChannelsLast(), Conv(2, 3, 2), nn.ReLU()]),
    vision("channels-last-bn", lambda: [Conv(1, 2, 1), ChannelsLast(), nn.BatchNorm2d(2, eps=0.1)]),
    vision("channels-last-pool", lambda: [Conv(1, 2, 1), ChannelsLast(), nn.AvgPool2d(2, 1)]),
    vision("bare", lambda: above(nn.Identity(), nn.ReLU(True), nn.Flatten(), nn.Identity())),
    vision("no-parameters", lambda: [nn.AvgPool2d(2, 1), nn.ReLU(), nn.MaxPool2d(2, 1)]),
    vision("dropout", lambda: above(Conv(2, 3, 2), nn.Dropout(0.4), nn.ReLU(), nn.Dropout(0.2))),
    vision("dropout2d", lambda: above(Conv(2, 3, 2), nn.Dropout2d(0.5)), seed=3),
    vision("frozen-weight", lambda: frozen(above(Conv(2, 2, 2), nn.ReLU()), "1.0.weight")),
    vision("frozen-bias", lambda: frozen(above(Conv(2, 2, 2, groups=2)), "1.bias", "0.weight")),
    vision("frozen-gamma", lambda: frozen(above(nn.BatchNorm2d(2, eps=0.1)), "1.weight")),
    vision("frozen-group-beta", lambda: frozen(above(nn.GroupNorm(1, 2, 0.1)), "1.bias")),
    vision("frozen-block", lambda: frozen([*above(Conv(2, 2, 2), nn.ReLU()), Conv(2, 2, 1)],
                                          "1.0.weight", "1.0.bias")),
    vision("frozen-norm", lambda: frozen(above(Conv(2, 2, 2), nn.BatchNorm2d(2, eps=0.1)),
                                         "1.1.weight", "1.1.bias")),
    vision("frozen-bottom", lambda: frozen(above(Conv(2, 2, 2), nn.Tanh()), "0.weight", "0.bias")),
]  # fmt: skip

NETS = {net.name: net for net in [*_convolutions(), *NORMS, *POOLED, *COMPOSITES, *EDGES]}


def random_vision_net(seed: int) -> Net:
    """A random chain: stages of convolution, norm, activation and pooling, perhaps a head."""
    rng = np.random.default_rng(seed)
    channels, *maps = (int(n) for n in rng.integers(1, 5, 3))
    draw = Draw(rng, (int(rng.integers(1, 5)), min(channels, 3), maps[0] + 1, maps[1] + 1))
    shape, ends = draw.shape, []
    for _ in range(int(rng.integers(1, 4))):
        draw.stage()
        ends.append(len(draw.layers))
    if rng.random() < 0.4:
        features = int(np.prod(draw.shape[1:]))
        draw.add(nn.Flatten)
        draw.add(lambda: nn.Linear(features, 3))
    by = str(draw.one("activation", "layer", "stage"))
    freeze, whole = rng.random(99) < float(draw.one(0.0, 0.0, 0.3)), rng.random() < 0.15

    def blocks() -> Blocks:
        built = [layer() for layer in draw.layers]
        if by == "stage":  # nested, several layers with parameters in a block
            parts = [built[a:b] for a, b in zip([0, *ends], [*ends, len(built)], strict=True)]
            chain: Blocks = [S(*part[:1], S(*part[1:])) for part in parts if part]
        else:
            chain = split(by, *built)
        for at, p in enumerate(p for block in chain for p in block.parameters()):
            p.requires_grad_(not freeze[at])
        for part in nn.ModuleList(chain).modules():
            # A bias that a norm takes away again would be all there is: nothing but rounding.
            if isinstance(part, Conv) and part.bias is not None and not part.weight.requires_grad:
                part.bias.requires_grad_(False)
        if whole:
            chain[len(chain) // 2].requires_grad_(False)
        return chain

    return vision(f"random-{seed}", blocks, shape, seed)
