"""Applications on the mount: they write, resize, sync, make, rename and remove files, several at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import trio

from dedup.errors import RewindError
from fusefs.agent import Agent
from fusefs.intercept import CreateFile, RemoveFile, RenamePath
from fusefs.volume_table import key_of
from replication.errors import HistoryLost, LinkDown, OutageError, RequestRefused
from replication.modes import Mode
from tests.simulation.chance import Chance
from tests.simulation.hosts import AgentHost, ObservedFirst, SecondHost
from tests.simulation.process import current_process
from tests.simulation.trace import Trace

VOLUME_BYTES_MAX = 160 << 10
WRITE_BYTES_MAX = 12 << 10
NAMES = tuple(f"{directory}{name}" for directory in ("", "sub/") for name in "abcd")
_REQUESTS = {"write": 70, "append": 6, "sync": 8, "resize": 6, "create": 4, "rename": 3, "exchange": 1, "remove": 2}


class Applications:
    """All of them. `start` lets them begin, in the nursery of a mount."""

    def __init__(self, host: AgentHost, second: SecondHost, chance: Chance, trace: Trace) -> None:
        self.active = True
        """Whether they make requests."""
        self.refusals = 0.0
        """How likely the source is to refuse or shorten a write."""
        self._host = host
        self._second = second
        self._chance = chance
        self._trace = trace
        self._names = trio.Lock()
        self._bookmarks = 0
        self.answered = 0

    def start(self, nursery: trio.Nursery) -> None:
        self._names = trio.Lock()
        self._host.requests = 0
        for number in range(self._host.settings.writers):
            nursery.start_soon(self._live, number)

    def write_at(self, fd: int, data: bytes, offset: int) -> int:
        """In the place of source_writes.write_at: the source's own doing."""
        file = os.fstat(fd).st_ino
        taken = len(data)
        if self._chance.happens(self.refusals):
            taken = self._chance.number(1, max(1, len(data) - 1)) if self._chance.happens(0.5) else 0
            self._trace.note(f"source refuses {len(data) - taken} of {len(data)}")
        if not taken:
            self._host.run.wrote(file, offset, b"", len(data))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = os.pwrite(fd, data[:taken], offset)
        self._host.run.wrote(file, offset, bytes(data[:taken]), len(data))
        return written

    def resize(self, fd: int, size: int) -> None:
        """In the place of os.ftruncate."""
        if self._chance.happens(self.refusals):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, size)
        self._host.run.cut(os.fstat(fd).st_ino, size)

    async def _live(self, number: int) -> None:
        agent = self._host.agent
        assert agent is not None
        at = 0
        while True:
            await trio.sleep(self._chance.scaled(self._host.settings.pause / 20, self._host.settings.pause * 2))
            if not self.active or not self._host.request_begins():
                continue
            try:
                at = await self._request(agent, at)
                self.answered += 1
            except (OutageError, HistoryLost, OSError, RequestRefused, LinkDown, RewindError) as error:
                self._trace.note(f"refused {number} {type(error).__name__}")
            finally:
                if not current_process().dead:
                    self._host.request_ended()

    async def _request(self, agent: Agent, at: int) -> int:
        kind = self._chance.weighted(_REQUESTS)
        if kind in ("create", "rename", "exchange", "remove"):
            async with self._names:
                await self._change_names(agent, kind)
            return at
        # As in the kernel, whoever looks a name up waits until a change of names has been answered.
        async with self._names:
            names = self._there()
            if not names:
                return at
            fd = os.open(self._host.source / self._chance.one_of(names), os.O_RDWR)
            volume = agent.volume_of(key_of(os.fstat(fd)))
        file = os.fstat(fd).st_ino
        try:
            if kind == "sync":
                await self._sync(agent, volume, fd)
            elif kind == "resize":
                await agent.resize(volume, fd, self._chance.number(0, VOLUME_BYTES_MAX))
            else:
                at = await self._write(agent, volume, fd, at, kind == "append")
        finally:
            if not current_process().dead:
                self._host.run.answered(file)
            os.close(fd)
        return at

    async def _write(self, agent: Agent, volume, fd: int, at: int, append: bool) -> int:  # type: ignore[no-untyped-def]
        chance = self._chance
        length = chance.one_of([chance.number(1, 600), 4096, chance.number(1, WRITE_BYTES_MAX), 8192])
        where = chance.number(0, 9)
        if where < 3:
            offset = at
        elif where < 6:
            offset = chance.number(0, VOLUME_BYTES_MAX // 4096 - 4) * 4096
        else:
            offset = chance.number(0, VOLUME_BYTES_MAX - WRITE_BYTES_MAX)
        if offset + length > VOLUME_BYTES_MAX:
            offset = 0
        if append and os.fstat(fd).st_size > VOLUME_BYTES_MAX:
            append = False
        promised = self._promise(agent)
        await agent.write(volume, fd, offset, chance.data(length), append)
        if volume is not None:
            self._check_promise(agent, promised, "write", self._second.group.held_ever)
        return offset + length

    async def _sync(self, agent: Agent, volume, fd: int) -> None:  # type: ignore[no-untyped-def]
        promised = self._promise(agent)
        await agent.fsync(volume, fd, datasync=True)
        self._trace.note("synced")
        if volume is not None:
            self._check_promise(agent, promised, "fsync", self._second.group.durable_ever)

    def _promise(self, agent: Agent) -> int:
        first = agent.first
        assert isinstance(first, ObservedFirst)
        return first.changes

    def _check_promise(self, agent: Agent, changes: int, what: str, level: int) -> None:
        """What sync promised, unless an outage or another mode had a say in it meanwhile."""
        first = agent.first
        if first.mode is not Mode.SYNC or first.changes != changes or first.outage or agent.link.degraded:  # type: ignore[attr-defined]
            return
        seq = self._host.run.seq_of_task()
        if seq > level:
            self._trace.violated("acknowledged-is-kept", f"{what} {seq} returned in sync mode, the store had {level}")

    async def _change_names(self, agent: Agent, kind: str) -> None:
        source, run = self._host.source, self._host.run
        there = self._there()
        free = [name for name in NAMES if name not in there]
        if kind == "create" and free:
            path = self._chance.one_of(free)

            def make() -> os.stat_result:
                fd = os.open(source / path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
                run.named(lambda tree: tree.make(path, status.st_ino))
                return status

            await self._name_change(agent, CreateFile(path, make))
        elif kind == "remove" and len(there) > 2:
            path = self._chance.one_of(there)

            def remove() -> None:
                os.unlink(source / path)
                run.named(lambda tree: tree.remove(path))

            await self._name_change(agent, RemoveFile(path, key_of(os.stat(source / path)), remove))
        elif kind in ("rename", "exchange") and len(there) > 2:
            await self._rename(agent, there, kind == "exchange")

    def _there(self) -> list[str]:
        found = {*os.listdir(self._host.source), *(f"sub/{name}" for name in os.listdir(self._host.source / "sub"))}
        return [name for name in NAMES if name in found]

    async def _rename(self, agent: Agent, there: list[str], exchange: bool) -> None:
        source, run = self._host.source, self._host.run
        old = self._chance.one_of(there)
        new = self._chance.one_of([name for name in (there if exchange else NAMES) if name != old])

        def rename() -> None:
            if exchange:
                aside = source / "aside.tmp"
                os.rename(source / old, aside)
                os.rename(source / new, source / old)
                os.rename(aside, source / new)
            else:
                os.rename(source / old, source / new)
            run.named(lambda tree: tree.move(old, new, exchange))

        replaced = key_of(os.stat(source / new)) if new in there else None
        key = key_of(os.stat(source / old))
        await self._name_change(agent, RenamePath(old, new, key, replaced, exchange, False, False, rename))

    async def _name_change(self, agent: Agent, change: CreateFile | RemoveFile | RenamePath) -> None:
        try:
            await agent.namespace(change)
        finally:
            if not current_process().dead:
                self._host.run.answered(None)
            self._trace.note(f"named {type(change).__name__}")


def make_source(path: Path, chance: Chance) -> None:
    """A source directory with files in it."""
    (path / "sub").mkdir(parents=True)
    for name in NAMES[: chance.number(1, 5)]:
        content = bytearray(chance.number(0, VOLUME_BYTES_MAX // 2))
        for _ in range(chance.number(0, 6)):
            at = chance.number(0, len(content))
            content[at : at + 4096] = chance.data(min(4096, len(content) - at))
        (path / name).write_bytes(content)
