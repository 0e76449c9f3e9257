"""Random shapes, strides, dtypes, threads and SIMD levels against float64 NumPy.

    python benchmarks/fuzz.py --seconds 600 --seed 0 --out benchmarks/results/fuzz.json

Case i of a seed is the same on every machine, so ``--only i`` repeats one. A mismatch prints it and
ends with exit code 1; a crash leaves its number in the last line printed with ``--verbose``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backmatch import _C, linalg

#: Around the widths of vectors, tiles and panels; the last ones rarely.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 97, 129, 200)
#: Numbers in the largest operand, as a power of two drawn per case: most are small, and many.
NUMBERS = (6, 17)
THREADS = (1, 2, 8)


class Draw:
    """Everything random of one case."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = np.random.default_rng([seed, number])
        self.dtype = (torch.float32, torch.float64)[self.random.integers(2)]
        self.eps = torch.finfo(self.dtype).eps
        self.numbers = 2 ** int(self.random.integers(*NUMBERS, endpoint=True))

    def size(self, most: int = SIZES[-1]) -> int:
        fitting = [n for n in SIZES if n <= most and n * n <= 2 * self.numbers]
        share = np.array([1.0 / (8 + n) for n in fitting])
        return int(self.random.choice(fitting, p=share / share.sum()))

    def lead(self, numbers: int) -> tuple[int, ...]:
        """Leading dimensions of an operand of so many numbers per system."""
        room = max(1, min(300, self.numbers // max(numbers, 1)))
        batch = int(self.random.integers(0, room + 1)) if self.random.random() < 0.9 else 0
        return [(), (batch,), (1, batch), (2, batch // 2), (batch, 1)][self.random.integers(5)]

    def part(self, lead: tuple[int, ...]) -> tuple[int, ...]:
        """A leading shape that broadcasts to ``lead``: dimensions of size 1 or left out."""
        kept = lead[self.random.integers(len(lead) + 1) :] if self.random.random() < 0.3 else lead
        return tuple(1 if self.random.random() < 0.2 else size for size in kept)

    def normal(self, *shape: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.random.standard_normal(shape))).to(self.dtype)

    def slopes(self, *shape: int) -> Tensor:
        """Dense, ReLU-like or all off."""
        share = self.random.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        on = torch.from_numpy(np.asarray(self.random.random(shape) < share)).to(self.dtype)
        return on if self.random.random() < 0.5 else on * self.normal(*shape)

    def laid_out(self, value: Tensor) -> Tensor:
        """The same values in memory of another order, with gaps and an offset, all NaN between."""
        if self.random.random() < 0.3:
            return value.clone()
        order = self.random.permutation(value.dim())
        steps = self.random.choice([1, 1, 1, 2, 3], value.dim())
        extents = [1 + int(s) * value.shape[d] for d, s in enumerate(steps)]
        memory = torch.full([extents[d] for d in order], torch.nan, dtype=value.dtype)
        view = memory.permute(tuple(np.argsort(order)))
        view = view[tuple(slice(1, None, int(step)) for step in steps)]
        return view[tuple(slice(0, size) for size in value.shape)].copy_(value)

    def damping(self, least: float, lead: tuple[int, ...]) -> float | Tensor:
        """At least ``least``; a number, or one per system."""
        if self.random.random() < 0.4:
            return float(least * (1 + self.random.random()))
        spread = torch.from_numpy(np.asarray(1 + self.random.random(self.part(lead)))).to(
            self.dtype
        )
        return self.laid_out(least * spread)

    def spd(self, *shape: int) -> Tensor:
        """Shape (..., n): matrices of that order with condition numbers of about 10."""
        *lead, n = shape
        Z = self.normal(*lead, n, n + 3)
        return Z @ Z.mT / (n + 3) + 0.5 * torch.eye(n, dtype=self.dtype)


class MismatchError(Exception):
    """An answer that is not the oracle's."""


def require(ok: object, what: str) -> None:
    if not ok:
        raise MismatchError(what)


def shifted(damping: float | Tensor, n: int) -> np.ndarray:
    value = damping.double().numpy() if isinstance(damping, Tensor) else np.float64(damping)
    return np.asarray(value)[..., None, None] * np.eye(n)


def same_for_threads(draw: Draw, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The call with one thread and with another number of them: equal bits."""
    torch.set_num_threads(1)
    one = call()
    torch.set_num_threads(int(draw.random.choice(THREADS)))
    for a, b in zip(one, call(), strict=True):
        require(torch.equal(a, b) or (a.isnan() == b.isnan()).all(), "threads change the bits")
        require(torch.equal(a.nan_to_num(), b.nan_to_num()), "threads change the bits")
    return one


def close(got: Tensor, want: np.ndarray, relative: float, what: str) -> None:
    """Norm of the difference per row of the last dimension, and no NaN."""
    require(tuple(got.shape) == want.shape, f"{what}: shape {tuple(got.shape)}, not {want.shape}")
    error = np.linalg.norm(got.double().numpy() - want, axis=-1)
    size = np.linalg.norm(want, axis=-1)
    require((error <= relative * size + 1e-300).all(), f"{what}: error {error.max(initial=0):.2e}")


def fuzz_spd_solve(draw: Draw) -> None:
    n, k = draw.size(), draw.size(40)
    lead = draw.lead(n * max(n, k))
    A, B = draw.spd(*draw.part(lead), n), draw.normal(*draw.part(lead), n, k)
    a, b = draw.laid_out(A), draw.laid_out(B)
    damping = draw.damping(0.1, lead) if draw.random.random() < 0.7 else 0.0
    X, info = same_for_threads(draw, lambda: linalg.spd_solve_ex(a, b, damping=damping))
    require(not info.any(), "info is not 0")
    S, x = A.double().numpy() + shifted(damping, n), X.double().numpy()
    residual = np.linalg.norm(S @ x - B.double().numpy(), axis=(-2, -1))
    scale = np.linalg.norm(S, axis=(-2, -1)) * np.linalg.norm(x, axis=(-2, -1))
    require((residual <= 30 * max(n, 1) * draw.eps * scale).all(), "residual")


def fuzz_min_norm_solve(draw: Draw) -> None:
    n, k = draw.size(40), draw.size(5)
    lead = draw.lead(n * max(n, k))
    Q = np.linalg.qr(draw.random.standard_normal((*draw.part(lead), n, n)))[0]
    values = np.where(np.arange(n) < draw.random.integers(0, n + 1), 1.0, 0.0)
    B = draw.normal(*draw.part(lead), n, k)
    P = (Q * values) @ np.swapaxes(Q, -1, -2)  # a projector is its own pseudo-inverse
    A = torch.from_numpy(P).to(draw.dtype)
    X = linalg.min_norm_solve(draw.laid_out(A), draw.laid_out(B))
    want = P @ B.double().numpy()
    want = np.broadcast_to(want, X.shape)
    error = np.abs(X.double().numpy() - want).max(initial=0)
    require(error <= 100 * (n + 1) * draw.eps * (1 + abs(want).max(initial=0)), f"{error:.2e}")


def fuzz_weighted_gram(draw: Draw) -> None:
    m, n = draw.size(), draw.size(129)
    (batch,) = draw.lead(max(m, n * n))[:1] or (1,)
    Z, w = draw.normal(m, n), draw.slopes(batch, m)
    damping = draw.damping(0.1, (batch,))
    z, weights = draw.laid_out(Z), draw.laid_out(w)
    (G,) = same_for_threads(draw, lambda: (linalg.weighted_gram(z, weights, damping=damping),))
    rows, scale = Z.double().numpy(), w.double().numpy()
    want = np.einsum("mi,bm,mj->bij", rows, scale, rows, optimize=True)
    size = np.einsum("mi,bm,mj->bij", abs(rows), abs(scale), abs(rows), optimize=True)
    shift = shifted(damping, n)
    bound = (m + 4) * draw.eps * (size + shift)
    require((abs(G.double().numpy() - want - shift) <= bound).all(), "entries")


def family(draw: Draw) -> tuple[Tensor, Tensor, Tensor, float | Tensor]:
    """K, D, R and a damping of the size of the matrices: condition numbers of at most 11."""
    n = draw.size()
    (batch,) = draw.lead(n * n // 4 + n)[:1] or (1,)
    Z = draw.normal(n, n + 3)
    K, D, R = Z @ Z.mT / (n + 3), draw.slopes(batch, n), draw.normal(batch, n)
    largest = float((D.square().amax() if D.numel() else torch.tensor(0)) * 4)
    return K, D, R, draw.damping(0.1 * max(largest, 0.1), (batch,))


def scaled(K: Tensor, D: Tensor, R: Tensor, damping: float | Tensor) -> np.ndarray:
    d, r = D.double().numpy(), R.double().numpy()
    S = d[:, :, None] * K.double().numpy() * d[:, None, :] + shifted(damping, K.shape[0])
    return d * np.linalg.solve(S, r[..., None])[..., 0]


def fuzz_scaled_gram_solve(draw: Draw) -> None:
    K, D, R, damping = family(draw)
    k, d, r = (draw.laid_out(value) for value in (K, D, R))
    X, info = same_for_threads(draw, lambda: linalg.scaled_gram_solve_ex(k, d, r, damping=damping))
    require(not info.any(), "info is not 0")
    close(X, scaled(K, D, R, damping), 400 * (len(K) + 1) * draw.eps, "scaled_gram_solve")


def fuzz_scaled_gram_cg(draw: Draw) -> None:
    K, D, R, damping = family(draw)
    shared = "shared" if draw.random.random() < 0.5 and len(K) else None
    operands = [draw.laid_out(value) for value in (K, D, R)]
    result = linalg.scaled_gram_cg(*operands, damping=damping, preconditioner=shared)
    require(result.converged.all(), "not converged")
    relative = 1e-3 if draw.dtype == torch.float32 else 1e-8
    want = scaled(K, D, R, damping)
    error = np.linalg.norm(result.x.double().numpy() - want, axis=-1)
    # The residual is small against R, of which D y may be a small part.
    require((error <= relative * (np.linalg.norm(want, axis=-1) + 100)).all(), "scaled_gram_cg")


def fuzz_cg(draw: Draw) -> None:
    n, k = draw.size(65), draw.size(9)
    lead = draw.lead(n * max(n, k))
    A, B = draw.spd(*draw.part(lead), n), draw.normal(*draw.part(lead), n, k)
    damping = draw.damping(0.1, lead)
    a, b = draw.laid_out(A), draw.laid_out(B)
    result = same_for_threads(draw, lambda: linalg.cg(a, b, damping=damping))
    x, converged = result[0].double().numpy(), result[3]
    require(converged.all(), "not converged")
    want = np.linalg.solve(A.double().numpy() + shifted(damping, n), B.double().numpy())
    relative = 1e-3 if draw.dtype == torch.float32 else 1e-8
    require(np.linalg.norm(x - want) <= relative * np.linalg.norm(want) + 1e-300, "cg")


def fuzz_ridge(draw: Draw) -> None:
    m, n = draw.size(129), draw.size(129)
    (batch,) = draw.lead(max(m * n // 4, m, n))[:1] or (1,)
    Z, R = draw.normal(m, n), draw.normal(batch, m)
    slopes = draw.slopes(batch, m) if draw.random.random() < 0.7 else None
    s = np.ones((batch, m)) if slopes is None else slopes.double().numpy()
    J = s[:, :, None] * Z.double().numpy()
    norm = float(np.linalg.norm(J, axis=(-2, -1)).max(initial=0)) ** 2
    damping = draw.damping(0.1 * max(norm, 0.1), (batch,))
    d = linalg.ridge(
        draw.laid_out(Z),
        draw.laid_out(R),
        slopes=None if slopes is None else draw.laid_out(slopes),
        damping=damping,
    )
    right = np.swapaxes(J, -1, -2) @ R.double().numpy()[..., None]
    want = np.linalg.solve(np.swapaxes(J, -1, -2) @ J + shifted(damping, n), right)[..., 0]
    allowed = 100 * (m + n + 1) * draw.eps * (1 + np.linalg.norm(want, axis=-1))
    error = np.linalg.norm(d.double().numpy() - want, axis=-1)
    require(d.shape == want.shape, f"shape {tuple(d.shape)}")
    require((error <= allowed).all(), f"error {error.max(initial=0):.2e}")


TARGETS: dict[str, Callable[[Draw], None]] = {
    "spd_solve": fuzz_spd_solve,
    "min_norm_solve": fuzz_min_norm_solve,
    "weighted_gram": fuzz_weighted_gram,
    "scaled_gram_solve": fuzz_scaled_gram_solve,
    "scaled_gram_cg": fuzz_scaled_gram_cg,
    "cg": fuzz_cg,
    "ridge": fuzz_ridge,
}


def run_case(seed: int, number: int) -> str:
    """Case ``number`` of ``seed``; returns what it called."""
    name = list(TARGETS)[number % len(TARGETS)]
    levels = _C.build_info()["simd"]
    draw = Draw(seed, number)
    _C.set_simd_level(levels[int(draw.random.integers(len(levels)))])
    try:
        TARGETS[name](draw)
    except Exception as error:
        raise MismatchError(f"case {number} of seed {seed}, {name}: {error!r}") from error
    return name


def run(seed: int, seconds: float, verbose: bool = False) -> Counter[str]:
    """Cases 0, 1, .. of ``seed`` until the time is over; returns how many of each ran.

    Raises:
        MismatchError: with the number of the case.
    """
    done: Counter[str] = Counter()
    threads, active = torch.get_num_threads(), _C.build_info()["simd_active"]
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if verbose:
                print(f"case {done.total()}", flush=True)
            done[run_case(seed, done.total())] += 1
    finally:
        torch.set_num_threads(threads)
        _C.set_simd_level(active)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this one case")
    parser.add_argument("--out", type=Path, help="write seed, seconds and counts there as JSON")
    parser.add_argument("--verbose", action="store_true", help="name every case before it runs")
    options = parser.parse_args(arguments)
    try:
        if options.only is not None:
            print(run_case(options.seed, options.only), "agrees")
            return 0
        done = run(options.seed, options.seconds, options.verbose)
    except MismatchError as error:
        print(error, file=sys.stderr)
        return 1
    record = {"seed": options.seed, "seconds": options.seconds, "cases": done.total(), **done}
    print(json.dumps(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
