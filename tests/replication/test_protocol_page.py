"""PROTOCOL.md says what the code does: each of its tables is read and held against the constants."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

import replication
from dedup import types
from dedup.types import Record
from replication import frame_layout, history_queries, messages, modes
from replication.frame_layout import FLAGS_ALLOWED, FRAME_LIMITS, RARE, Flag, MessageType
from replication.history_queries import Answer, Question
from replication.messages import ErrorCode, Message
from replication.modes import Mode, mode_policy
from replication.session import TABLE, Side, State

assert replication.__file__ is not None
PAGE = (Path(replication.__file__).parent / "PROTOCOL.md").read_text()
CLASSES = {cls.__name__: cls for cls in get_args(Message)}
FORMATS = {"u64": "Q", "u32": "I", "u16": "H", "u8": "B"}


def table(first_header: str, second_header: str) -> list[list[str]]:
    """The rows of the one table with these first columns."""
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    found = [lines for lines in tables if re.match(rf"\| {first_header} \| {second_header}", lines)]
    assert len(found) == 1, first_header
    rows = [line.strip("|").split("|") for line in found[0].splitlines()[2:]]
    return [[cell.strip() for cell in row] for row in rows]


def type_of(name: str) -> MessageType:
    return MessageType[re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()]


def test_messages() -> None:
    rows = table("type", "message")
    assert {row[1] for row in rows} == set(CLASSES)
    for number, name, said_by, body, shortest, longest in rows:
        assert int(number) == type_of(name)
        assert (int(shortest), int(longest)) == FRAME_LIMITS[int(number)]
        assert (body == "msgpack") == (CLASSES[name] in RARE)
        sides = {side.value for side in Side for state in State if CLASSES[name] in TABLE[state][side]}
        assert set(said_by.split(", ")) == sides


def test_flags() -> None:
    rows = table("flag", "name")
    assert [(int(row[0]), row[1]) for row in rows] == [(int(flag), flag.name) for flag in Flag]
    for number, _name, where, _meaning in rows:
        allowed = {type_of(name) for name in where.split(", ")}
        assert allowed == {kind for kind, flags in FLAGS_ALLOWED.items() if flags & int(number)}


def test_fixed_parts() -> None:
    rows = table("part", "fields")
    structs = {
        "Header": frame_layout.HEADER,
        "Reconcile": frame_layout.WRITE,
        "Extent": frame_layout.EXTENT,
        "Wanted": frame_layout.COMPARE_RESULT,
        "Remainder": frame_layout.AGGREGATE,
        "Result": frame_layout.QUERY,
    }
    fixed = {name for name, cls in CLASSES.items() if cls not in RARE and name != "SyncRequest"}
    assert {row[0] for row in rows} == fixed | {"Header", "Extent"}
    for name, fields, length in rows:
        struct = structs.get(name) or getattr(frame_layout, type_of(name).name)
        formats = "".join(FORMATS[field.split()[1]] for field in fields.split(", "))
        header = "" if name in ("Header", "Extent") else "IBBH"
        assert struct.format == f"<{header}{formats}"
        assert struct.size == int(length) + (8 if header else 0)


def test_msgpack_bodies() -> None:
    rows = table("message", "fields, in this order")
    assert {row[0] for row in rows} == {cls.__name__ for cls in RARE} | {"VolumeState"}
    for name, fields in rows:
        cls = CLASSES.get(name) or getattr(types, name)
        assert re.findall(r"`(\w+)`", fields) == list(inspect.signature(cls).parameters)


@pytest.mark.parametrize(("first", "union"), [("question", Question), ("answer", Answer)])
def test_questions_and_answers(first: str, union: object) -> None:
    rows = table(first, "fields")
    kinds = {cls.__struct_config__.tag: cls for cls in get_args(union)}
    assert {row[0] for row in rows} == set(kinds)
    for name, fields, *answer in rows:
        assert re.findall(r"`([\w-]+)`", fields) == list(kinds[name].__struct_fields__)
        if answer:
            expected = re.search(r"Answer: (\w+)", kinds[name].__doc__)
            assert expected and getattr(history_queries, expected[1]).__struct_config__.tag == answer[0]


def test_states() -> None:
    said: dict[State, dict[Side, dict[type, State]]] = {state: {side: {} for side in Side} for state in State}
    for state, side, name, after in table("state", "said by"):
        kinds = get_args(Record) if name == "any record" else (CLASSES[name],)
        said[State(state)][Side(side)] |= dict.fromkeys(kinds, State(after))
    assert said == TABLE


def test_error_codes() -> None:
    assert [(int(row[0]), row[1]) for row in table("code", "name")] == [(int(code), code.name) for code in ErrorCode]


def test_modes() -> None:
    rows = table("mode", "a write returns at")
    assert [row[0] for row in rows] == [mode.value for mode in Mode]
    for mode, write, flush, _frames, outage in rows:
        policy = mode_policy(Mode(mode), lambda: 0.0)
        assert (policy.write_waits_for.name, policy.flush_waits_for.name) == (write, flush)
        assert policy.outage.value == outage


@pytest.mark.parametrize("row", table("limit", "where"), ids=lambda row: row[0])
def test_limits(row: list[str]) -> None:
    name, module, value, _what = row
    assert str(getattr(importlib.import_module(module), name)) == value


def test_every_limit_of_the_protocol_is_on_the_page() -> None:
    listed = {row[0] for row in table("limit", "where")}
    for module in (messages, modes):
        limits = {name for name in vars(module) if name.endswith(("_MAX", "_SECONDS")) and not name.startswith("_")}
        assert limits <= listed | {"FRAME_OVERHEAD_BYTES"}
