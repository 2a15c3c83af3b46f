"""PostgreSQL and pgbench, as benchmarks use them. Needs root, and the server (Debian: postgresql)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER = "postgres"


def installed_programs() -> Path:
    """Where the server's programs are, of the newest version; ends the program where it could not run them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
    if os.geteuid() != 0 or not found:
        sys.exit("this benchmark needs root and PostgreSQL (Debian: apt-get install postgresql)")
    return found[-1]


def reachable(place: Path, within: Path) -> None:
    """Makes the directory and gives it to the server's user, who may pass through the directories from `within` on."""
    place.mkdir()
    shutil.chown(place, USER, USER)
    for above in place.parents:
        if within in (above, *above.parents):
            above.chmod(0o711)


class Database:
    """A PostgreSQL of its own in `place`, which is the server's user's, reached by a socket there, with no other port.
    Its fsyncs are as by default."""

    def __init__(self, place: Path, programs: Path) -> None:
        self._data = place / "data"
        self._place = place
        self._programs = programs

    def run(self, program: str, *words: str) -> str:
        command = ["runuser", "-u", USER, "--", str(self._programs / program), *words]
        done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{program}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def running(self) -> Iterator[Database]:
        self.run("initdb", "-D", str(self._data), "--auth=trust", "--no-locale", "--encoding=UTF8", "--no-sync")
        options = f"-k {self._place} -c listen_addresses='' -c shared_buffers=64MB -c max_wal_size=256MB"
        log = str(self._place / "log")
        self.run("pg_ctl", "-D", str(self._data), "-w", "-l", log, "-o", options, "start")
        try:
            yield self
        finally:
            self.run("pg_ctl", "-D", str(self._data), "-w", "-m", "fast", "stop")

    def pgbench(self, *words: str) -> str:
        return self.run("pgbench", "-h", str(self._place), *words, "postgres")

    def transactions(self, seconds: float, clients: int) -> float:
        """pgbench's own TPC-B-like transactions a second."""
        said = self.pgbench("-n", "-c", str(clients), "-j", "2", "-T", str(seconds))
        tps = re.search(r"tps = ([\d.]+)", said)
        assert tps, said
        return float(tps[1])

    def checkpoint(self) -> None:
        self.run("psql", "-h", str(self._place), "-q", "-c", "CHECKPOINT", "postgres")
