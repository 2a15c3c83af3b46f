"""SOURCE/.rewindfs: what the agent must know again after it has ended, however it ended.

`lock` (one mount of a source at a time), `agent.json`, `intent` (the intent log), `restores.json` (restores in place
that have not ended), `control` (the socket that commands speak to).

Invariants:
- `agent.json` is replaced as a whole: written anew, synced, renamed over, directory synced;
- an epoch is on disk before anybody hears of it, so no two agent starts have the same;
- `clean` is there only between a clean end and the first request of the next mount, and it names every volume as it was
  left. A start that fails or is killed leaves it: it stays true as long as nothing was written through a mount. What
  such a start recorded shows in what the store holds, which is then past `held`.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from dedup.errors import Damaged, RewindError, UnknownFormat
from dedup.types import Epoch, Seq, TimeNs
from fusefs.volume_table import STATE_DIRECTORY
from replication.durable_file import replace_file

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class FileMark:
    """What tells whether a file was changed behind the mount."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileMark:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class CleanEnd:
    """The group as a clean end left it: everything up to `held` durable at the second appliance, and these files.
    `time` is that record's, 0 where it is unknown."""

    held: Seq
    volumes: dict[str, FileMark]
    time: TimeNs = TimeNs(0)


@dataclass(frozen=True, slots=True)
class AgentState:
    """The content of agent.json. `store` is the store's uuid, empty before the first connection.

    `durable`: the second appliance had everything up to it durable when marks were last cleared from the intent log. A
    store that holds less has lost what nothing marks any more. `others`: the store knows an epoch that this state does
    not: another agent, or this one with a newer copy of its state, has fed the group; what is marked here is not all
    that may differ.
    """

    version: int = STATE_VERSION
    source: str = field(default_factory=lambda: uuid.uuid4().hex)
    group: str = ""
    store: str = ""
    epoch: Epoch = Epoch(0)
    durable: Seq = Seq(0)
    clean: CleanEnd | None = None
    others: bool = False


class StateDirectory:
    """The agent's state on disk. One process holds it; methods block for as long as a sync takes: call in a thread."""

    def __init__(self, source: Path, lock_fd: int, state: AgentState) -> None:
        self.path = source / STATE_DIRECTORY
        self._lock_fd = lock_fd
        self._saving = threading.Lock()
        self.state = state

    @classmethod
    def open(cls, source: Path) -> StateDirectory:
        """Makes the directory if it is absent and takes its lock. RewindError if another mount of the source runs."""
        path = source / STATE_DIRECTORY
        path.mkdir(mode=0o700, exist_ok=True)
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RewindError(
                    f"{source} is already protected by another mount; use that one, or unmount it first"
                ) from None
            return cls(source, lock_fd, _load(path / "agent.json"))
        except BaseException:
            os.close(lock_fd)
            raise

    @property
    def intent_path(self) -> Path:
        return self.path / "intent"

    @property
    def restores_path(self) -> Path:
        return self.path / "restores.json"

    @property
    def control_path(self) -> Path:
        return self.path / "control"

    def begin_epoch(self, group: str, at_least: Epoch, *, take_over: bool = False) -> Epoch:
        """A new epoch, durable: higher than any before, here and at the store (`at_least`).

        The clean mark stays. In another group nothing of what was kept holds: it goes, and no store is known. Where
        somebody else has begun epochs there, that is kept in mind until `serving`; also where this is to `take_over`,
        since starts of its own that failed may have counted past the other's.
        """
        with self._saving:
            state = self.state
            if group != state.group:
                state = replace(state, store="", durable=Seq(0), clean=None, others=False)
            epoch = Epoch(max(state.epoch, at_least) + 1)
            others = state.others or take_over or at_least > state.epoch
            self._save(replace(state, group=group, epoch=epoch, others=others))
            return epoch

    def serving(self, store: str) -> None:
        """Call it before the first write through the mount, when all that this start owes is marked: from now on the
        group is replicated to `store`, and the clean mark is gone. Durable."""
        with self._saving:
            durable = self.state.durable if store == self.state.store else Seq(0)
            self._save(replace(self.state, store=store, durable=durable, clean=None, others=False))

    def marks_go(self, durable: Seq) -> None:
        """Call it before marks are cleared: the second appliance has everything up to `durable` durable. Durable."""
        with self._saving:
            self._save(replace(self.state, durable=durable))

    def ended_cleanly(self, held: Seq, volumes: Mapping[str, os.stat_result], time: TimeNs = TimeNs(0)) -> None:
        """Leaves the clean mark; durable."""
        marks = {path: FileMark.of(status) for path, status in volumes.items()}
        with self._saving:
            self._save(replace(self.state, durable=held, clean=CleanEnd(held, marks, time)))

    def close(self) -> None:
        """Gives the lock back."""
        os.close(self._lock_fd)

    def _save(self, state: AgentState) -> None:
        replace_file(self.path / "agent.json", msgspec.json.encode(state))
        self.state = state


def _load(path: Path) -> AgentState:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return AgentState()
    try:
        state = msgspec.json.decode(content, type=AgentState)
        _check(state)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors too
        raise Damaged(
            f"{path} is damaged ({error}); remove it: the next mount compares the whole source with the store"
        ) from error
    if state.version != STATE_VERSION:
        raise UnknownFormat(
            f"{path} has version {state.version}, this rewindfs knows {STATE_VERSION}; use the newer one"
        )
    return state


def _check(state: AgentState) -> None:
    """ValueError for numbers that no state has: everything else takes them as they are."""
    if not 0 <= state.epoch < _EPOCHS:
        raise ValueError(f"epoch {state.epoch}")
    for seq in (state.durable, Seq(0) if state.clean is None else state.clean.held):
        if not 0 <= seq < _SEQS:
            raise ValueError(f"seq {seq}")


_EPOCHS = 1 << 32
_SEQS = 1 << 64
