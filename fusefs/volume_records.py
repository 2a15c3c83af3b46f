"""The records that restate what a volume is: made from the table, stamped by whoever queues them."""

from __future__ import annotations

from dedup.types import Attributes, ClockRun, Create, Resize, Retire, Seq, TimeNs, VolumeId
from fusefs.volume_table import Volume


def retire_record(volume: VolumeId, seq: Seq, time: TimeNs, run: ClockRun) -> Retire:
    return Retire(seq, time, run, volume)


def create_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Create:
    return Create(seq, time, run, volume.id, volume.path, volume.size, volume.mode, volume.uid, volume.gid)


def attributes_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Attributes:
    return Attributes(seq, time, run, volume.id, volume.mode, volume.uid, volume.gid)


def resize_record(volume: Volume, seq: Seq, time: TimeNs, run: ClockRun) -> Resize:
    return Resize(seq, time, run, volume.id, volume.size)
