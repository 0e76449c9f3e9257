"""The native CPU kernels called with raw addresses, as the operators do, and their inputs."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from backmatch import _C

SIZES = (0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 97, 129, 200, 257)
DTYPES = (torch.float32, torch.float64)
FILL = 7.0  # results start as this, so that an entry nobody wrote shows


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def per_system(damping: Tensor) -> tuple[int, int]:
    return damping.data_ptr(), damping.stride(0) if damping.numel() > 1 else 0


def spd_solve(A: Tensor, B: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, k = B.shape
    X = torch.full((batch, n, k), FILL, dtype=A.dtype)
    info = torch.full((batch,), -1, dtype=torch.int32)
    matrix, rhs = (A.data_ptr(), *A.stride()), (B.data_ptr(), *B.stride())
    out = X.data_ptr(), info.data_ptr()
    _C.spd_solve(name(A.dtype), batch, n, k, *matrix, *per_system(damping), *rhs, *out)
    return X, info


def scaled_gram_solve(K: Tensor, D: Tensor, R: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    batch, n = D.shape
    X = torch.full((batch, n), FILL, dtype=K.dtype)
    info = torch.full((batch,), -1, dtype=torch.int32)
    systems = K.data_ptr(), *K.stride(), D.data_ptr(), *D.stride(), R.data_ptr(), *R.stride()
    out = X.data_ptr(), info.data_ptr()
    _C.scaled_gram_solve(name(K.dtype), batch, n, *systems, *per_system(damping), *out)
    return X, info


def weighted_gram(Z: Tensor, w: Tensor, damping: Tensor) -> Tensor:
    (m, n), batch = Z.shape, len(w)
    G = torch.full((batch, n, n), FILL, dtype=Z.dtype)
    inputs = Z.data_ptr(), *Z.stride(), w.data_ptr(), *w.stride(), *per_system(damping)
    _C.weighted_gram(name(Z.dtype), batch, m, n, *inputs, G.data_ptr())
    return G


def cg(
    A: Tensor, B: Tensor, damping: Tensor, rtol: float, max_steps: int, x0: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n, k = B.shape
    X = torch.zeros((batch, n, k), dtype=A.dtype) if x0 is None else x0.clone()
    iterations = torch.full((batch, k), -1)
    residual = torch.full((batch, k), FILL, dtype=A.dtype)
    converged = torch.full((batch, k), 7, dtype=torch.uint8)
    systems = A.data_ptr(), *A.stride(), *per_system(damping), B.data_ptr(), *B.stride()
    out = [t.data_ptr() for t in (X, iterations, residual, converged)]
    _C.cg(name(A.dtype), batch, n, k, *systems, rtol, max_steps, *out)
    return X, iterations, residual, converged


def random_spd(batch: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Wishart matrices plus I / 2: condition numbers of about 10."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(batch, n, n + 3, generator=generator, dtype=torch.float64)
    A = Z @ Z.mT / (n + 3) + 0.5 * torch.eye(n, dtype=torch.float64)
    return A.to(dtype)


def random_tensor(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_slopes(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    """Slopes with a share of exact zeros that runs from none to all over the batch."""
    generator = torch.Generator().manual_seed(2)
    active = torch.rand(batch, n, generator=generator) < torch.linspace(1, 0, batch)[:, None]
    return random_tensor(batch, n, dtype=dtype, seed=3) * active


def damped(A: Tensor, damping: Tensor) -> np.ndarray:
    n = A.shape[-1]
    return A.double().numpy() + damping.double().numpy()[:, None, None] * np.eye(n)


def backward_error(A: np.ndarray, X: Tensor, B: np.ndarray, dtype: torch.dtype) -> float:
    """Worst |A x - b| / (|A| |x| n eps) over the batch; A in float64."""
    x, eps = X.double().numpy(), torch.finfo(dtype).eps
    residual = np.linalg.norm(A @ x - B, axis=(1, 2))
    scale = np.linalg.norm(A, axis=(1, 2)) * np.linalg.norm(x, axis=(1, 2)) * A.shape[-1] * eps
    return float((residual / scale).max())


def scipy_solve(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    pairs = zip(A, B, strict=True)
    return np.stack([scipy.linalg.cho_solve(scipy.linalg.cho_factor(a), b) for a, b in pairs])
