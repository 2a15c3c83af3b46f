"""Where two sides differ, told by digests and sums: against a comparison of the bytes."""

from __future__ import annotations

import secrets
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dedup.types import BLOCK_BYTES
from replication.digests import MANY, Digester, answer_bytes, read_places
from replication.messages import COMPARE_UNITS, SUM_UNITS

UNIT = SUM_UNITS[0]
BLOCKS = UNIT // BLOCK_BYTES
CONTENTS = [bytes([number]) * BLOCK_BYTES for number in range(3)]
"""Few, so that equal changes in several places and swaps come up: they must not cancel each other."""
units = st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS)


@given(units, st.dictionaries(st.integers(0, BLOCKS - 1), st.integers(0, 2), max_size=4))
def test_sums_tell_the_one_block_that_differs(ours: list[int], changes: dict[int, int]) -> None:
    digester = Digester(b"key")
    theirs = [changes.get(place, number) for place, number in enumerate(ours)]
    wrong = [place for place in range(BLOCKS) if ours[place] != theirs[place]]
    told = [digester.units(b"".join(CONTENTS[number] for number in side), UNIT) for side in (ours, theirs)]
    expected = MANY if len(wrong) > 1 else wrong[0] + 1 if wrong else 0
    assert read_places(digester.differing(*told, UNIT)) == [expected]


@pytest.mark.parametrize("unit", COMPARE_UNITS)
def test_each_unit_is_told_by_itself(unit: int) -> None:
    digester = Digester(secrets.token_bytes(32))
    ours = bytearray(2 * unit + 5)
    theirs = bytes(ours)
    ours[unit + 17] = 1
    differing = digester.differing(digester.units(ours, unit), digester.units(theirs, unit), unit)
    assert differing == b"\0" * answer_bytes(unit) + (1).to_bytes(answer_bytes(unit), "little") + bytes(
        answer_bytes(unit)
    )


@pytest.mark.parametrize("unit", COMPARE_UNITS)
def test_hole_is_told_as_its_zeros(unit: int) -> None:
    digester = Digester(b"key")
    assert digester.zeros(unit) == digester.units(b"\0", unit) == digester.units(bytes(unit), unit)


def test_keys_give_digests_that_have_nothing_in_common() -> None:
    told = [Digester(bytes([key])).units(bytes(UNIT), UNIT) for key in range(3)]
    assert all(one != other for one, other in pairwise(told))
