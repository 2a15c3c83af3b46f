"""The ids of the store, and the limits of what they number: all of its words that cost nothing to import.

A command that only asks an appliance needs no more of `types`, whose records take longer to make than its question.
"""

from __future__ import annotations

from typing import Final, NewType

Seq = NewType("Seq", int)
"""Position of a record in its group, u64, +1 per record. 0 means "nothing yet"; the first record is 1."""
TimeNs = NewType("TimeNs", int)
"""Wall clock of the agent, nanoseconds since 1970 UTC."""
VolumeId = NewType("VolumeId", int)
"""Persistent number of a volume within its group, u32, from 1; never used twice."""
Epoch = NewType("Epoch", int)
"""Number of an agent start within its group, u32, from 1."""
ClockRun = NewType("ClockRun", int)
"""Number of a stretch of records in which the agent's clock never decreased, u32, from 0."""
ContainerId = NewType("ContainerId", int)
"""Number of a container within its store, from 1; never used twice."""
JournalId = NewType("JournalId", int)
"""Number of a data journal within its store, u16; 0 is `base`."""
Address = NewType("Address", int)
"""Where a block's bytes are: container id and slot in one u64 (see `layout.address`). Permanent."""

BLOCK_BYTES: Final = 4096
HOLE: Final = Address(0)
"""The address of a block of zeros; nothing is stored for it."""
LOST: Final = Address(1)
"""The address of a block that nobody has: what was damaged when a write changed only a part of it. Reading it fails.
Its container, 0, is none that there is."""
LOST_CONTAINER: Final = ContainerId(0)
BASE_JOURNAL: Final = JournalId(0)
FINE_JOURNAL: Final = JournalId(1)
"""The every-write data journal that each store begins with."""

WRITE_BYTES_MAX: Final = 1 << 20
"""Largest payload of one record's extent: the largest FUSE write request (256 pages)."""
AGGREGATE_BYTES_MAX: Final = 4 << 20
"""Largest payload of one aggregate, all extents together."""
PATH_BYTES_MAX: Final = 4096
NAME_BYTES_MAX: Final = 255
VOLUME_BYTES_MAX: Final = 1 << 50
"""Largest size of a volume: 1 PiB."""
