"""Config files: the same options as the flags, which override them; hostile files refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backmatch.training.config import (
    TrainConfig,
    differences,
    read_config_file,
    read_mapping,
    resolve,
    to_json,
)
from backmatch.training.failures import UsageError
from backmatch.training.options import OPTIONS


def read(tmp_path: Path, text: str | bytes, name: str = "run.yaml") -> dict[str, object]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config_file(path)


def test_defaults() -> None:
    config = resolve()
    assert (config.method, config.weights, config.inputs) == ("backmatch", "auto", "auto")
    assert (config.weight_damping, config.input_damping) == ("rel:0.1", "rel:0.01")
    assert (config.optimizer, config.lr, config.momentum) == ("sgd", 1.0, 0.0)
    assert (config.batch_size, config.epochs, config.hidden) == (128, 5, [128, 128])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"method": "bp"},
            {"lr": 0.1, "momentum": 0.9, "weights": None, "weight_damping": None, "order": None},
        ),
        ({"optimizer": "adam"}, {"lr": 1e-3, "momentum": None}),
        ({"weights": "gradient"}, {"weight_damping": None, "input_damping": "rel:0.01"}),
        ({"inputs": "scalar"}, {"weight_damping": "rel:0.1", "input_damping": 0.0}),
        ({"damping": 2.0}, {"weight_damping": 2.0, "input_damping": 2.0}),
        ({"damping": 2.0, "input_damping": 0.0}, {"weight_damping": 2.0, "input_damping": 0.0}),
        ({"damping": 2.0, "weights": "gradient"}, {"weight_damping": None, "input_damping": 2.0}),
    ],
)
def test_derived_defaults(given: dict[str, object], expected: dict[str, object]) -> None:
    values = resolve(given).as_dict()
    assert {name: values[name] for name in expected} == expected


def test_later_levels_win() -> None:
    config = resolve({"lr": 0.5, "weight_damping": 1.0, "epochs": 2}, {"damping": 3.0, "lr": 0.25})
    assert (config.lr, config.weight_damping, config.input_damping) == (0.25, 3.0, 3.0)
    assert config.epochs == 2


@pytest.mark.parametrize("method", ["backmatch", "bp"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_saved_config_reads_back(method: str, optimizer: str, tmp_path: Path) -> None:
    config = resolve({"method": method, "optimizer": optimizer, "hidden": []})
    assert resolve(read(tmp_path, to_json(config), "config.json")) == config


def test_every_option_is_saved() -> None:
    names = {option.name for option in OPTIONS} - {"damping"}
    assert set(TrainConfig.__dataclass_fields__) == names


def test_yaml_and_json_and_both_spellings(tmp_path: Path) -> None:
    yaml_text = "lr: 1e-3\nbatch-size: 32\nhidden: [8, 4]\nweight_damping: rel:0.5\nthreads:\n"
    expected = {"lr": 1e-3, "batch_size": 32, "hidden": [8, 4], "weight_damping": "rel:0.5"}
    assert read(tmp_path, yaml_text) == expected
    assert read(tmp_path, json.dumps(expected), "run.json") == expected
    assert read(tmp_path, "hidden: 8,4") == {"hidden": [8, 4]}
    assert read(tmp_path, "hidden: none") == {"hidden": []}
    assert read(tmp_path, "damping: 2") == {"damping": 2.0}


BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold a mapping"),
        ("- lr", "must hold a mapping like 'lr: 0.5', got a list"),
        ("lr 0.5", "must hold a mapping"),
        ("lr: [", "line 1"),
        ("{", "not valid YAML or JSON"),
        ("lr: 1\nlr: 2", "key 'lr' stands there twice"),
        ("learning_rate: 1", "unknown option 'learning_rate'"),
        ("batchsize: 1", "did you mean 'batch_size'?"),
        ("1: 2", "unknown option 1"),
        ("? [1]\n: 2", "not valid YAML or JSON"),
        ("out: x", "unknown option 'out'"),
        ("lr: [1]", "lr: expected a number > 0, got a list"),
        ("lr: {a: 1}", "lr: expected a number > 0, got a mapping"),
        ("lr: true", "lr: expected a number > 0, got True"),
        ("lr: .nan", "lr: expected a number > 0"),
        ("lr: 1" + "0" * 400, "lr: expected a number > 0"),
        ("epochs: 1.0", "epochs: expected a whole number >= 1, got 1.0"),
        ("epochs: yes", "epochs"),
        ("hidden: [[1]]", "hidden"),
        ("hidden: [1.5]", "hidden"),
        ("seed: 99999999999999999999999", "seed"),
        ("data: cifar1", "data: expected one of digits, synthetic, cifar10, cifar100 or FILE.npz"),
        ("data: 3", "data: expected one of"),
        ("model: os.system", "model: expected one of mlp"),
        ("lr: !!python/object/apply:os.system ['true']", "not valid YAML or JSON"),
        ("a: &a {lr: 1}\n<<: *a", "not valid YAML or JSON"),
        ("a: &a [*a]", "not valid YAML or JSON"),
        (BOMB, "unknown option 'a'"),
        (BOMB.replace("a: &a", "lr: &a", 1).replace("i: &i", "data: &i"), "got a list"),
        (b"\xff\xfe\x00lr", "not valid YAML or JSON"),
        (b"\x00" * 100, "not valid YAML or JSON"),
        ("[" * 50_000, "not valid YAML or JSON"),
        ("# " + "x" * (1 << 20), "larger than 1 MiB"),
        ("lr: 2001-01-01", "lr: expected a number > 0"),
    ],
)
def test_unusable_files(text: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert told in message
    assert "run.yaml" in message
    assert len(message) < 500
    assert "\n" not in message


def test_a_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_config_file(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "run.yaml").write_text("lr: 1")
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(UsageError, match="cannot read it: Permission denied"):
        read_config_file(tmp_path / "run.yaml")


def test_no_effect_is_told_for_files_too() -> None:
    given = read_mapping({"method": "bp", "order": "sequential"}, "file")
    with pytest.raises(ValueError, match="--order has no effect with --method bp"):
        resolve(given)


def test_differences() -> None:
    saved = resolve({"weights": "gradient", "device": "cpu"}).as_dict()
    assert differences(saved, {"device": "auto", "threads": None, "weights": "gradient"}) == []
    assert differences(saved, {"damping": "rel:0.01"}) == []
    assert differences(saved, {"damping": 1.0, "lr": 2.0}) == [
        "lr: the run has 1.0, asked for 2.0",
        "input_damping: the run has rel:0.01, asked for 1.0",
    ]
