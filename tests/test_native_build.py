"""What the native build says of itself, and how it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backmatch import _C


def test_build_info_describes_this_build() -> None:
    info = _C.build_info()
    assert set(info) == {
        *("version", "compiler", "openmp", "simd", "simd_active"),
        *("cuda", "cuda_version", "cuda_architectures"),
    }
    assert info["simd"][0] == "baseline"
    assert info["simd_active"] in info["simd"]
    assert isinstance(info["openmp"], bool)
    assert info["cuda"] == (info["cuda_version"] is not None)
    assert info["cuda"] == (info["cuda_architectures"] is not None)


def test_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="'avx3' is not in this build, which has: baseline"):
        _C.set_simd_level("avx3")


@pytest.mark.parametrize("value", ["baseline", "avx3"])
def test_environment_chooses_the_level(value: str) -> None:
    code = "from backmatch import _C; print(_C.build_info()['simd_active'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BACKMATCH_SIMD": value},
        capture_output=True,
        text=True,
    )
    if value == "baseline":
        assert run.stdout.strip() == "baseline"
    else:
        assert "ImportError: BACKMATCH_SIMD: SIMD level 'avx3' is not in this build" in run.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BACKMATCH_CUDA": "yes"}, "BACKMATCH_CUDA: expected 0 or 1, got 'yes'"),
        ({"CXX": "no-such-compiler"}, "needs a C++17 compiler, none was found (looked for no-such"),
    ],
)
def test_build_names_what_is_wrong(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    root = Path(__file__).parents[1]
    folders = "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=root,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert message in run.stderr


def test_bad_dtype_and_size_are_named() -> None:
    with pytest.raises(ValueError, match="expected 'float32' or 'float64', got 'float16'"):
        _C.weighted_gram("float16", 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="weighted_gram: expected sizes >= 0, got -1"):
        _C.weighted_gram("float32", 1, -1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0)
