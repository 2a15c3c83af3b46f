"""`dedup/storage.py` is the only place of the store with file system calls: the crash tests see no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dedup

PACKAGE = Path(dedup.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
ELSEWHERE = {
    "catalog.py": {"os.statvfs", "lmdb.open"},
    "index_file.py": {"os.stat", "os.truncate"},
    "marker.py": {"os.stat", "nearest.exists", "open"},
    "sealed_form.py": {"mmap.mmap"},
}
"""LMDB's own file, and where the store lies: what it is mounted on; memory that no file lies behind."""
LMDB = {"env", "txn", "self._txn"}
SYSTEM = {"os", "os.path", "shutil", "io", "fcntl", "mmap", "tempfile"}
NO_FILES = re.compile(r"os\.(_exit|fsdecode|fsencode|fspath|getpid|major|minor|nice|strerror|urandom)")
"""Functions of `os` that touch no file."""
OF_PATHS = re.compile(
    "chmod|exists|glob|hardlink_to|is_dir|is_file|is_symlink|iterdir|lstat|mkdir|open|read_bytes|read_text|rename|rglob|"
    "rmdir|samefile|stat|symlink_to|touch|unlink|walk|write_bytes|write_text"
)
"""Methods of a Path that do; classes and what ends in `storage` have methods of the same names."""


def file_calls(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, method = name.rpartition(".")
            of_the_system = name == "open" or (owner in SYSTEM and not NO_FILES.fullmatch(name))
            of_a_path = OF_PATHS.fullmatch(method) and owner[:1].islower() and not owner.endswith("storage")
            if of_the_system or (of_a_path and owner not in SYSTEM and owner not in LMDB):
                yield name


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_module_but_storage_makes_file_system_calls(module: Path) -> None:
    if module.name != "storage.py":
        assert set(file_calls(module.read_text())) <= ELSEWHERE.get(module.name, set())


def test_the_search_finds_what_it_looks_for() -> None:
    source = "os.unlink(p)\nopen(p)\npath.stat()\nself._storage.open(p)\nStore.open(p)\nos.strerror(1)"
    assert sorted(file_calls(source)) == ["open", "os.unlink", "path.stat"]
