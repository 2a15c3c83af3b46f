"""The two hosts: the second appliance with its store, and the agent with its source directory.

As much as can be is the real thing: SecondAppliance over the model store; StateDirectory, IntentLog, plan, begin,
Agent and what goes on beside it, over a real directory. What `AgentHost._serve` does is what fusefs/mount_process.py
does, without FUSE.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from dedup.errors import RewindError, StoreFailed
from dedup.types import Epoch, Record, Resize, Write
from fusefs.agent import Agent
from fusefs.agent_start import begin, make_equal, open_intent, plan, resync_after_outages
from fusefs.state_directory import StateDirectory
from fusefs.volume_table import VolumeTable, list_volumes
from replication.agent_link import AgentLink
from replication.errors import HandshakeRefused, HistoryLost, LinkDown, ProtocolError
from replication.first_appliance import FirstAppliance
from replication.first_service import FirstService
from replication.intent_log import IntentLog
from replication.messages import PROTOCOL_VERSION, Compare, ErrorCode, Hello, Role
from replication.outbox import FRAME_OVERHEAD_BYTES
from replication.reconcile import Reconciled
from replication.record_clock import RecordClock
from replication.region_tracker import RegionTracker
from replication.second_appliance import SecondAppliance
from replication.spool import Spool
from replication.spool_file import Origin
from replication.spooler import drain_older
from tests.simulation.chance import Chance
from tests.simulation.model_store import ModelGroup, ModelStore
from tests.simulation.network import Line
from tests.simulation.process import Process
from tests.simulation.settings import Settings, Topology
from tests.simulation.source_history import Run
from tests.simulation.trace import Trace

GROUP = "group"
RESTART_SECONDS = 0.5
DRAIN_SECONDS = 60.0
BASE_TIME_NS = 1_700_000_000_000_000_000


class SecondHost:
    """The second appliance, its supervisor, and its store."""

    def __init__(self, store: ModelStore, line: Line, chance: Chance, trace: Trace) -> None:
        self.store = store
        self.process: Process | None = None
        self._line = line
        self._chance = chance
        self._trace = trace

    @property
    def group(self) -> ModelGroup:
        return self.store.group(GROUP)

    async def start(self, nursery: trio.Nursery, *, power: bool = False) -> None:
        """A new process opens the store and listens."""
        self._line.host_is_back()
        self.store.open_again(power=power)
        self.process = Process("second", self._chance)
        self._trace.note(f"second starts held={self.group.held}")
        nursery.start_soon(self._live, nursery, self.process)

    async def _live(self, nursery: trio.Nursery, process: Process) -> None:
        await process.run(self._serve)
        if not process.dead:
            # The store failed, and the appliance with it: its supervisor starts another.
            self._trace.note("second exits")
            await trio.sleep(RESTART_SECONDS)
            if self.process is process:
                await self.start(nursery)

    async def _serve(self) -> None:
        appliance = SecondAppliance(self.store)  # type: ignore[arg-type]
        try:
            await appliance.serve([self._line.listen()])
        except StoreFailed:
            return

    async def kill(self, *, power: bool = False) -> None:
        process, self.process = self.process, None
        if process is not None:
            self._trace.note(f"second {'loses power' if power else 'is killed'}")
            await process.kill(power=power)


class FirstHost:
    """A first appliance on a host of its own: what it has is in its memory only."""

    def __init__(self, near: Line, far: Line, settings: Settings, chance: Chance, trace: Trace) -> None:
        self.process: Process | None = None
        self._near = near
        self._far = far
        self._settings = settings
        self._chance = chance
        self._trace = trace

    def start(self, nursery: trio.Nursery) -> None:
        self._near.host_is_back()
        self.process = Process("first", self._chance)
        self._trace.note("first starts")
        nursery.start_soon(self.process.run, self._serve)

    async def _serve(self) -> None:
        service = FirstService(
            self._far.connect, mode=self._settings.mode, queue_bytes_max=self._settings.queue_bytes_max
        )
        await service.serve([self._near.listen()])

    async def kill(self, *, power: bool = False) -> None:
        process, self.process = self.process, None
        if process is not None:
            self._trace.note(f"first {'loses power' if power else 'is killed'}")
            await process.kill(power=power)


class ObservedFirst(FirstAppliance):
    """Tells the source's history what is recorded, and checks what the queue holds."""

    run_of_epoch: Run
    trace: Trace
    queue_max: int
    changes = 0
    """How often the link, the outage or the mode changed: who waits for something over one of these may be let go."""

    def append(self, record: Record | Compare) -> None:
        super().append(record)
        self.run_of_epoch.recorded(record)
        extent = getattr(record, "extent", None)
        nbytes = (0 if extent is None else len(extent.data)) + len(getattr(record, "digests", b""))
        if self.queued_bytes > self.queue_max + nbytes + 4 * FRAME_OVERHEAD_BYTES:
            self.trace.violated("bounded", f"{self.queued_bytes} bytes are queued, of {self.queue_max}")


class AgentHost:
    """The agent, its source directory, and what of it survives."""

    def __init__(
        self, source: Path, line: Line, second: SecondHost, settings: Settings, chance: Chance, trace: Trace
    ) -> None:
        self.source = source
        self.settings = settings
        self.runs: dict[Epoch, Run] = {}
        self.agent: Agent | None = None
        """While it serves applications."""
        self.serves = trio.Event()
        self.process: Process | None = None
        self.clock_step_ns = 0
        self.mode = settings.mode
        self.gaps_allowed = 1
        """How many gaps there may be: those of unclean ends and of changes that went unrecorded."""
        self.take_over = False
        """Whether mounts make it the group's agent, whoever was before."""
        self.epoch = Epoch(0)
        self.left_clean = False
        """Whether it has ended with a clean mark, by which a change behind the mount is told."""
        self.spells = 0
        """How often changes began to go unrecorded."""
        self.lost = 0
        """How often a history was lost."""
        self.requests = 0
        """Applications' requests under way."""
        self._idle = trio.Event()
        self._line = line
        self._second = second
        self._chance = chance
        self._trace = trace
        self._leave = trio.Event()
        self._run: Run | None = None
        self._spool: Spool | None = None

    # -- processes ---------------------------------------------------------------------------------------------------

    async def mount(self, nursery: trio.Nursery, applications: Callable[[trio.Nursery], None]) -> None:
        """Mounts, again and again until it has worked; returns at once."""
        self.process = Process("agent", self._chance)
        self._leave, self.serves = trio.Event(), trio.Event()
        self.left_clean = False
        nursery.start_soon(self._live, nursery, self.process, applications)

    async def _live(
        self, nursery: trio.Nursery, process: Process, applications: Callable[[trio.Nursery], None]
    ) -> None:
        async def main() -> None:
            await self._serve(applications)

        try:
            await process.run(main)
        finally:
            self._ended()
        self._trace.note("agent ended")

    async def kill(self) -> None:
        process, self.process = self.process, None
        if process is not None and not process.exited.is_set():
            self._trace.note("agent is killed")
            self.gaps_allowed += 1
            await process.kill()

    async def unmount(self) -> None:
        """Returns when it has ended, cleanly or not."""
        process, self.process = self.process, None
        if process is not None:
            self._trace.note("agent is told to leave")
            self._leave.set()
            await process.exited.wait()
            if self.agent is not None:
                await trio.lowlevel.checkpoint()

    def _ended(self) -> None:
        agent, self.agent = self.agent, None
        if agent is not None:
            self.spells += agent.link.spells
        if self._run is not None and agent is not None:
            volumes = agent.volumes

            def file_of(record: Record) -> int | None:
                assert isinstance(record, (Write, Resize))
                volume = record.extent.volume if isinstance(record, Write) else record.volume
                found = volumes.get(volume)
                return None if found is None else found.key[1]

            self._run.ended(file_of)
        self._run = None

    def now_ns(self) -> int:
        return BASE_TIME_NS + int(trio.current_time() * 1e9) + self.clock_step_ns

    # -- what mount_process.py does ----------------------------------------------------------------------------------

    async def _serve(self, applications: Callable[[trio.Nursery], None]) -> None:
        state = StateDirectory.open(self.source)
        intent: IntentLog | None = None
        self._spool = None
        if self.settings.topology is Topology.SPOOLED:
            self._spool = Spool.open(self.source.parent / "spool", self.settings.spool_bytes_max)
        try:
            while not self._leave.is_set():
                try:
                    first, epoch, welcome, known = await self._greet(state)
                    break
                except (LinkDown, ProtocolError, HandshakeRefused) as error:
                    self._trace.note(f"mount fails {type(error).__name__}")
                    if isinstance(error, HandshakeRefused) and error.code is ErrorCode.FENCED:
                        self.take_over = True  # what its text tells a person to do
                    await trio.sleep(RESTART_SECONDS)
            else:
                return
            last = state.state
            async with trio.open_nursery() as nursery:
                nursery.start_soon(first.run)
                files = await trio.to_thread.run_sync(list_volumes, self.source)
                intent = open_intent(state.intent_path, last)
                todo = plan(welcome, known, files, last, intent)
                self._trace.note(f"epoch {epoch} after {welcome.held}, clean={todo.clean}, all={todo.everything}")
                link = AgentLink(first, welcome.held, RecordClock(welcome.time, welcome.run, self.now_ns))
                agent = Agent(self.source, link, VolumeTable(welcome.next_volume), intent, RegionTracker())
                self.agent = agent
                work = await begin(agent, todo, epoch, known, files)
                if todo.clean:
                    agent.link.equal = True
                await trio.to_thread.run_sync(state.serving, welcome.store)
                self.take_over = False
                async with trio.open_nursery() as serving:
                    applications(serving)
                    self.serves.set()
                    with trio.CancelScope() as background:
                        async with trio.open_nursery() as beside:
                            beside.start_soon(agent.link.heartbeats)
                            beside.start_soon(agent.housekeeping, state.marks_go)
                            beside.start_soon(self._reconcile, agent, work, todo.clean)
                            await self._leave.wait()
                            while self.requests:
                                self._idle = trio.Event()
                                await self._idle.wait()
                            background.cancel()
                    serving.cancel_scope.cancel()
                await self._drain(agent, state)
                nursery.cancel_scope.cancel()
        finally:
            state.close()
            if self._spool is not None:
                self._spool.close()
            if intent is not None and intent._fd >= 0:
                os.close(intent._fd)

    async def _greet(self, state: StateDirectory):  # type: ignore[no-untyped-def]
        stored = self._second.group.epoch
        begin_epoch = partial(state.begin_epoch, take_over=self.take_over)
        epoch = await trio.to_thread.run_sync(begin_epoch, GROUP, stored)
        agent = state.state.source
        if self._spool is not None:
            hello = Hello(PROTOCOL_VERSION, Role.AGENT, GROUP, epoch, agent)
            await drain_older(self._spool, hello, self._first_of_older)
        first = self._first(epoch, agent)
        first.trace, first.queue_max = self._trace, self.settings.queue_bytes_max
        run = Run(self.source, self._trace)
        first.run_of_epoch = run
        welcome, known = await first.start()
        run.last = welcome.held
        self._run = self.runs[epoch] = run
        self.epoch = epoch
        return first, epoch, welcome, known

    def _first(self, epoch: Epoch, agent: str) -> ObservedFirst:
        first = ObservedFirst(
            self._line.connect,
            group=GROUP,
            epoch=epoch,
            agent=agent,
            take_over=self.take_over,
            through=self.settings.topology is Topology.RELAYED,
            mode=self.mode,
            outage=self.settings.outage,
            outage_after=self.settings.outage_after,
            queue_bytes_max=self.settings.queue_bytes_max,
            offers=self.settings.offers,
            spool=self._spool,
            on_change=lambda _status: self._changed(first),
            on_lost=self._is_lost,
        )
        return first

    def _first_of_older(self, origin: Origin) -> FirstAppliance:
        return FirstAppliance(
            self._line.connect, group=origin.group, epoch=origin.epoch, agent=origin.agent, spool=self._spool
        )

    def _changed(self, first: ObservedFirst) -> None:
        first.changes += 1
        self._trace.note(f"link {first.link.value} outage={first.outage}")

    def _is_lost(self, error: HistoryLost) -> None:
        self.lost += 1
        self._trace.note(f"lost {type(error).__name__}")  # its text names an agent, by chance

    async def _reconcile(self, agent: Agent, work, clean: bool) -> None:  # type: ignore[no-untyped-def]
        try:
            if not clean:
                await make_equal(agent, work, Reconciled())
                self._trace.note("equal")
            await resync_after_outages(agent, Reconciled())
        except HistoryLost:
            return

    async def _drain(self, agent: Agent, state: StateDirectory) -> None:
        with trio.move_on_after(DRAIN_SECONDS) as patience:
            try:
                await agent.drain()
            except HistoryLost:
                self.gaps_allowed += 1
                return
        if patience.cancelled_caught or not agent.link.equal:
            self.gaps_allowed += 1
            return
        try:
            intent = agent.intent
            intent.clear((volume, region) for volume, regions in intent.marked().items() for region in regions)
            await intent.close()
            files = await trio.to_thread.run_sync(list_volumes, self.source)
            await trio.to_thread.run_sync(state.ended_cleanly, agent.link.last, files, agent.link.time)
            self.left_clean = True
        except (OSError, RewindError) as error:
            self._trace.note(f"no clean mark {error}")

    # -- applications' requests --------------------------------------------------------------------------------------

    def request_begins(self) -> bool:
        """Whether a request may begin; then `request_ended` follows."""
        if self._leave.is_set():
            return False
        self.requests += 1
        return True

    def request_ended(self) -> None:
        self.requests -= 1
        self._idle.set()

    @property
    def run(self) -> Run:
        assert self._run is not None
        return self._run
