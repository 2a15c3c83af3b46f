"""The shape of the code, held: who may import whom, how long a module may be, and what none may be called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dedup", "replication", "fusefs")
"""From the leaf upward: a package imports itself and those before it."""
LINES_MAX = 500
FORBIDDEN_IN_DEDUP = {"trio", "pyfuse3"}

MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every absolute module name that `path` imports, wherever the statement stands, with its line."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, path.relative_to(ROOT).parts[0]
            else:
                yield node.lineno, node.module or ""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_all_packages_are_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward_only(path: Path) -> None:
    own = PACKAGES.index(path.relative_to(ROOT).parts[0])
    above = set(PACKAGES[own + 1 :])
    wrong = [f"line {line}: {name}" for line, name in imported(path) if name.split(".")[0] in above]
    assert not wrong, f"{name_of(path)} imports a package above its own: {wrong}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.is_relative_to(ROOT / "dedup")], ids=name_of)
def test_dedup_is_a_synchronous_leaf(path: Path) -> None:
    wrong = [f"line {line}: {name}" for line, name in imported(path) if name.split(".")[0] in FORBIDDEN_IN_DEDUP]
    assert not wrong, f"{name_of(path)} must know neither trio nor pyfuse3: {wrong}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < LINES_MAX, f"{name_of(path)} has {lines} lines; {LINES_MAX - 1} at most"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_module_is_one_noun(path: Path) -> None:
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}
