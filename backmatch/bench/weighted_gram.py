"""Z^T diag(w_j) Z for many weightings of one Z: against einsum, bmm and a loop of products.

Half of the weights are zero, as after ReLU. Peak memory shows whether a (batch, m, n) temporary is
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import linalg
from .accuracy import WORST, gram_error
from .case import OURS, Case, Settings, dtype_name, rotated
from .scaled_gram import peaks

SIZES, QUICK_SIZES = (32, 64, 128, 256, 512), (32, 128)
ROWS, QUICK_ROWS = 512, 128


def cases(settings: Settings) -> Iterator[Case]:
    """One case per dtype and n."""
    rows = QUICK_ROWS if settings.quick else ROWS
    for dtype in settings.dtypes:
        for n in settings.sizes(SIZES, QUICK_SIZES):
            # The peers' temporary counts too, else it would not fit beside the result.
            batch = settings.batch(max(rows, n) * n * dtype.itemsize)
            yield case(settings, "weighted_gram", rows, n, batch, dtype)


def case(settings: Settings, question: str, m: int, n: int, batch: int, dtype: torch.dtype) -> Case:
    """``batch`` weightings of one Z (m, n)."""
    generator = settings.generator(n)
    Z = torch.randn(m, n, generator=generator, dtype=dtype).to(settings.device)
    w = torch.rand(batch, m, generator=generator, dtype=dtype)
    w = torch.where(w > 0.5, w, 0.0).to(settings.device)
    active = int((w != 0).sum())
    candidates: dict[str, Callable[..., Tensor]] = {
        OURS: lambda Z, w: linalg.weighted_gram(Z, w),
        "einsum": lambda Z, w: torch.einsum("mi,jm,mk->jik", Z, w, Z),
        "bmm": lambda Z, w: (Z.T * w.unsqueeze(1)) @ Z,
        "loop": by_loop,
    }

    def extra(right: Sequence[str]) -> dict[str, object]:
        if settings.quick or n != 256:
            return {}
        sizes = {
            "result_bytes": batch * n * n * dtype.itemsize,
            "batch_m_n_bytes": batch * m * n * dtype.itemsize,
        }
        return peaks({name: candidates[name] for name in right}, (Z, w), settings.device) | sizes

    return Case(
        question=question,
        about={"n": n, "batch": batch, "m": m, "dtype": dtype_name(dtype)},
        inputs=rotated((Z,), (w,), settings.quick),
        candidates=candidates,
        error=lambda inputs, G: gram_error(inputs[0], inputs[1], G),
        bound=WORST,
        residual="|G - Z'WZ| / (|Z|'|W||Z| m eps)",
        # Multiplications and additions of one triangle; the other one is its mirror.
        flops=float(active * n * (n + 1)),
        bytes=dtype.itemsize * (m * n + batch * (m + n * n)),
        shared=1,
        batch=batch,
        extra=extra,
    )


def by_loop(Z: Tensor, w: Tensor) -> Tensor:
    """One product after the other; each fits the caches."""
    n = Z.shape[1]
    G = Z.new_empty(len(w), n, n)
    for row, out in zip(w, G, strict=True):
        torch.mm(Z.T * row, Z, out=out)
    return G
