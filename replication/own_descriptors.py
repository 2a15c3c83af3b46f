"""Which descriptors of this process are open on what, as /proc tells it."""

from __future__ import annotations

import os


def descriptors_of(link: str) -> list[int]:
    """Those whose link in /proc/self/fd reads so. Raises OSError where no descriptor is left to look with."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == link:
                found.append(int(name))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found
