"""A disk as a virtual machine has it: ext4 on a loop device on an image, which may lie on a mount. Needs root."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ext4_on_loop(image: Path, place: Path) -> Iterator[Path]:
    """The image, made an ext4 and mounted at `place`; gives the counters of its loop device. The kernel is left nothing
    to initialize behind what is measured."""
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        device = subprocess.run(["findmnt", "-no", "SOURCE", place], check=True, capture_output=True, text=True).stdout
        yield Path("/sys/block") / Path(device.strip()).name / "stat"
    finally:
        subprocess.run(["umount", place], check=True)
        # The kernel lets go of the image a while after its last user, and says nothing.
        while subprocess.run(["losetup", "-j", image], check=True, capture_output=True).stdout:
            time.sleep(0.1)
