"""Builds backmatch._C with CMake and Ninja; everything else is in pyproject.toml.

Environment: ``BACKMATCH_CUDA=0|1`` (never | required; default: where nvcc is found),
``CMAKE_CUDA_ARCHITECTURES``, ``CMAKE_BUILD_PARALLEL_LEVEL``, ``CXX``, ``CMAKE_ARGS``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Path of a build tool, looked for next to this Python first."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise SystemExit(
            f"backmatch: the build needs `{name}`, which was not found. "
            f"Install it (`python -m pip install {name}`) or build with `pip install .`."
        )
    return path


def check_compiler() -> None:
    """Names the missing compiler before CMake does so in forty lines."""
    command = shlex.split(os.environ.get("CXX", ""))[:1]
    names = command or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise SystemExit(
            "backmatch: the build needs a C++17 compiler, none was found "
            f"(looked for {', '.join(names)}). Install g++ 10 or later, or set CXX."
        )


def cuda_choice() -> str:
    """Value of BACKMATCH_CUDA, checked."""
    value = os.environ.get("BACKMATCH_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"backmatch: BACKMATCH_CUDA: expected 0 or 1, got {value!r}")
    return value


class CMakeBuild(build_ext):
    """Configures and builds csrc/ and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        self._forget_other_tools(build)
        cmake = find_tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DBACKMATCH_VERSION={self.distribution.get_version()}",
            f"-DBACKMATCH_CUDA={cuda_choice()}",
        ]
        if architectures := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self._run(configure)
        self._run([cmake, "--build", str(build), "--target", "_C"])
        built = next(build.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(target.suffix + ".new")
        shutil.copyfile(built, staged)
        os.replace(staged, target)

    @staticmethod
    def _forget_other_tools(build: Path) -> None:
        """A cache made with the tools of a vanished build environment would break the build."""
        cache = build / "CMakeCache.txt"
        if not cache.exists():
            return
        for line in cache.read_text().splitlines():
            name, _, value = line.partition("=")
            if name.split(":")[0] in ("CMAKE_COMMAND", "CMAKE_MAKE_PROGRAM", "pybind11_DIR") and (
                not Path(value).exists()
            ):
                shutil.rmtree(build)
                build.mkdir(parents=True)
                return

    @staticmethod
    def _run(command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            step = "compile" if "--build" in command else "configure"
            raise SystemExit(
                f"backmatch: CMake could not {step} the native module (exit code "
                f"{error.returncode}); the reason stands above."
            ) from None


setup(
    ext_modules=[Extension("backmatch._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
