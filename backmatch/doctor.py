"""``backmatch doctor``: what runs here, how it was built, and whether it computes rightly."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from . import __version__, linalg, reference
from .errors import MissingExtensionError
from .linalg import _library
from .matching import BackMatching
from .solvers import Gradient
from .training.progress import say

_OPTIONAL = ("rich", "matplotlib", "scikit-learn")


def run() -> int:
    """Print the report; returns 0 if every check passed, else 1."""
    for title, lines in (
        (f"backmatch {__version__}", _versions()),
        ("native core", _build()),
        ("devices", _devices()),
    ):
        say(title)
        for line in lines:
            say("  " + line)
    say("self-check")
    passed = [_passes(device) for device in _checked_devices()]
    say("all is well" if all(passed) else "something is wrong: see the FAILED lines")
    return 0 if all(passed) else 1


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scipy")
    )
    for name in _OPTIONAL:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed (optional)"


def _build() -> Iterator[str]:
    try:
        info = _library.native().build_info()
    except MissingExtensionError as error:
        yield f"FAILED {error}"
        return
    yield f"version {info['version']}, compiler {info['compiler']}"
    yield f"OpenMP {'yes' if info['openmp'] else 'no'}, threads {torch.get_num_threads()}"
    yield f"SIMD {', '.join(info['simd'])}; in use {info['simd_active']}"
    if info["cuda"]:
        yield f"CUDA {info['cuda_version']} for {info['cuda_architectures']}"
    else:
        yield "CUDA: not built in (no nvcc when it was built, or BACKMATCH_CUDA=0)"


def _devices() -> Iterator[str]:
    yield f"cpu: {platform.processor() or platform.machine()}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield f"cuda: none ({f'torch is built for {built}' if built else 'torch is a CPU build'})"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        yield f"cuda:{index}: {device.name}, {memory:.0f} GiB, sm_{device.major}{device.minor}"


def _checked_devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    if torch.cuda.is_available() and _has_cuda_kernels():
        yield torch.device("cuda")


def _has_cuda_kernels() -> bool:
    try:
        return hasattr(_library.native(), "cuda")
    except MissingExtensionError:
        return False


def _passes(device: torch.device) -> bool:
    checks: tuple[tuple[str, Callable[[torch.device], float]], ...] = (
        ("spd_solve equals the NumPy reference", solve_error),
        ("Gradient on both sides equals autograd", gradient_error),
    )
    passed = True
    for name, check in checks:
        try:
            error = check(device)
            good, detail = error < 1e-10, f"relative error {error:.1e}"
        except Exception as failure:  # a report must go on: the failure is what it reports
            good, detail = False, f"{type(failure).__name__}: {failure}"
        say(f"  {'OK    ' if good else 'FAILED'} {device.type}: {name} ({detail})")
        passed = passed and good
    return passed


def solve_error(device: torch.device) -> float:
    """Relative difference of ``spd_solve`` from the reference over five seeded systems, float64."""
    random = np.random.default_rng(0)
    factor = random.standard_normal((5, 33, 40))
    A, B = factor @ factor.transpose(0, 2, 1), random.standard_normal((5, 33, 2))
    expected = reference.spd_solve(A, B, damping=0.1)
    X = linalg.spd_solve(
        torch.from_numpy(A).to(device), torch.from_numpy(B).to(device), damping=0.1
    )
    difference = np.abs(X.cpu().numpy() - expected).max() / np.abs(expected).max()
    return float(difference)


def gradient_error(device: torch.device) -> float:
    """Relative difference of the sweep with :class:`Gradient` from autograd, float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).to(device, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values / 3)
    x = torch.randn(11, 7, generator=generator, dtype=torch.float64).to(device)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    matcher = BackMatching(model, weights=Gradient(), inputs=Gradient())
    matcher.backward(x, lambda output: output.square().mean())
    worst = 0.0
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        scale = float(gradient.abs().max())
        worst = max(worst, float((parameter.grad - gradient).abs().max()) / scale)
    return worst
