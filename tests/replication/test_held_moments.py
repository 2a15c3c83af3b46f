"""Holds over sessions: a session in use holds all that is held, whatever comes in between."""

from __future__ import annotations

from dedup.types import Seq, TimeNs
from replication.held_moments import HeldMoments

ONE, TWO = Seq(1), Seq(2)
THEN, LATER = TimeNs(100), TimeNs(200)


def in_session() -> HeldMoments:
    held = HeldMoments()
    assert held.renew(set()) == [] and held.generation == 1
    return held


def test_a_hold_counts_only_in_the_session_in_use() -> None:
    held = in_session()
    assert held.began(ONE, THEN, 0) is None and not held
    assert held.began(ONE, THEN, 1) is True
    assert held.began(ONE, THEN, 1) is False  # two asked side by side: one too many there
    assert held.again(ONE) and not held.again(TWO)
    assert [held.release(ONE) for _ in range(3)] == [False, False, True]
    assert not held.release(ONE) and not held


def test_a_hold_that_comes_while_a_session_begins_is_not_forgotten() -> None:
    held = in_session()
    held.began(ONE, THEN, 1)
    assert held.missing(set()) == [ONE]
    held.settle(ONE, THEN)
    held.began(TWO, THEN, 1)  # answered in the old session, in the last instant
    assert held.renew({ONE}) is None and held.generation == 1
    assert held.missing({ONE}) == [TWO]
    held.settle(TWO, THEN)
    assert held.renew({ONE, TWO}) == [] and held.generation == 2


def test_a_release_that_comes_while_a_session_begins_is_told_it() -> None:
    held = in_session()
    held.began(ONE, THEN, 1)
    held.settle(ONE, THEN)
    assert held.release(ONE)
    assert held.renew({ONE}) == [ONE]


def test_what_is_gone_is_not_held_and_is_released_all_the_same() -> None:
    held = in_session()
    for seq in (ONE, TWO):
        held.began(seq, THEN, 1)
    held.settle(ONE, None)  # thinned out
    held.settle(TWO, LATER)  # another moment of that seq, in an older copy of the store
    assert held.renew({TWO}) == [TWO]
    assert not held.again(ONE) and not held.again(TWO)
    assert held.began(TWO, LATER, 2) is True  # whoever looked it up anew means this one
    assert held.again(TWO)
    assert not held.release(ONE)
    assert [held.release(TWO) for _ in range(3)] == [False, False, True]
    assert not held
