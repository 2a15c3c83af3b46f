"""`rewindfs retention`: what it prints, what it refuses, and both ways to the store."""

from __future__ import annotations

import json
import os
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
from dedup.errors import BadPolicy, Damaged, NotAStore, StoreBusy
from dedup.retention import AtLimit, Policy, load_policy
from dedup.storage import Storage
from dedup.store import Store
from replication.control import NoAppliance
from replication.retention_cli import retention

DEFAULT = {
    "every_write_seconds": 7200,
    "minutes_seconds": 86400,
    "hours_seconds": 604800,
    "days_seconds": 2592000,
    "soft_limit_bytes": None,
    "hard_limit_bytes": None,
    "at_limit": "block",
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    Store.create(path)
    return path


def run(*args: object, status: int = 0) -> str:
    """What it prints; its RewindError is raised, as fusefs/cli.py's main would see it."""
    result = CliRunner().invoke(retention, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def shown(store: object) -> object:
    return json.loads(run("show", store, "--json"))


def test_the_default(store: Path) -> None:
    assert shown(store) == DEFAULT
    assert run("show", store).splitlines() == [
        "every write         for 2h",
        "one point a minute  for 1d",
        "one point an hour   for 7d",
        "one point a day     for 30d",
        "older               named points only",
        "soft limit          none",
        "hard limit          none",
    ]
    assert not (store / layout.POLICY_NAME).exists()


def test_what_is_set_is_shown_and_the_rest_stays(store: Path) -> None:
    said = json.loads(run("set", store, "--days", "60d", "--hard-limit", "1.5T", "--at-limit", "thin", "--json"))
    assert said == {**DEFAULT, "days_seconds": 60 * 86400, "hard_limit_bytes": 3 << 39, "at_limit": "thin"}
    assert shown(store) == said
    run("set", store, "--minutes", "0", "--every-write", "90m", "--soft-limit", "1GiB")
    assert shown(store) == {**said, "minutes_seconds": 0, "every_write_seconds": 5400, "soft_limit_bytes": 1 << 30}
    text = run("set", store, "--soft-limit", "none")
    assert "one point a minute  no such tier" in text and "soft limit          none" in text
    assert "1.5 TiB (1649267441664 bytes); there, writes wait while history is thinned faster (thin)" in text
    found = load_policy(Storage(), store)
    assert (found.minutes_ns, found.soft_limit_bytes, found.at_limit) == (0, None, AtLimit.THIN)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100000000", 10**8),
        ("64M", 64 << 20),
        ("64mib", 64 << 20),
        ("1.5G", 3 << 29),
        ("2PB", 2 << 50),
        ("0.5T", 1 << 39),
    ],
)
def test_sizes(store: Path, text: str, size: int) -> None:
    assert json.loads(run("set", store, "--hard-limit", text, "--json"))["hard_limit_bytes"] == size


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ((), "nothing to set"),
        (("--days", "month"), "'month' is no duration"),
        (("--days", ""), "is no duration"),
        (("--hard-limit", "big"), "'big' is no size"),
        (("--hard-limit", "0"), "no limit"),
        (("--soft-limit", "9999999P"), "no limit"),
        (("--at-limit", "ignore"), "'ignore'"),
    ],
)
def test_wrong_usage(store: Path, options: tuple[str, ...], why: str) -> None:
    assert why in run("set", store, *options, status=2)
    assert not (store / layout.POLICY_NAME).exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--hours", "12h"), "must ascend, and every-write 2h, minutes 1d, hours 12h, days 30d do not"),
        (("--every-write", "0", "--minutes", "0", "--hours", "0", "--days", "0"), "without any tier"),
        (("--hard-limit", "64M", "--soft-limit", "65M"), "below the soft limit"),
        (("--hard-limit", "1M"), "no room to work"),
        (("--days", "99999d"), "a hundred years"),
    ],
)
def test_what_contradicts_itself_is_refused_in_one_line(store: Path, options: tuple[str, ...], why: str) -> None:
    with pytest.raises(BadPolicy, match=why) as caught:
        run("set", store, *options)
    assert "\n" not in str(caught.value)
    assert shown(store) == DEFAULT


def test_a_damaged_policy_is_replaced_by_set(store: Path) -> None:
    run("set", store, "--days", "60d", "--minutes", "2d")
    with open(store / layout.POLICY_NAME, "ab") as file:
        file.write(b"?")
    with pytest.raises(Damaged, match="retention set"):
        run("show", store)
    result = CliRunner().invoke(retention, ["set", str(store), "--days", "50d"])
    assert result.exit_code == 0
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("rewindfs: warning: ") and "by default" in warning
    assert shown(store) == {**DEFAULT, "days_seconds": 50 * 86400}


def test_what_is_no_store(tmp_path: Path) -> None:
    for command in (["show", tmp_path], ["set", tmp_path, "--days", "50d"], ["show", tmp_path / "none"]):
        with pytest.raises(NotAStore):
            run(*command)
    assert list(tmp_path.iterdir()) == []
    for command in (["show", f"unix:{tmp_path}/socket"], ["set", f"unix:{tmp_path}/socket", "--days", "50d"]):
        with pytest.raises(NoAppliance):
            run(*command)


def test_a_writer_that_does_not_answer_keeps_its_store(store: Path) -> None:
    writer = Store.open(store)
    try:
        with pytest.raises(StoreBusy, match="try again"):
            run("set", store, "--days", "50d")
        assert shown(store) == DEFAULT
    finally:
        writer.close()
    run("set", store, "--days", "50d")
    Store.open(store).close()


@contextmanager
def appliance(store: Path) -> Iterator[None]:
    """A second appliance of its own process, ready; ended, and with success, at the end."""
    ours, its = socket.socketpair()
    command = [sys.executable, "-m", "fusefs", "appliance", "second", "--store", str(store), "-f"]
    process = subprocess.Popen(
        [*command, "--ready-fd", str(its.fileno())], pass_fds=[its.fileno()], stderr=subprocess.DEVNULL
    )
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
    """Its path and its address lead to it; its refusals are the command's; the next one has what was set."""
    address = f"unix:{store}/socket"
    with appliance(store):
        assert shown(address) == DEFAULT
        said = json.loads(run("set", store, "--hard-limit", "100G", "--json"))
        assert said["hard_limit_bytes"] == 100 << 30
        run("set", address, "--at-limit", "fail")
        assert shown(address) == shown(store) == {**said, "at_limit": "fail"}
        done = subprocess.run(
            [sys.executable, "-m", "fusefs", "retention", "set", str(store), "--soft-limit", "200G"],
            capture_output=True, text=True, check=False, env=os.environ,
        )  # fmt: skip
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (1, "")
        assert line.startswith("rewindfs: error: ") and "below the soft limit" in line
    with appliance(store):
        assert shown(address) == {**said, "at_limit": "fail"}
    assert load_policy(Storage(), store) == Policy(hard_limit_bytes=100 << 30, at_limit=AtLimit.FAIL)
