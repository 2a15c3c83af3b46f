"""The process behind a source mount: FUSE, agent and first appliance, and the embedded second appliance as its child.

Order of the start: the source's lock, the second appliance, a new epoch, the handshake, the list of volumes, the mount,
the clean mark dropped, the first request.
Order of the end: unmounted, drained, the clean mark, the second appliance stopped, the lock given back.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from dedup.errors import RewindError
from dedup.moment import check_name
from dedup.types import Epoch
from fusefs.agent import Agent
from fusefs.agent_control import Body, serve_control
from fusefs.agent_heal import heal
from fusefs.agent_start import begin, make_equal, open_intent, plan, resync_after_outages
from fusefs.daemon import serve
from fusefs.mount_control import DRAIN_SECONDS
from fusefs.mount_reconcile import OnlineReconcile
from fusefs.mount_restore import MountRestore
from fusefs.mounting import mount_options
from fusefs.source_mount import SourceMount
from fusefs.state_directory import StateDirectory
from fusefs.unfinished_restores import UnfinishedRestores
from fusefs.volume_table import VolumeTable, list_volumes
from replication.agent_link import AgentLink
from replication.background import Ready
from replication.errors import Fenced, HistoryLost, LinkDown, RequestRefused
from replication.first_appliance import FirstAppliance
from replication.forwarding import Forwarding
from replication.messages import Level
from replication.modes import Mode, Outage
from replication.reconcile import Reconciled, Work
from replication.record_clock import RecordClock
from replication.region_tracker import REGION_BYTES, RegionTracker
from replication.spool import Spool
from replication.status import LinkState
from replication.supervisor import Supervisor
from replication.target import Target
from replication.transport import Listener, listen_unix

log = logging.getLogger("rewindfs.mount")

TASKS_MAX: Final = 256
"""Requests that pyfuse3 serves at a time. A waiting writer holds one; if more threads than this write at once during a
long wait, the rest waits in the kernel."""
KEEP_SECONDS: Final = 30.0
"""How long an end in an outage may take to write the queue to the spool."""
ASK_SECONDS: Final = 5.0
"""How long a status waits for what an appliance elsewhere has to say."""


@dataclass(frozen=True, slots=True)
class MountSettings:
    """What `rewindfs mount` was asked for; paths are absolute."""

    source: Path
    mountpoint: Path
    target: Target
    group: str
    mode: Mode | None
    """None: what the first appliance elsewhere does; async where there is none."""
    outage: Outage | None = None
    outage_after: float = 10.0
    writeback: bool = False
    allow_other: bool = False
    options: tuple[str, ...] = ()
    wait_base: bool = False
    log_file: Path | None = None
    foreground: bool = False
    debug: bool = False
    take_over: bool = False
    """Feed the group from now on, whichever agent did before."""
    forwarding: Forwarding = field(default_factory=Forwarding)


async def run_mount(settings: MountSettings, ready: Ready) -> None:
    """One source mount's life. Returns after a clean end; raises what kept it from starting, or ended it otherwise."""
    state = await trio.to_thread.run_sync(StateDirectory.open, settings.source)
    try:
        async with trio.open_nursery() as nursery:
            supervisor = None
            if settings.target.store is not None:
                supervisor = Supervisor(
                    settings.target.store,
                    log_file=settings.log_file,
                    foreground=settings.foreground,
                    debug=settings.debug,
                )
                await nursery.start(supervisor.serve)
            spools = settings.forwarding.spools
            spool = None if spools is None else await spools.open(settings.group)
            try:
                mount = MountProcess(settings, state, supervisor, spool)
                async with trio.open_nursery() as forwarding:
                    await mount.start(forwarding)
                    await mount.serve(ready)
                    forwarding.cancel_scope.cancel()
            finally:
                if spool is not None:
                    spool.close()
            nursery.cancel_scope.cancel()
    finally:
        state.close()


class MountProcess:
    """The parts of a running mount, and what its control socket answers."""

    agent: Agent
    first: FirstAppliance
    _work: Sequence[Work]
    _restore: MountRestore

    def __init__(
        self, settings: MountSettings, state: StateDirectory, supervisor: Supervisor | None, spool: Spool | None
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._state = state
        self._supervisor = supervisor
        self._stop = trio.Event()
        self._equal = trio.Event()
        self._has_base = False
        self._store = ""
        self._progress = Reconciled()
        self._online = OnlineReconcile()
        self._drain_seconds = DRAIN_SECONDS
        self._background = trio.CancelScope()
        self._background_ended = trio.Event()

    async def start(self, nursery: trio.Nursery) -> None:
        """Greets the second appliance, and tells it of every volume; contents are left to `serve`."""
        settings = self._settings
        begin_epoch = partial(self._state.begin_epoch, take_over=settings.take_over)
        epoch = await trio.to_thread.run_sync(begin_epoch, settings.group, await self._stored_epoch())
        self.first = FirstAppliance(
            settings.target.connect,
            group=settings.group,
            epoch=epoch,
            agent=self._state.state.source,
            take_over=settings.take_over,
            through=settings.target.through,
            mode=settings.mode if settings.target.through else settings.mode or Mode.ASYNC,
            outage=settings.outage,
            outage_after=settings.outage_after,
            offers=settings.forwarding.offers,
            bytes_per_second=settings.forwarding.bytes_per_second,
            spool=self._spool,
            on_lost=_say_lost,
        )
        last = self._state.state
        welcome, known = await self.first.start()
        self._has_base = welcome.has_base
        if last.store == welcome.store and welcome.held < last.durable:
            log.warning(
                "the store holds records up to %d and had them up to %d: it was put back to an older state; everything "
                "is compared, and what it lost is a gap",
                welcome.held,
                last.durable,
            )
        if last.others and last.store == welcome.store:
            log.warning(
                "the store was fed in the meantime by another agent, or by one with a newer copy of %s: everything is "
                "compared",
                self._state.path,
            )
        nursery.start_soon(self.first.run)
        files = await trio.to_thread.run_sync(list_volumes, settings.source)
        intent = await trio.to_thread.run_sync(open_intent, self._state.intent_path, last)
        todo = plan(welcome, known, files, last, intent)
        log.info("epoch %d after seq %d: %s", epoch, welcome.held, "a clean start" if todo.clean else todo)
        link = AgentLink(self.first, welcome.held, RecordClock(welcome.time, welcome.run))
        self.agent = Agent(settings.source, link, VolumeTable(welcome.next_volume), intent, RegionTracker())
        self._work = await begin(self.agent, todo, epoch, known, files)
        self._store = welcome.store
        if todo.clean:
            self.agent.link.equal = True
            self._equal.set()

    async def _stored_epoch(self) -> Epoch:
        """The group's last epoch at the store: the state directory may have been lost, or restored from a copy."""
        status = await self._settings.target.ask(self._settings.group, "status")
        groups: Any = status["groups"]
        return Epoch(max((group["epoch"] for group in groups if group["group"] == self._settings.group), default=0))

    async def serve(self, ready: Ready) -> None:
        """Mounts, says that it is ready, and serves until it is unmounted or told to leave; then drains."""
        settings = self._settings
        unfinished = await trio.to_thread.run_sync(UnfinishedRestores, self._state.restores_path, self._store)
        operations = SourceMount(
            settings.source, self.agent, control=self._state.control_path, writeback=settings.writeback
        )
        self._restore = MountRestore(self.agent, operations.claims, operations.open_volumes, unfinished)
        options = mount_options(str(settings.source), allow_other=settings.allow_other, extra=settings.options)
        control = listen_unix(self._state.control_path, replace_stale=True)
        try:
            async with trio.open_nursery() as serving:
                serving.start_soon(self._in_background)
                serving.start_soon(self._answer, control)

                async def drain() -> None:
                    ready.stopping("unmounted; making everything durable")
                    await self._drain()

                async def mounted(task_status: trio.TaskStatus[None]) -> None:
                    await serve(
                        operations,
                        settings.mountpoint,
                        options,
                        before_requests=self._before_requests,
                        drain=drain,
                        stop=self._stop,
                        max_tasks=TASKS_MAX,
                        task_status=task_status,
                    )
                    serving.cancel_scope.cancel()

                await serving.start(mounted)
                if settings.wait_base:
                    await self._equal.wait()
                ready.ready(f"{settings.source} is mounted at {settings.mountpoint}")
        finally:
            operations.close()
            await control.aclose()

    async def _before_requests(self) -> None:
        await trio.to_thread.run_sync(self._state.serving, self._store)

    async def _in_background(self) -> None:
        """What goes on beside the requests, until the drain ends it: nothing may be recorded after the last record."""
        with self._background:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.agent.link.heartbeats)
                nursery.start_soon(self.agent.housekeeping, self._state.marks_go)
                nursery.start_soon(self._reconcile)
                nursery.start_soon(heal, self.agent)
                nursery.start_soon(self._online.serve, self.agent)
        self._background_ended.set()

    async def _reconcile(self) -> None:
        try:
            if not self._equal.is_set():
                await make_equal(self.agent, self._work, self._progress)
                self._work = ()
                self._has_base = True
                self._equal.set()
            await resync_after_outages(self.agent, self._progress)
        except HistoryLost:
            return  # `on_lost` has said it; applications keep their mount

    async def _drain(self) -> None:
        """Everything durable on both sides, and the clean mark, so that the next start goes on without a gap."""
        self._background.cancel()
        await self._background_ended.wait()
        with trio.move_on_after(self._drain_seconds) as patience:
            try:
                await self.agent.drain()
            except HistoryLost as lost:
                log.error("not drained: %s; the next mount compares source and store", lost)
                return
        if patience.cancelled_caught:
            await self._keep()
            return
        try:
            await self._leave_clean()
        except (OSError, RewindError) as error:
            log.error("no clean mark can be left: %s; the next mount reconciles what is marked", error)

    async def _keep(self) -> None:
        """The store did not take all in time: what there is goes to the spool, from where the next mount sends it."""
        kept = False
        with trio.move_on_after(KEEP_SECONDS):
            kept = await self.first.keep_all()
        log.error(
            "not drained within %g s; %sthe next mount reconciles what is marked",
            self._drain_seconds,
            "the spool has all of it; " if kept else "",
        )

    async def _leave_clean(self) -> None:
        intent = self.agent.intent
        if self.agent.link.equal:
            intent.clear((volume, region) for volume, regions in intent.marked().items() for region in regions)
        else:
            # What is owed stays marked. The clean mark tells what is changed behind the mount until the next one.
            log.warning("the store does not equal the source yet; the next mount goes on with the reconcile")
        await intent.close()
        files = await trio.to_thread.run_sync(list_volumes, self._settings.source)
        await trio.to_thread.run_sync(self._state.ended_cleanly, self.agent.link.last, files, self.agent.link.time)

    # -- the control socket ------------------------------------------------------------------------------------------

    async def _answer(self, listener: Listener) -> None:
        await serve_control(
            listener,
            {
                "status": self._status,
                "bookmark": self._bookmark,
                "bookmark.check": self._bookmark_check,
                "mode": self._mode,
                "unmount": self._unmount,
                "durable": self._durable,
                **self._online.handlers(),
                **self._restore.handlers(),
            },
        )

    async def _bookmark(self, body: Body) -> Body:
        """With `within`, seconds: recorded by then or not at all; `durable` says whether it was that by then, too."""
        name, within = _bookmark_name(body), body.get("within", math.inf)
        if not isinstance(within, (int, float)):
            raise RewindError("the time for a bookmark is a number of seconds")
        until = trio.current_time() + within
        seq = await self.agent.bookmark(name, within)
        with trio.move_on_at(until) as patience:
            await self.first.reached(seq, Level.DURABLE)
        return {"name": name, "seq": seq, "durable": not patience.cancelled_caught}

    async def _bookmark_check(self, body: Body) -> Body:
        """Whether there may be such a bookmark now, before an application is frozen for it. The source is synced, so
        that there is less to sync while it is."""
        await self.agent.check_bookmark(_bookmark_name(body))
        await self.agent.sync()
        return {"source": str(self._settings.source)}

    async def _mode(self, body: Body) -> Body:
        self.first.switch_mode(Mode(body.get("mode")))
        if self._settings.target.through and self.first.link is LinkState.CONNECTED:
            # With the link down it is said when it connects again.
            await self.first.request("mode.set", {"mode": self.first.mode.value})
        return {"mode": self.first.mode.value}

    async def _unmount(self, body: Body) -> Body:
        """Sets how long the drain may take. The unmount itself is the caller's: it sees what keeps the mount busy."""
        seconds = body.get("drain_timeout")
        if isinstance(seconds, (int, float)) and seconds > 0:
            self._drain_seconds = float(seconds)
        return {"pid": os.getpid(), "second": self._second_pid()}

    async def _durable(self, body: Body) -> Body:
        await self.first.drain()
        return {"durable_seq": self.first.durable}

    def _second_pid(self) -> int | None:
        process = None if self._supervisor is None else self._supervisor.process
        return None if process is None else process.pid

    async def _status(self, body: Body) -> Body:
        settings = self._settings
        beyond = await self._beyond()
        store = await self._store_report() if body.get("store") else None
        status = self.first.status()
        progress = self._online.progress or (None if self.agent.link.equal else self._progress)
        oldest = status.oldest_queued
        return {
            "group": settings.group,
            "source": str(settings.source),
            "mountpoint": str(settings.mountpoint),
            "store_path": None if settings.target.store is None else str(settings.target.store),
            "store_uuid": self._store,
            "store_report": store,
            "target": str(settings.target.address),
            "mode": status.mode.value,
            "waits_for": status.waits_for.name.lower(),
            "state": self._state_word(status.link, status.outage, beyond),
            "link": status.link.value,
            "error": status.error,
            "second": beyond,
            "oldest_queued": oldest,
            "lag": {"bytes": status.queued_bytes, "records": status.queued_records},
            "wire": {
                "written_bytes": status.written_bytes,
                "sent_bytes": status.sent_bytes,
                "saved_bytes": status.saved_bytes,
            },
            "spool": {
                "bytes": status.spool_bytes,
                "limit": status.spool_limit,
                "error": status.spool_error,
            },
            "seq": self.agent.link.last,
            "durable_seq": status.durable,
            "intent_bytes": sum(map(len, self.agent.intent.marked().values())) * REGION_BYTES,
            "volumes": len(self.agent.volumes),
            "half_restored": self._restore.report(),
            "reconcile": None if progress is None else progress.document(),
            "pids": {"mount": os.getpid(), "second": self._second_pid()},
        }

    async def _beyond(self) -> Body | None:
        """What the first appliance elsewhere says of its link to the second one; None without such, or without news."""
        return await self._asked("link.status", {}) if self._settings.target.through else None

    async def _store_report(self) -> Body | None:
        """What a second appliance elsewhere says of its store; None while it cannot be asked."""
        if self._settings.target.store is not None:
            return None
        page = await self._asked("report", {"kind": "store", "group": self._settings.group, "start": 0}) or {}
        head, rows = page.get("head"), page.get("rows")
        if not isinstance(head, dict) or not isinstance(rows, list):
            return None
        for name, row in rows:
            head.setdefault(name, []).append(row)
        return head

    async def _asked(self, command: str, body: Body) -> Body | None:
        with trio.move_on_after(ASK_SECONDS):
            try:
                return await self.first.request(command, body)
            except (LinkDown, RequestRefused, HistoryLost) as error:
                log.debug("%s: %s", command, error)
        return None

    def _state_word(self, link: LinkState, outage: bool, beyond: Body | None) -> str:
        if link is LinkState.LOST or self.agent.link.degraded:
            return "degraded"
        if outage or link is LinkState.FULL or self._is_cut_beyond(beyond):
            return "blocked" if self.first.outage_policy is Outage.BLOCK else "degraded"
        if not self.agent.link.equal:
            return "reconciling" if self._has_base else "initializing"
        return "protected"

    def _is_cut_beyond(self, beyond: Body | None) -> bool:
        """Whether the link behind the first appliance elsewhere has been down for as long as an outage takes."""
        down: Any = (beyond or {}).get("down_seconds")
        return down is not None and down >= self._settings.outage_after


def _bookmark_name(body: Body) -> str:
    name = body.get("name")
    if not isinstance(name, str):
        raise RewindError("a bookmark needs a name")
    check_name(name)
    return name


def _say_lost(error: HistoryLost) -> None:
    advice = "" if isinstance(error, Fenced) else "; unmount and mount again"
    log.critical("replication has ended: %s%s", error, advice)
