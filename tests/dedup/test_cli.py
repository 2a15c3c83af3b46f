"""The store-side commands: their JSON shapes to the key, their errors, and both ways to the store's writer."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from dedup import layout
from dedup.errors import BadTime, MomentRefused, NameRefused, NotAStore, StoreBusy, StoreError, UnknownName
from dedup.store import Store
from dedup.terminal import shown, size_text
from dedup.types import Bookmark, ContainerId, Epoch, EpochStart, ReconcileEnd, VolumeId
from replication.points_cli import points
from replication.snapshot_cli import snapshot
from replication.store_command import local_store
from replication.verify_cli import verify
from tests.dedup.model import Model

BLOCK = 4096
A, B = VolumeId(1), VolumeId(2)
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Base with a.img (2 blocks written), bookmark `mark` after 3 more, b.img created at seq 8, `whole` at the end."""
    path, model, dice = tmp_path / "store", Model(), random.Random(3)
    Store.create(path)
    opened = Store.open(path)
    group = opened.group("g")
    start = EpochStart(*model._next(), Epoch(1), clean=False)
    group.ingest([start, model.create("a.img", 10 * BLOCK)])
    group.ingest([model.reconcile(A, 0, dice.randbytes(2 * BLOCK)), ReconcileEnd(*model._next())])
    group.ingest([model.write(A, 4 * BLOCK, dice.randbytes(3 * BLOCK)), model.flush(A)])
    seq, time, run = model._next()
    group.ingest([Bookmark(seq, time, run, "mark")])
    group.ingest([model.create("b.img", 100), model.write(B, 0, b"b" * 50), model.write(A, 0, dice.randbytes(BLOCK))])
    group.create_snapshot("whole")
    opened.close()
    return path


def run(command: object, *args: object, status: int = 0) -> str:
    """What the command prints; its RewindError is raised, as fusefs/cli.py's main would see it."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout


def as_json(command: object, *args: object, status: int = 0) -> object:
    return json.loads(run(command, *args, "--json", status=status))


def is_place(value: object) -> bool:
    assert isinstance(value, dict) and set(value) == {"seq", "time"}, value
    return bool(RFC3339.fullmatch(value["time"])) and isinstance(value["seq"], int)


def test_list(store: Path) -> None:
    listed = as_json(snapshot, "list", store)
    assert isinstance(listed, list)
    assert [(one["name"], one["kind"], one["group"]) for one in listed] == [
        ("base", "base", "g"),
        ("mark", "bookmark", "g"),
        ("whole", "snapshot", "g"),
    ]
    for one in listed:
        assert set(one) == {"name", "time", "seq", "kind", "group", "volumes", "keep_until"}
        assert RFC3339.fullmatch(one["time"]) and one["keep_until"] is None
    a, b = "a.img", "b.img"
    assert [one["volumes"] for one in listed] == [
        [{"volume": a, "size": 10 * BLOCK, "changed_bytes": 2 * BLOCK}],
        [{"volume": a, "size": 10 * BLOCK, "changed_bytes": 3 * BLOCK}],
        [
            {"volume": a, "size": 10 * BLOCK, "changed_bytes": BLOCK},
            {"volume": b, "size": 100, "changed_bytes": BLOCK},
        ],
    ]
    assert as_json(snapshot, "list", store, "--group", "g") == listed
    text = run(snapshot, "list", store).splitlines()
    assert text[0].split() == ["name", "time", "seq", "kind", "group", "size", "changed", "volume"]
    assert text[2].split()[0] == "mark" and text[2].endswith("a.img") and len(text) == 5


def test_create_and_delete_without_an_appliance(store: Path) -> None:
    made = as_json(snapshot, "create", store, "--at", "bookmark=mark", "--name", "kept", "--volume", "a.img")
    assert isinstance(made, dict)
    assert RFC3339.fullmatch(made.pop("time"))
    assert made == {"name": "kept", "seq": 7, "kind": "snapshot", "group": "g", "volume": "a.img"}
    assert run(snapshot, "create", store).split()[1] == "seq=10"
    listed = as_json(snapshot, "list", store)
    assert isinstance(listed, list)
    assert next(one["volumes"] for one in listed if one["name"] == "kept")[0]["volume"] == "a.img"
    run(snapshot, "delete", store, "kept")
    with pytest.raises(UnknownName, match="kept"):
        run(snapshot, "delete", store, "kept")
    assert as_json(verify, store)["ok"] is True  # type: ignore[index]


def test_refusals_leave_the_store_as_it_was(store: Path) -> None:
    before = as_json(snapshot, "list", store)
    refused = [
        (NameRefused, "whole", ["--name", "whole"]),
        (NameRefused, "5m", ["--name", "5m"]),
        (MomentRefused, "seq=999", ["--at", "seq=999", "--name", "x"]),
        (BadTime, "a/b", ["--at", "a/b", "--name", "x"]),
        (UnknownName, "none.img", ["--volume", "none.img", "--name", "x"]),
        (UnknownName, "other", ["--group", "other", "--name", "x"]),
    ]
    for error, what, options in refused:
        with pytest.raises(error, match=re.escape(what)):
            run(snapshot, "create", store, *options)
    run(snapshot, "create", store, "--name", "", status=2)
    assert as_json(snapshot, "list", store) == before
    with pytest.raises(NotAStore):
        run(snapshot, "create", store.parent)
    holder = Store.open(store)
    with pytest.raises(StoreBusy, match="try again"):
        run(snapshot, "create", store)
    holder.close()


def test_several_groups(store: Path) -> None:
    opened = Store.open(store)
    model = Model()
    opened.group("h").ingest([*model.begin(), model.create("c.img", 1)])
    opened.close()
    listed = as_json(snapshot, "list", store)
    assert isinstance(listed, list) and {one["group"] for one in listed} == {"g", "h"}
    for command in ([snapshot, "create", store], [points, store], [snapshot, "map", store, "c.img", "--at", "latest"]):
        with pytest.raises(UnknownName, match="--group"):
            run(*command)
    assert as_json(points, store, "--group", "h")["group"] == "h"  # type: ignore[index]
    made = as_json(snapshot, "create", store, "--group", "h", "--name", "n")
    assert isinstance(made, dict) and made["group"] == "h"
    assert as_json(verify, store)["ok"] is True  # type: ignore[index]


def test_map(store: Path) -> None:
    mapped = as_json(snapshot, "map", store, "a.img", "--at", "latest")
    assert isinstance(mapped, dict) and set(mapped) == {"volume", "seq", "time", "ranges"}
    assert mapped["volume"] == "a.img" and mapped["seq"] == 10 and RFC3339.fullmatch(mapped["time"])
    ranges = mapped["ranges"]
    assert all(set(one) == {"offset", "length", "kind", "journal", "container", "slot"} for one in ranges)
    assert [(one["offset"] // BLOCK, one["length"] // BLOCK, one["kind"], one["journal"]) for one in ranges] == [
        (0, 1, "journal", "fine"),
        (1, 1, "base", "base"),
        (2, 2, "hole", None),
        (4, 3, "journal", "fine"),
        (7, 3, "hole", None),
    ]
    assert [(one["container"], one["slot"]) for one in ranges] == [(2, 4), (1, 1), (None, None), (2, 0), (None, None)]
    small = as_json(snapshot, "map", store, "b.img", "--at", "latest")
    assert isinstance(small, dict) and [(one["offset"], one["length"]) for one in small["ranges"]] == [(0, 100)]
    assert len(run(snapshot, "map", store, "a.img", "--at", "mark").splitlines()) == 5
    with pytest.raises(UnknownName, match=r"b\.img"):
        run(snapshot, "map", store, "b.img", "--at", "mark")


def test_map_of_large_holes(tmp_path: Path) -> None:
    """Holes across leaves that were never written, and across one that was written and cut, are one range."""
    path, model = tmp_path / "s", Model()
    Store.create(path)
    opened = Store.open(path)
    opened.group("g").ingest([*model.begin(), model.create("a.img")])
    last = 32 << 20
    opened.group("g").ingest([model.resize(A, last), model.write(A, 600 * BLOCK, b"x" * BLOCK)])
    opened.group("g").ingest([model.write(A, 5000 * BLOCK, b"y" * BLOCK), model.write(A, 5000 * BLOCK, bytes(BLOCK))])
    opened.close()
    mapped = as_json(snapshot, "map", path, "a.img", "--at", "latest")
    assert isinstance(mapped, dict)
    assert [(one["offset"], one["length"], one["kind"]) for one in mapped["ranges"]] == [
        (0, 600 * BLOCK, "hole"),
        (600 * BLOCK, BLOCK, "journal"),
        (601 * BLOCK, last - 601 * BLOCK, "hole"),
    ]


def test_points(store: Path) -> None:
    found = as_json(points, store)
    assert isinstance(found, dict)
    assert set(found) == {"group", "oldest", "newest", "covered_until", "ranges", "gaps", "flushes", "bookmarks"}
    assert is_place(found["oldest"]) and is_place(found["newest"]) and RFC3339.fullmatch(found["covered_until"])
    (whole,) = found["ranges"]
    assert set(whole) == {"from", "to", "granularity", "journal"}
    assert is_place(whole["from"]) and is_place(whole["to"])
    assert (whole["from"]["seq"], whole["to"]["seq"], whole["granularity"]) == (4, 10, "every-write")
    assert found["gaps"] == [] and found["flushes"] == 2
    (mark,) = found["bookmarks"]
    assert set(mark) == {"name", "seq", "time"} and (mark["name"], mark["seq"]) == ("mark", 7)
    assert "mark" in run(points, store)


def test_points_of_a_volume(store: Path) -> None:
    a = as_json(points, store, "a.img")
    assert isinstance(a, dict) and a["volume"] == "a.img" and a["flushes"] == 2
    assert (a["oldest"]["seq"], a["newest"]["seq"]) == (4, 10)
    b = as_json(points, store, "b.img")
    assert isinstance(b, dict) and (b["oldest"]["seq"], b["newest"]["seq"]) == (8, 10)
    assert b["flushes"] == 0 and b["bookmarks"] == [], "it came after both"
    with pytest.raises(UnknownName, match=r"none\.img"):
        run(points, store, "none.img")


def test_points_of_a_path_that_changes_hands(tmp_path: Path) -> None:
    path, model = tmp_path / "s", Model()
    Store.create(path)
    opened = Store.open(path)
    group = opened.group("g")
    group.ingest([*model.begin(), model.create("a", 1), model.create("b", 2)])  # 3, 4
    group.ingest([model.rename(A, "x"), model.flush(A), model.rename(B, "a"), model.retire(B)])  # 5, 6, 7, 8
    opened.close()
    found = as_json(points, path, "a")
    assert isinstance(found, dict)
    assert [(one["from"]["seq"], one["to"]["seq"]) for one in found["ranges"]] == [(3, 4), (7, 7)]
    assert found["flushes"] == 0, "it was called x then"


def test_points_with_gaps(tmp_path: Path) -> None:
    path, model = tmp_path / "s", Model()
    Store.create(path)
    opened = Store.open(path)
    assert opened.group("g").held == 0
    opened.close()
    empty = as_json(points, path)
    assert isinstance(empty, dict) and empty["oldest"] is None and empty["ranges"] == []
    assert "yet" in run(points, path)
    opened = Store.open(path)
    group = opened.group("g")
    group.ingest([*model.begin(), model.create("a", 1)])
    refused = model.write(A, 0, b"x")
    group.ingest([refused, model.correct(A, refused.seq, 1, 0, b"y")])
    opened.close()
    found = as_json(points, path)
    assert isinstance(found, dict)
    (gap,) = found["gaps"]
    assert set(gap) == {"from", "to", "reason"} and is_place(gap["from"]) and is_place(gap["to"])
    assert (gap["from"]["seq"], gap["to"]["seq"]) == (refused.seq, refused.seq)
    assert len(found["ranges"]) == 2
    assert "gap" in run(points, path)


def test_verify_shapes(store: Path) -> None:
    report = as_json(verify, store)
    assert isinstance(report, dict) and set(report) >= {"ok", "checks", "repaired", "repairs"}
    assert report["ok"] is True and report["repaired"] == 0
    for one in report["checks"]:
        assert set(one) >= {"name", "ok", "items", "damage"} and one["ok"] is True and one["damage"] == []
    assert "is sound" in run(verify, store, "--read-data")
    container = layout.container_path(store / "containers", ContainerId(2))
    data = bytearray(container.read_bytes())
    data[layout.RAW_SLOTS_OFFSET] ^= 1
    container.write_bytes(data)
    report = as_json(verify, store, "--read-data", status=1)
    assert isinstance(report, dict) and report["ok"] is False
    (found,) = [one for one in report["checks"] if not one["ok"]]
    assert found["name"] == "pointers-resolve"
    for one in found["damage"]:
        assert set(one) >= {"snapshot", "volume", "offset", "length", "file", "what"}
    assert {one["snapshot"] for one in found["damage"]} == {"mark", "whole", "latest"}
    text = run(verify, store, "--read-data", status=1)
    assert "is damaged" in text and "a.img in mark bytes 16384..20480" in text
    assert as_json(verify, store, "--repair", "--read-data", status=1)["repaired"] == 0  # type: ignore[index]


@pytest.mark.parametrize("address", ["unix:/run/x", "tls://host:1", "tcp://host:1"])
def test_an_address_is_no_path(address: str) -> None:
    with pytest.raises(StoreError, match="store's path"):
        local_store(address)


def test_a_path_is_a_path() -> None:
    assert local_store("/a/b:c") == Path("/a/b:c") and local_store("unix") == Path("unix")


def test_texts_for_a_terminal() -> None:
    assert [size_text(size) for size in (0, 1023, 1024, 1536, 5 << 30, 1 << 70)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "1048576.0 PiB",
    ]  # fmt: skip
    assert shown("a\x1b[1m\udcffé") == "a\\x1b[1m\\udcffé"


def rewindfs(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusefs", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@contextmanager
def appliance(store: Path) -> Iterator[None]:
    """A second appliance of its own process, ready; ended, and with success, at the end."""
    ours, its = socket.socketpair()
    command = [sys.executable, "-m", "fusefs", "appliance", "second", "--store", str(store), "-f"]
    process = subprocess.Popen([*command, "--ready-fd", str(its.fileno())], pass_fds=[its.fileno()])
    try:
        its.close()
        ours.settimeout(60)
        assert ours.recv(100) == b"ready\n"
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        ours.close()
        if process.poll() is None:
            process.kill()
            process.wait()


def test_beside_an_appliance(store: Path) -> None:
    """Changes go through its socket, since it holds the lock; readers see them at once, and its store verifies."""
    with appliance(store):
        made = rewindfs("snapshot", "create", store, "--at", "mark", "--name", "beside", "--json")
        assert made.returncode == 0, made.stderr
        assert json.loads(made.stdout)["seq"] == 7
        by_address = rewindfs("snapshot", "create", f"unix:{store}/socket", "--name", "address")
        assert by_address.returncode == 0, by_address.stderr
        names = [one["name"] for one in json.loads(rewindfs("snapshot", "list", store, "--json").stdout)]
        assert names == ["base", "beside", "mark", "address", "whole"]
        again = rewindfs("snapshot", "create", store, "--name", "beside")
        assert again.returncode == 1 and again.stderr.startswith("rewindfs: error: ")
        assert len(again.stderr.splitlines()) == 1 and "beside" in again.stderr
        assert rewindfs("snapshot", "delete", store, "beside").returncode == 0
        checked = rewindfs("verify", store, "--read-data", "--json")
        assert (checked.returncode, checked.stderr) == (0, "") and json.loads(checked.stdout)["ok"] is True
    names = [one["name"] for one in json.loads(rewindfs("snapshot", "list", store, "--json").stdout)]
    assert names == ["base", "mark", "address", "whole"]


def test_errors_are_one_line(store: Path) -> None:
    for args in (
        ["points", store / "none"],
        ["snapshot", "map", store, "a.img", "--at", "a/b"],
        ["snapshot", "create", "unix:/nowhere/socket"],
        ["snapshot", "create", "tls://host:1"],
    ):
        result = rewindfs(*args)
        assert (result.returncode, result.stdout) == (1, ""), args
        assert re.fullmatch(r"rewindfs: error: [^\n]*\n", result.stderr), result.stderr
