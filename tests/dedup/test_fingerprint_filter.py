"""The filter in front of LMDB: what was added it never denies, what it does not know it leaves to LMDB."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dedup.errors import StoreFull
from dedup.fingerprint_filter import HEADER_BYTES, PART_BYTES, FingerprintFilter
from dedup.fingerprint_table import SLICES, halves
from dedup.storage import Buffer, Storage


def marks(number: int, count: int, seed: int) -> list[bytes]:
    """Fingerprints of one slice."""
    dice = random.Random(seed)
    return [bytes([number << 2 | dice.randrange(4)]) + dice.randbytes(15) for _ in range(count)]


def answers(found: FingerprintFilter, asked: list[bytes]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return found.may_have(*halves(b"".join(asked)))


def test_what_was_added_is_never_denied(tmp_path: Path) -> None:
    """And of what was not, hardly any is let through; a slice that is not built knows nothing."""
    storage, path = Storage(), tmp_path / "filter"
    made = FingerprintFilter.make(storage, path)
    stored, added, later = marks(5, 70_000, 1), marks(5, 3_000, 2), marks(5, 1_000, 3)
    strange = marks(5, 20_000, 4)
    assert answers(made, strange).all()
    made.add(5, b"".join(added), iter(stored))
    made.add(5, b"".join(later), iter(()))
    for found in (made, FingerprintFilter.open(storage, path, made.tag)):
        assert found is not None
        assert answers(found, stored + added + later).all()
        assert answers(found, strange).mean() < 0.01
        assert answers(found, marks(6, 100, 5)).all()
    made.forget()
    assert answers(made, strange).all()
    again = FingerprintFilter.open(storage, path, made.tag)
    assert again is not None and answers(again, strange).all()
    for opened in (made, found, again):
        opened.close()


def test_a_file_that_is_not_the_one_meant_is_not_looked_at(tmp_path: Path) -> None:
    storage, path = Storage(), tmp_path / "filter"
    assert FingerprintFilter.open(storage, path, 1) is None
    made = FingerprintFilter.make(storage, path)
    made.add(63, b"".join(marks(63, 10, 1)), iter(()))
    made.close()
    assert FingerprintFilter.open(storage, path, made.tag + 1) is None
    os.truncate(path, HEADER_BYTES + (SLICES - 1) * PART_BYTES)
    assert FingerprintFilter.open(storage, path, made.tag) is None
    path.write_bytes(b"")
    assert FingerprintFilter.open(storage, path, made.tag) is None
    anew = FingerprintFilter.make(storage, path)
    assert anew.tag != made.tag and answers(anew, marks(63, 10, 2)).all()
    anew.close()


def test_a_slice_that_was_cut_off_is_built_anew(tmp_path: Path) -> None:
    """Its bits are written, and the header that calls it built is not, or LMDB's commit of it; then it goes on."""

    class CutOff(Storage):
        cut = False

        def pwritev(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
            if self.cut and offset < HEADER_BYTES:
                raise StoreFull("no space left")
            super().pwritev(fd, buffers, offset)

    storage, path = CutOff(), tmp_path / "filter"
    made = FingerprintFilter.make(storage, path)
    made.add(4, b"".join(marks(4, 100, 0)), iter(()))
    stored, lost, later = marks(5, 2_000, 1), marks(5, 2_000, 2), marks(5, 2_000, 3)
    storage.cut = True
    with pytest.raises(StoreFull):
        made.add(5, b"".join(lost), iter(stored))
    storage.cut = False
    made.add(4, b"".join(marks(4, 100, 1)), iter(()))  # its commit is cut off: bits too many, of no fingerprint
    made.close()
    found = FingerprintFilter.open(storage, path, made.tag)
    assert found is not None
    assert answers(found, marks(5, 100, 4) + stored + marks(4, 100, 0)).all()
    found.add(5, b"".join(later), iter(stored))
    assert answers(found, stored + later).all()
    assert answers(found, lost).mean() < 0.01
    found.close()


@pytest.mark.parametrize("number", [0, SLICES - 1])
def test_slices_do_not_touch_each_other(tmp_path: Path, number: int) -> None:
    made = FingerprintFilter.make(Storage(), tmp_path / "filter")
    for one in range(SLICES):
        made.add(one, b"", iter(()))
    made.add(number, b"".join(marks(number, 5_000, 1)), iter(()))
    assert answers(made, marks(number, 5_000, 1)).all()
    for other in range(1, SLICES - 1):
        assert not answers(made, marks(other, 50, 2)).any()
    made.close()
