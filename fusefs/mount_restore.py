"""A restore in place, as the process of the mount sees it: who may begin one, and what it claims meanwhile.

The command itself writes, through the mount, like any application; here is only what keeps others away from the volumes
that it writes, and what is remembered if it does not end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import trio

from dedup.errors import RewindError
from dedup.types import Seq, VolumeId
from fusefs.agent import Agent
from fusefs.agent_control import Body, Handlers
from fusefs.restore_claim import RestoreClaims, is_below
from fusefs.unfinished_restores import UnfinishedRestores

POLLS: Final = 60
_POLL_SECONDS: Final = 0.05
"""For 3 s a file that was just closed may look open: the kernel says it late, and a loop device holds it longer."""


class MountRestore:
    """Answers the command's `restore.start`, `restore.begin`, `restore.end`, in this order; and `restore.open`."""

    def __init__(
        self,
        agent: Agent,
        claims: RestoreClaims,
        open_volumes: Callable[[], set[VolumeId]],
        unfinished: UnfinishedRestores,
    ) -> None:
        self._agent = agent
        self._claims = claims
        self._open_volumes = open_volumes
        self._unfinished = unfinished

    def handlers(self) -> Handlers:
        """For the control socket."""
        return {
            "restore.start": self._start,
            "restore.begin": self._begin,
            "restore.end": self._end,
            "restore.open": self._open,
        }

    def report(self) -> list[dict[str, object]]:
        """What is half restored, for a status."""
        return [asdict(note) for note in self._unfinished.all]

    async def _start(self, body: Body) -> Body:
        """Claims the place for process `pid`; without `force` nobody else may have it open: `in_use` says who has."""
        place, pid = body.get("place"), body.get("pid")
        if not isinstance(place, str) or not isinstance(pid, int):
            raise RewindError("a restore needs a place and a process")
        self._agent.link.require_equal()
        exclusive = not body.get("force")
        number = self._claims.take(place, pid, exclusive=exclusive)
        in_use: list[str] = []
        for _ in range(POLLS if exclusive else 0):
            in_use = self._in_use(place)
            if not in_use:
                break
            await trio.sleep(_POLL_SECONDS)
        if in_use:
            self._claims.end(number)
        unfinished = [asdict(note) for note in self._unfinished.all if note.place == place]
        return {"id": number, "in_use": in_use, "unfinished": unfinished}

    def _in_use(self, place: str) -> list[str]:
        volumes = [self._agent.volumes.get(volume) for volume in self._open_volumes()]
        return sorted(volume.path for volume in volumes if volume is not None and is_below(volume.path, place))

    async def _open(self, body: Body) -> Body:
        """What anybody has open at the place: its last writes may be in the kernel's memory only."""
        place = body.get("place")
        if not isinstance(place, str):
            raise RewindError("what is open, of which place?")
        return {"open": self._in_use(place)}

    async def _begin(self, body: Body) -> Body:
        """The first change is next. Durable."""
        self._claims.require(body.get("id"))
        place, seq, bookmark = (body.get(name) for name in ("place", "seq", "bookmark"))
        if not isinstance(place, str) or not isinstance(seq, int) or not isinstance(bookmark, str):
            raise RewindError("a restore needs a place, a seq and a bookmark")
        await trio.to_thread.run_sync(self._unfinished.begun, place, Seq(seq), bookmark)
        return {}

    async def _end(self, body: Body) -> Body:
        """Gives the claim back. `done`: all of the place is as it was to be. The note goes once the source has that on
        its disk: what an earlier try wrote, this one had no need to write and to sync, and names were never synced."""
        done: Any = body.get("done")
        place = body.get("place")
        if done and isinstance(place, str):
            self._claims.require(body.get("id"))
            await self._agent.sync()
            await trio.to_thread.run_sync(self._unfinished.ended, place)
        self._claims.end(body.get("id"))
        return {}
