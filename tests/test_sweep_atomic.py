"""A sweep that fails leaves no trace: every failure, at every block, on every side.

Model, grads, buffers, hooks, RNG and optimizer have the bits they had, and the next sweep gives the
bits of one that followed no failure.
"""

from __future__ import annotations

import copy
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from sweep_nets import ORDERS, batch, square
from torch import nn

import backmatch as bm
from backmatch.solvers import Solver

OPTIONS = [
    {"order": "simultaneous"},
    {"order": "sequential", "passes": 2},
    {"order": "simultaneous", "newton_steps": 2},
]
FAILURES = {
    "exception": RuntimeError("no"),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
    "not positive definite": bm.NotPositiveDefiniteError("the matrix", [3], [1], 6),
    "interrupt": KeyboardInterrupt(),
}


class Counting(nn.Module):
    """Moves its buffers, one in place and one by assignment, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(4))
        self.fails_at, self.error = 0, None

    def forward(self, z):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean()
        self.fails_at -= 1
        if self.fails_at == 0:
            if isinstance(self.error, BaseException):
                raise self.error
            return z * self.error
        return (z + 1e-3 * torch.rand_like(z)) * self.weight.tanh()


def trained():
    """Model and optimizer after a step, so that grads, moments and statistics are no zeros.

    One grad is ``None``, and one parameter is frozen with a grad of its own.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.2)),
        nn.Sequential(nn.Linear(7, 4), nn.ReLU()),
        Counting(),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        nn.Linear(4, 3),
    ).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    square(model(batch())).backward()
    optimizer.step()
    model[3][0].weight.grad = None
    model[4].bias.requires_grad_(False)
    return model, optimizer


def everything(model, optimizer):
    """All that a failed sweep must leave alone, by value."""
    parameters = {
        name: (p.detach().clone(), None if p.grad is None else p.grad.clone(), p.requires_grad)
        for name, p in model.named_parameters()
    }
    modules = {
        name: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    }
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    moments = copy.deepcopy(optimizer.state_dict())
    return parameters, modules, buffers, moments, torch.get_rng_state(), torch.is_grad_enabled()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Failing(Solver):
    """Auto that raises, or whose step holds a NaN."""

    def __init__(self, error):
        self.error, self.auto = error, bm.Auto(bm.Relative(0.1))

    def damping_for(self, problem):
        return self.auto.damping_for(problem)

    def solve(self, problem, damping):
        if isinstance(self.error, BaseException):
            raise self.error
        solution = self.auto.solve(problem, damping)
        step = solution.step.clone()
        step.view(-1)[-1] = self.error
        return type(solution)(step, solution.record)


def at(chosen, error):
    """Solver choice that fails at one block only."""
    return lambda name, block: Failing(error) if name == chosen else bm.Auto(bm.Relative(0.1))


def check(model, optimizer, matcher, expected, loss=square):
    """One failing sweep; nothing has changed, and the next one is as if it had not been."""
    before = everything(model, optimizer)
    with pytest.raises(expected):
        matcher.backward(batch(), loss)
    assert equal(everything(model, optimizer), before)
    bm.BackMatching(model).backward(batch(), square)
    after = everything(model, optimizer)
    twin, other = trained()
    bm.BackMatching(twin).backward(batch(), square)
    assert equal(everything(twin, other), after)


def expected_of(error):
    return type(error) if isinstance(error, BaseException) else bm.NonFiniteError


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("failure", [*FAILURES, "nan", "inf"])
def test_failing_solves_at_every_block_and_side(failure, options):
    """5 weight problems and 4 input problems."""
    error = FAILURES.get(failure, float(failure) if failure in ("nan", "inf") else None)
    count = 0
    for side, blocks in (("weights", "01234"), ("inputs", "1234")):
        for name in blocks:
            model, optimizer = trained()
            matcher = bm.BackMatching(model, **{side: at(name, error)}, **options)
            check(model, optimizer, matcher, expected_of(error))
            count += 1
    assert count == 9


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_failing_forward_passes_first_and_later(options):
    """The block's own forward, at its first call and where it is evaluated again."""
    count = 0
    for error in (*FAILURES.values(), float("nan"), 1e200):
        for call in (1, 2, 3):
            model, optimizer = trained()
            if call > 1 and isinstance(error, float):
                continue  # a trial step that is not finite may be halved away
            counted = copy.deepcopy(model)
            counted[2].fails_at = 10**9
            bm.BackMatching(counted, **options).backward(batch(), square)
            if 10**9 - counted[2].fails_at < call:
                continue  # never evaluated so often
            torch.manual_seed(3)
            model[2].fails_at, model[2].error = call, error
            matcher = bm.BackMatching(model, **options)
            with_call = model[2].fails_at
            before = everything(model, optimizer)
            with pytest.raises(expected_of(error)):
                matcher.backward(batch(), square)
            model[2].fails_at = with_call
            assert equal(everything(model, optimizer), before)
            count += 1
    assert count >= 6


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_failing_hooks_at_every_block(kind, order):
    count = 0
    for index in range(5):
        for error in FAILURES.values():
            model, optimizer = trained()

            def fail(*values, error=error):
                torch.rand(2)
                raise error

            block = model[index]
            register = {
                "forward": block.register_forward_hook,
                "pre": block.register_forward_pre_hook,
            }[kind]
            handle = register(fail)
            matcher = bm.BackMatching(list(model), order=order)
            before = everything(model, optimizer)
            with pytest.raises(type(error)):
                matcher.backward(batch(), square)
            assert equal(everything(model, optimizer), before)
            handle.remove()
            count += 1
    assert count == 20


@pytest.mark.parametrize("order", ORDERS)
def test_failing_losses(order):
    """Raising after a draw of random numbers, not finite, and with a gradient that is not."""

    def raising(error):
        def loss(out):
            torch.rand(5)
            raise error

        return loss

    losses = [(raising(error), type(error)) for error in FAILURES.values()]
    losses.append((lambda out: out.sum() / 0, bm.NonFiniteError))
    losses.append((lambda out: (out * 0).sqrt().sum(), bm.NonFiniteError))
    for loss, expected in losses:
        model, optimizer = trained()
        check(model, optimizer, bm.BackMatching(model, order=order), expected, loss=loss)


class Interrupter:
    """Ctrl-C at the n-th Python call inside the package, as a profiler sees them."""

    FOLDER = str(Path(bm.__file__).parent)

    def __init__(self, call):
        self.left = call

    def __call__(self, frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(self.FOLDER):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *unused):
        sys.setprofile(None)


# Python drops what is raised while it closes a generator; then the step goes on to its end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_ctrl_c_at_60_places_is_all_or_nothing(options):
    """Either nothing has changed or, at the very end, the whole step has been written."""
    counted, other = trained()
    bm.BackMatching(counted, **options).backward(batch(), square)  # what is built only once
    counted, other = trained()
    with Interrupter(10**9) as counter:
        bm.BackMatching(counted, **options).backward(batch(), square)
    calls, done = 10**9 - counter.left, everything(counted, other)
    model, optimizer = trained()
    before = everything(model, optimizer)
    nothing = 0
    for place in range(60):
        call = 1 + place * (calls - 1) // 59
        with suppress(KeyboardInterrupt), Interrupter(call):
            bm.BackMatching(model, **options).backward(batch(), square)
        now = everything(model, optimizer)
        if equal(now, before):
            nothing += 1
            continue
        assert equal(now, done), f"call {call} of {calls}"
        model, optimizer = trained()
    assert nothing >= 55


def test_ctrl_c_between_two_grads_is_undone(monkeypatch):
    model, optimizer = trained()
    before = everything(model, optimizer)
    subtract, left = torch.Tensor.sub_, [3]

    def interrupted(self, other, **keywords):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return subtract(self, other, **keywords)

    monkeypatch.setattr(torch.Tensor, "sub_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bm.BackMatching(model).backward(batch(), square)
    monkeypatch.undo()
    assert left[0] == 0
    assert equal(everything(model, optimizer), before)


def test_no_memory_for_the_second_new_grad(monkeypatch):
    model, optimizer = trained()
    optimizer.zero_grad()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before = everything(model, optimizer)
    negate, left = torch.Tensor.neg, [2]

    def full(self):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return negate(self)

    monkeypatch.setattr(torch.Tensor, "neg", full)
    with pytest.raises(torch.OutOfMemoryError):
        bm.BackMatching(model, weights=bm.Gradient(), inputs=bm.Gradient()).backward(
            batch(), square
        )
    monkeypatch.undo()
    assert left[0] == 0
    assert equal(everything(model, optimizer), before)
