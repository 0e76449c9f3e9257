"""The recipes that come with the package: complete, resolvable, trainable, and in the wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cifar
import pytest
import torch

from backmatch.cli import main
from backmatch.training import recipes
from backmatch.training.config import resolve
from backmatch.training.failures import UsageError

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    f"vgg13-{data}{kind}"
    for data in ("cifar10", "cifar100")
    for kind in ("", "-scale-amended", "-sgd")
]


def test_names() -> None:
    assert recipes.names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_honest_and_resolves(name: str) -> None:
    text = recipes.text(name)
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    for word in ("Status: derived here", "not yet trained to the end by us", "Cost:"):
        assert word in comment.replace("#", " ").replace("  ", " ")
    config = resolve(recipes.read(name))
    assert config.data in name
    assert (config.model, config.augment, config.batch_size) == ("vgg13_bn", "standard", 128)
    assert config.method == ("bp" if name.endswith(("sgd", "amended")) else "backmatch")
    if config.method == "backmatch":
        assert (config.weights, config.inputs, config.lr) == ("auto", "auto", 0.3)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_recipes_differ_in_nothing_but_the_optimizer(data: str) -> None:
    plain = resolve(recipes.read(f"vgg13-{data}-sgd")).as_dict()
    amended = resolve(recipes.read(f"vgg13-{data}-scale-amended")).as_dict()
    differing = {name for name in plain if plain[name] != amended[name]}
    its_own = {"optimizer", "blocks", "normalize"}
    assert all(option in its_own or option.startswith("scale_") for option in differing)
    assert plain["optimizer"] == "sgd"
    assert amended["optimizer"] == "scale-amended"


def test_a_flag_that_does_not_go_with_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """The message names an option that nobody typed, so it says where it stands."""
    recipe = ["train", "--config", "recipe:vgg13-cifar10"]
    assert main([*recipe, "--method", "bp"]) == 2
    assert capsys.readouterr().err == (
        "backmatch: --blocks has no effect with --method bp; drop it "
        "(it stands in --config 'recipe:vgg13-cifar10')\n"
    )
    assert main([*recipe, "--hidden", "4"]) == 2
    assert capsys.readouterr().err.endswith(
        "--hidden has no effect with --model vgg13_bn; drop it\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains(name: str, tmp_path: Path) -> None:
    """One epoch of one small batch; flags go over the recipe."""
    data = "cifar100" if "cifar100" in name else "cifar10"
    fake_cifar.write(tmp_path / "data", data, "binary", per_file=3 if data == "cifar100" else 1)
    words = ["train", "--config", f"recipe:{name}", "--data-dir", str(tmp_path / "data")]
    words += ["--epochs", "1", "--batch-size", "3", "--device", "cpu", "--threads", "1", "--quiet"]
    threads = torch.get_num_threads()
    try:
        assert main([*words, "--out", str(tmp_path / "run")]) == 0
    finally:
        torch.set_num_threads(threads)
    step, evaluation = map(
        json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert (step["kind"], evaluation["kind"]) == ("step", "evaluation")
    assert step["lr"] == resolve(recipes.read(name)).lr
    assert step["train_loss"] > 0
    assert evaluation["test_loss"] > 0
    assert step.get("converged", True)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "vgg13-cifar10.yaml", "../recipes/vgg13-cifar10", "/etc/passwd", "a\0b",
     "vgg13_cifar10", "VGG13-CIFAR10", "x" * 5000, "~/x", "vgg13-cifar10/"],
)  # fmt: skip
def test_no_name_becomes_a_path(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipes.text(name)
    told = str(caught.value)
    assert told.isprintable()
    assert len(told) < 300
    for known in NAMES:
        assert known in told


def test_a_wrong_name_is_answered_without_torch() -> None:
    script = (
        "import sys; from backmatch.cli import main; "
        "code = main(['train', '--config', 'recipe:vgg13-cifar1O']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "2 False\n"
    assert "(did you mean vgg13-cifar10?)" in done.stderr
    assert "vgg13-cifar100-scale-amended" in done.stderr


def test_a_resumed_run_may_name_its_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared with what the run has, as any other config file."""
    (tmp_path / "config.json").write_text('{"data": "digits"}')
    assert main(["train", "--resume", str(tmp_path), "--config", "recipe:vgg13-cifar10"]) == 2
    assert "data: the run has digits, asked for cifar10" in capsys.readouterr().err


def test_an_installed_package_has_the_recipes(tmp_path: Path) -> None:
    """What setuptools puts into a wheel, without the compiled part."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "backmatch", source / "backmatch", ignore=ignored)
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    names = sorted(path.stem for path in (built / "backmatch" / "recipes").iterdir())
    assert names == sorted(NAMES)
    script = (
        "import backmatch, sys; from backmatch.training import recipes; "
        "print(backmatch.__file__, recipes.read('vgg13-cifar100')['data'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(built)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(built / "backmatch" / "__init__.py"), "cifar100"], (
        done.stderr
    )
