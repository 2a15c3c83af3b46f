"""The snapshots of a group as rows of a list, and what changed from one to the next."""

from __future__ import annotations

from collections.abc import Iterator

from dedup.moment import rfc3339
from dedup.reader import GroupReader
from dedup.types import Snapshot, VolumeId


def listed_snapshots(group: GroupReader) -> Iterator[dict[str, object]]:
    """Each snapshot in the contract's shape, in order, as it is found."""
    before: Snapshot | None = None
    for found in group.snapshots():
        volumes = [
            {"volume": path, "size": volume.size, "changed_bytes": _changed(group, volume.volume, before, found)}
            for path, volume in sorted(group.volumes_at(found.seq).items())
            if found.volume in (None, volume.volume)
        ]
        yield {
            "name": found.name,
            "time": rfc3339(found.time),
            "seq": found.seq,
            "kind": found.kind,
            "group": group.name,
            "volumes": volumes,
            "keep_until": None if found.keep_until is None else rfc3339(found.keep_until),
        }
        before = found


def _changed(group: GroupReader, volume: VolumeId, before: Snapshot | None, now: Snapshot) -> int:
    """Bytes of blocks that changed since the snapshot before, or all that are no holes where it had no such volume."""
    if before is None or group.view(before.seq).volume(volume) is None:
        return group.changed_bytes(volume, None, now.seq)
    return group.changed_bytes(volume, before.seq, now.seq)
