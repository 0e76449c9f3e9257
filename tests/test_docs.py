"""The Python blocks of the documentation run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from backmatch.linalg import _cuda_cg, _fused_cg, _ridge_choice, spd

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a file share one namespace, in order, as a reader would run them."""
    text = path.read_text()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": path.stem}
    for match in BLOCK.finditer(text):
        # Blank lines in front, so that a traceback shows the line of the document.
        source = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        exec(compile(source, str(path), "exec"), namespace)


def test_readme_has_python() -> None:
    """Guards the pattern above: a README without a match would pass unread."""
    assert BLOCK.search((ROOT / "README.md").read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_exist(path: Path) -> None:
    """Every relative link names a file, every link within a page a heading."""
    text = path.read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif "://" not in link:
            assert (path.parent / link.partition("#")[0]).exists(), link


def test_quoted_constants() -> None:
    """A number with a constant's name behind it, as in "512 (`KERNEL_SIDE`)", is its value."""
    quoted = re.findall(
        r"(\d[\d.e-]*)\s+\(`(\w+)`\)", (ROOT / "docs" / "performance.md").read_text()
    )
    assert len(quoted) >= 8  # guards the pattern
    kernels = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cpu").iterdir()))
    for value, name in quoted:
        modules = (spd, _cuda_cg, _fused_cg, _ridge_choice)
        found = [getattr(m, name) for m in modules if hasattr(m, name)]
        found += re.findall(rf"constexpr \w+ {name} = (\S+);", kernels)
        assert [float(each) for each in found] == [float(value)], name


@pytest.mark.parametrize(
    "name",
    [
        *("digits_mlp", "digits_undamped", "digits_cnn", "analysis"),
        *("vision", "kernels", "step", "scaling", "gpu"),
    ],
)
def test_documents_have_markers(name: str) -> None:
    """The benchmarks put their tables between them."""
    document = "docs/performance.md" if name == "scaling" else "README.md"
    text = (ROOT / document).read_text()
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    assert text.count(begin) == text.count(end) == 1
    assert text.index(begin) < text.index(end)
