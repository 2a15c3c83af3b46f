"""After an outage: the store is told of every name and size that changed unrecorded, before contents are reconciled.

Invariant: the group is locked only while there is room: where there is none, applications go on as their outage policy
says, and all that is not told yet is told again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from dedup.types import ClockRun, Record, Seq, TimeNs, VolumeId
from fusefs.agent import Agent
from fusefs.volume_records import attributes_record, create_record, rename_records, resize_record, retire_record
from replication.agent_link import RECORD_BYTES

RETRY_SECONDS: Final = 0.2


class _NoRoom(Exception):
    """Nothing can be recorded now."""


async def catch_up(agent: Agent) -> list[VolumeId]:
    """Returns the volumes of which the store knew nothing: their contents are zeros there. Raises HistoryLost."""
    fresh: list[VolumeId] = []
    while True:
        claim = await agent.lock.claim_all()
        try:
            await _tell(agent, fresh)
            return fresh
        except _NoRoom:
            pass
        finally:
            agent.lock.release(claim)
        await trio.sleep(RETRY_SECONDS)


async def _tell(agent: Agent, fresh: list[VolumeId]) -> None:
    while agent.unrecorded_retired:
        await _record(agent, partial(retire_record, agent.unrecorded_retired[0]))
        del agent.unrecorded_retired[0]
    # In this order a path is free before a new volume takes it.
    moved = [volume for volume in agent.volumes if volume.moved and volume.known]
    for rename in rename_records([(volume.id, volume.path) for volume in moved]):
        await _record(agent, rename)
    for volume in moved:
        volume.moved = False
    for volume in [volume for volume in agent.volumes if not volume.known]:
        await _record(agent, partial(create_record, volume))
        volume.known, volume.moved, volume.restyled = True, False, False
        fresh.append(volume.id)
    for volume in agent.volumes:
        await _record(agent, partial(resize_record, volume))
        if volume.restyled:
            await _record(agent, partial(attributes_record, volume))
            volume.restyled = False


async def _record(agent: Agent, build: Callable[[Seq, TimeNs, ClockRun], Record]) -> None:
    if not await agent.link.room_by_and_by(RECORD_BYTES):
        raise _NoRoom
    agent.link.put(build)
