"""What nvcc makes of the kernels: one compilation for all workers, kept while nothing changes."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from pathlib import Path

import cuda_resources
from cuda_host_library import compiler
from filelock import FileLock


def compiled(cache: Path) -> list[cuda_resources.Compiled]:
    """Every source; compiles them unless ``cache`` holds the answer to the same question."""
    stored = cache / f"{_question()}.pickle"
    with FileLock(cache / "lock"):
        if not stored.exists():
            for old in cache.glob("*.pickle"):
                old.unlink()
            with tempfile.TemporaryDirectory() as folder:
                done = cuda_resources.compile_all(cuda_resources.sources(), Path(folder))
            scratch = stored.with_suffix(".part")
            scratch.write_bytes(pickle.dumps(done))
            scratch.rename(stored)
    found: list[cuda_resources.Compiled] = pickle.loads(stored.read_bytes())
    return found


def _question() -> str:
    """A digest of all that the answer depends on: sources, headers, flags, compilers."""
    folder = cuda_resources.KERNELS
    files = [path for path in [*folder.rglob("*"), folder.parent / "kernels.h"] if path.is_file()]
    digest = hashlib.sha256()
    for path in [*sorted(files), Path(cuda_resources.__file__)]:
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    nvcc = cuda_resources.nvcc()
    version = cuda_resources.run([nvcc, "--version"])
    host = cuda_resources.run([*compiler(), "--version"])
    digest.update(f"{Path(nvcc).resolve()} {version} {host}".encode())
    return digest.hexdigest()[:16]
