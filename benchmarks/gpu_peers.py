"""Peers that only a CUDA machine may have: CuPy's batched solve and a Warp tile kernel.

Both are optional. A peer that is not importable is left out with its reason, one that fails is
recorded by the harness as failed. The Warp kernel follows its documented tile functions
(``tile_cholesky``, ``tile_cholesky_solve``), one block per system.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backmatch.bench.case import Case

#: A tile must fit into shared memory with its factor.
_MOST_TILE = {torch.float32: 128, torch.float64: 96}
_BLOCK = 128


def with_peers(case: Case) -> Case:
    """``case`` with the importable peers of its question as further candidates."""
    if case.question != "spd_solve" or case.inputs[0][0].device.type != "cuda":
        return case
    more: dict[str, Callable[..., Tensor]] = {}
    n, dtype = case.about["n"], getattr(torch, case.about["dtype"])
    if module("cupy") is not None:
        more["cupy"] = by_cupy
    if module("warp") is not None and n <= _MOST_TILE[dtype]:
        more["warp tiles"] = lambda A, B: by_warp(A, B)
    return dataclasses.replace(case, candidates={**case.candidates, **more})


@functools.lru_cache
def module(name: str) -> Any:
    """The module, or ``None`` where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def by_cupy(A: Tensor, B: Tensor) -> Tensor:
    """CuPy's batched LU solve, on torch's memory and stream."""
    cupy = module("cupy")
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        X = cupy.linalg.solve(cupy.from_dlpack(A), cupy.from_dlpack(B))
    return torch.from_dlpack(X)


def by_warp(A: Tensor, B: Tensor) -> Tensor:
    """One block per system: load a tile, factor it, solve, store."""
    wp = module("warp")
    X = torch.empty_like(B)
    stream = wp.stream_from_torch(torch.cuda.current_stream())
    wp.launch_tiled(
        _kernel(A.shape[-1], A.dtype),
        dim=[len(A)],
        inputs=[wp.from_torch(A), wp.from_torch(B.squeeze(-1)), wp.from_torch(X.squeeze(-1))],
        block_dim=_BLOCK,
        stream=stream,
    )
    return X


@functools.lru_cache
def _kernel(n: int, dtype: torch.dtype) -> Any:
    wp = module("warp")
    wp.config.quiet = True
    scalar = {torch.float32: wp.float32, torch.float64: wp.float64}[dtype]
    size = wp.constant(n)

    def solve(A: Any, B: Any, X: Any) -> None:
        i = wp.tid()
        a = wp.tile_load(A[i], shape=(size, size))
        b = wp.tile_load(B[i], shape=size)
        wp.tile_store(X[i], wp.tile_cholesky_solve(wp.tile_cholesky(a), b))

    matrix, vector = wp.array(dtype=scalar, ndim=3), wp.array(dtype=scalar, ndim=2)
    solve.__annotations__ = {"A": matrix, "B": vector, "X": vector}
    name = f"solve_{n}_{scalar.__name__}"
    return wp.Kernel(solve, key=name, module=wp.get_module(name))
