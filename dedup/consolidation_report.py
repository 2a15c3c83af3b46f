"""A consolidation by command: with the store to oneself, and what is reported of it either way."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dedup.consolidation_preview import Preview, preview
from dedup.consolidator import Outcome, consolidate, history_of
from dedup.gc import Collected, Collection, Collector, collect
from dedup.retention import load_policy
from dedup.types import TimeNs
from dedup.worker_lock import worker_lock

if TYPE_CHECKING:
    from dedup.store import Store


def consolidated_fields(outcome: Outcome, collected: Collected) -> dict[str, object]:
    """The contract's shape of what was done."""
    return {
        "planned": {
            "pieces": outcome.pieces + outcome.postponed,
            "containers": collected.plan.containers,
            "dead_blocks": collected.plan.dead_blocks,
        },
        "freed_bytes": outcome.freed_bytes + collected.freed_bytes,
        "dry_run": False,
        "postponed": outcome.postponed,
    }


def foreseen_fields(found: Preview) -> dict[str, object]:
    """The same of what would be done."""
    return {
        "planned": {
            "pieces": found.pieces,
            "points": found.points,
            "kept_points": found.kept,
            "journal_bytes": found.journal_bytes,
            "kept_journal_bytes": found.kept_bytes,
            "containers": found.collection.containers,
            "dead_blocks": found.collection.dead_blocks,
        },
        "freed_bytes": found.free_bytes,
        "dry_run": True,
        "postponed": 0,
    }


def consolidate_here(store: Store) -> dict[str, object]:
    """Thins every group by the store's policy, then collects. Damaged, StoreBusy, StoreFull, StoreFailed."""
    policy, now = load_policy(store.storage, store.path), TimeNs(time.time_ns())
    outcome = Outcome()
    with worker_lock(store.storage, store.path):
        for group in store.groups:
            outcome += consolidate(group, policy, now)
    if outcome.pieces:
        store.complete_containers()
    return consolidated_fields(outcome, collect(store))


def foresee_here(store: Store) -> dict[str, object]:
    """What `consolidate_here` would do. Damaged, StoreBusy, StoreFull, StoreFailed."""
    policy, now = load_policy(store.storage, store.path), TimeNs(time.time_ns())
    with worker_lock(store.storage, store.path):
        for group in store.groups:
            group.complete_segment()
        collection = Collection.begin(store)
        try:
            collector = Collector(store.storage, store.path, store.index, collection.boundary)
            with store.index.read() as txn:
                histories = [
                    (
                        history_of(group, txn),
                        collection.boundary.positions[group.name],
                    )
                    for group in store.groups
                ]
                return foreseen_fields(preview(histories, collector, policy, now))
        finally:
            collection.end()
