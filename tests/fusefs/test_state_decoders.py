"""What an agent finds in its state directory, whatever it is: the state that was left there, or a refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dedup.errors import Damaged
from dedup.types import Epoch, Seq, VolumeId
from fusefs import state_directory
from fusefs.state_directory import AgentState, CleanEnd, FileMark, StateDirectory
from replication import intent_log
from replication.region_tracker import REGIONS_MAX
from tests.dedup.mutations import either, mutated, outcome

# ---- agent.json ------------------------------------------------------------------------------------------------------

STATE: Final = AgentState(
    1, "a" * 32, "group", "b" * 32, Epoch(3), Seq(99), CleanEnd(Seq(99), {"größe": FileMark(1, 2, 3, 4, 5)})
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def saved(directory: Path) -> bytes:
    state = StateDirectory.open(directory)
    state._save(STATE)
    state.close()
    return (state.path / "agent.json").read_bytes()


def _load(path: Path, content: bytes) -> AgentState | None:
    (path / "changed.json").write_bytes(content)
    return outcome(lambda: state_directory._load(path / "changed.json"))


@given(data=st.data())
def test_agent_states(directory: Path, saved: bytes, data: st.DataObject) -> None:
    """It has no checksum: what reads as a state is one, and everything in it is what the rest expects."""
    changed = data.draw(either(saved))
    found = _load(directory, changed)
    assert changed != saved or found == STATE
    if found is not None:
        assert found.version == 1
        assert 0 <= found.epoch < 1 << 32
        assert 0 <= found.durable < 1 << 64
        assert found.clean is None or 0 <= found.clean.held < 1 << 64
        for volume in found.clean.volumes if found.clean is not None else ():
            os.fsencode(volume)


@pytest.mark.parametrize(
    "wrong", [b'"epoch":4294967296', b'"epoch":-1', b'"durable":-1', b'"durable":18446744073709551616']
)
def test_a_state_with_an_impossible_number_is_damage(directory: Path, saved: bytes, wrong: bytes) -> None:
    content = saved.replace(b'"epoch":3' if b"epoch" in wrong else b'"durable":99', wrong)
    assert content != saved
    assert _load(directory, content) is None


def test_a_state_of_many_brackets_is_damage(tmp_path: Path) -> None:
    (tmp_path / "agent.json").write_bytes(b'{"x":' + b"[" * 100_000)
    with pytest.raises(Damaged, match="damaged"):
        state_directory._load(tmp_path / "agent.json")


# ---- the intent log --------------------------------------------------------------------------------------------------

PATH: Final = Path("/source/.rewindfs/intent")
NONCE: Final = 1 << 62


def _bits(*regions: int) -> bytearray:
    pages: dict[tuple[VolumeId, int], bytearray] = {(VolumeId(1), 0): bytearray(512)}
    for region in regions:
        pages[VolumeId(1), 0][region >> 3] |= 1 << (region & 7)
    return pages[VolumeId(1), 0]


FRAMES: Final = (
    ({(VolumeId(1), 0): _bits(1, 2)}, 0),
    ({(VolumeId(1), 0): _bits(2), (VolumeId(7), 3): _bits(4000)}, 1),
    ({(VolumeId(7), 3): _bits()}, 2),
)


def _log() -> tuple[bytes, list[int]]:
    """A log of these frames, and where each ends."""
    content, ends = intent_log._encode_header(NONCE), []
    for pages, flags in FRAMES:
        content += intent_log._encode_frame(pages, flags, NONCE, len(content))
        ends.append(len(content))
    return content, ends


LOG, ENDS = _log()
Marks = tuple[dict[tuple[VolumeId, int], bytearray], int]
AFTER: Final[dict[int, Marks]] = {end: intent_log._decode(PATH, LOG[:end]) for end in ENDS}


def test_the_samples_are_what_they_seem() -> None:
    assert AFTER[ENDS[-1]] == ({(VolumeId(1), 0): _bits(2)}, 2)


@given(either(LOG))
def test_intent_logs(changed: bytes) -> None:
    """The marks of all whole frames before the first change; only the last frame may be taken for torn."""
    found = outcome(lambda: intent_log._decode(PATH, changed))
    whole = [end for end in ENDS if changed[:end] == LOG[:end]]
    if found is not None:
        assert whole
        assert found == AFTER[whole[-1]]
        assert len(whole) == len(ENDS) or changed[ENDS[-2] : ENDS[-1]] != LOG[ENDS[-2] :]
    if changed == LOG:
        assert found is not None


@given(data=st.data())
def test_intent_logs_behind_their_checksums(data: st.DataObject) -> None:
    """Frames that say anything: marks of some regions, or a refusal. The counts in them are only numbers."""
    content = intent_log._encode_header(NONCE)
    for pages, flags in FRAMES:
        frame = data.draw(mutated(intent_log._encode_frame(pages, flags, NONCE, len(content))) | st.just(b""))
        frame = frame or intent_log._encode_frame(pages, flags, NONCE, len(content))
        head, body = frame[: intent_log._FRAME.size], frame[intent_log._FRAME_BYTES :]
        checksum = xxh3_64_intdigest(head + body, seed=NONCE ^ len(content))
        content += head + checksum.to_bytes(8, "little") + body
    found = outcome(lambda: intent_log._decode(PATH, content))
    if found is not None:
        pages, flags = found
        assert not flags & ~3
        for (volume, index), bits in pages.items():
            assert volume > 0
            assert len(bits) == 512
            assert all(region < REGIONS_MAX for region in intent_log._bits_of(bits, index))
