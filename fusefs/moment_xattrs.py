"""Extended attributes that say which recovery point a file is of."""

from __future__ import annotations

from typing import Final

from dedup.moment import rfc3339
from dedup.types import Moment, TimeNs

XATTR_PREFIX: Final = b"user.rewindfs."


def moment_xattrs(moment: Moment) -> dict[bytes, bytes]:
    """Name → value."""
    values = {
        "seq": str(moment.seq),
        "time": rfc3339(TimeNs(moment.time)),
        "kind": moment.kind.value,
        "group": moment.group,
    }
    return {XATTR_PREFIX + key.encode(): value.encode() for key, value in values.items()}
