"""When a region's mark may go, against a model that remembers every event."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from dedup.types import Seq, VolumeId
from replication.region_tracker import IDLE_SECONDS, REGION_BYTES, RegionTracker, regions_of

ONE = VolumeId(1)


def _written(tracker: RegionTracker, *, seq: int = 1, now: float = 0.0) -> None:
    tracker.write_begin(ONE, 0, 1, Seq(seq), now=now)
    tracker.write_end(ONE, 0, 1, Seq(seq), now=now)


def _all_but_idle(tracker: RegionTracker, seq: int = 1) -> None:
    tracker.source_synced(ONE, tracker.token())
    tracker.durable(Seq(seq))


def test_regions_of_a_range() -> None:
    assert list(regions_of(0, 1)) == [0]
    assert list(regions_of(REGION_BYTES - 1, 2)) == [0, 1]
    assert list(regions_of(REGION_BYTES, REGION_BYTES)) == [1]
    assert list(regions_of(REGION_BYTES, 0)) == []


def test_a_region_goes_when_all_conditions_hold() -> None:
    tracker = RegionTracker()
    _written(tracker)
    _all_but_idle(tracker)
    assert tracker.clearable(IDLE_SECONDS - 1) == []
    assert tracker.clearable(IDLE_SECONDS) == [(ONE, 0)]
    assert tracker.clearable(IDLE_SECONDS) == [] and len(tracker) == 0


def test_not_while_a_write_is_in_flight() -> None:
    tracker = RegionTracker()
    _written(tracker)
    tracker.write_begin(ONE, 0, 1, now=0)
    _all_but_idle(tracker)
    assert tracker.clearable(1000) == []


def test_not_before_its_last_record_is_durable() -> None:
    tracker = RegionTracker()
    _written(tracker, seq=1)
    tracker.write_begin(ONE, 0, 1, Seq(2), now=0)
    tracker.write_end(ONE, 0, 1, Seq(3), now=0)
    _all_but_idle(tracker, seq=2)
    assert tracker.clearable(1000) == []
    tracker.durable(Seq(1))
    tracker.durable(Seq(3))
    assert tracker.clearable(1000) == [(ONE, 0)]


def test_not_by_a_sync_that_began_before_the_write_ended() -> None:
    tracker = RegionTracker()
    tracker.write_begin(ONE, 0, 1, Seq(1), now=0)
    token = tracker.token()
    tracker.write_end(ONE, 0, 1, Seq(1), now=0)
    tracker.source_synced(ONE, token)
    tracker.durable(Seq(1))
    assert tracker.clearable(1000) == []
    assert tracker.unsynced(1000) == {ONE}
    tracker.source_synced(ONE, tracker.token())
    assert tracker.unsynced(1000) == set()
    assert tracker.clearable(1000) == [(ONE, 0)]


def test_marked_ahead_and_never_written_goes_too() -> None:
    tracker = RegionTracker()
    tracker.touch(ONE, range(5, 7), Seq(4), now=0)
    _all_but_idle(tracker, seq=4)
    assert tracker.clearable(IDLE_SECONDS) == [(ONE, 5), (ONE, 6)]


def test_past_the_limit_the_longest_at_rest_is_forgotten_never_one_in_flight() -> None:
    tracker = RegionTracker(limit=3)
    tracker.write_begin(ONE, 0, 1, Seq(1), now=0)
    for region in range(1, 10):
        tracker.touch(ONE, range(region, region + 1), now=region)
    assert len(tracker) == 3
    tracker.write_end(ONE, 0, 1, Seq(1), now=100)
    _all_but_idle(tracker)
    assert tracker.clearable(1000) == [(ONE, 8), (ONE, 9), (ONE, 0)]


def test_a_retired_volume_is_forgotten() -> None:
    tracker = RegionTracker()
    tracker.write_begin(ONE, 0, 1, Seq(1), now=0)
    tracker.volume_gone(ONE)
    tracker.write_end(ONE, 0, 1, Seq(1), now=0)
    _all_but_idle(tracker)
    assert tracker.clearable(1000) == []


@dataclass
class _Model:
    """Remembers every write; asks the rule of the design, word by word, of each region."""

    writes: list[dict] = field(default_factory=list)
    syncs: list[tuple[int, int]] = field(default_factory=list)  # volume, moment the sync began
    durable: int = 0
    moment: int = 0
    cleared: dict[tuple[int, int], int] = field(default_factory=dict)

    def clearable(self, now: float) -> set[tuple[int, int]]:
        found = set()
        for key in {key for write in self.writes for key in write["keys"]}:
            mine = [w for w in self.writes if key in w["keys"] and w["began"] > self.cleared.get(key, -1)]
            if mine and all(self._settled(w, key[0], now) for w in mine):
                found.add(key)
        return found

    def _settled(self, write: dict, volume: int, now: float) -> bool:
        ended = write["ended"]
        return (
            ended is not None
            and write["seq"] <= self.durable
            and any(v == volume and began > ended for v, began in self.syncs)
            and now - write["touched"] >= IDLE_SECONDS
        )


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(1, 2), st.integers(0, 3 * REGION_BYTES)),
        st.tuples(st.just("end"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("sync begin"), st.integers(1, 2), st.just(0)),
        st.tuples(st.just("sync end"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("durable"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("wait"), st.sampled_from([1, 29, 31]), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(events=_EVENTS)
def test_property_the_tracker_says_what_the_rule_says(events: list[tuple[str, int, int]]) -> None:
    tracker, model = RegionTracker(), _Model()
    now, seq = 0.0, 0
    open_writes: list[dict] = []
    open_syncs: list[tuple[int, int, int]] = []
    for kind, number, offset in events:
        model.moment += 1
        if kind == "begin":
            seq += 1
            length = REGION_BYTES // 2
            tracker.write_begin(VolumeId(number), offset, length, Seq(seq), now=now)
            keys = {(number, region) for region in regions_of(offset, length)}
            write = {"keys": keys, "seq": seq, "began": model.moment, "ended": None, "touched": now}
            write |= {"volume": number, "offset": offset, "length": length}
            model.writes.append(write)
            open_writes.append(write)
        elif kind == "end" and number < len(open_writes):
            write = open_writes.pop(number)
            tracker.write_end(VolumeId(write["volume"]), write["offset"], write["length"], Seq(write["seq"]), now=now)
            write["ended"], write["touched"] = model.moment, now
        elif kind == "sync begin":
            open_syncs.append((number, tracker.token(), model.moment))
        elif kind == "sync end" and number < len(open_syncs):
            volume, token, began = open_syncs.pop(number)
            tracker.source_synced(VolumeId(volume), token)
            model.syncs.append((volume, began))
        elif kind == "durable":
            model.durable = max(model.durable, seq - number)
            tracker.durable(Seq(seq - number))
        elif kind == "wait":
            now += number
        elif kind == "clear":
            expected = model.clearable(now)
            assert set(tracker.clearable(now)) == expected
            model.cleared.update(dict.fromkeys(expected, model.moment))


def test_what_a_reconcile_found_equal_need_not_rest() -> None:
    tracker = RegionTracker()
    tracker.equal(ONE, 3, Seq(5), spells=0)
    tracker.source_synced(ONE, tracker.token())
    tracker.durable(Seq(4))
    assert tracker.clearable(0, spells=0) == [], "its last record is not durable"
    tracker.durable(Seq(5))
    assert tracker.clearable(0, spells=1) == [], "changes went unrecorded since"
    assert tracker.clearable(0, spells=0) == [(ONE, 3)]


def test_while_a_reconcile_is_owed_only_what_it_found_equal_goes() -> None:
    tracker = RegionTracker()
    _written(tracker)
    _all_but_idle(tracker)
    assert tracker.clearable(IDLE_SECONDS, spells=0) == []
    tracker.equal(ONE, 0, Seq(1), spells=0)
    assert tracker.clearable(IDLE_SECONDS, spells=0) == [], "the source was not synced since"
    _all_but_idle(tracker)
    assert tracker.clearable(IDLE_SECONDS - 1, spells=0) == [], "an application writes there"
    assert tracker.clearable(IDLE_SECONDS, spells=0) == [(ONE, 0)]
