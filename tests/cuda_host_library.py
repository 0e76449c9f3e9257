"""Builds the CUDA kernels for the host, on the block emulator, and calls them with NumPy arrays.

The kernel sources in ``csrc/cuda`` are compiled unmodified; see ``tests/cuda_host/emulator.h`` for
how they run and ``memory_check.h`` for what is checked on every memory access.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from filelock import FileLock

REPOSITORY = Path(__file__).parent.parent
KERNELS = REPOSITORY / "csrc" / "cuda"
HOST = Path(__file__).parent / "cuda_host"
#: Every kernel has a header of its own; device.cu, which has none, asks the driver.
KERNEL_SOURCES = tuple(
    path.name for path in sorted(KERNELS.glob("*.cu")) if path.with_suffix(".cuh").exists()
)

COMMON = ("-std=c++17", "-O2", "-fPIC")
#: Of what runs as a kernel; memory_check.cpp takes the sanitizer's place. At the lower level fewer
#: accesses are merged before they are seen.
INSTRUMENTED = ("-O1", "-fsanitize=thread")

GUARD_BYTES = 512
H100_SHARED_BYTES = 232448


@dataclass(frozen=True)
class Device:
    """What the emulated device looks like; ``seed`` draws the order of threads and blocks."""

    seed: int = 0
    shared_bytes: int = H100_SHARED_BYTES
    multiprocessors: int = 2


class FindingError(AssertionError):
    """The emulator saw a race, a stray access, a deadlock or a launch that a device refuses."""


# ---- build ---------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The C++ compiler of the system, or an error: the package itself needs one to build."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("no C++ compiler found: install g++ or set CXX")


def build(cache: Path, kernels: Path = KERNELS) -> Path:
    """Compiles the shared library into ``cache``, or finds the one of the same sources there."""
    sources = sorted(
        [*kernels.glob("*.cu*"), *kernels.rglob("*.h"), kernels.parent / "kernels.h"]
        + [p for p in HOST.iterdir() if p.is_file()]
    )
    digest = hashlib.sha256(" ".join([*compiler(), *COMMON, *INSTRUMENTED]).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    library = cache / f"cuda_host_{digest.hexdigest()[:16]}.so"
    with FileLock(library.with_suffix(".lock")):  # parallel workers ask for the same one
        if not library.exists():
            _compile(library, kernels)
    return library


def _compile(library: Path, kernels: Path) -> None:
    objects = library.with_suffix(".objects")
    objects.mkdir(parents=True, exist_ok=True)
    common = [*compiler(), *COMMON, f"-I{HOST}", f"-I{kernels}"]
    instrumented = [*common, *INSTRUMENTED]
    jobs = [(common, HOST / "emulator.cpp"), (common, HOST / "memory_check.cpp")]
    jobs += [(instrumented, HOST / "driver.cpp")]
    jobs += [(instrumented, HOST / "driver_krylov.cpp")]
    jobs += [(instrumented, kernels / name) for name in KERNEL_SOURCES]
    outputs = [str(objects / (source.stem + ".o")) for _, source in jobs]
    commands = [
        [*flags, "-x", "c++", "-c", str(source), "-o", output]
        for (flags, source), output in zip(jobs, outputs, strict=True)
    ]
    with ThreadPool(2) as pool:
        pool.map(_run, commands)
    scratch = library.with_suffix(f".{os.getpid()}")
    _run([*compiler(), "-shared", *outputs, "-o", str(scratch)])
    scratch.rename(library)  # at once, so that parallel sessions never see half a library
    shutil.rmtree(objects)


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


# ---- memory --------------------------------------------------------------------------------------


class Guarded:
    """An array of given strides in its own memory, every byte around its elements poisoned.

    It starts ``offset`` bytes behind a multiple of 16.
    """

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, offset: int = 0
    ) -> None:
        empty = 0 in shape
        reach = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        self.extent = 0 if empty else reach + dtype.itemsize
        self._memory = np.full(self.extent + 2 * GUARD_BYTES + 32, 0xFF, np.uint8)
        start = GUARD_BYTES + -(self._memory.ctypes.data + GUARD_BYTES) % 16 + offset
        self.array = np.ndarray(shape, dtype, self._memory.data, start, strides)
        self.address = self._memory.ctypes.data + start

    @classmethod
    def copy_of(cls, view: np.ndarray) -> Guarded:
        """Of the same strides and alignment."""
        guarded = cls(view.shape, view.strides, view.dtype, view.ctypes.data % 16)
        guarded.array[...] = view
        return guarded

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: np.dtype) -> Guarded:
        return cls(shape, np.ndarray(shape, dtype).strides, dtype)

    def element_strides(self) -> list[int]:
        return [step // self.array.itemsize for step in self.array.strides]


# ---- calls ---------------------------------------------------------------------------------------


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """Mirrors an argument struct of csrc/kernels.h; upper case, d, w and info are pointers."""
    pointers = ("damping", "info", "d", "w")
    kinds = [
        (f, ctypes.c_void_p if f[0].isupper() or f in pointers else ctypes.c_int64)
        for f in fields.split()
    ]
    return type(name, (ctypes.Structure,), {"_fields_": kinds})


SpdSolveArgs = _struct(
    "SpdSolveArgs",
    "batch n k A a_batch a_row a_col damping damping_stride B b_batch b_row b_col X info",
)
ScaledGramArgs = _struct(
    "ScaledGramArgs",
    "batch n K k_row k_col D d_batch d_col R r_batch r_col damping damping_stride X info",
)
WeightedGramArgs = _struct(
    "WeightedGramArgs", "batch m n Z z_row z_col w w_batch w_col damping damping_stride G"
)
RidgePrimalArgs = _struct(
    "RidgePrimalArgs",
    "batch m n Z z_row z_col D d_batch d_col R r_batch r_col damping damping_stride d info",
)


class PlantedArgs(ctypes.Structure):
    _fields_ = (("source", ctypes.c_void_p), ("out", ctypes.c_void_p))


class ProductArgs(ctypes.Structure):
    _fields_ = (("A", ctypes.c_void_p), ("B", ctypes.c_void_p), ("C", ctypes.c_void_p))


class CudaHost:
    """The emulated kernels; a call raises FindingError on any access or barrier that is wrong."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        i64, pointer, text = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
        self._library.configure.argtypes = [ctypes.c_uint64, i64, i64]
        self._library.watch.argtypes = [text, pointer, i64, i64, ctypes.c_bool]
        self._library.leave_out.argtypes = [text, ctypes.c_int]
        self._library.planted.argtypes = [ctypes.c_int, pointer, i64]
        self._library.planted.restype = text
        self._library.product.argtypes, self._library.product.restype = [pointer], text
        self._library.split_product.argtypes = [pointer]
        self._library.split_product.restype = text
        for precision in ("float", "double"):
            for stem, sizes in (("spd_solve", 3), ("scaled_gram_solve", 2)):
                launch = getattr(self._library, f"{stem}_{precision}")
                launch.argtypes, launch.restype = [pointer, pointer], text
                workspace = getattr(self._library, f"{stem}_workspace_{precision}")
                workspace.argtypes, workspace.restype = [i64] * sizes + [pointer], text
            for stem in ("weighted_gram", "ridge_primal"):
                launch = getattr(self._library, f"{stem}_{precision}")
                launch.argtypes, launch.restype = [pointer], text
            fits = getattr(self._library, f"ridge_primal_fits_{precision}")
            fits.argtypes, fits.restype = [i64, pointer], text

    def spd_solve(self, A, damping, B, device=Device()):
        """(A + damping I) X = B; A (batch, n, n), damping (batch,), B (batch, n, k)."""
        batch, n, k = B.shape
        A, damping, B = (Guarded.copy_of(a) for a in (A, damping, B))
        X = Guarded.contiguous((batch, n, k), A.array.dtype)
        info = Guarded.contiguous((batch,), np.dtype(np.int32))
        args = SpdSolveArgs(batch, n, k)
        args.A, (args.a_batch, args.a_row, args.a_col) = A.address, A.element_strides()
        args.B, (args.b_batch, args.b_row, args.b_col) = B.address, B.element_strides()
        args.damping, (args.damping_stride,) = damping.address, damping.element_strides()
        args.X, args.info = X.address, info.address
        inputs = {"A": A, "damping": damping, "B": B}
        self._call("spd_solve", (batch, n, k), args, inputs, {"X": X, "info": info}, device)
        return X.array, info.array

    def scaled_gram_solve(self, K, D, R, damping, device=Device()):
        """X = D y, (D K D + damping I) y = R; K (n, n), D and R (batch, n), damping (batch,)."""
        batch, n = D.shape
        K, D, R, damping = (Guarded.copy_of(a) for a in (K, D, R, damping))
        X = Guarded.contiguous((batch, n), K.array.dtype)
        info = Guarded.contiguous((batch,), np.dtype(np.int32))
        args = ScaledGramArgs(batch, n)
        args.K, (args.k_row, args.k_col) = K.address, K.element_strides()
        args.D, (args.d_batch, args.d_col) = D.address, D.element_strides()
        args.R, (args.r_batch, args.r_col) = R.address, R.element_strides()
        args.damping, (args.damping_stride,) = damping.address, damping.element_strides()
        args.X, args.info = X.address, info.address
        inputs = {"K": K, "D": D, "R": R, "damping": damping}
        self._call("scaled_gram_solve", (batch, n), args, inputs, {"X": X, "info": info}, device)
        return X.array, info.array

    def chain_rate(self, stem: str, dtype, repeats: int, device=Device()):
        """fma_rate or matrix_rate: the sum of every thread's chains, and the operations counted."""
        size = self.workspace_bytes(stem, dtype, (), device)
        sums = Guarded.contiguous((size // np.dtype(dtype).itemsize,), np.dtype(dtype))
        flops = ctypes.c_double()
        call = getattr(self._library, f"{stem}_{_precision(dtype)}")
        call.argtypes, call.restype = (
            [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p],
            (ctypes.c_char_p),
        )
        with self._watching(device, {}, {"sums": sums}):
            self._raise(call(repeats, sums.address, ctypes.byref(flops)))
        return sums.array, flops.value

    def weighted_gram(self, Z, w, damping, device=Device()):
        """G = Z^T diag(w) Z + damping I; Z (m, n), w (batch, m), damping (batch,)."""
        (batch, m), n = w.shape, Z.shape[1]
        Z, w, damping = (Guarded.copy_of(a) for a in (Z, w, damping))
        G = Guarded.contiguous((batch, n, n), Z.array.dtype)
        args = WeightedGramArgs(batch, m, n)
        args.Z, (args.z_row, args.z_col) = Z.address, Z.element_strides()
        args.w, (args.w_batch, args.w_col) = w.address, w.element_strides()
        args.damping, (args.damping_stride,) = damping.address, damping.element_strides()
        args.G = G.address
        inputs = {"Z": Z, "w": w, "damping": damping}
        self._launch("weighted_gram", args, inputs, {"G": G}, device)
        return G.array

    def ridge_primal(self, Z, D, R, damping, device=Device()):
        """(Z^T D^2 Z + damping I) d = Z^T D R; Z (m, n), D and R (batch, m), damping (batch,)."""
        (batch, m), n = D.shape, Z.shape[1]
        Z, D, R, damping = (Guarded.copy_of(a) for a in (Z, D, R, damping))
        d = Guarded.contiguous((batch, n), Z.array.dtype)
        info = Guarded.contiguous((batch,), np.dtype(np.int32))
        args = RidgePrimalArgs(batch, m, n)
        args.Z, (args.z_row, args.z_col) = Z.address, Z.element_strides()
        args.D, (args.d_batch, args.d_col) = D.address, D.element_strides()
        args.R, (args.r_batch, args.r_col) = R.address, R.element_strides()
        args.damping, (args.damping_stride,) = damping.address, damping.element_strides()
        args.d, args.info = d.address, info.address
        inputs = {"Z": Z, "D": D, "R": R, "damping": damping}
        self._launch("ridge_primal", args, inputs, {"d": d, "info": info}, device)
        return d.array, info.array

    def ridge_primal_fits(self, dtype, n: int, device=Device()) -> bool:
        """Whether ridge_primal takes systems of order n on this device."""
        self._library.configure(device.seed, device.shared_bytes, device.multiprocessors)
        result = ctypes.c_int64()
        query = getattr(self._library, f"ridge_primal_fits_{_precision(dtype)}")
        self._raise(query(n, ctypes.byref(result)))
        return bool(result.value)

    @contextlib.contextmanager
    def without_barrier(self, file: str, line: int) -> Iterator[None]:
        """The barrier called at this line (counted from 1) of this header does nothing."""
        self._library.leave_out(file.encode(), line)
        try:
            yield
        finally:
            self._library.leave_out(b"", 0)

    def planted(self, fault: int, source: np.ndarray, device=Device()) -> np.ndarray:
        """Runs a kernel with a planted fault (cuda_host/planted.cuh) on rows of 64 integers."""
        guarded = Guarded.copy_of(source)
        out = Guarded.contiguous(source.shape, source.dtype)
        args = PlantedArgs(guarded.address, out.address)
        with self._watching(device, {"in": guarded}, {"out": out}):
            self._raise(self._library.planted(fault, ctypes.byref(args), len(source)))
        return out.array

    def product(self, A: np.ndarray, B: np.ndarray) -> np.ndarray:
        """A (8, 4) times B (4, 8) on the matrix units, float64."""
        C = np.zeros((8, 8))
        args = ProductArgs(A.ctypes.data, B.ctypes.data, C.ctypes.data)
        self._raise(self._library.product(ctypes.byref(args)))
        return C

    def split_product(self, A: np.ndarray, B: np.ndarray, C: np.ndarray) -> np.ndarray:
        """C + A B on the matrix units: A (16, 16) and B (16, 8) cut to bf16, C (16, 8) float32."""
        A, B = (np.ascontiguousarray(a, np.float32).view(np.uint32) >> 16 for a in (A, B))
        A, B, C = A.astype(np.uint16), B.astype(np.uint16), C.astype(np.float32)
        args = ProductArgs(A.ctypes.data, B.ctypes.data, C.ctypes.data)
        self._raise(self._library.split_product(ctypes.byref(args)))
        return C

    def workspace_bytes(self, stem: str, dtype, sizes: tuple[int, ...], device: Device) -> int:
        """Bytes of workspace that the launch of these sizes asks for."""
        self._library.configure(device.seed, device.shared_bytes, device.multiprocessors)
        result = ctypes.c_int64()
        query = getattr(self._library, f"{stem}_workspace_{_precision(dtype)}")
        query.argtypes = [ctypes.c_int64] * len(sizes) + [ctypes.c_void_p]
        query.restype = ctypes.c_char_p
        self._raise(query(*sizes, ctypes.byref(result)))
        return result.value

    def _call(self, stem, sizes, args, inputs, outputs, device) -> None:
        dtype = outputs["X"].array.dtype
        size = self.workspace_bytes(stem, dtype, sizes, device)
        workspace = Guarded.contiguous((size,), np.dtype(np.uint8))
        with self._watching(device, inputs, {**outputs, "workspace": workspace}):
            launch = getattr(self._library, f"{stem}_{_precision(dtype)}")
            self._raise(launch(ctypes.byref(args), workspace.address))

    def _launch(self, stem, args, inputs, outputs, device) -> None:
        """A kernel without workspace."""
        dtype = next(iter(outputs.values())).array.dtype
        with self._watching(device, inputs, outputs):
            self._raise(getattr(self._library, f"{stem}_{_precision(dtype)}")(ctypes.byref(args)))

    def _watching(self, device: Device, inputs, outputs) -> _Watching:
        self._library.configure(device.seed, device.shared_bytes, device.multiprocessors)
        return _Watching(self._library, inputs, outputs)

    @staticmethod
    def _raise(message: bytes) -> None:
        if message:
            raise FindingError(message.decode())


class _Watching:
    """Watches arrays while a kernel runs."""

    def __init__(self, library, inputs, outputs) -> None:
        self._library, self._arrays = library, [(inputs, False), (outputs, True)]

    def __enter__(self) -> None:
        for arrays, output in self._arrays:
            for name, guarded in arrays.items():
                start, extent = guarded.address, guarded.extent
                self._library.watch(name.encode(), start, extent, GUARD_BYTES, output)

    def __exit__(self, *exception: object) -> None:
        self._library.forget_all()


def _precision(dtype) -> str:
    return {"float32": "float", "float64": "double"}[np.dtype(dtype).name]
