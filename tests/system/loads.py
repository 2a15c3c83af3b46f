"""Applications that know what they were promised: a database in SQLite, and fio that reads back what it wrote.

Invariants under test: `acknowledged-is-kept` for each commit that has returned, and each moment is one that SQLite
recovers from: all of a transaction or nothing, and no later one without the earlier.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.system.harness import SEARCH_PATH

JOURNALS = ("delete", "truncate", "persist", "wal")
SUFFIXES = ("", "-journal", "-wal")
"""The files of a database whose one writer keeps the index of its log in memory."""
END_SECONDS_MAX = 120


@dataclass(slots=True)
class Commit:
    """One order: when its transaction began and, if it did, when its COMMIT returned (ns)."""

    began: int
    returned: int | None = None


def item_of(number: int) -> bytes:
    """The content of an order, of a size of its own: up to three pages of the database."""
    seed = hashlib.blake2b(number.to_bytes(8, "big")).digest()
    return (seed * 200)[: 20 + number * 7919 % 12_000]


class Orders:
    """A thread that adds an order a transaction, each durable when COMMIT returns, until it is told to stop or the
    mount dies under it. Orders are numbered without a hole, and a total is kept in the same transaction."""

    def __init__(self, file: Path, journal: str) -> None:
        self.file = file
        self.journal = journal
        self.commits: list[Commit] = []
        """Of order 1, 2, …"""
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.error = None
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(END_SECONDS_MAX)
        assert not self._thread.is_alive(), "the database hangs"

    def _run(self) -> None:
        try:
            with opened(self.file) as database:
                database.execute("PRAGMA locking_mode = exclusive")
                database.execute(f"PRAGMA journal_mode = {self.journal}")
                database.execute("PRAGMA synchronous = full")
                database.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, item BLOB, total INTEGER)")
                number, total = latest(database)
                assert number >= self.returned(), f"{self.returned()} orders had been committed, {number} are there"
                while not self._stop.is_set():
                    number, total = number + 1, total + number + 1
                    self._add(database, number, total)
        except Exception as error:  # noqa: BLE001 - whoever started the load judges it
            self.error = error

    def _add(self, database: sqlite3.Connection, number: int, total: int) -> None:
        if number > len(self.commits):
            self.commits.append(Commit(time.time_ns()))
        commit = self.commits[number - 1]
        database.execute("BEGIN IMMEDIATE")
        database.execute("INSERT INTO orders VALUES (?, ?, ?)", (number, item_of(number), total))
        if number > 10:
            # Pages in the middle of the file are written again, not only new ones.
            database.execute("UPDATE orders SET total = total WHERE id = ?", (number * 31 % (number - 1) + 1,))
        database.execute("COMMIT")
        commit.returned = time.time_ns()

    def returned(self, moment: int | None = None) -> int:
        """The last order whose COMMIT had returned by then, or at all."""
        numbers = (
            number
            for number in range(len(self.commits), 0, -1)
            if (returned := self.commits[number - 1].returned) is not None and (moment is None or returned <= moment)
        )
        return next(numbers, 0)

    def begun(self, moment: int) -> int:
        """The last order whose transaction had begun by then."""
        return sum(commit.began <= moment for commit in self.commits)


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as database:
        yield database


def latest(database: sqlite3.Connection) -> tuple[int, int]:
    """The last order and its total; zeros when there is none."""
    row = database.execute("SELECT id, total FROM orders ORDER BY id DESC LIMIT 1").fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def orders_in(file: Path) -> int:
    """How many orders a copy of the database holds once SQLite has recovered it. AssertionError unless it is sound."""
    if not file.exists() or not file.stat().st_size:
        return 0
    with opened(file) as database:
        database.execute("PRAGMA locking_mode = exclusive")
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)], file
        if not database.execute("SELECT 1 FROM sqlite_schema WHERE name = 'orders'").fetchone():
            return 0
        count = 0
        for number, item, total in database.execute("SELECT id, item, total FROM orders ORDER BY id"):
            count += 1
            assert number == count, f"{file}: order {count} is missing"
            assert item == item_of(number), f"{file}: order {number} is not what was written"
            assert total == number * (number + 1) // 2, f"{file}: the total of order {number}"
    return count


class Fio:
    """fio in a loop, each time random writes to one file that are read back and verified, until it is told to stop or
    the mount dies under it."""

    def __init__(self, file: Path, environment: dict[str, str], mebibytes: int, kibibytes_per_second: int) -> None:
        self.file = file
        self.error: Exception | None = None
        self._environment = {**environment, "PATH": SEARCH_PATH}
        # The loop is the shell's: this process must not fork while the mount is stopped. The child would close its
        # copies of the files that are open there, which waits for the mount, and the parent waits for the child.
        self._command = [
            *("sh", "-c", 'while "$@"; do :; done; exit 1', "sh"),
            *("fio", "--name=chaos", f"--filename={file}", f"--size={mebibytes}M", "--rw=randwrite", "--bs=4k-64k"),
            *("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--ioengine=psync", "--randrepeat=0"),
            *("--fsync=64", f"--rate={kibibytes_per_second}k", "--allow_file_create=0"),
        ]
        self._stop = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.error = None
        self._stop.clear()
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            # In a directory of the file system that lies still: fio writes the state of a verification there.
            cwd=self.file.parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._listen, args=(self._process,))
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        assert self._process is not None
        with suppress(ProcessLookupError):  # it has ended by itself; `error` says why
            os.killpg(self._process.pid, signal.SIGTERM)
        self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(END_SECONDS_MAX)
        assert not self._thread.is_alive(), "fio hangs"

    def _listen(self, process: subprocess.Popen[str]) -> None:
        said, _ = process.communicate()
        if not self._stop.is_set():
            self.error = AssertionError(f"fio has failed: {said[-2000:]}")
