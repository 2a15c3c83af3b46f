"""What a start decides from what the end before it left, whatever kind of end that was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from dedup.types import ClockRun, Epoch, Seq, TimeNs, VolumeId, VolumeState
from fusefs.agent_start import Plan, open_intent, plan
from fusefs.state_directory import StateDirectory
from fusefs.volume_table import STATE_DIRECTORY, list_volumes
from replication.intent_log import IntentLog
from replication.messages import Welcome

HELD = Seq(10)
WELCOME = Welcome(
    version=1,
    store="store",
    epoch=Epoch(1),
    held=HELD,
    durable=HELD,
    time=TimeNs(1),
    run=ClockRun(1),
    has_base=True,
    reconciling=False,
    next_volume=VolumeId(2),
    digest_key=b"",
)


class Left:
    """A source with one volume, as a clean end at `HELD` left it."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.file = source / "a.img"
        self.file.write_bytes(bytes(8192))
        state = StateDirectory.open(source)
        state.begin_epoch("group", Epoch(0))
        IntentLog.open(state.intent_path)
        state.serving("store")
        state.ended_cleanly(HELD, list_volumes(source), WELCOME.time)
        state.close()

    def mark(self, region: int) -> None:
        async def mark() -> None:
            intent = IntentLog.open(self.source / STATE_DIRECTORY / "intent")
            await intent.mark(VolumeId(1), region, region)
            await intent.close()

        trio.run(mark)

    def change_behind_the_mount(self) -> None:
        status = self.file.stat()
        self.file.write_bytes(bytes(8191) + b"x")
        os.utime(self.file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))

    def start(self, welcome: Welcome = WELCOME, group: str = "group", *, served: bool = False) -> Plan:
        """A start up to its decision, and killed there; or, `served`, when requests may come."""
        state = StateDirectory.open(self.source)
        try:
            state.begin_epoch(group, welcome.epoch)
            status = self.file.stat()
            known = [
                VolumeState(VolumeId(1), "a.img", status.st_size, status.st_mode & 0o7777, status.st_uid, status.st_gid)
            ]
            intent = open_intent(state.intent_path, state.state)
            decided = plan(welcome, known, list_volumes(self.source), state.state, intent)
            if served:
                state.serving(welcome.store)
            return decided
        finally:
            state.close()


@pytest.fixture
def left(tmp_path: Path) -> Left:
    return Left(tmp_path)


def test_killed_start_still_knows_what_changed_behind_the_mount(left: Left) -> None:
    assert left.start().clean
    left.change_behind_the_mount()
    assert left.start().changed == ("a.img",)
    assert left.start().changed == ("a.img",)


def test_start_killed_after_its_first_record_is_not_taken_for_a_clean_end(left: Left) -> None:
    assert left.start().clean
    assert left.start(replace(WELCOME, held=Seq(HELD + 1))).everything


def test_clean_mark_ends_with_the_first_request(left: Left) -> None:
    assert left.start(served=True).clean
    left.change_behind_the_mount()
    assert left.start().changed == (), "nothing may be read from a mark that writes through the mount made old"


def test_clean_end_of_another_group_says_nothing(left: Left) -> None:
    assert left.start(group="other").everything
    assert left.start(group="other").everything
    assert left.start().everything


def test_the_same_seq_of_another_copy_of_the_store_is_no_clean_end(left: Left) -> None:
    other = replace(WELCOME, time=TimeNs(WELCOME.time + 1))
    assert left.start(other).everything
    assert left.start().clean, "nothing was served: the mark holds for the store it was left at"


@pytest.mark.parametrize("served", [False, True])
def test_without_the_intent_log_everything_is_compared(left: Left, served: bool) -> None:
    left.start(served=served)
    (left.source / STATE_DIRECTORY / "intent").unlink()
    assert left.start().everything
    assert left.start().everything, "and a start that is killed does not end that"


def test_gap_that_an_earlier_start_left_open_is_closed(left: Left) -> None:
    decided = left.start(replace(WELCOME, reconciling=True))
    assert not decided.clean
    assert not (decided.everything or decided.changed or decided.regions), "nothing else is owed"


def test_where_another_agent_has_fed_the_group_everything_is_compared(left: Left) -> None:
    """Whatever is marked here, and however clean the end was: marks say nothing of what others wrote."""
    theirs = replace(WELCOME, epoch=Epoch(2))
    assert left.start().clean
    assert left.start(theirs).clean, "of an epoch that this source has begun itself"
    theirs = replace(WELCOME, epoch=Epoch(9))
    assert left.start(theirs).everything
    # Killed before it could mark everything: the next start owes the same, though the epoch is known by now.
    assert left.start(theirs).everything
    assert left.start(theirs, served=True).everything
    left.start(theirs, served=True)
    assert not left.start(theirs).everything


def test_another_agent_s_epochs_in_another_group_mean_nothing(left: Left) -> None:
    assert left.start(replace(WELCOME, epoch=Epoch(9))).everything
    left.start(group="other", served=True)
    assert not left.start(group="other").everything


def test_initial_sync_that_was_killed_goes_on_where_it_ended(left: Left) -> None:
    """No base yet, but this store was served: what is owed is what is marked, and the base."""
    assert left.start(served=True).clean
    decided = left.start(replace(WELCOME, has_base=False, reconciling=True))
    assert not decided.everything and not decided.clean
    left.mark(0)
    assert left.start(replace(WELCOME, has_base=False)).regions == {VolumeId(1): [0]}


def test_initial_sync_of_another_store_begins_anew(left: Left) -> None:
    assert left.start(replace(WELCOME, has_base=False, store="another")).everything


def test_marks_of_a_mount_that_left_in_the_middle_are_kept_beside_its_clean_mark(left: Left) -> None:
    left.mark(0)
    decided = left.start()
    assert decided.regions == {VolumeId(1): [0]} and not decided.changed
    left.change_behind_the_mount()
    assert left.start().changed == ("a.img",)
