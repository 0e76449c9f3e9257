"""Calls the emulated conjugate gradient kernels with NumPy arrays, every access checked."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np
from cuda_cases import DEFAULT
from cuda_host_library import CudaHost, Guarded

_PRECISIONS = {"float32": ("float", ctypes.c_float), "float64": ("double", ctypes.c_double)}
_POINTERS = ("damping", "upper", "lower", "iterations", "residual", "converged")
_POINTERS += ("rho", "target", "running", "alive", "steps")


class Result(NamedTuple):
    x: np.ndarray
    iterations: np.ndarray
    residual: np.ndarray
    converged: np.ndarray


def _arguments(dtype: np.dtype, fields: str, **values: object) -> ctypes.Structure:
    """An argument struct of csrc/kernels.h; what is upper case or in _POINTERS is a pointer."""
    kinds = {"rtol": _PRECISIONS[dtype.name][1], "preconditioned": ctypes.c_bool}
    named = []
    for name in fields.split():
        pointer = name[0].isupper() or name in _POINTERS
        default = ctypes.c_void_p if pointer else ctypes.c_int64
        named.append((name, kinds.get(name, default)))
    struct = type("Args", (ctypes.Structure,), {"_fields_": named})()
    for name, value in values.items():
        setattr(struct, name, value)
    return struct


def _call(cuda: CudaHost, stem: str, dtype, arguments, inputs, outputs, device, *tail) -> None:
    """Watches the outputs but for flags, which the shadow of 4 byte words cannot tell apart."""
    outputs = {k: v for k, v in outputs.items() if k == "workspace" or v.array.itemsize >= 4}
    launch = getattr(cuda._library, f"{stem}_{_PRECISIONS[np.dtype(dtype).name][0]}")
    launch.argtypes = [ctypes.c_void_p] * (1 + len(tail))
    launch.restype = ctypes.c_char_p
    with cuda._watching(device, inputs, outputs):
        cuda._raise(launch(ctypes.byref(arguments), *tail))


def _assert_untouched(arrays: dict[str, Guarded]) -> None:
    """Arrays that are not watched (flags, and what is read and written) keep the bytes around."""
    for name, guarded in arrays.items():
        start = guarded.address - guarded._memory.ctypes.data
        around = np.delete(guarded._memory, slice(start, start + guarded.extent))
        assert (around == 0xFF).all(), f"write out of bounds of {name}"


def _status(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Guarded]:
    kinds = {"iterations": np.dtype(np.int64), "residual": dtype, "converged": np.dtype(np.uint8)}
    return {name: Guarded.contiguous(shape, kind) for name, kind in kinds.items()}


def _result(X: Guarded, status: dict[str, Guarded]) -> Result:
    arrays = [value.array for value in status.values()]
    return Result(X.array, *arrays[:2], arrays[2].astype(bool))


def cg(cuda, A, damping, B, rtol, max_steps, x0=None, device=DEFAULT) -> Result:
    """A (batch, n, n), damping (batch,), B (batch, n, k)."""
    batch, n, k = B.shape
    dtype = B.dtype
    inputs = {k_: Guarded.copy_of(v) for k_, v in (("A", A), ("damping", damping), ("B", B))}
    X = Guarded.copy_of(np.zeros(B.shape, dtype) if x0 is None else np.ascontiguousarray(x0))
    status = _status((batch, k), dtype)
    steps = {name: value.element_strides() for name, value in inputs.items()}
    arguments = _arguments(
        dtype,
        "batch n k A a_batch a_row a_col damping damping_stride B b_batch b_row b_col rtol "
        "max_steps X iterations residual converged",
        **{"batch": batch, "n": n, "k": k, "rtol": rtol, "max_steps": max_steps, "X": X.address},
        **{name: value.address for name, value in (inputs | status).items()},
        **dict(zip(("a_batch", "a_row", "a_col"), steps["A"], strict=True)),
        **dict(zip(("b_batch", "b_row", "b_col"), steps["B"], strict=True)),
        damping_stride=steps["damping"][0],
    )
    _call(cuda, "cg", dtype, arguments, inputs, status, device)
    _assert_untouched({"X": X, "converged": status["converged"]})
    return _result(X, status)


def scaled_gram_cg(cuda, K, D, R, damping, rtol, max_steps, inverse=None, device=DEFAULT) -> Result:
    """K (n, n), D and R (batch, n), damping (batch,); inverse: L^-1 (n, n) of L L^T."""
    batch, n = R.shape
    dtype = R.dtype
    given = {"K": K, "D": D, "R": R, "damping": damping}
    if inverse is not None:
        given |= {"upper": np.ascontiguousarray(inverse.T), "lower": np.ascontiguousarray(inverse)}
    inputs = {name: Guarded.copy_of(value) for name, value in given.items()}
    X, status = Guarded.contiguous((batch, n), dtype), _status((batch,), dtype)
    steps = {name: value.element_strides() for name, value in inputs.items()}
    arguments = _arguments(
        dtype,
        "batch n K k_row k_col D d_batch d_col R r_batch r_col damping damping_stride upper lower "
        "rtol max_steps X iterations residual converged",
        **{"batch": batch, "n": n, "rtol": rtol, "max_steps": max_steps, "X": X.address},
        **{name: value.address for name, value in (inputs | status).items()},
        **dict(zip(("k_row", "k_col"), steps["K"], strict=True)),
        **dict(zip(("d_batch", "d_col"), steps["D"], strict=True)),
        **dict(zip(("r_batch", "r_col"), steps["R"], strict=True)),
        damping_stride=steps["damping"][0],
    )
    _call(cuda, "scaled_gram_cg", dtype, arguments, inputs, {"X": X, **status}, device)
    _assert_untouched({"converged": status["converged"]})
    return _result(X, status)


class Loop:
    """The arrays of the fused steps; ``step`` and ``direction`` change copies of them."""

    FIELDS = "P Q X R rho target running alive steps"

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def run(self, cuda, stem, max_steps=10**6, preconditioned=False, device=DEFAULT) -> Loop:
        """The arrays after ``cg_step`` or ``cg_direction``, which also takes Z."""
        memory = {name: Guarded.copy_of(value) for name, value in self.arrays.items()}
        systems, n = self.arrays["P"].shape
        dtype = self.arrays["P"].dtype
        precision = _PRECISIONS[dtype.name][0]
        fields = {
            "cg_step": f"systems n max_steps preconditioned {self.FIELDS}",
            "cg_direction": "systems n R Z P rho running",
        }[stem]
        values = {"systems": systems, "n": n, "max_steps": max_steps}
        values |= {"preconditioned": preconditioned}
        values |= {name: value.address for name, value in memory.items()}
        chosen = {name: value for name, value in values.items() if name in fields.split()}
        arguments = _arguments(dtype, fields, **chosen)
        size = getattr(cuda._library, f"cg_step_workspace_{precision}")
        size.argtypes, size.restype = [ctypes.c_int64] * 2, ctypes.c_int64
        cuda._watching(device, {}, {})
        workspace = Guarded.contiguous((size(systems, n),), np.dtype(np.uint8))
        outputs = {"workspace": workspace} if workspace.extent else {}
        _call(cuda, stem, dtype, arguments, {}, outputs, device, workspace.address)
        _assert_untouched(memory)
        return Loop(**{name: value.array for name, value in memory.items()})
