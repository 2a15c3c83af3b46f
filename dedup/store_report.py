"""How a store is doing: its sizes, its limits, and of each group what can be restored."""

from __future__ import annotations

from dataclasses import asdict

from dedup.moment import rfc3339
from dedup.reader import GroupReader, StoreReader
from dedup.space import space_of
from dedup.types import TimeNs


def store_document(store: StoreReader, group: str | None = None) -> dict[str, object]:
    """{"store", "space", "groups"}: sizes and limits of the whole store, and of all groups, or the one, their points.

    Walks the store's files.
    """
    names = store.groups() if group is None else [group]
    usage = store.usage()
    return {
        "store": {"path": str(store.path), **asdict(usage)},
        "space": space_of(store.storage, store.path, usage.bytes),
        "groups": [_points(store.group(name)) for name in names],
    }


def _points(group: GroupReader) -> dict[str, object]:
    points = group.points()
    return {
        "group": group.name,
        "oldest": None if points.oldest is None else rfc3339(points.oldest.time),
        "newest": None if points.newest is None else rfc3339(points.newest.time),
        "covered_until": rfc3339(TimeNs(points.covered_until)),
        "gaps": len(points.gaps),
    }
