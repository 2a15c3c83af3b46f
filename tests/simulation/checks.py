"""The invariants of DESIGN §7, as far as a model of the store can show them."""

from __future__ import annotations

from dedup.types import BLOCK_BYTES, Aggregate, Correct, EpochStart, Heartbeat, ReconcileBegin, Record, Seq
from fusefs.volume_table import list_volumes
from replication import region_tracker
from replication.messages import Compare
from tests.simulation.hosts import AgentHost, SecondHost
from tests.simulation.image import Image
from tests.simulation.settings import Profile
from tests.simulation.source_history import Tree
from tests.simulation.trace import Trace


def check_levels(host: AgentHost, second: SecondHost, trace: Trace) -> None:
    """`acknowledged-is-kept`: nobody was told that the store has more than it ever had."""
    if host.agent is None:
        return
    first, group = host.agent.first, second.group
    if first.received > group.held_ever or first.durable > group.durable_ever:
        trace.violated(
            "acknowledged-is-kept",
            f"told of {first.received}, durable {first.durable}; "
            f"the store had {group.held_ever}, durable {group.durable_ever}",
        )


def check_marks(host: AgentHost, second: SecondHost, trace: Trace) -> None:
    """`acknowledged-is-kept`: where the source differs from what the store has for good, the region is marked."""
    agent = host.agent
    if agent is None or not host.serves.is_set():
        return
    intent = agent.intent
    if intent.everything or intent._flags_durable & 1 or agent.brackets._made or agent.brackets._unrecorded:
        return  # names and sizes may differ: everything would be compared
    stored = {volume.path: volume for volume in second.group.durable_image.volumes.values()}
    for path in list_volumes(host.source):
        ours, theirs = (host.source / path).read_bytes(), stored.get(path)
        if theirs is None:
            continue  # found by the listing, and sent whole
        if ours == theirs.content or len(ours) != len(theirs.content):
            continue  # of another size: all of it would be compared
        for block in range(0, len(ours), BLOCK_BYTES):
            region = block // region_tracker.REGION_BYTES
            if ours[block : block + BLOCK_BYTES] != theirs.content[block : block + BLOCK_BYTES] and not (
                intent.is_marked(theirs.id, region)
            ):
                trace.violated("acknowledged-is-kept", f"{path} differs at {block}, and region {region} is not marked")


def check_moments(host: AgentHost, second: SecondHost, trace: Trace) -> int:
    """`replica-equals-source`, `order`, `one-writer`: every recovery point of the store equals the source after its
    seq, and each record is the one that the epoch's agent made. Returns how many points there were."""
    log = second.group.log
    corrected: set[int] = set()
    image, tree, changes, run = Image(), Tree(), [], None
    cursor = points = 0
    for record in log:
        first = record.first_seq if isinstance(record, Aggregate) else record.seq
        if first != image.held + 1:
            trace.violated("order", f"record {first} follows {image.held}")
        image.apply(record)
        if isinstance(record, EpochStart):
            run = host.runs[record.epoch]
            tree, changes, cursor = run.base.copy(), run.changes(), 0
            # Also by a correction that did not arrive before the agent died: its write counts as one in flight then.
            corrections = [made for made in run.stamped.values() if isinstance(made, Correct)]
            corrected = {seq for made in corrections for seq in range(made.refused, made.seq)}
            image.dirty.update(image.volumes)
        if run is None:
            trace.violated("one-writer", f"record {record.seq} belongs to no epoch")
            return 0
        _check_made(record, run.stamped.get(record.seq), trace)
        while cursor < len(changes) and changes[cursor][0] <= record.seq:
            changes[cursor][1](tree)
            cursor += 1
        if image.is_point and record.seq not in corrected:
            points += 1
            if difference := differs(image, tree):
                trace.violated("replica-equals-source", f"at seq {record.seq}: {difference}")
            image.dirty.clear()
            tree.dirty.clear()
    return points


def _check_made(record: Record, made: Record | Compare | None, trace: Trace) -> None:
    if isinstance(record, Aggregate) or made == record:
        return
    if isinstance(record, Heartbeat) and isinstance(made, Compare):
        return  # what the store keeps of it
    trace.violated("one-writer", f"record {record.seq} of the store was not made by the agent of its epoch: {made}")


def check_end(host: AgentHost, second: SecondHost, trace: Trace) -> None:
    """All is healed and drained: what is durable is what the source holds."""
    image = second.group.durable_image.copy()
    tree = Tree.of(host.source)
    image.dirty, tree.dirty = set(image.volumes), set(tree.files)
    if difference := differs(image, tree):
        trace.violated("replica-equals-source", f"at the end: {difference}")
    if not image.is_point:
        trace.violated("gap-is-said", "the gap did not end")


def check_gaps(host: AgentHost, second: SecondHost, trace: Trace, *, spells: int, lost: bool) -> None:
    """`gap-is-said`, from its other side: there is none that nothing explains."""
    log = second.group.log
    starts = sum(isinstance(record, EpochStart) and not record.clean for record in log)
    begins = sum(isinstance(record, ReconcileBegin) for record in log)
    if starts > host.gaps_allowed or begins > spells:
        trace.violated("gap-is-said", f"{starts} starts with a gap of {host.gaps_allowed}, {begins} later of {spells}")
    is_short = host.settings.profile in (Profile.CALM, Profile.SHORT)
    if is_short and (starts > 1 or begins or lost):
        trace.violated("gap-is-said", f"short faults made gaps: {starts} starts, {begins} later, lost: {lost}")


def differs(image: Image, tree: Tree) -> str:
    """Where they differ; empty when they do not. Looks at what is dirty only, apart from names."""
    stored = {volume.path: volume for volume in image.volumes.values()}
    if stored.keys() != tree.names.keys():
        return f"the store has {sorted(stored)}, the source {sorted(tree.names)}"
    for path, file in tree.names.items():
        volume, content = stored[path], tree.files[file]
        if (volume.id in image.dirty or file in tree.dirty) and volume.content != content:
            size = min(len(content), len(volume.content))
            at = next((at for at in range(size) if volume.content[at] != content[at]), size)
            sizes = f"{len(volume.content)} and {len(content)} bytes"
            return f"{path} (volume {volume.id}) at byte {at}: {sizes}"
    return ""


def last_seq(second: SecondHost) -> Seq:
    return second.group.held
