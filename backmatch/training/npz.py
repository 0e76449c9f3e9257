"""Read a user's ``.npz`` file as if it were hostile: no pickle, no bomb, one clear sentence."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from .failures import UsageError, show

KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The four arrays of the file, unchecked beyond their being plain numbers.

    Raises:
        UsageError: no such file, not an npz file, damaged, an array is missing, holds objects,
            or is larger than the machine's memory.
    """
    where = f"--data {show(str(path), 200)}"
    if not path.exists():
        raise UsageError(f"{where}: no such file")
    if not path.is_file():
        raise UsageError(f"{where}: not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, where)
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in KEYS}
    except UsageError:
        raise
    except OSError as error:
        reason = error.strerror or show(str(error))
        raise UsageError(f"{where}: cannot read it: {reason}") from None
    except MemoryError:
        raise UsageError(f"{where}: does not fit into memory") from None
    except Exception as error:  # whatever a parser makes of hostile bytes: the file is unusable
        raise UsageError(
            f"{where}: not an intact .npz file ({type(error).__name__}); "
            "write it with numpy.savez(FILE, x_train=.., y_train=.., x_test=.., y_test=..)"
        ) from None


def _check_members(archive: zipfile.ZipFile, where: str) -> None:
    # A few kilobytes of a zip file can claim to be terabytes: headers are read first.
    members = {info.filename: info for info in archive.infolist()}
    missing = [key for key in KEYS if f"{key}.npy" not in members]
    if missing:
        raise UsageError(
            f"{where}: has no array {', '.join(missing)}; needed are {', '.join(KEYS)}"
        )
    total = 0
    for key in KEYS:
        info = members[f"{key}.npy"]
        with archive.open(info) as file:
            shape, dtype = _header(file)
            size = info.file_size - file.tell()
        if dtype.hasobject or dtype.kind not in "biuf":
            raise UsageError(f"{where}: {key} must hold real numbers, got dtype {dtype}")
        if math.prod(shape) * dtype.itemsize > size:
            raise UsageError(f"{where}: {key} is truncated: shape {shape} does not fit its bytes")
        total += info.file_size
    if total > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UsageError(f"{where}: does not fit into memory ({total / 2**30:.1f} GiB)")


def _header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(file)
    reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = reader(file)
    return shape, dtype
