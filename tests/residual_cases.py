"""Residual blocks for the tests: lazy, named, seeded."""

from __future__ import annotations

from typing import Any

from cases import Net, frozen, in_eval
from torch import nn

from backmatch.blocks import Residual


def mlp_body(n_in: int = 5, n_out: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, 6), nn.Tanh(), nn.Linear(6, n_out))


def norm_body() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5),
        nn.BatchNorm1d(5),
    )  # fmt: skip


def conv_residual() -> Residual:
    body = nn.Sequential(
        nn.Conv2d(2, 3, 3, 2, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3),
    )  # fmt: skip
    shortcut = nn.Sequential(nn.Conv2d(2, 3, 1, 2, bias=False), nn.BatchNorm2d(3))
    return Residual(body, shortcut, nn.ReLU(inplace=True))


def nested() -> Residual:
    inner = Residual(nn.Sequential(nn.Tanh(), nn.Linear(5, 5)), activation=nn.LeakyReLU(0.2))
    return Residual(nn.Sequential(nn.Linear(5, 5), nn.Sequential(inner)), activation=nn.ReLU())


def in_place() -> Residual:
    body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4))
    shortcut = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Linear(5, 4, bias=False))
    return Residual(body, shortcut, nn.SiLU(inplace=True))


def around(make: Any, n_out: int = 5) -> Any:
    return lambda: [nn.Linear(4, 5), make(), nn.Linear(n_out, 3)]


CASES = {
    net.name: net
    for net in [
        Net("identity", around(lambda: Residual(mlp_body())), (6, 4), seed=1),
        Net("activation", around(lambda: Residual(nn.Linear(5, 5), activation=nn.ReLU())), (6, 4)),
        Net(
            "projection",
            around(lambda: Residual(mlp_body(5, 4), nn.Linear(5, 4, bias=False), nn.SiLU()), 4),
            (6, 4),
            seed=2,
        ),
        Net("nested", around(nested), (6, 4), seed=3),
        Net("in-place", around(in_place, 4), (6, 4), seed=4),
        Net("parameterless", around(lambda: Residual(nn.Tanh(), activation=nn.ReLU())), (6, 4)),
        Net("bottom", lambda: [Residual(mlp_body()), nn.Linear(5, 3)], (6, 5), seed=5),
        Net(
            "one-leaf-of-many",
            around(lambda: nn.Sequential(nn.Tanh(), Residual(mlp_body()), nn.ReLU(inplace=True))),
            (6, 4),
            seed=6,
        ),
        Net(
            "dropout",
            around(
                lambda: Residual(
                    nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.4)), nn.Dropout(0.3), nn.Tanh()
                )
            ),
            (6, 4),
            seed=7,
        ),
        Net(
            "frozen-parts",
            lambda: frozen(
                [nn.Linear(4, 5), Residual(mlp_body(), nn.Linear(5, 5)), nn.Linear(5, 3)],
                "1.body.0.weight",
                "1.shortcut.bias",
            ),
            (6, 4),
            seed=8,
        ),
        Net(
            "frozen-body",
            lambda: frozen(
                [nn.Linear(4, 5), Residual(nn.Linear(5, 5), nn.Linear(5, 5)), nn.Linear(5, 3)],
                "1.body.weight",
                "1.body.bias",
            ),
            (6, 4),
            seed=9,
        ),
        Net(
            "batch-norm",
            around(lambda: Residual(norm_body(), activation=nn.ReLU())),
            (7, 4),
            coupled=True,
            seed=10,
        ),
        Net(
            "batch-norm-eval",
            lambda: in_eval([nn.Linear(4, 5), Residual(norm_body()), nn.Linear(5, 3)]),
            (6, 4),
            seed=11,
        ),
        Net(
            "conv",
            lambda: [
                nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()),
                conv_residual(),
                nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
            ],
            (3, 1, 4, 4),
            coupled=True,
            seed=12,
        ),
    ]
}
