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

#: Residual |H v - theta v| / |theta_max| at which an eigenpair has converged. The eigenvalue is off
#: by no more than that, and by its square over the gap to the next one.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-11}
#: Steps of the torch route: per wanted eigenvalue, and at least.
STEPS_EACH, LEAST_STEPS = 40, 1000
#: Steps between two looks at the Ritz values.
LOOK_EVERY = 8


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
    norm = torch.linalg.vector_norm
    if not bool(norm(product(_start(like, 0))) > 0):
        return like.new_zeros(k)
    values, vectors = run(product, like, k, 0)
    slack = 8 * TOLERANCE[like.dtype]
    for seed in range(1, like.numel() - k + 1):
        rest = _restricted(product, vectors)
        sizes = values.abs()
        smallest = int(sizes.argmin())
        start = _start(like, seed)
        # What is left of an operator of lower rank is rounding, in which no eigenpair converges.
        if not bool(norm(rest(start)) > slack * sizes.max() * norm(start)):
            break
        found, vector = run(rest, like, 1, seed)
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
    """SciPy's ``eigsh``."""
    dtype = np.dtype(str(like.dtype).removeprefix("torch."))

    def matvec(v: np.ndarray) -> np.ndarray:
        out = product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(like))
        return out.cpu().numpy()

    n = like.numel()
    operator = LinearOperator((n, n), matvec=matvec, dtype=dtype)
    try:
        values, vectors = eigsh(
            operator,
            k=k,
            which="LM",
            v0=_start(like, seed).cpu().numpy(),
            tol=TOLERANCE[like.dtype],
        )
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"Lanczos found {len(error.eigenvalues)} of {k} eigenvalues before its cap of "
            f"{n * 10} restarts; ask for fewer (k) or pass a smaller batch"
        ) from error
    return torch.from_numpy(values).to(like), torch.from_numpy(vectors).to(like)


def torch_lanczos(product: Product, like: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same on any device: one process, fully reorthogonalised (Paige 1972).

    An exhausted Krylov space goes on with a new direction, so that the basis can always grow to
    the whole space. A Ritz pair's residual is |beta s|, s the last entry of its vector.
    """
    n, eps = like.numel(), torch.finfo(like.dtype).eps
    cap = min(n, max(LEAST_STEPS, STEPS_EACH * k))
    following = _unit(_start(like, seed))
    basis = like.new_empty(min(cap, 64), n)
    T = like.new_zeros(cap, cap)
    for j in range(cap):
        if j == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[j] = following
        w = product(basis[j])
        T[j, j] = torch.dot(w, basis[j])
        w = _orthogonal(w, basis[: j + 1])
        beta = torch.linalg.vector_norm(w)
        steps = j + 1
        if steps in (cap, n) or (steps >= k and steps % LOOK_EVERY == 0):
            found = _converged(T[:steps, :steps], beta, k, steps == n)
            if found is not None:
                return found[0], basis[:steps].mT @ found[1]
        if bool(beta <= 4 * eps * T.abs().max()):
            following = _unit(_orthogonal(_start(like, seed + 7919 * steps), basis[:steps]))
        elif steps < cap:
            following = w / beta
            T[j, j + 1] = T[j + 1, j] = beta
    raise NotConvergedError(
        f"Lanczos did not settle {k} eigenvalues within {cap} steps; ask for fewer (k) or pass a "
        "smaller batch"
    )


def _converged(T: Tensor, beta: Tensor, k: int, whole: bool) -> tuple[Tensor, Tensor] | None:
    """The k Ritz values of largest magnitude and their vectors in the basis, once they stand."""
    ritz, S = torch.linalg.eigh(T)
    wanted = ritz.abs().argsort(descending=True)[:k]
    left = (beta * S[-1, wanted]).abs()
    if whole or bool((left <= TOLERANCE[T.dtype] * ritz.abs().max()).all()):
        return ritz[wanted], S[:, wanted]
    return None


def _orthogonal(w: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        w = w - basis.mT @ (basis @ w)
    return w


def _unit(v: Tensor) -> Tensor:
    unit: Tensor = v / torch.linalg.vector_norm(v)
    return unit
