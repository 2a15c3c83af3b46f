"""Another agent that wants to feed the group: refused, or it takes the group over, writes, and is gone."""

from __future__ import annotations

import trio

from dedup.types import ClockRun, Epoch, EpochStart, Extent, Record, Seq, TimeNs, Write
from replication.errors import HandshakeRefused, HistoryLost, LinkDown, ProtocolError
from replication.first_appliance import FirstAppliance
from tests.simulation.chance import Chance
from tests.simulation.hosts import GROUP, AgentHost, SecondHost
from tests.simulation.network import Line
from tests.simulation.process import Process
from tests.simulation.source_history import Run
from tests.simulation.trace import Trace

NAME = "another agent, of another source"
SECONDS = 2.0


class Rival:
    """One attempt. `fed` says whether the group was its own for a while."""

    def __init__(self, host: AgentHost, second: SecondHost, line: Line, chance: Chance, trace: Trace) -> None:
        self.fed = False
        self.epoch = Epoch(second.group.epoch + 1)
        self._host = host
        self._second = second
        self._line = line
        self._chance = chance
        self._trace = trace

    async def run(self, *, take_over: bool) -> None:
        """`one-writer`: where it does not take the group over it must be refused, once that has an agent."""
        process = Process("rival", self._chance)
        await process.run(lambda: self._try(take_over))

    async def _try(self, take_over: bool) -> None:
        first = FirstAppliance(
            self._line.connect, group=GROUP, epoch=self.epoch, agent=NAME, take_over=take_over, offers=False
        )
        owned = self._second.group.owners[-1:] not in ((), (NAME,))
        try:
            welcome, volumes = await first.start()
        except (HandshakeRefused, LinkDown, ProtocolError) as error:
            self._trace.note(f"rival fails {type(error).__name__}")
            return
        if owned and not take_over:
            self._trace.violated("one-writer", "another agent may feed the group without taking it over")
        self.fed = True
        self._trace.note(f"rival feeds from {welcome.held + 1}")
        run = self._host.runs[self.epoch] = Run(self._host.source, self._trace)
        records: list[Record] = [EpochStart(Seq(welcome.held + 1), welcome.time, welcome.run, self.epoch, False)]
        records += [
            _write(Seq(records[0].seq + 1 + index), welcome.time, welcome.run, volume.volume, self._chance)
            for index, volume in enumerate(volumes)
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.run)
            for record in records:
                run.stamped[record.seq] = record
                first.append(record)
            with trio.move_on_after(SECONDS):
                try:
                    await first.drain()
                except HistoryLost:
                    self._trace.note("rival is fenced")
            nursery.cancel_scope.cancel()


def _write(seq: Seq, time: TimeNs, run: ClockRun, volume, chance: Chance) -> Write:  # type: ignore[no-untyped-def]
    return Write(seq, time, run, Extent(volume, chance.number(0, 20) * 4096, chance.data(4096)))
