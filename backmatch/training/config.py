"""The resolved configuration of a run: flags over config file over defaults."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from .failures import UsageError, show
from .options import BY_NAME, CIFAR, INVERTIBLE, OPTIONS, SCALE_OPTIONS, SCALED_OPTIMIZERS

#: No config file is near this size; the limit stops a hostile one from being parsed.
MAX_CONFIG_BYTES = 1 << 20

#: Options that only the back-matching method reads.
MATCHING_ONLY = (
    "blocks",
    "weights",
    "inputs",
    "cg_steps",
    "weight_damping",
    "input_damping",
    "damping",
    "target_step",
    "order",
)

#: Data that augmentation would spoil, and why.
NOT_TO_BE_MOVED = {
    "digits": "a digit moved or mirrored is another one",
    "synthetic": "synthetic has no images",
}


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run with its final value; ``None`` where model or method do not read it.

    ``device`` and ``threads`` are settled (``auto`` and ``None`` replaced) when the run starts.
    """

    data: str
    data_dir: str | None
    augment: str
    model: str
    hidden: list[int] | None
    activation: str | None
    method: str
    blocks: str | None
    weights: str | None
    inputs: str | None
    cg_steps: int | None
    weight_damping: float | str | None
    input_damping: float | str | None
    target_step: float | None
    order: str | None
    optimizer: str
    lr: float
    momentum: float | None
    scale_kind: str | None
    scale_estimate: str | None
    scale_probes: int | None
    scale_damping: float | None
    scale_every: int | None
    scale_average: float | None
    normalize: bool | None
    weight_decay: float
    schedule: str
    batch_size: int
    epochs: int
    seed: int
    probe: int
    device: str
    dtype: str
    threads: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(*levels: Mapping[str, Any]) -> TrainConfig:
    """Merge levels of option values, later ones win, and fill in the defaults.

    Raises:
        ValueError: an option that has no effect next to the others.

    >>> resolve({"lr": 0.5}, {"damping": 2.0, "input_damping": "rel:0.1"}).weight_damping
    2.0
    """
    given: dict[str, Any] = {}
    for level in levels:
        if "damping" in level:  # the newer general value replaces older particular ones
            given.pop("weight_damping", None)
            given.pop("input_damping", None)
        given.update({name: value for name, value in level.items() if value is not None})
    values = {option.name: given.get(option.name, option.default) for option in OPTIONS}
    scaled = _fill_scales(values, given)
    if values["method"] == "bp":
        unused = [name for name in MATCHING_ONLY if name in given]
        if scaled:
            unused = [name for name in unused if name != "blocks"]
        if unused:
            raise ValueError(f"{BY_NAME[unused[0]].flag} has no effect with --method bp; drop it")
    else:
        _fill_matching(values, given)
    _fill_data(values, given)
    _fill_model(values, given)
    _check_solvers(values)
    _fill_optimizer(values)
    _fill_decay(values)
    del values["damping"]
    return TrainConfig(**values)


def _fill_data(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Where the files are, and whether images are moved about."""
    name = values["data"]
    if name in CIFAR:
        values["data_dir"] = given.get("data_dir", "data")
    elif "data_dir" in given:
        raise ValueError(f"--data-dir has no effect with --data {show(name)}; drop it")
    values["augment"] = given.get("augment", "standard" if name in CIFAR else "none")
    if values["augment"] != "none" and name in NOT_TO_BE_MOVED:
        raise ValueError(
            f"--augment {values['augment']} is for photographs: {NOT_TO_BE_MOVED[name]}; drop it"
        )


def _fill_model(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    if values["model"] == "mlp":
        values["hidden"] = given.get("hidden", [128, 128])
        values["activation"] = given.get("activation", "relu")
        return
    for name in ("hidden", "activation"):
        if name in given:
            raise ValueError(f"--{name} has no effect with --model {values['model']}; drop it")


def _check_solvers(values: Mapping[str, Any]) -> None:
    sides = (values["weights"], values["inputs"])
    if values["cg_steps"] is not None and "cg" not in sides:
        raise ValueError("--cg-steps has no effect unless --weights or --inputs is cg; drop it")
    if values["inputs"] != "layer-inverse":
        return
    if values["activation"] not in INVERTIBLE:
        model = values["model"]
        got = f"--activation {values['activation']}" if model == "mlp" else f"--model {model}"
        raise ValueError(
            "--inputs layer-inverse: expected --model mlp with --activation "
            f"{', '.join(INVERTIBLE)}, got {got}"
        )
    if values["blocks"] == "layer":
        raise ValueError(
            "--inputs layer-inverse: expected every activation in one block with its Linear, "
            "got --blocks layer; drop it"
        )


def _fill_matching(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    for name, default in (
        ("blocks", "activation"),
        ("weights", "auto"),
        ("inputs", "auto"),
        ("target_step", 1.0),
        ("order", "simultaneous"),
    ):
        values[name] = given.get(name, default)
    both_gradient = values["weights"] == values["inputs"] == "gradient"
    if both_gradient and "damping" in given:
        raise ValueError(
            "--damping has no effect when --weights and --inputs are gradient; drop it"
        )
    for side, name, relative in (
        ("weights", "weight_damping", "rel:0.1"),
        ("inputs", "input_damping", "rel:0.01"),
    ):
        if values[side] == "gradient":
            if name in given:
                flag = BY_NAME[name].flag
                raise ValueError(f"{flag} has no effect with --{side} gradient; drop it")
            continue
        default = 0.0 if values[side] == "scalar" else relative
        values[name] = given.get(name, given.get("damping", default))


def _fill_scales(values: dict[str, Any], given: Mapping[str, Any]) -> bool:
    """The options of an optimizer that divides by scalars; whether it is one."""
    name = values["optimizer"]
    if name not in SCALED_OPTIMIZERS:
        for option in SCALE_OPTIONS:
            if option.name in given:
                raise ValueError(f"{option.flag} has no effect with --optimizer {name}; drop it")
        return False
    if values["method"] != "bp":
        raise ValueError(
            f"--optimizer {name} divides the gradients of back-propagation; add --method bp"
        )
    for key, default in (
        ("blocks", "activation"),
        ("scale_kind", "trace"),
        ("scale_estimate", "exact"),
        ("scale_damping", 0.0),
        ("scale_every", 10),
        ("scale_average", 0.0),
        ("normalize", True),
    ):
        values[key] = given.get(key, default)
    _fill_estimate(values, given)
    usual = (0.1, 0.9) if values["normalize"] else (1.0, 0.0)  # off: the step of the sweep
    for key, default in zip(("lr", "momentum"), usual, strict=True):
        values[key] = given.get(key, default)
    return True


def _fill_estimate(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    estimate, kind = values["scale_estimate"], values["scale_kind"]
    if estimate == "exact":
        if "scale_probes" in given:
            raise ValueError("--scale-probes has no effect with --scale-estimate exact; drop it")
        return
    of = {"hutchinson": "trace", "power": "spectral"}[estimate]
    if kind != of:
        raise ValueError(f"--scale-estimate {estimate} needs --scale-kind {of}, got {kind}")
    values["scale_probes"] = given.get("scale_probes", 8)


def _fill_optimizer(values: dict[str, Any]) -> None:
    name = values["optimizer"]
    if name in SCALED_OPTIMIZERS:
        return
    if name in ("sgd", "rmsprop"):
        plain = values["method"] == "bp" and name == "sgd"
        usual = 0.9 if plain else 0.0
        values["momentum"] = usual if values["momentum"] is None else values["momentum"]
    elif values["momentum"] is not None:
        raise ValueError(f"--momentum has no effect with --optimizer {name}; drop it")
    if values["lr"] is None:
        sgd = 1.0 if values["method"] == "backmatch" else 0.1
        values["lr"] = sgd if name == "sgd" else 1e-3


def _fill_decay(values: dict[str, Any]) -> None:
    if values["weight_decay"] is None:
        # That of adamw is torch's own default.
        values["weight_decay"] = 0.01 if values["optimizer"] == "adamw" else 0.0


def read_config_file(path: Path, flag: str = "--config") -> dict[str, Any]:
    """Option values of a YAML or JSON file (a flat mapping, keys as the flags).

    Raises:
        UsageError: the file cannot be read, is no flat mapping, or holds a key or a value
            that is none of the options'; the message opens with ``flag`` and the path.
    """
    where = f"{flag} {show(str(path), 200)}"
    try:
        if not path.is_file():
            raise UsageError(f"{where}: no such file")
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise UsageError(f"{where}: larger than 1 MiB, not a config file")
        return read_config_text(raw.decode("utf-8"), where)
    except OSError as error:
        raise UsageError(f"{where}: cannot read it: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not valid YAML or JSON ({_first_line(error)})") from None


def read_config_text(text: str, where: str) -> dict[str, Any]:
    """Option values of the text of a config file; ``where`` opens every message."""
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise UsageError(f"{where}: not valid YAML or JSON ({_first_line(error)})") from None
    return read_mapping(content, where)


def read_mapping(content: object, where: str) -> dict[str, Any]:
    """Check a parsed mapping of options; ``where`` opens every message."""
    if not isinstance(content, dict):
        raise UsageError(f"{where}: must hold a mapping like 'lr: 0.5', got {show(content)}")
    values: dict[str, Any] = {}
    for key, raw in content.items():
        name = key.replace("-", "_") if isinstance(key, str) else None
        if name not in BY_NAME:
            raise UsageError(
                f"{where}: {unknown('option', key, BY_NAME, 'backmatch train --help')}"
            )
        if raw is None:
            continue
        try:
            values[name] = BY_NAME[name].value(raw, name)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
    return values


def unknown(what: str, name: object, known: Iterable[str], help_command: str) -> str:
    """``unknown option 'lrr', did you mean 'lr'?``"""
    close = difflib.get_close_matches(str(name)[:60], list(known), n=1, cutoff=0.7)
    hint = f", did you mean {close[0]!r}?" if close else f"; see '{help_command}'"
    return f"unknown {what} {show(name)}{hint}"


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``lr: the run has 1.0, asked for 0.5`` for every wanted option that differs.

    ``auto`` devices and unset values ask for nothing; ``damping`` asks for both sides.
    """
    asked = {name: value for name, value in wanted.items() if value is not None}
    if asked.get("device") == "auto":
        del asked["device"]
    both = asked.pop("damping", None)
    if both is not None:
        for name in ("weight_damping", "input_damping"):
            if saved[name] is not None:
                asked.setdefault(name, both)
    return [
        f"{name}: the run has {saved[name]}, asked for {value}"
        for name, value in asked.items()
        if saved[name] != value
    ]


def to_json(config: TrainConfig) -> str:
    """The text of ``config.json``; it can be given back as ``--config``."""
    return json.dumps(config.as_dict(), indent=2) + "\n"


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and merge keys (nested ones are a bomb)."""


def _construct_mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise ValueError(f"key {show(key)} stands there twice")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _first_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    text = str(error).splitlines()
    return show(text[0])[1:-1] if text else type(error).__name__
