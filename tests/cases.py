"""Catalogue of nets and matrices for the tests: lazy, named, seeded.

One row adds a net or a matrix to every test that runs over the catalogue. Nothing is built before
``make`` is called, and every ``make`` builds the same thing.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Blocks = list[nn.Module]
Loss = Callable[[Tensor], Tensor]


def half_square(z: Tensor, y: Tensor) -> Tensor:
    """Mean over the batch of 1/2 |z - y|^2."""
    return 0.5 * (z - y).square().sum() / z.shape[0]


@dataclass(frozen=True)
class Net:
    """A chain of blocks with an input and a loss.

    Attributes:
        name: its name in test ids.
        blocks: builds the chain; called with torch seeded.
        shape: shape of the input batch, dimension 0 the sample.
        classes: integers below this number as input (an embedding), else normal numbers.
        labels: cross-entropy on integer labels instead of half the squared distance.
        coupled: whether some block that is not the bottom one couples the samples.
        seed: of parameters and data.
    """

    name: str
    blocks: Callable[[], Blocks]
    shape: tuple[int, ...] = (5, 6)
    classes: int | None = None
    labels: bool = False
    coupled: bool = False
    seed: int = 0

    def make(self, dtype: torch.dtype = torch.float64) -> tuple[Blocks, Tensor, Loss]:
        """Blocks that have not run yet, input and loss; torch's generator is left seeded."""
        torch.manual_seed(self.seed)
        blocks = [block.to(dtype) for block in self.blocks()]
        if self.classes is None:
            x = torch.randn(self.shape, dtype=dtype)
        else:
            x = torch.randint(self.classes, self.shape)
        out = nn.Sequential(*copy.deepcopy(blocks))(x.clone()).detach()
        if self.labels:
            y = torch.randint(out.shape[1], (out.shape[0],))
            return blocks, x, lambda z: nn.functional.cross_entropy(z, y)
        target = torch.randn(out.shape, dtype=dtype)
        torch.manual_seed(self.seed)
        return blocks, x, lambda z: half_square(z, target)


class ResidualMLP(nn.Module):
    """z + V tanh(U z): the generic route, per sample."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.down(torch.tanh(self.up(z)))


class Centred(nn.Module):
    """Linear after removing the batch mean: samples depend on each other."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z - z.mean(0)))


class DeclaredCoupled(Centred):
    """The same, and says so."""

    batch_coupled = True


class Tied(nn.Module):
    """One Linear used twice inside a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(z)))


class Unused(nn.Module):
    """A trainable parameter that the output does not depend on."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear, self.spare = nn.Linear(n_in, n_out), nn.Parameter(torch.ones(3))

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> Blocks:
    """Linear+activation blocks and a Linear on top."""
    pairs = list(itertools.pairwise(widths))
    hidden = [nn.Sequential(nn.Linear(a, b, bias=bias), activation()) for a, b in pairs[:-1]]
    return [*hidden, nn.Linear(*pairs[-1], bias=bias)]


def frozen(blocks: Blocks, *names: str) -> Blocks:
    """Freeze the parameters whose name (block index first) is given."""
    for name, parameter in nn.ModuleList(blocks).named_parameters():
        parameter.requires_grad_(name not in names)
    return blocks


def in_eval(blocks: Blocks) -> Blocks:
    """The blocks in evaluation mode."""
    return [block.eval() for block in blocks]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.1),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "softplus": lambda: nn.Softplus(beta=2.0),
    "elu": lambda: nn.ELU(alpha=0.7),
    "relu-inplace": lambda: nn.ReLU(inplace=True),
    "leaky-relu-inplace": lambda: nn.LeakyReLU(0.2, inplace=True),
    "silu-inplace": lambda: nn.SiLU(inplace=True),
    "elu-inplace": lambda: nn.ELU(inplace=True),
}

STRUCTURED = [
    *(Net(name, lambda a=a: mlp(6, 9, 7, 4, activation=a)) for name, a in ACTIVATIONS.items()),
    Net("linear", lambda: [nn.Linear(6, 4)]),
    Net("linear-no-bias", lambda: [nn.Linear(6, 4, bias=False)]),
    Net("linear-chain", lambda: [nn.Linear(6, 8), nn.Linear(8, 3, bias=False), nn.Linear(3, 5)]),
    Net("no-bias", lambda: mlp(6, 9, 4, bias=False)),
    Net("tall-batch", lambda: mlp(3, 4, 5, 2), shape=(23, 3), seed=1),
    Net("wide", lambda: mlp(4, 33, 3), shape=(5, 4), seed=2),
    Net("narrow", lambda: mlp(17, 2, 9), shape=(7, 17), seed=3),
    Net("batch-1", lambda: mlp(6, 5, 4), shape=(1, 6), seed=4),
    Net("one-unit", lambda: mlp(1, 1, 1), shape=(3, 1), seed=5),
    Net("deep", lambda: mlp(5, 6, 5, 6, 5, 6, 3, activation=nn.SiLU), shape=(4, 5), seed=6),
    Net("cross-entropy", lambda: mlp(6, 8, 5), labels=True, seed=7),
    Net(
        "features-3d",
        lambda: [
            nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, 3), nn.ReLU()),
            nn.Sequential(nn.Flatten(), nn.Linear(9, 4)),
        ],
        shape=(4, 3, 4),
        seed=8,
    ),
    Net("features-3d-linear", lambda: [nn.Linear(3, 5), nn.Linear(5, 2)], shape=(4, 3, 3), seed=9),
    Net(
        "flatten",
        lambda: [
            nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU()),
            nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)), nn.Tanh()),
            nn.Flatten(),
            nn.Linear(4, 3),
        ],
        shape=(5, 2, 4),
        seed=10,
    ),
    Net(
        "leaves",
        lambda: [nn.Linear(6, 7), nn.Tanh(), nn.Identity(), nn.Linear(7, 5), nn.GELU()],
        seed=11,
    ),
    Net("parameterless", lambda: [nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Sigmoid()], seed=12),
    Net("activation-first", lambda: [nn.Linear(6, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 4))]),
    Net(
        "activation-chain",
        lambda: [
            nn.Linear(6, 5),
            nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.LeakyReLU(0.3, inplace=True)),
            nn.Linear(6, 3),
        ],
    ),
    Net(
        "dropout",
        lambda: [
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.4)),
            nn.Dropout(0.3),
            nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Dropout(0.2, inplace=True)),
            nn.Linear(7, 3),
        ],
        seed=13,
    ),
    Net(
        "dropout-eval",
        lambda: in_eval([nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4)), *mlp(8, 3)]),
        seed=14,
    ),
    Net("frozen-weight", lambda: frozen(mlp(6, 7, 5, 3), "1.0.weight"), seed=15),
    Net("frozen-bias", lambda: frozen(mlp(6, 7, 5, 3), "0.0.bias", "2.bias"), seed=16),
    Net("frozen-block", lambda: frozen(mlp(6, 7, 5, 3), "1.0.weight", "1.0.bias"), seed=17),
]

GENERIC = [
    Net("residual", lambda: [nn.Linear(6, 5), ResidualMLP(5, 4), nn.Linear(5, 3)], seed=20),
    Net("tied", lambda: [nn.Linear(6, 5), Tied(5), nn.Linear(5, 3)], seed=21),
    Net("unused-parameter", lambda: [nn.Linear(6, 5), Unused(5, 3)], seed=22),
    Net("two-linears", lambda: [nn.Linear(6, 5), nn.Sequential(*mlp(5, 4, 3))], seed=23),
    Net(
        "coupled-probed",
        lambda: [nn.Linear(6, 5), Centred(5, 4), nn.Linear(4, 3)],
        coupled=True,
        seed=24,
    ),
    Net(
        "coupled-declared",
        lambda: [nn.Linear(6, 5), DeclaredCoupled(5, 4), nn.Linear(4, 3)],
        coupled=True,
        seed=25,
    ),
    Net(
        "batch-norm",
        lambda: [
            nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()),
            nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()),
            nn.Linear(4, 3),
        ],
        shape=(7, 6),
        coupled=True,
        seed=26,
    ),
    Net(
        "batch-norm-eval",
        lambda: in_eval([nn.Linear(6, 5), nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4))]),
        seed=27,
    ),
    Net(
        "layer-norm",
        lambda: [nn.Linear(6, 5), nn.Sequential(nn.LayerNorm(5), nn.Tanh()), nn.Linear(5, 3)],
        seed=28,
    ),
    Net(
        "conv",
        lambda: [
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(2, 2, 2, stride=2), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(8, 3)),
        ],
        shape=(3, 1, 4, 4),
        seed=29,
    ),
    Net(
        "embedding",
        lambda: [nn.Sequential(nn.Embedding(6, 3), nn.Flatten()), *mlp(12, 5, 3)],
        shape=(5, 4),
        classes=6,
        seed=30,
    ),
    Net("prelu", lambda: [nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.PReLU(4))], seed=31),
]


def random_net(seed: int) -> Net:
    """A random chain of Linear, activation, Dropout and reshaping blocks of awkward sizes."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(1, 9))
    spread = (int(rng.integers(1, 4)),) if rng.random() < 0.3 else ()
    shape = (int(rng.integers(1, 8)), *spread, width)
    plan: list[list[Callable[[], nn.Module]]] = []
    for _ in range(int(rng.integers(1, 5))):
        n_in, width, bias = width, int(rng.integers(1, 11)), bool(rng.random() < 0.7)
        block = [functools.partial(nn.Linear, n_in, width, bias=bias)]
        if rng.random() < 0.7:
            block.append(ACTIVATIONS[str(rng.choice(list(ACTIVATIONS)))])
        if rng.random() < 0.2:
            block.append(functools.partial(nn.Dropout, 0.3))
        if rng.random() < 0.2:
            block.append(nn.Identity)
        apart = len(block) > 1 and rng.random() < 0.2  # every leaf a block
        plan.extend([[leaf] for leaf in block] if apart else [block])
    return Net(
        f"random-{seed}",
        lambda: [nn.Sequential(*(leaf() for leaf in block)) for block in plan],
        shape=shape,
        seed=seed,
    )


NETS = {net.name: net for net in [*STRUCTURED, *GENERIC]}


@dataclass(frozen=True)
class Spd:
    """A batch of symmetric positive (semi)definite matrices with a known spectrum.

    Attributes:
        name: its name in test ids.
        n: size.
        condition: largest over smallest nonzero eigenvalue; they are spaced evenly in logarithm.
        rank: number of nonzero eigenvalues, ``None`` for n.
        batch: number of matrices.
        seed: of the eigenvectors and right-hand sides.
    """

    name: str
    n: int
    condition: float = 1.0
    rank: int | None = None
    batch: int = 3
    seed: int = 0

    def make(self, columns: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """A of shape (batch, n, n) and B = A X of shape (batch, n, columns), float64."""
        rng = np.random.default_rng(self.seed)
        rank = self.n if self.rank is None else self.rank
        values = np.zeros(self.n)
        values[:rank] = np.logspace(0, -np.log10(self.condition), rank)
        Q = np.linalg.qr(rng.standard_normal((self.batch, self.n, self.n)))[0]
        A = (Q * values) @ Q.transpose(0, 2, 1)
        A = 0.5 * (A + A.transpose(0, 2, 1))
        return A, A @ rng.standard_normal((self.batch, self.n, columns))


SPD = {
    case.name: case
    for case in [
        Spd("orthonormal", 7),
        Spd("one", 1),
        *(Spd(f"n{n}-cond1e3", n, 1e3, seed=n) for n in (2, 7, 31, 32, 33, 65)),
        *(Spd(f"cond1e{k}", 12, 10.0**k, seed=k) for k in (1, 3, 6, 9)),
        Spd("batch-1", 9, 1e2, batch=1),
        Spd("batch-65", 5, 1e2, batch=65),
    ]
}

SINGULAR = {
    case.name: case
    for case in [
        Spd("rank-1", 6, rank=1),
        Spd("half-rank", 10, 1e3, rank=5),
        Spd("lacks-one", 33, 1e2, rank=32),
        Spd("zero", 4, rank=0),
    ]
}

#: name -> (matrix, LAPACK's info): the order of the first leading minor that is not positive.
NOT_SPD: dict[str, tuple[np.ndarray, int]] = {
    "negative": (np.diag([-1.0, 1.0, 1.0]), 1),
    "indefinite": (np.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 2),
    "zero": (np.zeros((3, 3)), 1),
    "last-pivot": (np.diag([1.0, 1.0, -1e-8]), 3),
}
