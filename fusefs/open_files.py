"""Who has a file open, as far as this user may see: processes, and loop devices with what is mounted on them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fusefs.mountpoint import mounts

_PROC = Path("/proc")
_BLOCK_DEVICES = Path("/sys/block")
COMMAND_CHARS_MAX = 60


def holders(path: Path) -> list[str]:
    """One text each, for a person: `process 12 (sqlite3 shop.db)`, `/dev/loop0 (mounted at /srv)`. May be empty."""
    return [*_processes(path), *_loop_devices(path)]


def _processes(path: Path) -> Iterator[str]:
    status = os.stat(path)
    key = status.st_dev, status.st_ino
    for pid in sorted(int(name) for name in os.listdir(_PROC) if name.isdigit()):
        try:
            opened = any(_is_open(pid, fd, path.name, key) for fd in os.listdir(f"/proc/{pid}/fd"))
            if pid != os.getpid() and (opened or _is_mapped(pid, key)):
                yield f"process {pid} ({_command(pid)})"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or it is another user's


def _is_open(pid: int, fd: str, name: str, key: tuple[int, int]) -> bool:
    link = f"/proc/{pid}/fd/{fd}"
    try:
        # By name first: looking at a file of another file system may take as long as that one pleases.
        if os.path.basename(os.readlink(link)) != name:
            return False
        status = os.stat(link)
    except OSError:
        return False  # closed meanwhile, or on a mount that is dead: in both cases it is not the file looked for
    return (status.st_dev, status.st_ino) == key


def _is_mapped(pid: int, key: tuple[int, int]) -> bool:
    """Whether it has the file in its memory, closed or not."""
    for line in Path(f"/proc/{pid}/maps").read_bytes().splitlines():
        _, _, _, device, inode = line.split(maxsplit=5)[:5]
        major, minor = (int(part, 16) for part in device.split(b":"))
        if (os.makedev(major, minor), int(inode)) == key:
            return True
    return False


def _command(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    text = words.decode(errors="replace") or Path(f"/proc/{pid}/comm").read_text().strip()
    return text if len(text) <= COMMAND_CHARS_MAX else text[:COMMAND_CHARS_MAX] + "…"


def _loop_devices(path: Path) -> Iterator[str]:
    for device in sorted(_BLOCK_DEVICES.glob("loop*")):
        try:
            backing = (device / "loop/backing_file").read_text().removesuffix("\n")
        except OSError:
            continue  # in no use
        if backing == str(path):
            node = f"/dev/{device.name}"
            places = [str(mount.path) for mount in mounts() if _is_of(mount.source, node)]
            yield f"{node} (mounted at {', '.join(places)})" if places else node


def _is_of(source: str, node: str) -> bool:
    """Whether it is that loop device, or a partition of it."""
    return re.fullmatch(re.escape(node) + r"(p\d+)?", source) is not None
