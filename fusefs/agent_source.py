"""The source as a reconcile reads it: files opened by volume, ranges held by the agent's range lock."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from dedup.types import VOLUME_BYTES_MAX, VolumeId
from fusefs.agent import Agent


@dataclass(frozen=True, slots=True)
class AgentSource:
    """Implements `reconcile.SourceFiles`."""

    agent: Agent

    @asynccontextmanager
    async def opened(self, volume: VolumeId) -> AsyncIterator[int | None]:
        """The volume's file while the context lasts, wherever it is renamed meanwhile; None when it is gone."""
        # Past where anybody writes: only what changes names is held off, which locks the whole group.
        claim = await self.agent.lock.claim(volume, VOLUME_BYTES_MAX, 1)
        try:
            known = self.agent.volumes.get(volume)
            fd = None
            if known is not None:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = await trio.to_thread.run_sync(os.open, self.agent.source / known.path, flags)
        finally:
            self.agent.lock.release(claim)
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    @asynccontextmanager
    async def claimed(self, volume: VolumeId, offset: int, length: int) -> AsyncIterator[bool]:
        """Holds the range; False when the volume is gone."""
        claim = await self.agent.lock.claim(volume, offset, length)
        try:
            yield self.agent.volumes.get(volume) is not None
        finally:
            self.agent.lock.release(claim)
