"""100 times SIGKILL: a run that goes on afterwards ends with the very same bits.

A run is killed again and again until it ends by itself; then a new one begins. Where it has not
written its config.json yet it is no run, and the same ``--out`` starts it anew.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cli_child import Stage, finish, kill_after, kill_at, stages
from run_cases import METHODS, arguments, assert_same_run, resume

#: Kills in all: every method at the stages of saving, and from outside at any time.
KILLS = 100
EACH = KILLS // (2 * len(METHODS))


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(method: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(method) / "run"
    assert finish(arguments(method, path)) == 0
    return path


class Runs:
    """One run after the other, each checked against the undisturbed one when it has ended."""

    def __init__(self, method: str, folder: Path, whole: Path) -> None:
        self.method, self.folder, self.whole = method, folder, whole
        self.started = 0
        self.kills = 0

    @property
    def path(self) -> Path:
        return self.folder / str(self.started) / "run"

    def command(self) -> list[str]:
        """What a user would type now."""
        if (self.path / "config.json").exists():
            return resume(self.path)
        return arguments(self.method, self.path)

    def ended(self, code: int) -> bool:
        """Count a kill; check a run that came to its end."""
        if code == -signal.SIGKILL:
            self.kills += 1
            return False
        assert code == 0
        assert_same_run(self.path, self.whole)
        self.started += 1
        return True

    def finish(self) -> None:
        """Let the last run end, and check it."""
        assert self.ended(finish(self.command()))


def wanted_stages(undisturbed: list[Stage]) -> Iterator[Stage]:
    """Each of a run's stages, in a seeded order, for ever."""
    random = np.random.default_rng(0)
    different = sorted(set(undisturbed))
    while True:
        for number in random.permutation(len(different)):
            yield different[number]


def test_kills_inside_every_stage_of_saving(method: str, whole: Path, tmp_path: Path) -> None:
    undisturbed = stages(arguments(method, tmp_path / "listed" / "run"))
    random = np.random.default_rng(1)
    runs, hit = Runs(method, tmp_path, whole), set()
    for stage in wanted_stages(undisturbed):
        # A run that is nearly done has no such stage any more; the next one has.
        for occurrence in (int(random.integers(1, 4)), 1):
            torn = bool(random.integers(2))
            if not runs.ended(kill_at(runs.command(), stage, occurrence, torn)):
                hit.add(stage)
                break
        if runs.kills == EACH:
            break
    runs.finish()
    assert runs.kills == EACH
    assert hit == set(undisturbed)


def test_kills_from_outside_at_random_times(method: str, whole: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    runs = Runs(method, tmp_path, whole)
    began = time.perf_counter()
    assert finish(arguments(method, tmp_path / "timed" / "run")) == 0
    duration = time.perf_counter() - began
    for _ in range(20 * EACH):
        runs.ended(kill_after(runs.command(), duration * random.random()))
        if runs.kills == EACH:
            break
    runs.finish()
    assert runs.kills == EACH
