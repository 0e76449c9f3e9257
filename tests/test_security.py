"""What hostile files and networks could reach: nothing is unpickled, run, imported or called."""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import backmatch

PACKAGE = Path(backmatch.__file__).parent

#: Modules that open connections, or run what they read.
FORBIDDEN_MODULES = {
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc", "requests"),
    *("httpx", "aiohttp", "urllib3", "pickle", "cPickle", "dill", "cloudpickle", "joblib"),
    *("marshal", "shelve", "code", "codeop", "runpy", "pty", "webbrowser"),
}
#: Files in which one of them is wanted: a reader of pickles that allows arrays and labels only.
ALLOWED_MODULES = {"training/pickles.py": {"pickle"}}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
OS_CALLS = {"system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "startfile"}

#: Where a module is imported by a name that stands in a table of the program.
IMPORTERS = {"__init__.py", "linalg/_library.py", "plotting/draw.py"}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Dotted name of what is called, and the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def offences(name: str, tree: ast.Module) -> list[str]:
    """What in one file could reach the network, a shell, or code in data."""
    found = []
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for module in modules:
            top = module.split(".")[0]
            if top in FORBIDDEN_MODULES and top not in ALLOWED_MODULES.get(name, set()):
                found.append(f"imports {module}")
    for function, call in calls(tree):
        last = function.rsplit(".", 1)[-1]
        if function in FORBIDDEN_CALLS or (function.startswith("os.") and last in OS_CALLS):
            found.append(f"calls {function}")
        if function in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
            found.append(f"calls {function}")
        if function == "torch.load" and keyword(call, "weights_only") != "True":
            found.append("calls torch.load without weights_only=True")
        if function.endswith("np.load") and keyword(call, "allow_pickle") != "False":
            found.append("calls np.load without allow_pickle=False")
        if function.startswith("yaml.") and last in (
            "load",
            "load_all",
            "unsafe_load",
            "full_load",
        ):
            loader = keyword(call, "Loader")
            safe = loader == "yaml.SafeLoader" or f"class {loader}(yaml.SafeLoader)" in ast.unparse(
                tree
            )
            if not safe:
                found.append(f"calls {function} with an unsafe loader")
        if keyword(call, "shell") not in ("", "False") or function == "subprocess.getoutput":
            found.append(f"calls {function} with a shell")
        if last == "import_module" and name not in IMPORTERS:
            found.append(f"calls {function}")
        if last == "extractall" and not keyword(call, "filter"):
            found.append(f"calls {function} without a filter")
        if function.startswith("torch.hub") or last in ("urlretrieve", "load_state_dict_from_url"):
            found.append(f"calls {function}")
    return found


def test_no_file_of_the_package_reaches_network_shell_or_code_in_data() -> None:
    count = 0
    for name, tree in trees():
        assert offences(name, tree) == [], name
        count += 1
    assert count > 100


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import pickle", "imports pickle"),
        ("from urllib.request import urlopen", "imports urllib.request"),
        ("pickle.loads(data)", "calls pickle.loads"),
        ("torch.load(path)", "weights_only=True"),
        ("torch.load(path, weights_only=False)", "weights_only=True"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=False"),
        ("yaml.load(text, Loader=yaml.Loader)", "unsafe loader"),
        ("yaml.load(text, Loader=Mine)\nclass Mine(yaml.Loader): pass", "unsafe loader"),
        ("yaml.unsafe_load(text)", "unsafe loader"),
        ("eval(text)", "calls eval"),
        ("os.system(text)", "calls os.system"),
        ("subprocess.run(text, shell=True)", "with a shell"),
        ("importlib.import_module(config.model)", "import_module"),
        ("archive.extractall(folder)", "without a filter"),
        ("torch.hub.load(a, b)", "torch.hub"),
    ],
)
def test_each_of_them_would_be_found(source: str, told: str) -> None:
    assert told in " ".join(offences("any.py", ast.parse(source)))


# ---- sockets off -----------------------------------------------------------------------------


def _without_network(arguments: list[str], sender: Any) -> None:
    import io
    import socket

    attempts: list[str] = []

    def refuse(event: str, values: tuple[Any, ...]) -> None:
        # Unix sockets of the process itself (event loops, multiprocessing) are no network.
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            attempts.append(f"{event} {values}")
            raise OSError("the network is off")

    def no_socket(*values: Any, **names: Any) -> Any:
        attempts.append(f"socket {values}")
        raise OSError("the network is off")

    sys.addaudithook(refuse)
    socket.socket.__init__ = no_socket  # type: ignore[method-assign]
    sys.stdout = sys.stderr = io.StringIO()
    from backmatch.cli import main

    code: Any = None
    try:
        code = main(arguments)
    finally:
        sender.send((code, attempts, sys.stdout.getvalue()))


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["train", "--data", "digits", "--epochs", "1", "--hidden", "8", "--out", "run"],
        ["train", "--data", "synthetic", "--dry-run"],
        ["--version"],
        ["train", "--help"],
    ],
    ids=" ".join,
)
def test_commands_work_with_sockets_off(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(tmp_path / "run") if a == "run" else a for a in arguments]
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_without_network, args=(arguments, sender))
    process.start()
    assert receiver.poll(120), "the command has not ended"
    code, attempts, said = receiver.recv()
    process.join(60)
    assert attempts == []
    assert code == 0 or {"--version", "--help"} & set(arguments), said


# ---- configs choose from registries ----------------------------------------------------------


@pytest.mark.parametrize(
    "option", ["model", "method", "optimizer", "weights", "inputs", "device", "dtype", "order"]
)
@pytest.mark.parametrize("value", ["os.system", "builtins:eval", "../evil", "evil.py", "__main__"])
def test_configs_never_import(option: str, value: str, tmp_path: Path, monkeypatch) -> None:
    from backmatch.cli import main

    (tmp_path / "evil.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    (tmp_path / "run.yaml").write_text(f"{option}: {value!r}\n")
    assert main(["train", "--config", "run.yaml", "--out", "out"]) == 2
    assert main(["train", f"--{option}", value, "--out", "out"]) == 2
    assert not {name for name in set(sys.modules) - before if "evil" in name}
    assert not os.path.exists("out")


# ---- hostile checkpoints -----------------------------------------------------------------------


class Exploit:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


def hostile_checkpoints() -> dict[str, bytes | None]:
    import pickle

    from backmatch.training import checkpoint

    sealed = checkpoint.encode({"step": 1})
    return {
        "empty": b"",
        "truncated": sealed[: len(sealed) // 2],
        "text": b"PK\x03\x04 not a zip file",
        "pickle": pickle.dumps(Exploit()),
        "sealed pickle": checkpoint.encode({"step": Exploit()}),
        "sealed list": checkpoint.encode([Exploit()]),  # type: ignore[arg-type]
        "sealed stranger": sealed,
        "folder": None,
    }


@pytest.mark.parametrize("kind", hostile_checkpoints())
def test_hostile_checkpoints_are_refused_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from backmatch.cli import main
    from backmatch.training import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_draw_curves", lambda *_: False)
    command = ["train", "--data", "synthetic", "--hidden", "4", "--epochs", "1", "--method", "bp"]
    assert main([*command, "--quiet", "--out", "run"]) == 0
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been stopped
    content = hostile_checkpoints()[kind]
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        path = tmp_path / "run" / name
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert "checkpoint" in error
    assert not (tmp_path / "exploited").exists()
