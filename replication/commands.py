"""Control commands that a second appliance answers: who may give them, what they take, what they reply.

A body and a reply are JSON-like. Times are integers of nanoseconds, sizes bytes. Errors are one line for a person.

    name.check       {group?, name}                            → {}; an error when nothing can be given this name,
                                                                 or, to an agent, when now is no recovery point
    status           {group?}                                  → {"store": {…}, "groups": [{…}], "sessions", "pid",
                                                                 "space": {…}}
    sync             {}                                        → {}; all that was received before is durable
    checkpoint       {}                                        → {}
    snapshot.create  {group?, name?, at?, volume?, keep_ns?}   → {"group", "name", "seq", "time", "kind", "volume"}
    snapshot.delete  {group?, name}                            → {"group", "name"}
    journal.list     {group?}                                  → {"group", "journals": [{"name", "id", "granularity",
                                                                 "in_use"}]}
    journal.create   {group?, name, granularity_ns?}           → {"group", "name", "id", "granularity", "in_use"}
    journal.use      {group?, name}                            → the same; what is received from now on goes there
    consolidate      {dry_run?}                                → {"planned", "freed_bytes", "dry_run", …}
    gc               {dry_run?}                                → {"planned", "freed_bytes", "dry_run", …}
    heal.note        {addresses}                               → {"healed", "agents"}: these blocks are damaged; how
                                                                 many were healed since the appliance began, and how
                                                                 many agents there are to ask for their bytes
    heal.wanted      {}                                        → {"ranges": [[volume, offset, length], …]} of the
                                                                 agent's volumes: damaged at the store, and wanted
                                                                 once more
    report           {kind, group?, volume?, at?, start?}      → {"head", "rows", "next"}: a page of what reports.py
                                                                 makes: points, snapshots, map, store
    retention.show   {}                                        → dedup.retention.Policy
    retention.set    {some fields of Policy}                   → the whole of it, durable and in force

`group` is the session's own where it has one, else the store's only one.

What a reader asks about the past, many small questions in a row, are no commands: see history_queries.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from dedup.consolidation_report import consolidated_fields, foreseen_fields
from dedup.errors import MomentRefused, NameRefused, RewindError, UnknownName
from dedup.gc import collected_fields
from dedup.granularity import journal_fields
from dedup.healing import head_ranges
from dedup.moment import check_name
from dedup.pointer_map import Addresses
from dedup.retention import changed_policy, policy_fields
from dedup.types import BLOCK_BYTES, JournalSpec
from replication.maintenance import Maintenance
from replication.messages import Role
from replication.permissions import Caller
from replication.report_process import ReportProcesses
from replication.reports import Subject
from replication.space_gate import SpaceGate
from replication.store_writer import StoreWriter

if TYPE_CHECKING:
    from dedup.group_writer import GroupWriter

Body = dict[str, object]

RESERVATION_SECONDS: Final = 60.0
"""How long a name that an agent checked is kept for its bookmark: the record may not be refused when it arrives."""
RESERVATIONS_MAX: Final = 1024
HEAL_RANGES_MAX: Final = 4096
"""Ranges that an agent is asked for at a time; the others are left to the next verification."""


class BadRequest(RewindError):
    """The request is none that this version knows, lacks a field, or is not for this role."""


class Commands:
    """The commands of one appliance."""

    def __init__(
        self,
        writer: StoreWriter,
        sessions: Callable[[], Mapping[str, int]],
        space: SpaceGate,
        maintenance: Maintenance,
    ) -> None:
        """`sessions` gives the number of live agent sessions per group, and of all sessions under ""."""
        self._writer = writer
        self._sessions = sessions
        self._space = space
        self._maintenance = maintenance
        self._reports = ReportProcesses(writer.store.path)
        self._reserved: dict[tuple[str, str], float] = {}

    async def run(self, caller: Caller, command: str, body: Body) -> Body:
        """Raises BadRequest, or what the store raises: StoreFull, StoreFailed, UnknownName, NameRefused, …"""
        entry = _COMMANDS.get(command)
        if entry is None:
            raise BadRequest(f"unknown command {command!r}; known: {', '.join(_COMMANDS)}")
        roles, function = entry
        if caller.role not in roles:
            raise BadRequest(f"{command} is not for the role {caller.role.value}")
        if caller.limited and command in _WHOLE_STORE:
            raise BadRequest(f"{command} is about all groups of the store, and this key is trusted with some of them")
        return await function(self, caller, body)

    def group_name(self, caller: Caller) -> str:
        """The group whose past the caller's session asks about: its own, or the only one that it may. UnknownName."""
        return self._group(caller, {}).name

    async def _name_check(self, caller: Caller, body: Body) -> Body:
        group = self._group(caller, body)
        name = _text(body, "name")
        check_name(name)
        if await self._writer.run(group.name_exists, name):
            raise NameRefused(f"group {group.name} already has a snapshot or bookmark {name!r}; choose another name")
        if caller.role is Role.AGENT:
            if not group.has_base or group.reconciling:
                what = "a reconcile is under way" if group.has_base else "the base snapshot is still being made"
                raise MomentRefused(f"group {group.name}: {what}, now is no recovery point; try again when it is done")
            self._reserve(group.name, name)
        return {}

    async def _status(self, caller: Caller, body: Body) -> Body:
        usage = await self._writer.run(self._writer.store.usage)
        sessions = self._sessions()
        groups = [group for group in self._writer.store.groups if caller.group in ("", group.name)]
        groups = [group for group in groups if caller.may_touch(group.name)]
        return {
            "store": {**dataclasses.asdict(usage), "uuid": self._writer.store.uuid},
            "groups": [_group_status(group, sessions.get(group.name, 0)) for group in groups],
            "sessions": sum(sessions[group.name] for group in groups) if caller.limited else sessions[""],
            "pid": os.getpid(),
            "space": self._space.status(usage.bytes),
        }

    async def _sync(self, caller: Caller, body: Body) -> Body:
        await self._writer.sync()
        return {}

    async def _checkpoint(self, caller: Caller, body: Body) -> Body:
        await self._writer.checkpoint()
        return {}

    async def _snapshot_create(self, caller: Caller, body: Body) -> Body:
        group = self._group(caller, body)
        name, at = _text(body, "name", "") or None, _text(body, "at", "latest")
        volume = _text(body, "volume", "") or None
        if name is not None and not await self._writer.run(group.name_exists, name):
            self._check_reservation(group.name, name)
        snapshot = await self._writer.keep(group.create_snapshot, name, at, volume, _count(body, "keep_ns"))
        return {"group": group.name, **dataclasses.asdict(snapshot)}

    async def _snapshot_delete(self, caller: Caller, body: Body) -> Body:
        group = self._group(caller, body)
        name = _text(body, "name")
        await self._writer.run(group.delete_snapshot, name)
        return {"group": group.name, "name": name}

    async def _report(self, caller: Caller, body: Body) -> Body:
        named = caller.limited or bool(_text(body, "group", caller.group))
        subject = Subject(
            _text(body, "kind"),
            self._group(caller, body).name if named else None,
            _text(body, "volume", "") or None,
            _text(body, "at", "latest"),
            _text(body, "since", "") or None,
            _text(body, "until", "") or None,
            _count(body, "buckets"),
        )
        page = await self._reports.page(subject, _count(body, "start"))
        return without_others(page) if caller.limited else page

    async def _retention_show(self, caller: Caller, body: Body) -> Body:
        return policy_fields(self._space.policy)

    async def _retention_set(self, caller: Caller, body: Body) -> Body:
        policy = changed_policy(self._space.policy, body)
        await self._space.set_policy(policy)
        self._maintenance.reconsider()
        return policy_fields(policy)

    async def _journal_list(self, caller: Caller, body: Body) -> Body:
        group = self._group(caller, body)
        state = group.state
        return {"group": group.name, "journals": [journal_fields(spec, state.journal) for spec in state.journals]}

    async def _journal_create(self, caller: Caller, body: Body) -> Body:
        width = body.get("granularity_ns", 0)
        if not isinstance(width, int):
            raise BadRequest("'granularity_ns' of the request is no number")
        return await self._journal_change(caller, body, lambda group, name: group.add_journal(name, width))

    async def _journal_use(self, caller: Caller, body: Body) -> Body:
        return await self._journal_change(caller, body, lambda group, name: group.switch_journal(name))

    async def _journal_change(
        self, caller: Caller, body: Body, change: Callable[[GroupWriter, str], JournalSpec]
    ) -> Body:
        """One entry of the journal, then a sync that is shared with everyone else's: no writer waits for it."""
        group = self._group(caller, body)
        spec = await self._writer.run(change, group, _text(body, "name"))
        await self._writer.sync()
        return {"group": group.name, **journal_fields(spec, group.state.journal)}

    async def _consolidate(self, caller: Caller, body: Body) -> Body:
        if body.get("dry_run") is True:
            return foreseen_fields(await self._maintenance.foresee())
        return consolidated_fields(*await self._maintenance.consolidate())

    async def _gc(self, caller: Caller, body: Body) -> Body:
        dry_run = body.get("dry_run") is True
        return collected_fields(await self._maintenance.collect(dry_run=dry_run), dry_run=dry_run)

    async def _heal_note(self, caller: Caller, body: Body) -> Body:
        addresses = body.get("addresses")
        if not isinstance(addresses, list) or not all(isinstance(one, int) and one > 0 for one in addresses):
            raise BadRequest("'addresses' of the request is no list of addresses")
        wounds = self._writer.store.healer.wounds
        wounds.note(addresses)
        sessions = self._sessions()
        return {"healed": wounds.healed, "agents": sum(sessions.values()) - sessions[""]}

    async def _heal_wanted(self, caller: Caller, body: Body) -> Body:
        group = self._group(caller, body)
        bad = self._writer.store.healer.wounds.take(group.name)
        ranges = await trio.to_thread.run_sync(self._head_ranges, group, bad) if len(bad) else []
        return {"ranges": ranges}

    def _head_ranges(self, group: GroupWriter, bad: Addresses) -> list[list[int]]:
        found = head_ranges(self._writer.store.index, group.reader(), group.catalog.group_id, bad)
        return [
            [volume, first * BLOCK_BYTES, blocks * BLOCK_BYTES]
            for volume, first, blocks in islice(found, HEAL_RANGES_MAX)
        ]

    def _group(self, caller: Caller, body: Body) -> GroupWriter:
        """The group meant; never makes one."""
        name = caller.group if caller.role is Role.AGENT else _text(body, "group", caller.group)
        known = {group.name: group for group in self._writer.store.groups if caller.may_touch(group.name)}
        if not name and len(known) == 1:
            return next(iter(known.values()))
        if name in known:
            return known[name]
        if name and caller.limited:
            raise UnknownName(f"no group {name!r} in the store")
        listed = ", ".join(sorted(known)) or "none"
        if name:
            raise UnknownName(f"no group {name!r} in the store; it holds {listed}")
        raise UnknownName(f"name a group with --group; the store holds {listed}")

    def _reserve(self, group: str, name: str) -> None:
        now = trio.current_time()
        self._reserved = {key: until for key, until in self._reserved.items() if until > now}
        if len(self._reserved) < RESERVATIONS_MAX:
            self._reserved[group, name] = now + RESERVATION_SECONDS

    def _check_reservation(self, group: str, name: str) -> None:
        if self._reserved.get((group, name), 0.0) > trio.current_time():
            raise NameRefused(f"the name {name!r} is being given to a bookmark; choose another one")


def without_others(page: Body) -> Body:
    """The page of a map without the names of other groups: blocks may lie in a data journal of theirs."""
    rows = page.get("rows")
    for _, row in rows if isinstance(rows, list) else ():
        if isinstance(row, dict) and "/" in str(row.get("journal")):
            row["journal"] = "another group's"
    return page


def _count(body: Body, key: str) -> int:
    """A number that is not negative; 0 where there is none."""
    value = body.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise BadRequest(f"{key!r} of the request is no such number")
    return value


def _text(body: Body, key: str, default: str | None = None) -> str:
    value = body.get(key)
    if value is None:
        if default is None:
            raise BadRequest(f"the request lacks {key!r}")
        return default
    if not isinstance(value, str):
        raise BadRequest(f"{key!r} of the request is not text")
    return value


def _group_status(group: GroupWriter, agents: int) -> Body:
    return {
        "group": group.name,
        "epoch": group.epoch,
        "held": group.held,
        "durable": group.durable,
        "time": group.time,
        "run": group.run,
        "has_base": group.has_base,
        "reconciling": group.reconciling,
        "agents": agents,
    }


_Function = Callable[[Commands, Caller, Body], Awaitable[Body]]
_WHOLE_STORE: Final = frozenset({"checkpoint", "consolidate", "gc", "heal.note", "retention.set"})
"""Not for whom some groups are closed."""
_ALL: Final = frozenset(Role)
_ADMIN: Final = frozenset({Role.ADMIN})
_NOT_READER: Final = frozenset({Role.ADMIN, Role.AGENT})
_COMMANDS: Final[dict[str, tuple[frozenset[Role], _Function]]] = {
    "name.check": (_ALL, Commands._name_check),
    "status": (_ALL, Commands._status),
    "sync": (_NOT_READER, Commands._sync),
    "heal.note": (_ADMIN, Commands._heal_note),
    "heal.wanted": (frozenset({Role.AGENT}), Commands._heal_wanted),
    "report": (_ALL, Commands._report),
    "checkpoint": (_ADMIN, Commands._checkpoint),
    "snapshot.create": (_ADMIN, Commands._snapshot_create),
    "snapshot.delete": (_ADMIN, Commands._snapshot_delete),
    "journal.list": (_ALL, Commands._journal_list),
    "journal.create": (_ADMIN, Commands._journal_create),
    "journal.use": (_ADMIN, Commands._journal_use),
    "consolidate": (_ADMIN, Commands._consolidate),
    "gc": (_ADMIN, Commands._gc),
    "retention.show": (_ALL, Commands._retention_show),
    "retention.set": (_ADMIN, Commands._retention_set),
}
