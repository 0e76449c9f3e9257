"""Convolutional nets: whole steps and single problems, each beside its peer.

    python benchmarks/vision.py            # run, store results/vision.json, print the tables
    python benchmarks/vision.py --readme   # put stored tables into README.md, run nothing

- Whole steps: the exact step beside one back-propagation step of the same net, time and peak memory
  of tensors.
- Weights of convolution + ReLU: our direct solve and CG beside the patch matrix, per-channel Gram
  matrices and Cholesky written with torch.
- Inputs of convolution + ReLU: CG without preconditioner, with the diagonal, and with the circulant
  matrix of the mean slope (by FFT).

Answers are compared before anything is timed; candidates take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import stored
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

import backmatch as bm
from backmatch.blocks import Linearisation, adapt
from backmatch.problems import LeastSquares
from backmatch.solvers import Solver
from backmatch.training.peak_memory import PeakMemory

RESULTS = stored.RESULTS / "vision.json"
CPU = torch.device("cpu")
#: name -> (net, input shape)
STEPS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "cnn, 8x8, batch 128": (bm.models.cnn, (128, 1, 8, 8)),
    "resnet20, 8x8, batch 128": (lambda: bm.models.resnet20(1), (128, 1, 8, 8)),
    "vgg13_bn, 32x32, batch 8": (bm.models.vgg13_bn, (8, 3, 32, 32)),
}
#: channels in and out, side of the map, samples
LAYERS = ((16, 32, 8, 128), (64, 64, 16, 16), (128, 128, 8, 32))
Candidates = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--readme", action="store_true", help="put stored tables into README.md")
    arguments = parser.parse_args()
    if arguments.readme:
        stored.insert(readme(json.loads(RESULTS.read_text())), "vision")
        return
    torch.set_num_threads(arguments.threads)
    results = {
        "machine": stored.machine(),
        "weights": [weight_problem(*layer) for layer in LAYERS],
        "inputs": [input_problem(*layer, c) for layer in LAYERS[:2] for c in (0.1, 0.01)],
        "steps": [whole_step(name) for name in STEPS],
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(tables(results))


def whole_step(name: str) -> dict[str, Any]:
    build, shape = STEPS[name]
    torch.manual_seed(0)
    net, x, y = build(), torch.randn(shape), torch.randint(10, shape[:1])
    matcher = bm.BackMatching(bm.partition(net))

    def exact() -> bm.Step:
        return matcher.backward(x, lambda out: nnf.cross_entropy(out, y))

    def back_propagation() -> None:
        nnf.cross_entropy(net(x), y).backward()

    candidates: Candidates = {"exact": exact, "back_propagation": back_propagation}
    row: dict[str, Any] = {"net": name}
    for key, run in candidates.items():
        net.zero_grad()
        with PeakMemory(CPU) as memory:
            run()
        row[f"{key}_peak_mib"] = memory.total / 2**20
    records = [r for b in exact().blocks for r in (b.weight, b.input) if r is not None]
    row["most_iterations"] = max(r.iterations for r in records)
    row["worst_residual"] = max(r.residual for r in records if r.residual is not None)
    row |= timed(candidates, repeats=5)
    print(name, "done", flush=True)
    return row


def linearised(n_in: int, n_out: int, side: int, samples: int) -> tuple[nn.Conv2d, Linearisation]:
    """A convolution + ReLU on the output of a ReLU, as in the middle of a net."""
    torch.manual_seed(0)
    conv = nn.Conv2d(n_in, n_out, 3, padding=1)
    block = adapt("conv", nn.Sequential(conv, nn.ReLU()))
    z = torch.randn(samples, n_in, side, side).relu()
    return conv, block.forward(z, with_input=True, replayable=False)


def solved(solver: Solver, problem: LeastSquares) -> Any:
    return solver.solve(problem, solver.damping_for(problem))


def weight_problem(n_in: int, n_out: int, side: int, samples: int) -> dict[str, Any]:
    _, at = linearised(n_in, n_out, side, samples)
    problem = at.weight_problem(torch.randn(at.output.shape))
    direct, cg = bm.Cholesky(bm.Relative(0.1)), bm.CG(bm.Relative(0.1))
    resolved = direct.damping_for(problem)
    assert resolved is not None
    damping = float(resolved.values)
    z, mask, r = problem.patches.x, problem.slopes, problem.residual

    def torch_only() -> Tensor:
        P = nnf.unfold(z, 3, padding=1).transpose(1, 2).flatten(0, 1)
        P = torch.cat([P, P.new_ones(len(P), 1)], 1)
        weights, found = mask.transpose(0, 1).flatten(1), []
        step = max(1, 2**26 // P.numel())
        for part in torch.arange(n_out).split(step):
            J = weights[part].unsqueeze(2) * P
            H = (J.mT @ J) / samples
            H.diagonal(dim1=1, dim2=2).add_(damping)
            g = (J.mT @ r[part].unsqueeze(2)) / samples
            found.append(torch.cholesky_solve(g, torch.linalg.cholesky(H)).squeeze(2))
        return torch.cat(found)

    candidates: Candidates = {
        "direct": lambda: solved(direct, problem).step,
        "cg": lambda: solved(cg, problem).step,
        "torch": torch_only,
    }
    agree(candidates)
    layer = f"{n_in}->{n_out}, {side}x{side}, batch {samples}"
    iterations = solved(cg, problem).record.iterations
    print("weights", layer, "done", flush=True)
    return {"layer": layer, "cg_iterations": iterations, **timed(candidates, repeats=3)}


def input_problem(n_in: int, n_out: int, side: int, samples: int, factor: float) -> dict[str, Any]:
    conv, at = linearised(n_in, n_out, side, samples)
    problem = at.input_problem(torch.randn(at.output.shape))
    row: dict[str, Any] = {
        "layer": f"{n_in}->{n_out}, {side}x{side}, batch {samples}",
        "damping": f"rel:{factor:g}",
    }

    def circulant(family: LeastSquares, damping: float | Tensor) -> Callable[[Tensor], Tensor]:
        return circulant_inverse(conv.weight.detach(), side, family.slopes, damping)

    choices = {"plain": None, "jacobi": "jacobi", "circulant": circulant}
    solvers = {k: bm.CG(bm.Relative(factor), preconditioner=c) for k, c in choices.items()}
    for key, solver in solvers.items():
        row[f"{key}_iterations"] = solved(solver, problem).record.iterations
    candidates: Candidates = {k: (lambda s=s: solved(s, problem).step) for k, s in solvers.items()}
    agree(candidates)
    print("inputs", row["layer"], "done", flush=True)
    return row | timed(candidates, repeats=3)


def circulant_inverse(
    weight: Tensor, side: int, slopes: Tensor, damping: float | Tensor
) -> Callable[[Tensor], Tensor]:
    """(mean slope^2 C^T C + mean damping I)^-1, C the convolution with periodic boundaries."""
    n_out, n_in = weight.shape[:2]
    kernel = weight.new_zeros(n_out, n_in, side, side)
    for i in range(3):
        for j in range(3):
            kernel[:, :, (1 - i) % side, (1 - j) % side] += weight[:, :, i, j]
    spectrum = torch.fft.rfft2(kernel).permute(2, 3, 0, 1)
    gram = slopes.square().mean() * (spectrum.mH @ spectrum)
    shift = torch.as_tensor(damping).mean()
    inverse = torch.linalg.inv(gram + shift * torch.eye(n_in))

    def apply(residual: Tensor) -> Tensor:
        maps = torch.fft.rfft2(residual.view(-1, n_in, side, side))
        found = torch.einsum("hwab,mbhw->mahw", inverse, maps)
        return torch.fft.irfft2(found, s=(side, side)).reshape(residual.shape)

    return apply


def agree(candidates: Candidates) -> None:
    """All answers within 1 % in norm (CG stops at a residual of 1e-5)."""
    first, *others = (run() for run in candidates.values())
    for other in others:
        error = torch.linalg.vector_norm(other - first) / torch.linalg.vector_norm(first)
        assert error < 1e-2, f"answers differ by {error:.1e}"


def timed(candidates: Candidates, repeats: int) -> dict[str, float]:
    """Median milliseconds; the candidates take turns, after one round that does not count."""
    times: dict[str, list[float]] = {key: [] for key in candidates}
    for round_ in range(repeats + 1):
        for key, run in candidates.items():
            began = time.perf_counter()
            run()
            if round_:
                times[key].append(1e3 * (time.perf_counter() - began))
    return {f"{key}_ms": statistics.median(values) for key, values in times.items()}


def tables(results: dict[str, Any]) -> str:
    """One aligned table for each question."""
    parts = []
    for question in ("weights", "inputs", "steps"):
        rows = results[question]
        lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        parts.append(
            "\n".join("  ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) for x in lines)
        )
    return "\n\n".join(parts)


def readme(results: dict[str, Any]) -> str:
    """Whole steps as Markdown."""
    lines = [
        "| one step | exact | back-propagation | ratio | exact, peak memory | back-propagation |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["steps"]:
        times = [row["exact_ms"], row["back_propagation_ms"]]
        sizes = [row["exact_peak_mib"], row["back_propagation_peak_mib"]]
        cells = [row["net"], *(f"{t:.0f} ms" for t in times), f"{times[0] / times[1]:.0f}"]
        lines.append("| " + " | ".join([*cells, *(f"{size:.0f} MiB" for size in sizes)]) + " |")
    m = results["machine"]
    where = (
        f"Median steps; memory of tensors. {m['date']}, {m['cpu']}, threads: {m['threads']}, "
        f"torch {m['torch']}, Python {m['python']}, float32."
    )
    return "\n".join([*lines, "", where])


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
