"""The structure of the code is the picture in the README: what each module may import is read from there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgelm"
HEAVY = {"numba", "llvmlite"}  # only the kernels may know them
FOREIGN = {"tests", "tools", "torch", "transformers", "onnx"}


def rooms() -> list[list[str]]:
    """The lines of the README's picture of imports, from the foundation up: names of modules and packages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"Imports point one way.*?```text\n(.*?)```", text, re.DOTALL)
    assert match, "the README has no picture of the imports"
    return [line.split("|")[0].split() for line in match[1].splitlines()]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a module imports when it runs, at its top or later; not what only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], node.module or ""]).rstrip(".")
            source = base if node.level else node.module or ""
            yield from (f"{source}.{alias.name}" for alias in node.names)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module(dotted: str) -> str | None:
    """The module or package directly below edgelm that a dotted name lies in."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "edgelm" and len(parts) > 1 else None


def test_the_picture_has_every_module_once() -> None:
    drawn = [name for line in rooms() for name in line]
    there = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert sorted(drawn) == sorted(there - {"__init__", "__main__"})


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    level = {name: i for i, line in enumerate(rooms()) for name in line}
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in ("__init__", "__main__"):
        return
    for name in imports(path):
        room = module(name)
        assert name.split(".")[0] not in FOREIGN, name
        if room in level:
            assert level[room] <= level[parts[0]], f"{parts[0]} is below {room} and may not import it"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_only_kernels_know_numba(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "kernels":
        assert not HEAVY & {name.split(".")[0] for name in imports(path)}


def test_the_runtime_never_needs_the_converters() -> None:
    for path in sources(PACKAGE):
        assert "converters" not in {name.split(".")[0] for name in imports(path)}, path


def test_the_converters_need_neither_numba_nor_torch() -> None:
    for path in sources(ROOT / "converters"):
        assert not (HEAVY | FOREIGN - {"onnx"}) & {name.split(".")[0] for name in imports(path)}, path


def test_every_tool_stands_in_the_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w/]+\.py)` \| \S", text, re.MULTILINE)
    assert sorted(told) == [p.relative_to(ROOT / "tools").as_posix() for p in sources(ROOT / "tools")]


def test_no_file_is_too_long_to_read() -> None:
    long = {p.name: n for p in sources(PACKAGE) if (n := len(p.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long
