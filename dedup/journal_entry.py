"""One entry of the metadata journal: the value, and its bytes.

An entry holds where each block of a record went (address and fingerprint, run by run), never the blocks themselves;
with the containers it says everything the record said. FORMAT.md, "Metadata journal", has the offset tables.

`encode` refuses what is not well made with ValueError (a fault of this program); `decode` and `extents_of` raise
Damaged for bytes that are not an entry, and expect the checksum to have been verified.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, NamedTuple, Protocol, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from dedup.bounds import within_bounds
from dedup.errors import Damaged
from dedup.gaps import is_closed
from dedup.layout import (
    ADDRESS_BYTES,
    CHECKSUM_BYTES,
    ENTRY_BYTES_MAX,
    ENTRY_HEADER,
    ENTRY_HEADER_BYTES,
    ENTRY_PADDING_MASK,
    EXTENT_HEADER,
    EXTENT_HEADER_BYTES,
    FINGERPRINT_BYTES,
    block_span,
    checksum,
    padded,
)
from dedup.types import (
    BLOCK_BYTES,
    VOLUME_BYTES_MAX,
    Aggregate,
    Attributes,
    BaseAdvance,
    Bookmark,
    ClockRun,
    Consolidated,
    ConsolidatedMore,
    Correct,
    Create,
    Entry,
    Epoch,
    EpochStart,
    Extent,
    Flush,
    Heartbeat,
    JournalCreate,
    JournalId,
    JournalSpec,
    JournalUse,
    Owner,
    Reconcile,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    Seq,
    SnapshotCreate,
    SnapshotDelete,
    TimeNs,
    VolumeId,
    Write,
)

Addresses = NDArray[np.uint64]

_HEADER: Final = ENTRY_HEADER.struct
_EXTENT: Final = EXTENT_HEADER.struct
_U64: Final = np.dtype("<u8")


class EntryKind(IntEnum):
    """What an entry records; the numbers are on disk."""

    WRITE = 1
    AGGREGATE = 2
    RECONCILE = 3
    CORRECT = 4
    RESIZE = 5
    CREATE = 6
    RENAME = 7
    RETIRE = 8
    ATTRIBUTES = 9
    FLUSH = 10
    BOOKMARK = 11
    HEARTBEAT = 12
    EPOCH_START = 13
    RECONCILE_BEGIN = 14
    RECONCILE_END = 15
    SNAPSHOT_CREATE = 16
    SNAPSHOT_DELETE = 17
    CONSOLIDATED = 18
    CONSOLIDATED_MORE = 19
    JOURNAL_CREATE = 20
    JOURNAL_USE = 21
    BASE_ADVANCE = 22
    OWNER = 23

    @property
    def consumes_seq(self) -> bool:
        """False for what the store itself adds: it carries the seq that it follows."""
        return self < EntryKind.SNAPSHOT_CREATE or self == EntryKind.CONSOLIDATED


KINDS: Final[tuple[EntryKind | None, ...]] = (None, *EntryKind)
"""EntryKind by its number."""
_WRITE: Final = EntryKind.WRITE  # told by identity: the hash of an enum's member is made in Python
_BARE_KINDS: Final = frozenset({EntryKind.WRITE, EntryKind.AGGREGATE, EntryKind.RECONCILE, EntryKind.CONSOLIDATED_MORE})
_EXTENT_KINDS: Final = _BARE_KINDS | {EntryKind.CORRECT, EntryKind.RESIZE, EntryKind.CONSOLIDATED}
_SPANNING_KINDS: Final = frozenset({EntryKind.AGGREGATE, EntryKind.CONSOLIDATED})


@dataclass(frozen=True, slots=True, eq=False)
class LoggedExtent:
    """Where the blocks of one extent are.

    `offset` and `length` are the bytes that were written. `addresses` ('<u8', HOLE for zeros) and `fingerprints` (16
    bytes each, zeros for a hole) are those of every block they touch, whole: blocks offset // 4096 and on.
    """

    volume: VolumeId
    offset: int
    length: int
    addresses: Addresses
    fingerprints: bytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LoggedExtent):
            return NotImplemented
        return (
            (self.volume, self.offset, self.length) == (other.volume, other.offset, other.length)
            and self.fingerprints == other.fingerprints
            and np.array_equal(self.addresses, other.addresses)
        )

    def __hash__(self) -> int:
        return hash((self.volume, self.offset, self.length, self.fingerprints))


@dataclass(frozen=True, slots=True)
class Logged:
    """One entry. `body` is None for Write, Aggregate, Reconcile and ConsolidatedMore: the extents say it all.

    A Correct's body has an extent without data; a Resize may have an extent, the last block when it was cut short.
    `journal` is the data journal that received the blocks.
    """

    kind: EntryKind
    first_seq: Seq
    seq: Seq
    time: TimeNs
    run: ClockRun
    journal: JournalId
    extents: tuple[LoggedExtent, ...]
    body: Entry | None


class _BodyDecoder(Protocol):
    def decode(self, body: bytes, /) -> Any: ...


class _Codec(NamedTuple):
    """How the body of one kind is written: its fields but seq, time and run, as a msgpack array of declared types."""

    type: type[Any]
    decoder: _BodyDecoder
    fields: Callable[[Any], tuple[object, ...]]
    make: Callable[..., Any]


def _codec(
    type_: type[Any], shape: Any, fields: Callable[[Any], tuple[object, ...]], make: Callable[..., Any]
) -> _Codec:
    return _Codec(type_, msgspec.msgpack.Decoder(shape), fields, make)


def _bytes(text: str) -> bytes:
    return text.encode()


def _text(data: bytes) -> str:
    return data.decode()


_CONSOLIDATED_HEAD: Final = 3
"""Fields of Consolidated that the entry's header has: seq, time, run."""
_CONSOLIDATED_NAMES: Final = tuple(field.name for field in dataclasses.fields(Consolidated))[_CONSOLIDATED_HEAD:]
_CONSOLIDATED_TYPES: Final = get_type_hints(Consolidated)
_CONSOLIDATED_SHAPE: Final = tuple(_CONSOLIDATED_TYPES[name] for name in _CONSOLIDATED_NAMES)


class _ConsolidatedDecoder:
    """The first stores' have no owners, and one that changed none is written like theirs."""

    _long: Final = msgspec.msgpack.Decoder(tuple[_CONSOLIDATED_SHAPE])  # type: ignore[valid-type]
    _short: Final = msgspec.msgpack.Decoder(tuple[_CONSOLIDATED_SHAPE[:-1]])  # type: ignore[misc]

    def decode(self, body: bytes, /) -> Any:
        try:
            return self._short.decode(body)
        except msgspec.ValidationError:
            return self._long.decode(body)


def _consolidated_fields(body: Consolidated) -> tuple[object, ...]:
    fields = tuple(getattr(body, name) for name in _CONSOLIDATED_NAMES)
    return fields if body.owners else fields[:-1]


_CODECS: Final[dict[EntryKind, _Codec]] = {
    EntryKind.CORRECT: _codec(
        Correct,
        tuple[int, int, int, int],
        lambda r: (r.refused, r.size, r.extent.volume, r.extent.offset),
        lambda s, t, c, refused, size, volume, offset: Correct(
            s, t, c, Seq(refused), size, Extent(VolumeId(volume), offset, b"")
        ),
    ),
    EntryKind.RESIZE: _codec(
        Resize,
        tuple[int, int],
        lambda r: (r.volume, r.size),
        lambda s, t, c, volume, size: Resize(s, t, c, VolumeId(volume), size),
    ),
    EntryKind.CREATE: _codec(
        Create,
        tuple[int, bytes, int, int, int, int],
        lambda r: (r.volume, _bytes(r.path), r.size, r.mode, r.uid, r.gid),
        lambda s, t, c, volume, path, size, mode, uid, gid: Create(
            s, t, c, VolumeId(volume), _text(path), size, mode, uid, gid
        ),
    ),
    EntryKind.RENAME: _codec(
        Rename,
        tuple[tuple[tuple[int, bytes], ...], tuple[int, ...]],
        lambda r: (tuple((volume, _bytes(path)) for volume, path in r.moves), r.retired),
        lambda s, t, c, moves, retired: Rename(
            s, t, c, tuple((VolumeId(volume), _text(path)) for volume, path in moves), tuple(map(VolumeId, retired))
        ),
    ),
    EntryKind.RETIRE: _codec(
        Retire, tuple[int], lambda r: (r.volume,), lambda s, t, c, volume: Retire(s, t, c, VolumeId(volume))
    ),
    EntryKind.ATTRIBUTES: _codec(
        Attributes,
        tuple[int, int, int, int],
        lambda r: (r.volume, r.mode, r.uid, r.gid),
        lambda s, t, c, volume, mode, uid, gid: Attributes(s, t, c, VolumeId(volume), mode, uid, gid),
    ),
    EntryKind.FLUSH: _codec(
        Flush, tuple[int], lambda r: (r.volume,), lambda s, t, c, volume: Flush(s, t, c, VolumeId(volume))
    ),
    EntryKind.BOOKMARK: _codec(
        Bookmark, tuple[bytes], lambda r: (_bytes(r.name),), lambda s, t, c, name: Bookmark(s, t, c, _text(name))
    ),
    EntryKind.HEARTBEAT: _codec(Heartbeat, tuple[()], lambda r: (), Heartbeat),
    EntryKind.EPOCH_START: _codec(
        EpochStart,
        tuple[int, bool],
        lambda r: (r.epoch, r.clean),
        lambda s, t, c, epoch, clean: EpochStart(s, t, c, Epoch(epoch), clean),
    ),
    EntryKind.RECONCILE_BEGIN: _codec(
        ReconcileBegin,
        tuple[bytes],
        lambda r: (_bytes(r.reason),),
        lambda s, t, c, reason: ReconcileBegin(s, t, c, _text(reason)),
    ),
    EntryKind.RECONCILE_END: _codec(ReconcileEnd, tuple[()], lambda r: (), ReconcileEnd),
    EntryKind.SNAPSHOT_CREATE: _codec(
        SnapshotCreate,
        tuple[bytes, int, int, int | None, int | None],
        lambda r: (_bytes(r.name), r.at, r.at_time, r.volume, r.keep_until),
        lambda s, t, c, name, at, at_time, volume, keep_until: SnapshotCreate(
            s, t, c, _text(name), Seq(at), TimeNs(at_time), volume, keep_until
        ),
    ),
    EntryKind.SNAPSHOT_DELETE: _codec(
        SnapshotDelete,
        tuple[bytes],
        lambda r: (_bytes(r.name),),
        lambda s, t, c, name: SnapshotDelete(s, t, c, _text(name)),
    ),
    EntryKind.CONSOLIDATED: _Codec(Consolidated, _ConsolidatedDecoder(), _consolidated_fields, Consolidated),
    EntryKind.JOURNAL_CREATE: _codec(
        JournalCreate,
        tuple[int, bytes, int],
        lambda r: (r.spec.journal, _bytes(r.spec.name), r.spec.granularity_ns),
        lambda s, t, c, journal, name, granularity: JournalCreate(
            s, t, c, JournalSpec(JournalId(journal), _text(name), granularity)
        ),
    ),
    EntryKind.JOURNAL_USE: _codec(
        JournalUse, tuple[int], lambda r: (r.journal,), lambda s, t, c, journal: JournalUse(s, t, c, JournalId(journal))
    ),
    EntryKind.BASE_ADVANCE: _codec(
        BaseAdvance,
        tuple[int, int],
        lambda r: (r.base, r.base_time),
        lambda s, t, c, base, base_time: BaseAdvance(s, t, c, Seq(base), TimeNs(base_time)),
    ),
    EntryKind.OWNER: _codec(
        Owner, tuple[bytes], lambda r: (_bytes(r.agent),), lambda s, t, c, agent: Owner(s, t, c, _text(agent))
    ),
}

_KIND_OF: Final[dict[type[Any], EntryKind]] = {
    Write: EntryKind.WRITE,
    Aggregate: EntryKind.AGGREGATE,
    Reconcile: EntryKind.RECONCILE,
    ConsolidatedMore: EntryKind.CONSOLIDATED_MORE,
} | {codec.type: kind for kind, codec in _CODECS.items()}
_ENCODER: Final = msgspec.msgpack.Encoder()


def kind_of(entry: Entry) -> EntryKind:
    """The kind of a record or of an entry that the store makes."""
    return _KIND_OF[type(entry)]


def encode(logged: Logged, seed: int) -> bytes:
    """The entry's bytes in a segment of that seed, a multiple of 8. ValueError when not well made or too large."""
    if logged.body is None and len(logged.extents) == 1:
        return _encode_lone(logged, logged.extents[0], seed)
    _check(logged)
    parts = [bytes(ENTRY_HEADER_BYTES)]
    length = ENTRY_HEADER_BYTES
    for extent in logged.extents:
        blocks = len(extent.addresses)
        parts.append(_EXTENT.pack(extent.volume, 0, extent.offset, extent.length, blocks))
        parts.append(extent.addresses.astype("<u8", copy=False).tobytes())
        parts.append(extent.fingerprints)
        length += EXTENT_HEADER_BYTES + blocks * (ADDRESS_BYTES + FINGERPRINT_BYTES)
    if logged.body is not None:
        body = _ENCODER.encode(_CODECS[logged.kind].fields(logged.body))
        parts.append(body)
        length += len(body)
    padding = padded(length) - length
    length += padding
    if length > ENTRY_BYTES_MAX:
        raise ValueError(f"the entry of seq {logged.seq} has {length} bytes, more than {ENTRY_BYTES_MAX}")
    parts.append(bytes(padding))
    entry = bytearray().join(parts)
    _HEADER.pack_into(
        entry,
        0,
        0,
        length,
        logged.kind,
        padding,
        logged.journal,
        logged.seq,
        logged.first_seq,
        logged.time,
        logged.run,
        len(logged.extents),
    )
    entry[:CHECKSUM_BYTES] = checksum(memoryview(entry)[CHECKSUM_BYTES:], seed).to_bytes(CHECKSUM_BYTES, "little")
    return bytes(entry)


def _encode_lone(logged: Logged, extent: LoggedExtent, seed: int) -> bytes:
    """`encode` for the entries that are nearly all there are: one extent, no body. They need no padding."""
    spans = logged.seq - logged.first_seq
    if (logged.kind is not _WRITE or spans) and (
        logged.kind not in _BARE_KINDS or spans < 0 or (spans and logged.kind not in _SPANNING_KINDS)
    ):
        raise ValueError(f"the entry of seq {logged.seq} is not well made: its kind needs a body, or one seq")
    blocks = _check_extent(logged, extent)
    length = ENTRY_HEADER_BYTES + EXTENT_HEADER_BYTES + blocks * (ADDRESS_BYTES + FINGERPRINT_BYTES)
    if length > ENTRY_BYTES_MAX:
        raise ValueError(f"the entry of seq {logged.seq} has {length} bytes, more than {ENTRY_BYTES_MAX}")
    head = _HEADER.pack(
        0, length, logged.kind, 0, logged.journal, logged.seq, logged.first_seq, logged.time, logged.run, 1
    )
    checked = b"".join(
        (
            head[CHECKSUM_BYTES:],
            _EXTENT.pack(extent.volume, 0, extent.offset, extent.length, blocks),
            extent.addresses.astype("<u8", copy=False).tobytes(),
            extent.fingerprints,
        )
    )
    return checksum(checked, seed).to_bytes(CHECKSUM_BYTES, "little") + checked


def _check_extent(logged: Logged, extent: LoggedExtent) -> int:
    """The blocks that the extent touches. ValueError unless it has a pointer for each, within the largest volume."""
    offset, end = extent.offset, extent.offset + extent.length
    blocks = -(-end // BLOCK_BYTES) - offset // BLOCK_BYTES if extent.length else 0
    if len(extent.addresses) != blocks or len(extent.fingerprints) != blocks * FINGERPRINT_BYTES:
        raise ValueError(
            f"the entry of seq {logged.seq} is not well made: {extent.length} bytes at {offset} touch {blocks} blocks"
        )
    if offset < 0 or end > VOLUME_BYTES_MAX:
        raise ValueError(f"the entry of seq {logged.seq} is not well made: an extent ends past the largest volume")
    return blocks


def _check(logged: Logged) -> None:
    """Before the write: what `decode` would call damage must not be written. ValueError."""
    fault = _fault(logged)
    if logged.body is not None and (
        kind_of(logged.body) is not logged.kind
        or (logged.body.seq, logged.body.time, logged.body.run) != (logged.seq, logged.time, logged.run)
    ):
        fault = "its body is another entry's"
    for extent in logged.extents:
        _check_extent(logged, extent)
    if fault is not None:
        raise ValueError(f"the entry of seq {logged.seq} is not well made: {fault}")


def _fault(logged: Logged) -> str | None:
    """What no entry may be, one that is written or one that is read."""
    if logged.kind not in _SPANNING_KINDS and logged.first_seq != logged.seq:
        return "only an aggregate spans seqs"
    if not logged.first_seq <= logged.seq:
        return "its first seq lies after its last"
    if logged.extents and logged.kind not in _EXTENT_KINDS:
        return "its kind has no extents"
    if (logged.body is None) != (logged.kind in _BARE_KINDS):
        return "its kind and its body do not go together"
    if logged.body is not None and not within_bounds(logged.body):
        return "a number or a text of its body is none that could be"
    if isinstance(logged.body, Correct) and not 0 < logged.body.refused < logged.seq:
        return f"it corrects seq {logged.body.refused}, which is not before it"
    if isinstance(logged.body, Consolidated) and not all(map(is_closed, logged.body.gaps)):
        return "a gap has no end"
    return None


def extents_of(raw: memoryview | bytes) -> tuple[LoggedExtent, ...]:
    """The extents of an entry whose checksum was verified. Damaged when they do not fit it."""
    return _extents(raw)[0]


def _extents(raw: memoryview | bytes) -> tuple[tuple[LoggedExtent, ...], int]:
    """The extents, and the offset in the entry where they end."""
    _, length, _, flags, _, seq, _, _, _, count = _HEADER.unpack_from(raw)
    end = length - (flags & ENTRY_PADDING_MASK)
    extents = []
    at = ENTRY_HEADER_BYTES
    for _ in range(count):
        if at + EXTENT_HEADER_BYTES > end:
            raise Damaged(f"the entry of seq {seq}: its extents do not fit it")
        volume, _, offset, written, blocks = _EXTENT.unpack_from(raw, at)
        at += EXTENT_HEADER_BYTES
        fingerprints_at = at + blocks * ADDRESS_BYTES
        next_at = fingerprints_at + blocks * FINGERPRINT_BYTES
        if next_at > end or block_span(offset, written)[1] != blocks or offset + written > VOLUME_BYTES_MAX:
            raise Damaged(f"the entry of seq {seq}: {written} bytes at {offset} in {blocks} blocks cannot be")
        addresses = np.frombuffer(raw, _U64, blocks, at)
        extents.append(LoggedExtent(volume, offset, written, addresses, bytes(raw[fingerprints_at:next_at])))
        at = next_at
    return tuple(extents), at


def decode(raw: memoryview | bytes) -> Logged:
    """The value of an entry whose checksum was verified. Damaged when it says what cannot be."""
    _, length, number, flags, journal, seq, first_seq, time, run, _ = _HEADER.unpack_from(raw)
    kind = KINDS[number] if number < len(KINDS) else None
    if kind is None:
        raise Damaged(f"the entry of seq {seq}: kind {number} is not known")
    extents, at = _extents(raw)
    body = bytes(raw[at : length - (flags & ENTRY_PADDING_MASK)])
    record: Entry | None = None
    if kind in _BARE_KINDS:
        if body:
            raise Damaged(f"the entry of seq {seq}: {len(body)} bytes follow its extents")
    else:
        codec = _CODECS[kind]
        try:
            record = codec.make(seq, time, run, *codec.decoder.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Damaged(f"the entry of seq {seq}: its body cannot be decoded: {error}") from error
    logged = Logged(kind, first_seq, seq, time, run, journal, extents, record)
    # A bare entry of one seq, as nearly all are, has nothing that could be wrong.
    if (record is not None or first_seq != seq) and (fault := _fault(logged)) is not None:
        raise Damaged(f"the entry of seq {seq}: {fault}")
    return logged
