"""``compare.png``: drawn from what ``compare.json`` holds, whatever the comparison was."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.figure import Figure

from backmatch.comparing import figure, methods, summary, table
from backmatch.comparing.axes import accuracy_axis

NAMES = ("bp-sgd", "bp-momentum", "bp-adam", "scalar", "cg-1", "cg-16", "exact-inputs", "exact")


def run(name: str, seed: int, rise: float, error: str | None = None) -> dict[str, Any]:
    steps = [0, 2, 4, 8] if error is None else [0, 2]
    return {
        "kind": "final",
        "method": name,
        "lr": 0.3,
        "seed": seed,
        "train_loss": [1.0] * steps[-1],
        "steps": steps,
        "accuracy": [min(0.1 + rise * step + 0.01 * seed, 1.0) for step in steps],
        "loss": [1.0] * len(steps),
        "training_seconds": [0.01 * step * (1 + rise) for step in steps],
        "step_ms": [10.0 * (1 + rise)] * steps[-1],
        "unconverged_steps": 0,
        "error": error,
    }


def result(names: tuple[str, ...] = NAMES, seeds: int = 2, **options: Any) -> dict[str, Any]:
    asked = {
        "data": "digits",
        "model": "mlp",
        "hidden": [128, 128],
        "activation": "relu",
        "batch_size": 128,
        "epochs": 2,
        "seeds": list(range(seeds)),
        "report_epochs": [1, 2],
        "methods": list(names),
        "target": None,
        **options,
    }
    runs = [run(n, s, 0.02 + 0.014 * i) for s in range(seeds) for i, n in enumerate(names)]
    goal = summary.target(asked, runs, 8)
    rows = [
        {
            "name": name,
            "title": methods.find(name).title,
            "lr": 0.3,
            "edge": False,
            "tuning": [],
            "tuning_runs": 6,
            "summary": summary.summarize(
                summary.of(runs, name),
                goal=goal["accuracy"],
                epochs=asked["report_epochs"],
                steps_per_epoch=4,
            ),
        }
        for name in names
    ]
    return {
        "options": asked,
        "data": {"train": 1437, "validation": 287, "test": 360},
        "steps_per_epoch": 4,
        "total_steps": 8,
        "target": goal,
        "methods": rows,
        "runs": runs,
    }


def test_the_same_result_gives_the_same_bytes_and_stays_as_it_is() -> None:
    given = result()
    before = copy.deepcopy(given)
    first = figure.draw(given)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert figure.draw(given) == first
    assert given == before
    other = result()
    other["runs"][0]["accuracy"][-1] = 0.9
    assert figure.draw(other) != first


@pytest.mark.parametrize(
    ("names", "seeds"),
    [
        (("exact",), 1),
        (("bp-adam",), 3),
        (("cg-2", "cg-3"), 1),
        ((*methods.NAMED, "cg-1", "cg-2", "cg-4", "cg-8", "cg-16", "cg-32", "cg-64"), 3),
    ],
)
def test_any_set_of_methods_can_be_drawn(names: tuple[str, ...], seeds: int) -> None:
    assert len(figure.draw(result(names, seeds))) > 10_000


def test_one_epoch_and_nothing_right_at_all() -> None:
    given = result(("bp-sgd", "exact"), epochs=1, report_epochs=[2])
    for row in given["runs"]:
        row["accuracy"] = [0.0] * len(row["accuracy"])
    assert len(figure.draw(given)) > 10_000


def test_a_method_without_any_result_is_left_out() -> None:
    given = result(("bp-sgd", "exact"))
    given["runs"] = [
        run("bp-sgd", row["seed"], 0.1, "after 3 steps: NaN") if row["method"] == "bp-sgd" else row
        for row in given["runs"]
    ]
    given["methods"][0]["summary"] = summary.summarize(
        summary.of(given["runs"], "bp-sgd"), goal=0.9, epochs=[1, 2], steps_per_epoch=4
    )
    assert figure.curve(given, "bp-sgd")["mean"] == []
    assert len(figure.draw(given)) > 10_000


def test_curves_are_means_over_the_seeds_that_finished() -> None:
    given = result(("bp-sgd", "exact"), seeds=3)
    given["runs"][0] = run("bp-sgd", 0, 0.5, "after 2 steps: NaN")
    found = figure.curve(given, "bp-sgd")
    mine = [r["accuracy"] for r in given["runs"] if r["method"] == "bp-sgd" and not r["error"]]
    assert len(mine) == 2
    assert found["steps"] == [0, 2, 4, 8]
    assert found["mean"] == pytest.approx([(a + b) / 2 for a, b in zip(*mine, strict=True)])
    assert all(
        low < mean < high
        for low, mean, high in zip(found["low"], found["mean"], found["high"], strict=True)
    )


@pytest.mark.parametrize(
    "data", ["a$b$\\frac{.npz", "a$.npz", "\u65e5\u672c.npz", "a\nb.npz", "l" * 400]
)
def test_any_file_name_is_drawn_without_a_warning(data: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figure.draw(result(("bp-sgd", "exact"), data=data)).startswith(b"\x89PNG")


def test_settings_of_the_user_change_nothing() -> None:
    drawn = figure.draw(result())
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red"}):
        assert figure.draw(result()) == drawn


def test_no_error_at_all_is_called_100() -> None:
    axes = Figure().subplots()
    found = result(("exact",))
    found["data"]["test"] = 5
    found["runs"][0]["accuracy"][-1] = 1.0
    accuracy_axis(axes, found, 0.1)
    ticks = {float(at): axes.yaxis.get_major_formatter()(at, 0) for at in axes.get_yticks()}
    assert ticks[10.0] == "100"
    assert "90" not in ticks.values()


@pytest.mark.parametrize("epochs", [[1, 2], list(range(1, 31))], ids=["two", "thirty"])
def test_the_table_fits_a_terminal(epochs: list[int]) -> None:
    found = result(methods.DEFAULT)
    wide = {"mean": 0.7354, "sd": 0.1754, "seeds": [0.6, 0.8]}
    found |= {
        "machine": {"cpu": "a", "threads": 1},
        "versions": {"torch": "2", "backmatch": "1"},
        "began_unix_seconds": 0,
    }
    found["options"] |= {"report_epochs": epochs, "tuning_seeds": [10000], "dtype": "float32"}
    for row in found["methods"]:
        row |= {"lr": 0.0005, "edge": True}
        row["summary"] |= {
            "accuracy": {str(epoch): wide for epoch in epochs},
            **{"best": wide, "reached": 2, "step_ms": wide, "target_seconds": wide},
            "target_steps": {"mean": 22.0, "sd": 10.0},
        }
    lines = [line for text in table.terminal(found) for line in text.split("\n")]
    assert max(map(len, lines)) <= 100
    heading = lines[0].split("  ")
    assert heading[0] == "method"
    parts = sum(line.startswith("exact ") for line in lines)
    assert parts == 1 if len(epochs) == 2 else parts > 1
    text = "\n".join(lines)
    assert all(f"after {epoch}" in text for epoch in epochs)
    assert "ms/step" in text


def test_a_run_that_diverged_takes_no_part_in_any_mean() -> None:
    runs = [run("exact", 0, 0.1), run("exact", 1, 0.1, error="after 2 steps: NaN")]
    found = summary.summarize(runs, goal=0.2, epochs=[1], steps_per_epoch=4)
    assert (found["reached"], found["diverged"]) == (1, 1)
    for name in ("target_steps", "target_seconds", "step_ms"):
        assert found[name]["seeds"][1] is None
        assert found[name]["mean"] == found[name]["seeds"][0]
