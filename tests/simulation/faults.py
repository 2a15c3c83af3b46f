"""Faults: each begins, lasts, and is healed by whoever began it; `heal` mends what is left."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence

import trio

from dedup.types import BLOCK_BYTES, Epoch
from fusefs.volume_table import list_volumes
from replication.modes import Mode
from tests.simulation.applications import Applications
from tests.simulation.chance import Chance
from tests.simulation.hosts import AgentHost, FirstHost, SecondHost
from tests.simulation.network import Line
from tests.simulation.process import Process
from tests.simulation.rival import NAME as RIVAL
from tests.simulation.rival import Rival
from tests.simulation.settings import Profile
from tests.simulation.trace import Trace

Fault = Callable[[], Awaitable[None]]


class Faults:
    """All that can happen to one agent, one second appliance and the line between them."""

    def __init__(
        self,
        nursery: trio.Nursery,
        agent: AgentHost,
        second: SecondHost,
        first: FirstHost | None,
        lines: Sequence[Line],
        applications: Applications,
        chance: Chance,
        trace: Trace,
    ) -> None:
        self.put_back = False
        """Whether the store was put back to an older copy, or fed by another agent, and not compared since."""
        self.since = Epoch(0)
        """The epoch in which that was."""
        self.behind = 0
        self._nursery = nursery
        self._agent = agent
        self._second = second
        self._first = first
        self._lines = lines
        self._applications = applications
        self._chance = chance
        self._trace = trace
        self._second_busy = trio.Lock()
        self._first_busy = trio.Lock()
        self._agent_busy = trio.Lock()
        is_short = agent.settings.profile is Profile.SHORT
        self._longest = 1.5 if is_short else 2 * agent.settings.outage_after
        short: dict[Fault, float] = {
            self.cut: 4,
            self.line_down: 3,
            self.stall: 2,
            self.hold: 2,
            self.kill_second: 4,
            self.second_loses_power: 3,
            self.switch_mode: 3,
            self.slow_second: 1,
            self.sync_fails: 1,
        }
        rough: dict[Fault, float] = {
            self.kill_agent: 4,
            self.kill_both: 2,
            self.remount: 2,
            self.full: 2,
            self.source_refuses: 2,
            self.clock_steps: 1,
            self.old_copy: 0.5,
            self.rival: 0.7,
        }
        if first is not None:
            short[self.kill_first] = 5
            short[self.slow_first] = 1
        self._weights = short if is_short else {**short, **rough}

    async def go_on(self) -> None:
        """One after the other, until cancelled."""
        if self._agent.settings.profile is Profile.CALM:
            return
        every = self._agent.settings.fault_every
        while True:
            is_short = self._agent.settings.profile is Profile.SHORT
            await trio.sleep(every if is_short else self._chance.scaled(every / 10, 2 * every))
            fault = self._chance.weighted(self._weights)
            self._trace.note(f"fault {fault.__name__}")  # type: ignore[attr-defined]
            await fault()

    def heal(self) -> None:
        """What a cancelled fault may have left."""
        for line in self._lines:
            line.up, line.slow = True, 1.0
            line.release()
        self._second.store.full = False
        self._applications.refusals = 0.0
        for host in (self._second, self._first, self._agent):
            if host is not None and host.process is not None:
                host.process.slow_until = 0.0

    async def _while(self) -> None:
        await trio.sleep(self._chance.scaled(0.01, self._longest))

    # -- the line ----------------------------------------------------------------------------------------------------

    def _line(self) -> Line:
        return self._chance.one_of(self._lines)

    async def cut(self) -> None:
        self._line().cut()

    async def line_down(self) -> None:
        line = self._line()
        line.up = False
        line.cut()
        try:
            await self._while()
        finally:
            line.up = True

    async def hold(self) -> None:
        """Nothing passes, in one direction or both, and nobody is told; then all of it does, or the link breaks."""
        line = self._line()
        line.hold(*self._chance.one_of([("up",), ("down",), ("up", "down")]))
        try:
            await self._while()
        finally:
            if self._chance.happens(0.5):
                line.cut()
            line.release()

    async def stall(self) -> None:
        line = self._line()
        line.slow = self._chance.scaled(2, 30)
        try:
            await self._while()
        finally:
            line.slow = 1.0

    # -- the first appliance -----------------------------------------------------------------------------------------

    async def kill_first(self) -> None:
        assert self._first is not None
        async with self._first_busy:
            try:
                await self._first.kill(power=self._chance.happens(0.3))
                await self._while()
            finally:
                self._first.start(self._nursery)

    async def slow_first(self) -> None:
        assert self._first is not None
        await self._slow(self._first.process)

    # -- the second appliance ----------------------------------------------------------------------------------------

    async def _second_ends(self, *, power: bool) -> None:
        async with self._second_busy:
            try:
                await self._second.kill(power=power)
                await self._while()
            finally:
                with trio.CancelScope(shield=True):
                    await self._second.start(self._nursery, power=power)

    async def kill_second(self) -> None:
        await self._second_ends(power=False)

    async def second_loses_power(self) -> None:
        await self._second_ends(power=True)

    async def slow_second(self) -> None:
        await self._slow(self._second.process)

    async def _slow(self, process: Process | None) -> None:
        if process is not None:
            process.slow_until = trio.current_time() + self._chance.scaled(0.05, self._longest)
            await trio.sleep_until(process.slow_until)

    async def sync_fails(self) -> None:
        self._second.store.sync_fails = True

    async def full(self) -> None:
        self._second.store.full = True
        try:
            await self._while()
        finally:
            self._second.store.full = False

    async def old_copy(self) -> None:
        """The store is put back to an older copy of itself, with no appliance running."""
        async with self._second_busy:
            with trio.CancelScope(shield=True):
                await self._second.kill()
                self._second.store.put_back()
                # Whoever does not know of it yet goes on; behind a first appliance that takes a while.
                self.put_back, self.since = True, self._agent.epoch
                self._agent.gaps_allowed += 1
                if self._second.group.owners[-1:] == (RIVAL,):
                    self._agent.take_over = True  # as the refusal says: the group was another agent's then
                self._trace.note(f"old_copy held={self._second.group.held}")
                await self._second.start(self._nursery)

    async def rival(self) -> None:
        """Another agent comes; where it took the group over, the first one comes back, sooner or later."""
        async with self._second_busy:
            rival = Rival(self._agent, self._second, self._lines[-1], self._chance, self._trace)
            take_over = self._chance.happens(0.5)
            before = self.put_back, self.since
            self.put_back, self.since = True, rival.epoch
            try:
                with trio.CancelScope(shield=True):
                    await rival.run(take_over=take_over)
                if rival.fed:
                    self._agent.gaps_allowed += 2
                else:
                    self.put_back, self.since = before
                await self._while()
            finally:
                self._agent.take_over = self._agent.take_over or rival.fed

    # -- the agent ---------------------------------------------------------------------------------------------------

    async def kill_agent(self) -> None:
        async with self._agent_busy:
            try:
                await self._agent.kill()
                await self._while()
            finally:
                await self.mount()

    async def kill_both(self) -> None:
        power = self._chance.happens(0.5)
        async with self._agent_busy, self._second_busy:
            try:
                await self._agent.kill()
                await self._second.kill(power=power)
                await self._while()
            finally:
                with trio.CancelScope(shield=True):
                    await self._second.start(self._nursery, power=power)
                await self.mount()

    async def remount(self) -> None:
        """A clean end, and a new start; now and then something changes behind the mount meanwhile."""
        async with self._agent_busy:
            try:
                with trio.CancelScope(shield=True):
                    await self._agent.unmount()
                if self._agent.left_clean and self._chance.happens(0.5):
                    self._change_behind()
                await self._while()
            finally:
                await self.mount()

    def _change_behind(self) -> None:
        files = sorted(list_volumes(self._agent.source))
        path = self._agent.source / self._chance.one_of(files)
        at = self._chance.number(0, 8) * BLOCK_BYTES + self._chance.number(0, 100)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(self._chance.data(100))
        # Told by its time, which the kernel's clock might not have moved on.
        self.behind += 1
        os.utime(path, ns=(self.behind, self.behind))
        self._agent.gaps_allowed += 1
        self._trace.note(f"behind {path.name}")

    async def mount(self) -> None:
        with trio.CancelScope(shield=True):
            await self._agent.mount(self._nursery, self._applications.start)

    async def switch_mode(self) -> None:
        agent = self._agent.agent
        self._agent.mode = self._chance.one_of(list(Mode))
        if agent is not None:
            agent.first.switch_mode(self._agent.mode)
            agent.first.changes += 1  # type: ignore[attr-defined]

    async def source_refuses(self) -> None:
        self._applications.refusals = self._chance.scaled(0.02, 0.8)
        try:
            await self._while()
        finally:
            self._applications.refusals = 0.0

    async def clock_steps(self) -> None:
        self._agent.clock_step_ns += int(self._chance.between(-5, 5) * 1e9)
