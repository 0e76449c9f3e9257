"""The fused steps of conjugate gradient on CUDA, executed on the host: those of the CPU kernels."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import DTYPES
from cuda_host_library import Device
from cuda_krylov_calls import Loop

from backmatch.linalg._library import native


def loop(rng, systems: int, n: int, dtype) -> Loop:
    """A state in which some systems are paused, break down, converge or reach the cap of 5."""
    arrays = {name: rng.standard_normal((systems, n)).astype(dtype) for name in "PQXRZ"}
    arrays["Q"] = (arrays["P"] * rng.uniform(1, 2, (systems, n))).astype(dtype)
    arrays["Q"][1::7] *= -1
    arrays["P"][2::7, n // 2] = np.nan
    flags = (np.arange(systems) % 5 != 3).astype(np.uint8)
    rho, target = rng.uniform(0.5, 2, (2, systems)).astype(dtype)
    target[4::7] = 1e6
    steps = np.where(np.arange(systems) % 7 == 5, 4, 0)
    alive = np.ones(systems, np.uint8)
    return Loop(**arrays, rho=rho, target=target, running=flags, alive=alive, steps=steps)


def step_on_cpu(state: Loop, stem: str, preconditioned: bool) -> dict[str, np.ndarray]:
    """The same call of the CPU kernel on a copy."""
    after = {name: value.copy() for name, value in state.arrays.items()}
    names = Loop.FIELDS if stem == "cg_step" else "R Z P rho running"
    addresses = [after[name].ctypes.data for name in names.split()]
    options = [5, preconditioned] if stem == "cg_step" else []
    dtype, shape = after["P"].dtype.name, after["P"].shape
    getattr(native(), stem)(dtype, *shape, *options, *addresses)
    return after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stem", ["cg_step", "cg_direction"])
@pytest.mark.parametrize("n", [1, 31, 33, 257, 1030, 8192, 8193, 20_000])
def test_fused_steps_are_those_of_the_cpu(cuda, dtype, stem, n):
    rng = np.random.default_rng(n)
    for preconditioned in (False, True):
        state = loop(rng, 15 if n < 1000 else 7, n, dtype)
        options = {"max_steps": 5, "preconditioned": preconditioned, "device": Device(n)}
        mine = state.run(cuda, stem, **options)
        cpu = step_on_cpu(state, stem, preconditioned)
        tolerance = 100 * np.sqrt(n) * np.finfo(dtype).eps
        for name, value in mine.arrays.items():
            np.testing.assert_allclose(
                value, cpu[name], rtol=tolerance, atol=tolerance, err_msg=name
            )
        for name in ("running", "alive", "steps"):
            np.testing.assert_array_equal(mine.arrays[name], cpu[name])
        paused = state.arrays["running"] == 0
        for name, value in mine.arrays.items():
            np.testing.assert_array_equal(value[paused], state.arrays[name][paused])


@pytest.mark.parametrize("n", [40, 9000])
def test_bits_of_fused_steps_do_not_depend_on_rows_or_order(cuda, n):
    state = loop(np.random.default_rng(11), 9, n, np.float32)
    for stem in ("cg_step", "cg_direction"):
        whole = state.run(cuda, stem, 5, device=Device(multiprocessors=1))
        again = state.run(cuda, stem, 5, device=Device(5, multiprocessors=3))
        for j in (0, 1, 4, 5, 8):
            one = slice(j, j + 1)
            alone = Loop(**{name: value[one] for name, value in state.arrays.items()})
            alone = alone.run(cuda, stem, 5, device=Device(6))
            for name, value in whole.arrays.items():
                np.testing.assert_array_equal(alone.arrays[name], value[one])
                np.testing.assert_array_equal(again.arrays[name], value)
