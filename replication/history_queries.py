"""What a reader asks about the past, and the answers: the bodies of Query and Result, which PROTOCOL.md lists.

Invariants:
- bounded: every list, text and run of bytes has a limit, and an answer that may be longer is said in pages;
- an answer has a checksum: what a broken link or disk made of it is refused, never used (`no-wrong-bytes`).
"""

from __future__ import annotations

from struct import Struct
from typing import Annotated, Final

import msgspec
import numpy as np
import xxhash
import zstandard

from dedup import errors
from dedup.errors import RewindError, StoreError
from dedup.layout import LEAF_BLOCKS
from dedup.pointer_map import Addresses
from dedup.types import Moment, Snapshot, VolumeState
from replication.errors import ProtocolError
from replication.messages import FINGERPRINT_BYTES, RESULT_BYTES_MAX

FETCH_BLOCKS_MAX: Final = 256
"""Blocks of one Blocks or Marks question."""
LEAVES_PER_QUERY_MAX: Final = 16
"""Leaves of one Pointers question."""
GROUPS_PER_QUERY_MAX: Final = 64
"""Moments of one Groups question."""
PAGE_BYTES: Final = 512 << 10
"""About what a page of names, paths, volumes or ranges holds."""
TEXT_CHARACTERS_MAX: Final = 4096
ERROR_CHARACTERS_MAX: Final = 4000
DAMAGE_CHARACTERS_MAX: Final = 500
_ZSTD_LEVEL: Final = 1
_COMPRESS_BYTES_MIN: Final = 200
_CHECKSUM_BYTES: Final = 8
_HEAD: Final = Struct("<QB")
"""Of a result's body: checksum (xxh3_64 of all that follows it), form."""
_PLAIN: Final = 0
_ZSTD: Final = 1

U64 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Text = Annotated[str, msgspec.Meta(max_length=TEXT_CHARACTERS_MAX)]
Span = tuple[U64, Annotated[int, msgspec.Meta(ge=1, le=FETCH_BLOCKS_MAX)]]
"""The first block of a run, and how many."""
Spans = Annotated[tuple[Span, ...], msgspec.Meta(min_length=1, max_length=FETCH_BLOCKS_MAX)]
Side = tuple[U64, U64]
"""A volume and a seq."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="is"):
    pass


# Questions


class Refresh(_Body, frozen=True, tag="refresh"):
    """See everything that was journalled before. Answer: Refreshed."""


class Names(_Body, frozen=True, tag="names"):
    """The catalogued recovery points from number `start` on; 0 looks anew. Answer: NamesPage."""

    start: U64


class Name(_Body, frozen=True, tag="name"):
    """The catalogued recovery point of that name. Answer: NamesPage, of one or none."""

    name: Text


class Paths(_Body, frozen=True, tag="paths"):
    """Every path that a volume has had, from number `start` on, unless they are those of `known`. Answer: PathsPage."""

    known: U64
    start: U64


class Resolve(_Body, frozen=True, tag="resolve"):
    """The recovery point that TIME names; ages count from `now`, else from the clock there. Answer: Resolved."""

    text: Text
    now: U64 | None


class Groups(_Body, frozen=True, tag="groups"):
    """The group at each of these seqs; of a single one from volume number `start` on. Answer: GroupsPage."""

    seqs: Annotated[tuple[U64, ...], msgspec.Meta(min_length=1, max_length=GROUPS_PER_QUERY_MAX)]
    start: U64 = 0


class ImageAt(_Body, frozen=True, tag="image"):
    """The volume at the last record at or before `seq` that can be told from others. Answer: ImageFound."""

    volume: U64
    seq: U64


class NextData(_Body, frozen=True, tag="next-data"):
    """The first offset from `offset` on that is no hole, of the volume at exactly `seq`. Answer: At."""

    volume: U64
    seq: U64
    offset: U64


class Differing(_Body, frozen=True, tag="differing"):
    """Where two images, at exactly their seqs, differ, from offset `start` on. Answer: Ranges."""

    old: Side | None
    new: Side | None
    start: U64


class Hold(_Body, frozen=True, tag="hold"):
    """Keep the moment until Release, or until the session ends. Answer: Held."""

    seq: U64


class Release(_Body, frozen=True, tag="release"):
    """Ends one Hold. Answer: Done."""

    seq: U64


class Require(_Body, frozen=True, tag="require"):
    """Whether history still tells the moment from others. Answer: Done."""

    seq: U64


class Allocated(_Body, frozen=True, tag="allocated"):
    """How much of the volume at exactly `seq` is no hole, at most. Answer: AllocatedFound."""

    volume: U64
    seq: U64


class Pointers(_Body, frozen=True, tag="pointers"):
    """The addresses of leaves `leaf`.. of the volume at exactly `seq`. Answer: PointersFound."""

    volume: U64
    seq: U64
    leaf: U64
    count: Annotated[int, msgspec.Meta(ge=1, le=LEAVES_PER_QUERY_MAX)]


class Blocks(_Body, frozen=True, tag="blocks"):
    """Blocks of the volume at exactly `seq`, at most FETCH_BLOCKS_MAX in all. Answer: BlocksFound."""

    volume: U64
    seq: U64
    spans: Spans


class Marks(_Body, frozen=True, tag="marks"):
    """Their fingerprints alone, as the store has them; zeros where it has none. Answer: MarksFound."""

    volume: U64
    seq: U64
    spans: Spans


# Answers


class Refreshed(_Body, frozen=True, tag="refreshed"):
    """The group, and what is known of it as a whole. `rewritten` differs once history may have been thinned out."""

    group: Text
    covered_until: U64
    rewritten: tuple[U64, U64]


class NamesPage(_Body, frozen=True, tag="names-page"):
    snapshots: tuple[Snapshot, ...]
    next: U64 | None


class PathsPage(_Body, frozen=True, tag="paths-page"):
    """`version` is another one when paths came; no paths where it is the one known."""

    version: U64
    paths: tuple[str, ...]
    next: U64 | None


class Resolved(_Body, frozen=True, tag="resolved"):
    moment: Moment


class GroupPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    moment: Moment
    volumes: tuple[VolumeState, ...]


class GroupsPage(_Body, frozen=True, tag="groups-page"):
    """The first few of those asked for, whole; or a part of the first, whose volumes go on at number `next`."""

    groups: tuple[GroupPage, ...]
    next: U64 | None


class ImageFound(_Body, frozen=True, tag="image-found"):
    """`seq` is that of the moment itself."""

    seq: U64
    time: U64
    size: U64
    label: str


class At(_Body, frozen=True, tag="at"):
    """`final`, or there is none up to that offset: ask from there."""

    offset: U64
    final: bool


class Ranges(_Body, frozen=True, tag="ranges"):
    """Ascending (offset, length); more of them from `next` on."""

    ranges: tuple[tuple[U64, U64], ...]
    next: U64 | None


class Held(_Body, frozen=True, tag="held"):
    """The time of the moment, which tells it from another one of that seq in another store."""

    time: U64


class Done(_Body, frozen=True, tag="done"):
    pass


class PointersFound(_Body, frozen=True, tag="pointers-found"):
    """LEAF_BLOCKS addresses (u64) of each leaf, each as the difference from the one before, modulo 2^64."""

    steps: bytes


class BlocksFound(_Body, frozen=True, tag="blocks-found"):
    """Of each block its fingerprint, of 16 bytes; then the bytes of those that are no hole, and not damaged: a hole has
    a fingerprint of zeros, a damaged one is in `damage`, by its number, with what is wrong."""

    marks: bytes
    data: memoryview
    damage: tuple[tuple[U64, str], ...]


class AllocatedFound(_Body, frozen=True, tag="allocated-found"):
    bytes: U64


class MarksFound(_Body, frozen=True, tag="marks-found"):
    marks: bytes


class Refused(_Body, frozen=True, tag="refused"):
    """It could not be answered: an error of the store, by the name of its type."""

    kind: str
    text: str


Question = (
    Refresh | Names | Name | Paths | Resolve | Groups | ImageAt | NextData | Differing | Hold | Release | Require
    | Pointers | Blocks | Marks | Allocated
)  # fmt: skip
Answer = (
    Refreshed | NamesPage | PathsPage | Resolved | GroupsPage | ImageFound | At | Ranges | Held | Done | PointersFound
    | BlocksFound | MarksFound | AllocatedFound | Refused
)  # fmt: skip

_encoder: Final = msgspec.msgpack.Encoder()
_questions: Final = msgspec.msgpack.Decoder(Question)
_answers: Final = msgspec.msgpack.Decoder(Answer)
_KINDS: Final[dict[str, type[RewindError]]] = {
    kind.__name__: kind
    for kind in (
        errors.BadTime,
        errors.Damaged,
        errors.MomentGone,
        errors.MomentRefused,
        errors.StoreBusy,
        errors.StoreFailed,
        errors.StoreFull,
        errors.UnknownName,
    )
}


def can_be_said(text: str) -> bool:
    """Whether a question may have this text; no TIME and no name in a store is one that may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return len(text) <= TEXT_CHARACTERS_MAX


def question_bytes(question: Question) -> bytes:
    """The body of its Query."""
    return msgspec.msgpack.encode(question)


def question_of(body: bytes | memoryview) -> Question:
    """Raises ProtocolError for what is no question, or asks for too much."""
    try:
        question: Question = _questions.decode(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ProtocolError(f"a query that is none: {error}") from error
    if isinstance(question, Blocks | Marks) and sum(count for _, count in question.spans) > FETCH_BLOCKS_MAX:
        raise ProtocolError(f"a query for more than {FETCH_BLOCKS_MAX} blocks")
    return question


def answer_bytes(answer: Answer, *, compress: bool) -> memoryview:
    """The body of its Result, compressed where that is wanted and saves an eighth."""
    body = bytearray(_HEAD.size)
    body[-1] = _PLAIN
    _encoder.encode_into(answer, body, _HEAD.size)
    length = len(body) - _HEAD.size
    if compress and length > _COMPRESS_BYTES_MIN:
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=False)
        smaller = compressor.compress(memoryview(body)[_HEAD.size :])
        if len(smaller) <= length - length // 8:
            body = bytearray(b"".join((bytes(_HEAD.size), smaller)))
            body[_HEAD.size - 1] = _ZSTD
    checksum = xxhash.xxh3_64_intdigest(memoryview(body)[_CHECKSUM_BYTES:])
    _HEAD.pack_into(body, 0, checksum, body[_HEAD.size - 1])
    return memoryview(body)


def answer_of(body: bytes | memoryview) -> Answer:
    """Raises ProtocolError for what is no answer, or not as it was sent."""
    if len(body) <= _HEAD.size:
        raise ProtocolError("a result that is none: it is too short")
    checksum, form = _HEAD.unpack_from(body)
    rest = memoryview(body)[_HEAD.size :]
    if xxhash.xxh3_64_intdigest(memoryview(body)[_CHECKSUM_BYTES:]) != checksum:
        raise ProtocolError("a result is not what was sent: its checksum differs")
    try:
        if form == _ZSTD:
            size = zstandard.frame_content_size(rest)
            if not 0 <= size <= RESULT_BYTES_MAX:
                raise ProtocolError(f"a compressed result of {size} bytes")
            rest = memoryview(
                zstandard.ZstdDecompressor().decompress(rest, max_output_size=size, allow_extra_data=False)
            )
        elif form != _PLAIN:
            raise ProtocolError(f"a result of unknown form {form}")
        answer: Answer = _answers.decode(rest)
        return answer
    except (msgspec.MsgspecError, RecursionError, ValueError, zstandard.ZstdError) as error:
        raise ProtocolError(f"a result that is none: {error}") from error


def refused(error: RewindError) -> Refused:
    """What is said of an error of the store's."""
    return Refused(type(error).__name__, " ".join(str(error).split())[:ERROR_CHARACTERS_MAX])


def error_of(said: Refused) -> RewindError:
    """The error that was met there, to be raised here."""
    return _KINDS.get(said.kind, StoreError)(said.text)


def steps_of(addresses: Addresses) -> bytes:
    """`PointersFound.steps`: what lies in a row in a container is a row of ones, and costs next to nothing."""
    return np.diff(addresses, prepend=np.uint64(0)).astype("<u8").tobytes()


def addresses_of(steps: bytes, leaves: int) -> Addresses:
    """What `steps_of` was made of. ProtocolError where it is not of so many leaves."""
    if len(steps) != leaves * LEAF_BLOCKS * 8:
        raise ProtocolError(f"{len(steps)} bytes are not the pointers of {leaves} leaves")
    return np.cumsum(np.frombuffer(steps, dtype="<u8"), dtype=np.uint64)


def marks_array(marks: bytes, blocks: int) -> np.ndarray[tuple[int, ...], np.dtype[np.void]]:
    """Fingerprints, an element each. ProtocolError where there are not so many."""
    if len(marks) != blocks * FINGERPRINT_BYTES:
        raise ProtocolError(f"{len(marks)} bytes are not the fingerprints of {blocks} blocks")
    return np.frombuffer(marks, dtype=f"V{FINGERPRINT_BYTES}")
