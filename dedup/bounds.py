"""What the numbers and texts of a decoded value may be: msgpack carries any, the rest of the store expects these.

The limits come from the declared types of a dataclass's fields (`Seq` is a u64, `VolumeId` a u32, ...), and for a few
from the field's name. Values that pass fit every key and every struct of the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from dedup.types import (
    BLOCK_BYTES,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    VOLUME_BYTES_MAX,
    ClockRun,
    ContainerId,
    Epoch,
    JournalId,
    VolumeId,
)

_U64_MAX: Final = (1 << 64) - 1
_LARGEST: Final[dict[Any, int]] = {
    VolumeId: (1 << 32) - 1,
    ClockRun: (1 << 32) - 1,
    Epoch: (1 << 32) - 1,
    JournalId: (1 << 16) - 1,
    ContainerId: (1 << 48) - 1,
}
"""Of the numbers that are not u64."""
_LARGEST_NAMED: Final = {
    "size": VOLUME_BYTES_MAX,
    "cuts": VOLUME_BYTES_MAX // BLOCK_BYTES,
    "mode": (1 << 32) - 1,
    "uid": (1 << 32) - 1,
    "gid": (1 << 32) - 1,
}
"""Of the plain numbers in fields of these names."""
_LONGEST_NAMED: Final = {
    "name": NAME_BYTES_MAX,
    "forgotten": NAME_BYTES_MAX,
    "agent": NAME_BYTES_MAX,
    "owners": NAME_BYTES_MAX,
    "path": PATH_BYTES_MAX,
    "paths": PATH_BYTES_MAX,
    "moves": PATH_BYTES_MAX,
}
"""Bytes of the texts in fields of these names."""

_Check = Callable[[Any], bool]


def within_bounds(value: object) -> bool:
    """Whether everything in a decoded dataclass is what its type allows."""
    kind: Any = type(value)
    return _check_of(kind, "")(value)


@cache
def _check_of(kind: Any, field: str) -> _Check:
    """The check of values of a declared type, in a field of that name."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return _all_fields([(part.name, _check_of(hints[part.name], part.name)) for part in dataclasses.fields(kind)])
    if origin in (Union, UnionType):
        known = [one for one in inner if one is not NoneType]
        check = _check_of(known[0] if len(known) == 1 else object, field)
        return lambda value: value is None or check(value)
    if origin is dict:
        key, item = (_check_of(one, field) for one in inner)
        return lambda value: all(key(one) and item(other) for one, other in value.items())
    if origin is tuple and inner[-1] is Ellipsis:
        each = _check_of(inner[0], field)
        return lambda value: all(each(one) for one in value)
    if origin is tuple:
        checks = [_check_of(one, field) for one in inner]
        return lambda value: all(one(part) for one, part in zip(checks, value, strict=True))
    if kind is str:
        longest = _LONGEST_NAMED.get(field, _U64_MAX)
        return lambda value: _text_fits(value, longest)
    if kind is int or getattr(kind, "__supertype__", None) is int:
        largest = _LARGEST.get(kind, _LARGEST_NAMED.get(field, _U64_MAX))
        return lambda value: 0 <= value <= largest
    return lambda value: True


def _all_fields(parts: list[tuple[str, _Check]]) -> _Check:
    """A loop: in listings this is called for each of thousands of values, and a generator costs as much as the rest."""

    def check_all(value: object) -> bool:
        for name, check in parts:  # noqa: SIM110
            if not check(getattr(value, name)):
                return False
        return True

    return check_all


def _text_fits(text: str, longest: int) -> bool:
    try:
        return len(text.encode()) <= longest
    except UnicodeEncodeError:
        return False
