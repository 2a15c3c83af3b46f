"""What every message must satisfy, whichever side made it: ranges, lengths, forms of names and paths.

Pure functions that raise Malformed; the codec turns that into the error of the side at fault.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from dedup.types import (
    PATH_BYTES_MAX,
    VOLUME_BYTES_MAX,
    WRITE_BYTES_MAX,
    Attributes,
    Bookmark,
    Create,
    EpochStart,
    ReconcileBegin,
    ReconcileEnd,
    Rename,
    Resize,
    Retire,
    VolumeState,
)
from replication.control_checks import (
    CONTROL_CHECKS,
    DIGEST_KEY_BYTES_MAX,
    U16_MAX,
    U32_MAX,
    U64_MAX,
    Malformed,
    check_name,
    check_range,
    check_text,
)
from replication.frame_layout import AGGREGATE_EXTENTS_MAX, OFFERED_BYTES
from replication.messages import (
    COMPARE_BLOCKS_MAX,
    COMPARE_BYTES_MAX,
    COMPARE_UNITS,
    DIGEST_BYTES,
    OFFER_BLOCKS_MAX,
    QUERY_BYTES_MAX,
    RESULT_BYTES_MAX,
    SUM_UNITS,
    VOLUMES_PER_PAGE_MAX,
    Ack,
    Compare,
    Offer,
    Uncompared,
    VolumePage,
)

RENAME_MOVES_MAX: Final = 65536
"""Most volumes that one Rename moves, and most that it replaces."""


def check_path(path: str) -> None:
    """Relative to the source directory, without empty, `.` or `..` components, NUL, or components over 255 bytes."""
    check_text("path", path, PATH_BYTES_MAX)
    for component in path.split("/"):
        check_name("path component", component)


def check_stamp(message: Any) -> None:
    """The three fields that every record begins with."""
    check_range("seq", message.seq, 1, U64_MAX)
    check_range("time", message.time, 0, U64_MAX)
    check_range("run", message.run, 0, U32_MAX)


def check_volume(volume: int) -> None:
    check_range("volume", volume, 1, U32_MAX)


def check_range_of_volume(offset: int, length: int) -> None:
    if offset < 0 or offset + length > VOLUME_BYTES_MAX:
        raise Malformed(f"range {offset}+{length} ends past the largest volume size {VOLUME_BYTES_MAX}")


def check_extent(volume: int, offset: int, length: int) -> None:
    if not 0 <= length <= WRITE_BYTES_MAX:
        raise Malformed(f"an extent of {length} bytes; at most {WRITE_BYTES_MAX} are allowed")
    if volume < 1:
        raise Malformed("volume 0")
    if offset + length > VOLUME_BYTES_MAX:
        raise Malformed(f"range {offset}+{length} ends past the largest volume size {VOLUME_BYTES_MAX}")


def check_correct(seq: int, refused: int, size: int) -> None:
    if not 1 <= refused < seq:
        raise Malformed(f"record {seq} corrects {refused}, which is not before it")
    check_range("size", size, 0, VOLUME_BYTES_MAX)


def check_aggregate(first_seq: int, seq: int, extents: int) -> None:
    if not 1 <= first_seq <= seq:
        raise Malformed(f"an aggregate of records {first_seq}..{seq}")
    check_range("extents", extents, 1, AGGREGATE_EXTENTS_MAX)


def check_piece(length: int) -> None:
    if not length:
        raise Malformed("an empty extent in an aggregate")


def check_piece_form(volume: int, offset: int, data_bytes: int, zeros: int) -> None:
    """An entry of an aggregate's table: data or zeros, not both, not nothing."""
    if data_bytes and zeros:
        raise Malformed("an extent has both data and zeros")
    check_extent(volume, offset, data_bytes or zeros)
    check_piece(data_bytes or zeros)


def check_ack(message: Ack) -> None:
    if not message.durable <= message.received <= message.queued:
        raise Malformed(f"{message}: durable is past received, or received past queued")
    if not message.durable <= message.kept <= message.queued:
        raise Malformed(f"{message}: durable is past kept, or kept past queued")


def check_answer(seq: int, marks: bytes) -> None:
    """What a CompareResult says: a byte for each unit, or two. How many there must be, and what they may be, is known
    by the Compare alone."""
    check_range("seq", seq, 1, U64_MAX)
    check_range("bytes of an answer", len(marks), 1, COMPARE_BLOCKS_MAX)


def check_marks(seq: int, marks: bytes) -> None:
    """What a Wanted says: a 0 or 1 for each block."""
    check_answer(seq, marks)
    if marks.strip(b"\0\1"):
        raise Malformed("an answer holds a byte other than 0 and 1")


def check_offer(message: Offer) -> None:
    check_range("seq", message.seq, 1, U64_MAX)
    blocks, rest = divmod(len(message.blocks), OFFERED_BYTES)
    if rest or not 1 <= blocks <= OFFER_BLOCKS_MAX:
        raise Malformed(f"{len(message.blocks)} bytes are not an offer of 1..{OFFER_BLOCKS_MAX} blocks")


def check_query(number: int, length: int) -> None:
    check_range("query id", number, 1, U64_MAX)
    check_range("bytes of a query", length, 1, QUERY_BYTES_MAX)


def check_result(number: int, length: int) -> None:
    check_range("query id", number, 1, U64_MAX)
    check_range("bytes of a result", length, 1, RESULT_BYTES_MAX)


def check_compare(message: Compare) -> None:
    check_stamp(message)
    check_volume(message.volume)
    if message.unit not in COMPARE_UNITS or message.offset % message.unit:
        raise Malformed(f"a compare of units of {message.unit} bytes at {message.offset}")
    units, rest = divmod(len(message.digests), 2 * DIGEST_BYTES if message.unit in SUM_UNITS else DIGEST_BYTES)
    if rest or not 1 <= units <= COMPARE_BLOCKS_MAX:
        raise Malformed(f"{len(message.digests)} bytes of digests are not those of 1..{COMPARE_BLOCKS_MAX} units")
    check_range("bytes of a compare", units * message.unit, 1, COMPARE_BYTES_MAX)
    check_range_of_volume(message.offset, units * message.unit)


def check_state(state: VolumeState) -> None:
    """A volume as it can be: whoever restores it makes a file of that path."""
    check_volume(state.volume)
    check_path(state.path)
    check_range("size", state.size, 0, VOLUME_BYTES_MAX)
    _check_owner(state)


def _check_owner(value: Create | Attributes | VolumeState) -> None:
    check_range("mode", value.mode, 0, U16_MAX)
    check_range("uid", value.uid, 0, U32_MAX)
    check_range("gid", value.gid, 0, U32_MAX)


def _check_uncompared(message: Uncompared) -> None:
    check_range("seq", message.seq, 1, U64_MAX)
    check_range("digest key length", len(message.digest_key), 0, DIGEST_KEY_BYTES_MAX)


def _check_volume_page(message: VolumePage) -> None:
    check_range("volumes in a page", len(message.volumes), 0, VOLUMES_PER_PAGE_MAX)
    for state in message.volumes:
        check_state(state)


def _check_resize(message: Resize) -> None:
    check_stamp(message)
    check_volume(message.volume)
    check_range("size", message.size, 0, VOLUME_BYTES_MAX)


def _check_create(message: Create) -> None:
    check_stamp(message)
    check_volume(message.volume)
    check_path(message.path)
    check_range("size", message.size, 0, VOLUME_BYTES_MAX)
    _check_owner(message)


def _check_rename(message: Rename) -> None:
    check_stamp(message)
    check_range("moves", len(message.moves), 0, RENAME_MOVES_MAX)
    check_range("retired volumes", len(message.retired), 0, RENAME_MOVES_MAX)
    if not message.moves and not message.retired:
        raise Malformed("a rename that moves and retires nothing")
    touched = [volume for volume, _path in message.moves] + list(message.retired)
    for volume in touched:
        check_volume(volume)
    if len(set(touched)) != len(touched):
        raise Malformed("a rename names one volume twice")
    for _volume, path in message.moves:
        check_path(path)
    if len({path for _volume, path in message.moves}) != len(message.moves):
        raise Malformed("a rename moves two volumes to one path")


def _check_retire(message: Retire) -> None:
    check_stamp(message)
    check_volume(message.volume)


def _check_attributes(message: Attributes) -> None:
    check_stamp(message)
    check_volume(message.volume)
    _check_owner(message)


def _check_bookmark(message: Bookmark) -> None:
    check_stamp(message)
    check_name("bookmark", message.name)


def _check_epoch_start(message: EpochStart) -> None:
    check_stamp(message)
    check_range("epoch", message.epoch, 1, U32_MAX)


def _check_reconcile_begin(message: ReconcileBegin) -> None:
    check_stamp(message)
    check_text("reason", message.reason)


RARE_CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    **CONTROL_CHECKS,
    VolumePage: _check_volume_page,
    Uncompared: _check_uncompared,
    Resize: _check_resize,
    Create: _check_create,
    Rename: _check_rename,
    Retire: _check_retire,
    Attributes: _check_attributes,
    Bookmark: _check_bookmark,
    EpochStart: _check_epoch_start,
    ReconcileBegin: _check_reconcile_begin,
    ReconcileEnd: check_stamp,
}
"""The check of each message that travels as msgpack; the others are checked by their own codec."""
