"""Gaps found by seeks are those that a look at all of them finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.catalog import Catalog, Index
from dedup.gaps import Gaps, inside, merged
from dedup.group_state import GroupState
from dedup.metadata_journal import FIRST_POSITION
from dedup.types import Gap, Seq, TimeNs

LAST = 60


def gap_of(first: int, last: int | None) -> Gap:
    """A gap whose times are ten times its seqs, since the record before it."""
    return Gap(
        Seq(first), None if last is None else Seq(last), TimeNs(10 * (first - 1)),
        None if last is None else TimeNs(10 * (last + 1)), "an outage",
    )  # fmt: skip


closed = st.builds(lambda first, length: gap_of(first, first + length), st.integers(2, LAST), st.integers(0, 9))
open_ends = st.none() | st.just(gap_of(LAST + 12, None))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    directory: Path = tmp_path_factory.mktemp("index")
    index = Index(directory, writer=True)
    yield index
    index.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(closed, max_size=12), st.lists(closed, max_size=3), open_ends)
def test_seeks_find_what_a_look_at_all_gaps_finds(
    index: Index, stored: list[Gap], since: list[Gap], still_open: Gap | None
) -> None:
    catalog = Catalog(index, 1)
    with index.env.begin(write=True) as txn:
        for gap in stored:  # one checkpoint each
            catalog.put_anchor(txn, GroupState(new_gaps=[gap]), FIRST_POSITION)
        every = merged([*stored, *since, *([] if still_open is None else [still_open])])
        for one, next_one in itertools.pairwise(every):
            assert one.last is not None and one.last < next_one.first
        state = GroupState(base=Seq(1), new_gaps=since, gap=still_open)
        gaps = Gaps(catalog, txn, state)
        assert gaps.all() == every
        for seq in range(1, LAST + 20):
            found = gaps.at(Seq(seq))
            expected = next((gap for gap in every if inside(gap, Seq(seq))), None)
            assert (found is None) == (expected is None), seq
            assert found is None or inside(found, Seq(seq))
        disjoint = merged(stored)
        for time in range(0, 10 * (LAST + 14), 5):
            for after in (0, time // 10 - 3, time // 10):
                alone = Gaps(catalog, txn, GroupState(base=Seq(1))).during(TimeNs(time), Seq(max(0, after)), Seq(LAST))
                between = [
                    gap
                    for gap in disjoint
                    if max(0, after) < gap.first <= LAST
                    and gap.to_time is not None
                    and gap.from_time < time < gap.to_time
                ]
                # Neighbours share the time between them: either may be named.
                assert alone in between if between else alone is None, (time, after)
        txn.abort()
