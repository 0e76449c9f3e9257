"""The eigenvalues of largest magnitude of a symmetric operator, copies of multiple ones included.

A Krylov space holds one copy of a multiple eigenvalue in exact arithmetic, and local Hessians have
many: every output unit of a Linear shares one matrix. So after each run the operator is restricted
to what is orthogonal to the eigenvectors found, and run again, until that shows nothing larger.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from ..errors import NotConvergedError

#: H v for a flat v.
Product = Callable[[Tensor], Tensor]
#: (product, like, k, seed) -> k eigenvalues (k,) and their vectors (size, k).
Run = Callable[[Product, Tensor, int, int], tuple[Tensor, Tensor]]

#: Steps of the torch route per wanted eigenvalue, at least 300.
STEPS_EACH = 40


def extreme_eigenvalues(product: Product, like: Tensor, k: int, run: Run | None = None) -> Tensor:
    """The k eigenvalues of largest magnitude, in no special order, in the dtype of ``like``.

    Args:
        product: H v, symmetric.
        like: an empty vector of the operator's size, dtype and device.
        k: below the size.
        run: one Lanczos run: :func:`arpack` on the CPU and :func:`torch_lanczos` on CUDA.

    Raises:
        NotConvergedError: Lanczos stopped at its cap.
    """
    if run is None:
        run = torch_lanczos if like.is_cuda else arpack
    values, vectors = run(product, like, k, 0)
    slack = 8 * torch.finfo(like.dtype).eps * like.numel() ** 0.5
    for seed in range(1, like.numel() - k + 1):
        found, vector = run(_restricted(product, vectors), like, 1, seed)
        sizes = values.abs()
        smallest = int(sizes.argmin())
        if not bool(found[0].abs() > sizes[smallest] + slack * sizes.max()):
            break
        values[smallest], vectors[:, smallest] = found[0], vector[:, 0]
        vectors = torch.linalg.qr(vectors).Q
    return values


def _restricted(product: Product, vectors: Tensor) -> Product:
    def project(v: Tensor) -> Tensor:
        return v - vectors @ (vectors.mT @ v)

    return lambda v: project(product(project(v)))


def _start(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(like.numel(), generator=generator, dtype=torch.float64, device="cpu")
    return start.to(like)


def arpack(product: Product, like: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """SciPy's ``eigsh`` to the precision of the dtype."""
    dtype = np.dtype(str(like.dtype).removeprefix("torch."))

    def matvec(v: np.ndarray) -> np.ndarray:
        out = product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(like))
        return out.cpu().numpy()

    n = like.numel()
    operator = LinearOperator((n, n), matvec=matvec, dtype=dtype)
    try:
        values, vectors = eigsh(operator, k=k, which="LM", v0=_start(like, seed).cpu().numpy())
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"Lanczos found {len(error.eigenvalues)} of {k} eigenvalues before its cap of "
            f"{n * 10} restarts; ask for fewer (k) or pass a smaller batch"
        ) from error
    return torch.from_numpy(values).to(like), torch.from_numpy(vectors).to(like)


def torch_lanczos(product: Product, like: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same on any device: one process, fully reorthogonalised (Paige 1972).

    An exhausted Krylov space goes on with a new direction, so that the basis can always grow to
    the whole space. Stops when the residual |beta s| of every wanted Ritz pair is rounding.
    """
    n, eps = like.numel(), torch.finfo(like.dtype).eps
    cap = min(n, max(300, STEPS_EACH * k))
    basis = like.new_zeros(cap, n)
    basis[0] = _unit(_start(like, seed))
    T = like.new_zeros(cap, cap)
    generator = torch.Generator().manual_seed(seed + 1)
    for j in range(cap):
        w = product(basis[j])
        T[j, j] = torch.dot(w, basis[j])
        w = _orthogonal(w, basis[: j + 1])
        beta = torch.linalg.vector_norm(w)
        checked = j + 1 == cap or (j + 1 >= k and (j + 1) % 8 == 0)
        if checked:
            ritz, S = torch.linalg.eigh(T[: j + 1, : j + 1])
            wanted = ritz.abs().argsort(descending=True)[:k]
            scale = ritz.abs().max()
            left = (beta * S[-1, wanted]).abs()
            if j + 1 == n or (j + 1 >= k and bool((left <= 4 * eps * scale).all())):
                return ritz[wanted], basis[: j + 1].mT @ S[:, wanted]
        if j + 1 < cap:
            if bool(beta <= 4 * eps * T[: j + 1, : j + 1].abs().max()):
                fresh = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
                basis[j + 1] = _unit(_orthogonal(fresh.to(like), basis[: j + 1]))
            else:
                basis[j + 1] = w / beta
                T[j, j + 1] = T[j + 1, j] = beta
    raise NotConvergedError(
        f"Lanczos did not settle {k} eigenvalues within {cap} steps; ask for fewer (k) or pass a "
        "smaller batch"
    )


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        w = w - basis.mT @ (basis @ w)
    return w


def _unit(v: Tensor) -> Tensor:
    unit: Tensor = v / torch.linalg.vector_norm(v)
    return unit
