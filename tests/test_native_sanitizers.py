"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; `make sanitize`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import sanitized_core

pytestmark = pytest.mark.slow

#: Large orders only repeat what smaller ones do, and cost minutes here.
LARGE = (
    "96 or 97 or 127 or 128 or 129 or 130 or 200 or 257 or 260 or cuts_out_any_rows or every_order"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pybind11", reason="building the core needs pybind11")
    path = f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin"
    if not (shutil.which("cmake", path=path) and shutil.which("ninja", path=path)):
        pytest.skip("building the core needs cmake and ninja")
    if not sanitized_core.runtimes():
        pytest.skip("the C++ compiler has no AddressSanitizer runtime (libasan, libubsan)")
    if built := os.environ.get("BACKMATCH_SANITIZED_BUILD"):
        return Path(built)
    return sanitized_core.build(tmp_path_factory.mktemp("sanitized"))


def test_the_kernel_tests_pass_under_the_sanitizers(library: Path) -> None:
    files = [f"tests/test_native_{name}.py" for name in ("kernels", "gram", "ridge")]
    options = ("-p", "sanitized_core", "-p", "no:cacheprovider", "-x", "-k", f"not ({LARGE})")
    done = sanitized_core.run(library, "-m", "pytest", *options, *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_random_calls_pass_under_the_sanitizers(library: Path) -> None:
    code = "import sanitized_core, fuzz; raise SystemExit(fuzz.main(['--seconds', '4']))"
    done = sanitized_core.run(library, "-c", code)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert '"cases"' in done.stdout


@pytest.mark.parametrize("level", ["baseline", "avx512"])
@pytest.mark.parametrize(
    "kernel",
    [
        "spd_solve writes",
        "spd_solve reads",
        "scaled_gram_solve reads",
        "weighted_gram writes",
        "cg_direction writes",
        "stride overflows",
    ],
)
def test_a_planted_overflow_is_caught(library: Path, kernel: str, level: str) -> None:
    """One element behind a buffer, and an offset beyond 64 bits."""
    done = sanitized_core.run(library, "tests/sanitized_core.py", kernel, level)
    if "is not in this build" in done.stderr:
        pytest.skip(f"this machine has no {level}")
    assert done.returncode != 0, done.stdout
    told = {"stride overflows": "signed integer overflow"}.get(kernel, "ERROR: AddressSanitizer")
    assert told in done.stderr
    assert "csrc/cpu" in done.stderr
