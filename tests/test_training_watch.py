"""What a dry run measures: peaks of allocations, and solvers under watch that change nothing."""

from __future__ import annotations

import pytest
import torch
from sweep_nets import batch, net, square

import backmatch as bm
from backmatch.training.peak_memory import PeakMemory
from backmatch.training.watched import Watch

CPU = torch.device("cpu")
#: Bytes of one tensor of the tests below.
SIZE = 400_000


def tensor() -> torch.Tensor:
    return torch.empty(SIZE // 4)


def test_peak_counts_what_lives_at_one_time() -> None:
    before = tensor()
    with PeakMemory(CPU) as memory:
        first, second = tensor(), tensor()
        del first
        third = tensor()
        del second, third, before
    assert memory.total == 2 * SIZE


def test_peak_of_nothing() -> None:
    with PeakMemory(CPU) as memory:
        pass
    assert (memory.total, memory.spans) == (0, {})


def test_spans_count_from_the_first_of_their_name() -> None:
    with PeakMemory(CPU) as memory:
        kept = [tensor()]
        with memory.span("a"):
            kept.append(tensor())
        with memory.span("b"):
            tensor()
        with memory.span("a"):
            kept += [tensor(), tensor()]
    assert memory.spans == {"a": 3 * SIZE, "b": SIZE}
    assert memory.total == 4 * SIZE


class FakeCuda:
    """Allocator counters that tests move by hand."""

    def __init__(self) -> None:
        self.live = self.peak = 10

    def use(self, size: int, keep: int) -> None:
        self.peak = max(self.peak, self.live + size)
        self.live += keep

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def reset(device: torch.device) -> None:
            self.peak = self.live

        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.live)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)


def test_cuda_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    cuda.use(1000, keep=0)  # a peak before the measurement does not count
    with PeakMemory(torch.device("cuda")) as memory:
        cuda.use(5, keep=2)
        with memory.span("a"):
            cuda.use(7, keep=3)
        cuda.use(20, keep=0)
        with memory.span("a"):
            cuda.use(1, keep=0)
        with memory.span("b"):
            cuda.use(30, keep=0)
    assert memory.spans == {"a": 7, "b": 30}
    assert memory.total == 35


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_watched_solvers_give_the_same_bits(order: str) -> None:
    grads = []
    watch = Watch(CPU)
    weights, inputs = bm.Auto(bm.Relative(0.1)), bm.CG(bm.Relative(0.01))
    for pair in (
        (weights, inputs),
        (watch.choice("weights", weights), watch.choice("inputs", inputs)),
    ):
        model = net()
        bm.BackMatching(model, weights=pair[0], inputs=pair[1], order=order).backward(
            batch(), square
        )
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert set(watch.seconds) == {
        ("0", "weights"),
        ("1", "inputs"),
        ("2", "weights"),
        ("2", "inputs"),
    }
    assert all(len(times) == 1 and times[0] > 0 for times in watch.seconds.values())


def test_one_time_per_step() -> None:
    watch = Watch(CPU)
    solvers = [watch.choice(side, bm.Gradient()) for side in ("weights", "inputs")]
    matcher = bm.BackMatching(net(), weights=solvers[0], inputs=solvers[1])
    for _ in range(3):
        watch.begin_step()
        matcher.backward(batch(), square)
    assert {len(times) for times in watch.seconds.values()} == {3}
