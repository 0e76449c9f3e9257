"""``--probe K``: the run does not notice, the rows are whole, and resuming gives the same ones."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_child import finish, kill_at, signal_at, stages
from run_cases import assert_same, rows, state

from backmatch import errors
from backmatch.cli import main
from backmatch.training import data, methods, models, probes, rundir
from backmatch.training.config import resolve

ARGUMENTS = [
    *("train", "--data", "synthetic", "--hidden", "16", "--batch-size", "512"),
    *("--epochs", "2", "--device", "cpu", "--threads", "1", "--quiet"),
]
METHODS = {
    "backmatch": ["--optimizer", "adam"],
    "cg": ["--weights", "cg", "--inputs", "cg", "--order", "sequential", "--dtype", "float64"],
    "gradient": ["--weights", "scalar", "--inputs", "gradient", "--lr", "0.1"],
    "bp": ["--method", "bp"],
}


def run(out: Path, *words: str) -> Path:
    assert main([*ARGUMENTS, *words, "--out", str(out)]) == 0
    return out


def probed(path: Path) -> list[dict[str, Any]]:
    return [row for row in rows(path) if row["kind"] == "probe"]


@pytest.mark.parametrize("method", METHODS)
def test_the_run_does_not_notice(method: str, tmp_path: Path) -> None:
    bare = run(tmp_path / "bare", *METHODS[method])
    watched = run(tmp_path / "watched", *METHODS[method], "--probe", "3")
    assert [row for row in rows(watched) if row["kind"] != "probe"] == rows(bare)
    for part in ("model", "optimizer", "rng"):
        assert_same(state(watched)[part], state(bare)[part])
    found = probed(watched)
    assert [row["step"] for row in found] == [3, 6]
    assert [row["epoch"] for row in found] == [1, 2]
    text = (watched / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    summary = json.loads((watched / "summary.json").read_text())
    assert (summary["probes"], summary["failed_probes"]) == (2, 0)
    assert summary["probe_seconds"] > 0
    assert "probes" not in json.loads((bare / "summary.json").read_text())


def test_a_row_holds_what_the_page_says(tmp_path: Path) -> None:
    path = run(tmp_path / "run", "--probe", "8")
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (row,) = [json.loads(line) for line in lines if '"probe"' in line]
    assert row["probe_ms"] > 0
    assert [block["block"] for block in row["blocks"]] == ["0", "1"]
    bottom, top = row["blocks"]
    assert bottom["input"] is None
    assert set(top) == {
        *("block", "requested", "loss", "local", "joint", "propagated", "weight", "input")
    }
    assert set(top["weight"]["cosine"]) == {
        *("gradient", "scalar", "local_gradient", "local_scalar", "adam")
    }
    assert set(top["input"]["ratio"]) == {"gradient", "scalar", "local_gradient", "local_scalar"}
    assert top["weight"]["damping"]["min"] > 0
    # On the top block back-propagation hands down what the sweep does: r_B = -m dJ/dz_B.
    for of in ("cosine", "ratio"):
        step = top["weight"][of]
        assert step["gradient"] == pytest.approx(step["local_gradient"], rel=1e-4)
    assert len(json.dumps(row)) < 2500 * len(row["blocks"])


def test_the_first_step_of_adam_is_the_sign_of_the_gradient(tmp_path: Path) -> None:
    path = run(tmp_path / "run", "--method", "bp", "--probe", "1", "--epochs", "1")
    first = probed(path)[0]
    length = (
        first["blocks"][1]["weight"]["step_norm"] / first["blocks"][1]["weight"]["ratio"]["adam"]
    )
    assert length == pytest.approx(1e-3 * (16 * 10 + 10) ** 0.5, rel=1e-3)


def test_off_is_off_and_a_config_file_can_be_overruled(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("probe: 2\n")
    arguments = ["--config", str(tmp_path / "options.yaml")]
    assert len(probed(run(tmp_path / "on", *arguments))) == 4
    assert not probed(run(tmp_path / "off", *arguments, "--probe", "0"))
    assert state(tmp_path / "off")["probes"] is None


@pytest.mark.parametrize("bad", ["-1", "x", "1.5", ""])
def test_bad_intervals(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, f"--probe={bad}"]) == 2
    assert "--probe: expected a whole number >= 0" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["backmatch", "bp"])
def method(request: pytest.FixtureRequest) -> list[str]:
    return [*ARGUMENTS, *METHODS[request.param], "--probe", "3", "--out"]


@pytest.fixture(scope="module")
def whole(method: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "whole"
    assert finish([*method, str(path)]) == 0
    return path


def assert_same_probed_run(path: Path, whole: Path) -> None:
    """:func:`assert_same_run` but for one wall-clock number in the checkpoint."""
    assert rows(path) == rows(whole)
    for each in (mine := state(path), theirs := state(whole)):
        assert each["position"].pop("probe_seconds") > 0
    assert_same(mine, theirs)


@pytest.mark.parametrize("point", [0, 1, 2])
def test_resume_after_a_kill(method: list[str], whole: Path, tmp_path: Path, point: int) -> None:
    path = tmp_path / "run"
    total = len(stages([*method, str(tmp_path / "counted")]))
    assert kill_at([*method, str(path)], None, 4 + point * (total - 4) // 3) == -signal.SIGKILL
    assert finish(["train", "--resume", str(path), "--quiet"]) == 0
    assert_same_probed_run(path, whole)


@pytest.mark.parametrize("step", [2, 3])
def test_resume_after_a_signal(method: list[str], whole: Path, tmp_path: Path, step: int) -> None:
    path = tmp_path / "run"
    assert signal_at([*method, str(path)], step, signal.SIGINT) == 130
    assert finish(["train", "--resume", str(path), "--quiet"]) == 0
    assert_same_probed_run(path, whole)


def test_resume_without_the_shadow_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert signal_at([*ARGUMENTS, "--out", str(path)], 2, signal.SIGINT) == 130
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "probe": 5}))
    assert main(["train", "--resume", str(path), "--quiet"]) == 2
    assert "probe: the run has 0, now 5" in capsys.readouterr().err


def looking(method: str = "bp") -> tuple[probes.Probes, torch.nn.Sequential, data.Dataset]:
    config = resolve({"data": "synthetic", "hidden": [8], "method": method, "probe": 1})
    dataset = data.load("synthetic", torch.float32)
    model = models.create("mlp", dataset, [8])
    return probes.Probes(model, config), model, dataset


def test_a_probe_that_fails_is_a_row_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found, model, dataset = looking()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail(*values: Any, **named: Any) -> None:
        raise errors.NonFiniteError("weight step", 3, 4)

    monkeypatch.setattr(probes, "probe", fail)
    row = found.look(1, 1, dataset.x_train[:20], dataset.y_train[:20])
    assert row is not None
    assert "weight step" in row["error"]
    assert row["blocks"] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_failed_probes_are_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*values: Any, **named: Any) -> None:
        raise errors.NonFiniteError("weight step", 3, 4)

    monkeypatch.setattr(probes, "probe", fail)
    loud = [word for word in ARGUMENTS if word != "--quiet"]
    assert main([*loud, "--probe", "3", "--out", str(tmp_path / "run")]) == 0
    assert "2 probes failed, the first at step 3: weight step" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_probes"] == 2


@pytest.mark.parametrize("where", ["gradient", "probe"])
def test_an_interrupt_inside_a_probe_changes_nothing(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model, dataset = looking("backmatch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    name = "cross_entropy" if where == "gradient" else "probe"

    def stop(*values: Any, **named: Any) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(probes, name, stop)
    with pytest.raises(KeyboardInterrupt):
        found.look(1, 1, dataset.x_train[:20], dataset.y_train[:20])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    if where == "gradient":
        assert torch.equal(torch.get_rng_state(), random)


def test_out_of_memory_in_the_extra_pass_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, *values: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probes.Probes, "_gradients", full)
    assert main([*ARGUMENTS, "--probe", "3", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "drop --probe" in error


def test_batch_norm_and_dropout_do_not_notice() -> None:
    dataset = data.load("synthetic", torch.float32)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Linear(32, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout()),
        torch.nn.Linear(8, 10),
    )
    for method in ("bp", "backmatch"):
        config = resolve({"data": "synthetic", "method": method, "probe": 1})
        found = probes.create(model, config)
        assert found is not None
        before = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        row = found.look(1, 1, dataset.x_train[:20], dataset.y_train[:20])
        assert row is not None
        assert "error" not in row
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
        # The step that follows draws the mask that the probe has seen.
        matcher = methods.BackMatching(methods.partition(model))
        again = probes.probe(matcher, dataset.x_train[:20], lambda o: o.square().mean())
        torch.set_rng_state(random)
        step = matcher.backward(dataset.x_train[:20], lambda o: o.square().mean())
        assert again.loss == float(step.loss)
        model.load_state_dict(before)
        model.zero_grad()


def test_disk_full_at_a_probe_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = tmp_path / "whole", tmp_path / "run"
    run(whole, "--probe", "3")
    original = rundir.write_fully

    def full(descriptor: int, content: bytes) -> None:
        if b'"probe"' in content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_fully", full)
        assert main([*ARGUMENTS, "--probe", "3", "--out", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main(["train", "--resume", str(path), "--quiet"]) == 0
    assert_same_probed_run(path, whole)


@pytest.mark.parametrize("method", ["bp", "backmatch"])
def test_hooks_that_come_later_see_nothing_of_the_probes(method: str) -> None:
    """An optimizer's hooks measure the run's own passes."""
    found, model, dataset = looking(method)
    seen: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *values: seen.append(values))
        module.register_full_backward_hook(lambda *values: seen.append(values))
    row = found.look(1, 1, dataset.x_train[:20], dataset.y_train[:20])
    assert row is not None
    assert row["blocks"]
    assert not seen


def test_probes_see_the_weights_of_the_run() -> None:
    found, model, dataset = looking("backmatch")
    x, y = dataset.x_train[:20], dataset.y_train[:20]
    first = found.look(1, 1, x, y)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    second = found.look(2, 1, x, y)
    assert first is not None
    assert second is not None
    assert first["blocks"][0]["requested"] != second["blocks"][0]["requested"]
    other = probes.probe(
        methods.create_matcher(model, resolve({"hidden": [8]})),
        x,
        lambda output: torch.nn.functional.cross_entropy(output, y),
    )
    assert other.blocks[0].as_dict()["requested"] == second["blocks"][0]["requested"]
