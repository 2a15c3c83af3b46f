"""FORMAT.md says what the code does: its tables against `layout`, its kinds against `EntryKind`, its tests exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dedup
from dedup import (
    fingerprint_filter,
    fingerprint_index,
    fingerprint_run,
    fingerprint_runs,
    layout,
    sealed_layout,
    sync_log,
)
from dedup.layout import Fields
from dedup.metadata_journal import EntryKind

PAGE = (Path(dedup.__file__).parent / "FORMAT.md").read_text()
STRUCTS = {
    value.name: value
    for module in (layout, sealed_layout, fingerprint_run, sync_log)
    for value in vars(module).values()
    if isinstance(value, Fields)
}


def tables() -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(the heading above, the columns, the rows) of each table of the page."""
    heading = ""
    lines = iter(PAGE.splitlines())
    for line in lines:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            columns = cells(line)
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(cells(row))
            yield heading, columns, rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


OFFSET_TABLES = {heading: rows for heading, columns, rows in tables() if columns[:3] == ["offset", "bytes", "field"]}


def test_every_struct_has_its_table_and_every_table_its_struct() -> None:
    assert set(OFFSET_TABLES) == set(STRUCTS)


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_offset_tables(name: str) -> None:
    said = [(int(offset), int(length), field) for offset, length, field, *_ in OFFSET_TABLES[name]]
    assert said == STRUCTS[name].table()
    end = said[-1][0] + said[-1][1]
    assert end == STRUCTS[name].size


def test_constants() -> None:
    said = {
        name: int(value) for _, columns, rows in tables() if columns == ["constant", "value"] for name, value in rows
    }
    assert len(said) > 10
    assert {name: {**vars(layout), **vars(sealed_layout), **vars(sync_log)}[name] for name in said} == said


def test_magic_numbers() -> None:
    for name, magic in (
        ("STORE marker", layout.STORE_MAGIC),
        ("container header", layout.CONTAINER_MAGIC),
        ("segment header", layout.SEGMENT_MAGIC),
        ("run header", fingerprint_run.RUN_MAGIC),
        ("sync log entry", sync_log.SYNC_LOG_MAGIC),
    ):
        assert OFFSET_TABLES[name][0][3] == "`" + magic.decode().replace("\n", "\\n") + "`"


def test_the_numbers_of_runs() -> None:
    (words,) = re.findall(r"^### Runs of fingerprints.*?^### ", PAGE, re.MULTILINE | re.DOTALL)
    rows = fingerprint_run.RUN_PAGE_ROWS
    for said in (
        f"newest ones out, up to {fingerprint_index.UNMERGED_MAX:,} ",
        f"A run has a page of {fingerprint_run.RUN_PAGE_BYTES:,} bytes",
        f"the filter most / {fingerprint_filter.PAIR_ROWS} pairs of words and the",
        f"fences room for most / {rows} numbers",
        f"A page has {rows} first halves, {rows} second halves, {rows} addresses",
    ):
        assert said in words.replace("\n", " ")
    assert f"index/{fingerprint_runs.run_name(1)} " in PAGE


def test_kinds() -> None:
    (rows,) = [rows for heading, _, rows in tables() if heading == "Kinds and bodies"]
    assert [(int(number), kind) for number, kind, *_ in rows] == [(kind.value, kind.name) for kind in EntryKind]


def test_names_of_files() -> None:
    assert f"containers/{layout.container_name(layout.ContainerId(1))} " in PAGE
    assert f"groups/GROUP/journal/{layout.segment_name(layout.Seq(1))} " in PAGE


def test_the_crash_table_names_tests_that_exist() -> None:
    rows = [row for _, columns, rows in tables() if columns[0] == "window" for row in rows]
    assert len(rows) > 20
    existing = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        existing.update(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))
    for window, _, _, named in rows:
        names = re.findall(r"`(test_\w+)`", named)
        assert names, window
        assert set(names) <= existing, window
