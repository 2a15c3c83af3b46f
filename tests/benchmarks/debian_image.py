"""A Linux-like image that lives on: Debian packages unpacked into ext4, and what days do to them.

Made with what a Debian machine has: apt (which needs the network the first time; packages are kept in
`bench-results/packages`), dpkg-deb, mkfs.ext4, a loop device. On the first day the oldest version that apt offers of
each package is unpacked. Then each day has its changes, the same ones for each seed: packages of which apt offers newer
versions (of the release, of its security and its updates) are unpacked in the next one, new packages are added, logs
grow and are rotated, rows of a small database change.
"""

from __future__ import annotations

import random
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.benchmarks.mounts import ROOT

PACKAGES_DIRECTORY: Final = ROOT / "bench-results" / "packages"
SYSTEM: Final = (
    *("bash", "coreutils", "dpkg", "apt", "libapt-pkg6.0", "libc6", "libc-bin", "locales", "util-linux", "mount"),
    *("systemd", "udev", "libsystemd0", "libudev1", "openssl", "libssl3", "ca-certificates", "tzdata", "sudo"),
    *("perl-base", "perl-modules-5.36", "libperl5.36", "python3.11-minimal", "libpython3.11-minimal"),
    *("libpython3.11-stdlib", "curl", "libcurl4", "openssh-client", "openssh-server", "libxml2", "libexpat1"),
    *("libglib2.0-0", "linux-libc-dev", "bind9-libs", "nginx-core"),
)
SMALL_SYSTEM: Final = (
    *(
        "bash",
        "coreutils",
        "dpkg",
        "libc6",
        "libc-bin",
        "openssl",
        "libssl3",
        "tzdata",
        "perl-base",
        "curl",
        "libcurl4",
    ),
    *("systemd", "openssh-client", "util-linux", "libxml2"),
)
ADDED: Final = (
    "less",
    "krb5-locales",
    "redis-server",
    "php8.2-cli",
    "postgresql-15",
    "libtiff6",
    "libgnutls30",
    "cpp-12",
)
LOG_LINES: Final = 4000
LOG_DAYS: Final = 7
ROWS: Final = 20_000
ROWS_CHANGED: Final = 400


@dataclass(frozen=True, slots=True)
class Package:
    """Every version that apt offers, the oldest first, as files."""

    name: str
    files: tuple[Path, ...]


def offered(*names: str) -> list[Package]:
    """The packages' versions, downloaded where they are not kept yet. RuntimeError where apt has none, or cannot."""
    command = ["apt-cache", "madison", *names]
    listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    found: dict[str, list[str]] = {name: [] for name in names}
    for line in listed.splitlines():
        name, version, _ = (part.strip() for part in line.split("|"))
        if version not in found[name]:
            found[name].insert(0, version)  # apt has the newest first
    if missing := [name for name, versions in found.items() if not versions]:
        raise RuntimeError(f"apt offers no package {', '.join(missing)}: `apt-get update` first")
    _download([f"{name}={version}" for name, versions in found.items() for version in versions])
    return [Package(name, tuple(_file(name, version) for version in versions)) for name, versions in found.items()]


def _download(wanted: list[str]) -> None:
    PACKAGES_DIRECTORY.mkdir(parents=True, exist_ok=True)
    lacking = [one for one in wanted if not _files(*one.split("="))]
    if lacking:
        command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *lacking]
        subprocess.run(command, cwd=PACKAGES_DIRECTORY, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def _files(name: str, version: str) -> list[Path]:
    return list(PACKAGES_DIRECTORY.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"))


def _file(name: str, version: str) -> Path:
    (found,) = _files(name, version)
    return found


class DebianImage:
    """The image file, and the days that it has lived. Every day is a mount, its changes, and an unmount."""

    def __init__(self, system: tuple[str, ...], days: int, size: int, seed: int = 1) -> None:
        self._random = random.Random(seed)
        self._size = size
        self._system = offered(*system)
        upgrades = [(package.name, file) for package in self._system for file in package.files[1:]]
        on = sorted(self._random.randrange(1, days) for _ in upgrades)
        self._random.shuffle(upgrades)
        upgrades.sort(key=lambda upgrade: self._nth(*upgrade))  # a package's versions come in their order
        self._upgrades = list(zip(on, [file for _, file in upgrades], strict=True))
        added = [package.files[-1] for package in offered(*ADDED[: max(1, days // 2)])]
        self._added = [(2 * number + 1, file) for number, file in enumerate(added)]
        self._day = 0

    def _nth(self, name: str, file: Path) -> int:
        return next(package.files.index(file) for package in self._system if package.name == name)

    def make(self, image: Path, mountpoint: Path) -> None:
        """The first day, in a new file."""
        with open(image, "xb") as file:
            file.truncate(self._size)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        with mounted(image, mountpoint) as root:
            for package in self._system:
                _unpack(package.files[0], root)
            self._make_database(root)
            self._logs(root)

    def live_a_day(self, image: Path, mountpoint: Path) -> None:
        """The next day's changes."""
        self._day += 1
        with mounted(image, mountpoint) as root:
            for day, file in self._upgrades + self._added:
                if day == self._day:
                    _unpack(file, root)
            self._change_database(root)
            self._logs(root)

    def _make_database(self, root: Path) -> None:
        (root / "var/lib/application").mkdir(parents=True)
        with sqlite3.connect(root / "var/lib/application/data.sqlite") as database:
            database.execute("create table orders (id integer primary key, customer text, amount real, note text)")
            database.executemany("insert into orders values (?, ?, ?, ?)", map(self._row, range(ROWS)))
        database.close()

    def _change_database(self, root: Path) -> None:
        rows = [self._row(self._random.randrange(ROWS)) for _ in range(ROWS_CHANGED)]
        with sqlite3.connect(root / "var/lib/application/data.sqlite") as database:
            database.executemany("insert or replace into orders values (?, ?, ?, ?)", rows)
        database.close()

    def _row(self, number: int) -> tuple[int, str, float, str]:
        customer = f"customer-{self._random.randrange(1000):04d}"
        return number, customer, self._random.randrange(10**6) / 100, self._random.randbytes(40).hex()

    def _logs(self, root: Path) -> None:
        logs = root / "var/log"
        logs.mkdir(parents=True, exist_ok=True)
        if self._day and not self._day % LOG_DAYS:
            (logs / "syslog").rename(logs / "syslog.1")
        with open(logs / "syslog", "a") as log:
            for number in range(LOG_LINES):
                service = self._random.choice(("sshd", "cron", "systemd", "kernel", "nginx"))
                text = (
                    f"{service}[{self._random.randrange(30_000)}]: session {self._random.randrange(1 << 32):x} closed"
                )
                log.write(f"day {self._day:02d} {number * 20 // 3600:02d}:{number // 180 % 60:02d} host {text}\n")


def _unpack(package: Path, root: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", package, root], check=True, stdin=subprocess.DEVNULL)


@contextmanager
def mounted(image: Path, mountpoint: Path) -> Iterator[Path]:
    """The image through a loop device; unmounted, and so complete in its file, at the end."""
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)
