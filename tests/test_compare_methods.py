"""The methods of ``backmatch compare`` are what they claim, from equal weights on equal batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.modules import module as modules

import backmatch as bm
from backmatch.bench import peers
from backmatch.comparing import methods, options, trial
from backmatch.training import run as training
from backmatch.training.data import Dataset
from backmatch.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"data": "synthetic", "hidden": "9,7", "batch_size": "256", "device": "cpu"}


def settled(**given: Any) -> options.CompareOptions:
    return options.settle({**SMALL, "dtype": "float64", **given})


def trainer(name: str, lr: float = 1.0, seed: int = 3, **given: Any) -> Trainer:
    given.setdefault("methods", name)
    config = settled(**given).config(name, lr, seed)
    return training.assemble(config, training.load_data(config))


def step(of: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = next(of.batches(0))
    of.optimizer.zero_grad()
    of.method(x, y)
    return x, y


PLAIN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "bp-sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "bp-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "bp-adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


@pytest.mark.parametrize("name", PLAIN)
def test_back_propagation_is_a_plain_torch_loop(name: str) -> None:
    config = settled(epochs="2").config(name, 0.05, 3)
    data = training.load_data(config)
    row = trial.run(config, data, evaluate_at={14}, timed=False)
    torch.manual_seed(3)
    net = bm.models.mlp(32, (9, 7)).double()
    optimizer = PLAIN[name](net.parameters())
    losses = []
    reference = training.assemble(config, data)
    for epoch in range(2):
        for x, y in reference.batches(epoch):
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == 14:
                right = (net(data.x_test).argmax(1) == data.y_test).double().mean()
    assert len(losses) == 16
    torch.testing.assert_close(row["train_loss"], losses, rtol=1e-12, atol=0)
    assert row["steps"] == [14]
    assert row["accuracy"] == [pytest.approx(float(right), abs=1e-12)]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cg_takes_exactly_so_many_steps(steps: int, recwarn: pytest.WarningsRecorder) -> None:
    of = trainer(f"cg-{steps}")
    matcher = bm.BackMatching(
        bm.partition(of.model),
        weights=bm.CG(bm.Relative(0.1), rtol=0, max_steps=steps),
        inputs=bm.CG(bm.Relative(0.01), rtol=0, max_steps=steps),
    )
    x, y = step(of)
    got = [p.grad.clone() for p in of.model.parameters() if p.grad is not None]
    of.optimizer.zero_grad()
    report = matcher.backward(x, lambda out: cross_entropy(out, y))
    torch.testing.assert_close(got, [p.grad for p in of.model.parameters()], rtol=0, atol=0)
    records = [r for b in report.blocks for r in (b.weight, b.input) if r is not None]
    assert [record.iterations for record in records] == [steps] * 5
    assert of.method(x, y).log["iterations"] == steps
    assert not recwarn.list


def test_cg_with_many_steps_is_exact() -> None:
    """The end of the continuum: the same dampings, solved to the end."""
    grads = []
    for name in ("cg-200", "exact"):
        of = trainer(name)
        step(of)
        grads.append([p.grad for p in of.model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-7, atol=1e-9)


def test_gradient_on_both_sides_is_the_other_end() -> None:
    """``bp-sgd`` is the sweep with Gradient on both sides."""
    of = trainer("bp-sgd")
    x, y = step(of)
    got = [p.grad.clone() for p in of.model.parameters() if p.grad is not None]
    of.optimizer.zero_grad()
    matcher = bm.BackMatching(bm.partition(of.model), weights=bm.Gradient(), inputs=bm.Gradient())
    matcher.backward(x, lambda out: cross_entropy(out, y))
    torch.testing.assert_close(got, [p.grad for p in of.model.parameters()], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_foof_is_foof(activation: str) -> None:
    of = trainer("foof", activation=activation)
    x, y = step(of)
    damping = methods.find("foof").options["weight_damping"]
    want = peers.foof(of.model, x, lambda out: cross_entropy(out, y), damping)
    assert len(want) == 6
    for parameter, value in zip(of.model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "weights", "inputs"),
    [
        ("exact", "cholesky", "cholesky"),
        ("exact-weights", "cholesky", "gradient"),
        ("exact-inputs", "gradient", "cholesky"),
        ("scalar", "scalar", "scalar"),
        ("exact-undamped", "cholesky", "cholesky"),
        ("layer-inverse", "cholesky", "layer_inverse"),
    ],
)
def test_the_sides_are_solved_as_named(name: str, weights: str, inputs: str) -> None:
    from backmatch.training.methods import create_matcher

    of = trainer(name, activation="leaky_relu")
    x, y = next(of.batches(0))
    report = create_matcher(of.model, of.config).backward(x, lambda out: cross_entropy(out, y))
    assert {block.weight.solver for block in report.blocks if block.weight} == {weights}
    assert {block.input.solver for block in report.blocks if block.input} == {inputs}
    undamped = all(block.weight.damping == 0 for block in report.blocks if block.weight)
    assert undamped == (name in ("exact-undamped", "scalar"))


def test_all_methods_begin_with_the_same_weights_and_see_the_same_batches() -> None:
    names = [*methods.DEFAULT, "layer-inverse"]
    made = [trainer(name, activation="tanh", methods=",".join(names)) for name in names]
    for of in made[1:]:
        assert all(
            torch.equal(p, q)
            for p, q in zip(of.model.parameters(), made[0].model.parameters(), strict=True)
        )
    for epoch in (0, 1):
        for batch in zip(*(of.batches(epoch) for of in made), strict=True):
            for x, y in batch[1:]:
                assert torch.equal(x, batch[0][0])
                assert torch.equal(y, batch[0][1])
    other = trainer("exact", seed=4, activation="tanh")
    assert trial.digest(other.model) != trial.digest(made[0].model)
    assert not torch.equal(next(other.batches(0))[0], next(made[0].batches(0))[0])


def test_runs_use_their_own_numbers_wherever_they_stand() -> None:
    """A run is a function of its options: what ran before it in the process does not matter."""
    config = settled(epochs="1").config("exact", 1.0, 0)
    data = training.load_data(config)
    rows = []
    for timed in (False, True, False):
        rows.append(trial.run(config, data, evaluate_at={0, 3, 8}, timed=timed))
        torch.rand(7)
    for row in rows:
        assert len(row.pop("step_ms")) == 8
        assert len(row.pop("training_seconds")) == 3
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["steps"] == [0, 3, 8]


def test_a_diverging_run_is_recorded() -> None:
    config = settled(epochs="2").config("bp-sgd", 1e200, 0)
    row = trial.run(config, training.load_data(config), evaluate_at={0, 16}, timed=True)
    assert row["error"].startswith("after ")
    assert "non-finite" in row["error"]
    assert row["steps"] == [0]
    assert len(row["train_loss"]) < 16


def test_unconverged_steps_are_counted_not_warned(recwarn: pytest.WarningsRecorder) -> None:
    def never(x: Any, y: Any) -> Any:
        import warnings

        from backmatch.errors import ConvergenceWarning
        from backmatch.training.methods import Result

        warnings.warn("cap", ConvergenceWarning, stacklevel=1)
        return Result(1.0, torch.zeros(len(y), 10), {"converged": False})

    config = settled(epochs="1").config("exact", 1.0, 0)
    data = training.load_data(config)
    original = trial.assemble

    def assemble(*arguments: Any) -> Trainer:
        made = original(*arguments)
        made.method = never
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "assemble", assemble)
        row = trial.run(config, data, evaluate_at=(), timed=True)
    assert row["unconverged_steps"] == 8
    assert not recwarn.list


def test_the_held_out_samples_are_apart() -> None:
    n = 103
    x = torch.arange(n, dtype=torch.float64).reshape(n, 1)
    y = torch.arange(n) * 4 // n  # sorted by class, as files often are
    test = -torch.ones(5, 1, dtype=torch.float64)
    data = Dataset(x, y, test, torch.zeros(5, dtype=torch.int64), 4)
    apart = trial.held_out(data)
    kept, out = apart.x_train.flatten().tolist(), apart.x_test.flatten().tolist()
    assert sorted(kept + out) == list(range(n))  # every training sample once, no test sample
    assert len(out) in (20, 21)
    counts = torch.bincount(apart.y_test, minlength=4)
    assert counts.min() >= 4
    assert torch.equal(y[apart.x_test.flatten().long()], apart.y_test)
    assert torch.equal(trial.held_out(data).x_test, apart.x_test)


@pytest.mark.parametrize("name", ["scale-amended", "layerwise-adaptive"])
def test_hooks_of_an_optimizer_are_off_after_a_run(name: str) -> None:
    config = settled(methods=name, epochs="1").config(name, 0.1, 0)
    data = training.load_data(config)

    def hooks() -> int:
        return len(modules._global_forward_pre_hooks) + len(modules._global_forward_hooks)

    def fail() -> None:
        with trial.assembled(config, data):
            counts.append(hooks())
            raise ZeroDivisionError

    counts = [hooks()]
    with pytest.raises(ZeroDivisionError):
        fail()
    counts.append(hooks())
    assert counts[0] == counts[2] < counts[1]
    row = trial.run(config, data, evaluate_at={8}, timed=True)
    assert row["error"] is None
    assert row["steps"] == [8]
    assert hooks() == counts[0]
