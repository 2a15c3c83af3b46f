"""The intent log's namespace flag around changes of names and sizes: set before one, until both sides have it for good.

Invariants:
- `acknowledged-is-kept`: a change's bracket ends only when its record is durable at the second appliance, and a sync of
  the source's filesystem that began after the change has succeeded: until then a power cut may undo the change;
- a change that is made and went unrecorded keeps its bracket until the store equals the source again.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import pyfuse3
import trio

from dedup.types import Seq
from replication.first_appliance import FirstAppliance
from replication.intent_log import IntentLog


class NamespaceBrackets:
    """The open brackets of one source, oldest first. `settle`, now and then, ends those that may end."""

    def __init__(self, source: Path, intent: IntentLog, first: FirstAppliance) -> None:
        self._source = source
        self._intent = intent
        self._first = first
        self._made: deque[tuple[Seq, int]] = deque()
        """Record and number of each change that was made, in order."""
        self._unrecorded = 0
        self._changes = 0
        self._synced = 0
        """The number of the last change before a sync of the source that succeeded."""

    async def begin(self) -> None:
        """Returns when the flag is durable. Raises IntentLogFailed: the change must not be made."""
        await self._intent.namespace_begin()

    def close(self, seq: Seq | None) -> None:
        """The change was made, recorded as `seq` (0: nothing of it is to be recorded), or was not made; None: it went
        unrecorded."""
        if seq is None:
            self._unrecorded += 1
        else:
            self._changes += 1
            self._made.append((seq, self._changes))

    def equal_again(self) -> None:
        """The store has what went unrecorded, durably; the source's disk may not have it yet."""
        unrecorded, self._unrecorded = self._unrecorded, 0
        for _ in range(unrecorded):
            self.close(Seq(0))

    async def settle(self) -> None:
        """Ends the brackets whose record is durable, after a sync of the source if need be. Raises its OSError."""
        if self._made and self._made[0][0] <= self._first.durable:
            await self.sync()

    async def sync(self) -> None:
        """Syncs the source's filesystem, then ends every bracket that may end. Raises OSError."""
        changes = self._changes
        await trio.to_thread.run_sync(pyfuse3.syncfs, str(self._source))
        self._synced = max(changes, self._synced)
        while self._made and self._made[0][0] <= self._first.durable and self._made[0][1] <= self._synced:
            self._made.popleft()
            self._intent.namespace_end()
