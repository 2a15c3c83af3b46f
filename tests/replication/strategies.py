"""Hypothesis strategies for every message of the protocol. Lengths stay small; limits have tests of their own."""

from __future__ import annotations

from hypothesis import strategies as st

from dedup.types import (
    VOLUME_BYTES_MAX,
    Aggregate,
    Attributes,
    Bookmark,
    Correct,
    Create,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    VolumeState,
    Write,
)
from replication.digests import answer_bytes
from replication.frame_layout import OFFERED_BYTES
from replication.messages import (
    COMPARE_BYTES_MAX,
    COMPARE_UNITS,
    DIGEST_BYTES,
    PROTOCOL_VERSION,
    Ack,
    Compare,
    CompareResult,
    ErrorCode,
    Failure,
    Hello,
    Mode,
    Offer,
    Piece,
    Query,
    Remainder,
    Reply,
    Request,
    Result,
    Role,
    SyncRequest,
    Uncompared,
    VolumePage,
    Wanted,
    Welcome,
)

u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
seqs = st.integers(1, (1 << 64) - 1)
volumes = st.integers(1, (1 << 32) - 1)
sizes = st.integers(0, VOLUME_BYTES_MAX)
names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=200)
offsets = st.integers(0, VOLUME_BYTES_MAX - (1 << 20))
stamp = {"seq": seqs, "time": u64, "run": u32}
owner = {"mode": u16, "uid": u32, "gid": u32}

data_extents = st.builds(Extent, volumes, offsets, st.binary(min_size=1, max_size=9000))
zero_extents = st.builds(Extent, volumes, offsets, st.just(b""), st.integers(1, 1 << 20))
extents = st.one_of(data_extents, zero_extents)
empty_extents = st.builds(Extent, volumes, offsets, st.just(b""))
json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
bodies = st.dictionaries(texts, json_like, max_size=4)

writes = st.builds(Write, extent=extents, **stamp)
aggregates = st.builds(
    lambda first, count, time, run, pieces: Aggregate(first, first + count, time, run, tuple(pieces)),
    st.integers(1, 1 << 60),
    st.integers(0, 300),
    u64,
    u32,
    st.lists(
        st.one_of(data_extents, st.builds(Extent, volumes, offsets, st.just(b""), st.integers(1, 9000))), min_size=1
    ),
)
corrects = st.builds(
    lambda seq, back, time, run, size, extent: Correct(seq + back, time, run, seq, size, extent),
    st.integers(1, 1 << 60),
    st.integers(1, 1000),
    u64,
    u32,
    sizes,
    st.one_of(extents, empty_extents),
)
renames = st.builds(
    lambda seq, time, run, moved, retired: Rename(
        seq, time, run, tuple((number + 1, path) for number, path in enumerate(moved)), tuple(retired)
    ),
    seqs,
    u64,
    u32,
    st.lists(paths, min_size=1, max_size=5, unique=True),
    st.lists(st.integers(1000, 2000), max_size=3, unique=True),
)
records = st.one_of(
    writes,
    aggregates,
    st.builds(Reconcile, extent=st.one_of(extents, empty_extents), **stamp),
    corrects,
    st.builds(Resize, volume=volumes, size=sizes, **stamp),
    st.builds(Create, volume=volumes, path=paths, size=sizes, **stamp, **owner),
    renames,
    st.builds(Retire, volume=volumes, **stamp),
    st.builds(Attributes, volume=volumes, **stamp, **owner),
    st.builds(Flush, volume=volumes, **stamp),
    st.builds(Bookmark, name=names, **stamp),
    st.builds(Heartbeat, **stamp),
    st.builds(EpochStart, epoch=st.integers(1, (1 << 32) - 1), clean=st.booleans(), **stamp),
    st.builds(ReconcileBegin, reason=texts, **stamp),
    st.builds(ReconcileEnd, **stamp),
)
states = st.builds(VolumeState, volume=volumes, path=paths, size=sizes, retired=st.booleans(), **owner)
compares = st.builds(
    lambda seq, time, run, volume, at, unit, blocks: Compare(
        seq,
        time,
        run,
        volume,
        at * unit,
        bytes(range(DIGEST_BYTES)) * (answer_bytes(unit) * min(blocks, COMPARE_BYTES_MAX // unit)),
        unit,
    ),
    seqs,
    u64,
    u32,
    volumes,
    st.integers(0, 1 << 27),
    st.sampled_from(COMPARE_UNITS),
    st.integers(1, 40),
)
pieces = st.one_of(
    st.builds(Piece, volumes, offsets, st.integers(1, 9000), st.just(0)),
    st.builds(Piece, volumes, offsets, st.just(0), st.integers(1, 9000)),
)
remainders = st.builds(
    lambda first, count, time, run, table, data: Remainder(first, first + count, time, run, tuple(table), data),
    st.integers(1, 1 << 60),
    st.integers(0, 300),
    u64,
    u32,
    st.lists(pieces, min_size=1, max_size=9),
    st.binary(max_size=9000),
)
short_control = st.one_of(
    st.builds(
        Hello,
        st.just(PROTOCOL_VERSION),
        st.just(Role.AGENT),
        names,
        st.integers(1, (1 << 32) - 1),
        names,
        st.booleans(),
        st.none() | st.sampled_from(Mode),
    ),
    st.builds(
        Hello,
        st.just(PROTOCOL_VERSION),
        st.sampled_from([Role.ADMIN, Role.READER]),
        st.one_of(st.just(""), names),
        st.just(0),
    ),
    st.builds(
        lambda version, store, epoch, held, unsynced, time, run, base, reconciling, following, key, mode: Welcome(
            version, store, epoch, held, max(0, held - unsynced), time, run, base, reconciling, following, key, mode
        ),
        u32,
        names,
        u32,
        u64,
        u16,
        u64,
        u32,
        st.booleans(),
        st.booleans(),
        u32,
        st.binary(max_size=64),
        st.none() | st.sampled_from(Mode),
    ),
    st.builds(Request, seqs, names, bodies),
    st.builds(Reply, seqs, bodies, texts),
    st.builds(Failure, st.sampled_from(ErrorCode), texts),
)
"""What a short command says or hears."""
control = st.one_of(
    short_control,
    st.builds(VolumePage, st.lists(states, max_size=5).map(tuple), st.booleans()),
    compares,
    st.builds(CompareResult, seqs, st.binary(min_size=1, max_size=40)),
    st.just(SyncRequest()),
    st.builds(
        lambda durable, ahead, kept, queued: Ack(
            durable + max(ahead, kept) + queued, durable + kept, durable + ahead, durable
        ),
        st.integers(0, 1 << 60),
        u32,
        u32,
        u32,
    ),
    st.builds(Uncompared, seqs, st.binary(max_size=64)),
    st.builds(Offer, seqs, st.integers(1, 40).map(lambda blocks: bytes(range(OFFERED_BYTES)) * blocks)),
    st.builds(Wanted, seqs, st.lists(st.sampled_from([0, 1]), min_size=1, max_size=40).map(bytes)),
    remainders,
    st.builds(Query, seqs, st.binary(min_size=1, max_size=200)),
    st.builds(Result, seqs, st.binary(min_size=1, max_size=9000)),
)
messages = st.one_of(records, control)
