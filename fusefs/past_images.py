"""The images of one group's volumes, made when they are first read, for handlers in any thread.

Invariants:
- one thread at a time uses the history (`turn`); images are read by any number;
- bounded: IMAGES_MAX images are kept, whatever is open.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from dedup.errors import WouldBlock
from dedup.history import History, PastImage
from dedup.types import Seq, VolumeId

IMAGES_MAX: Final = 32
"""Images kept for reading, each at most some 4 MiB of decoded pointers and the overlay of its moment."""


class PastImages:
    """Of moments that are held, so that an image stays what it is. Any thread."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.turn = threading.Lock()
        """To be held while the history is used."""
        self._images: OrderedDict[tuple[VolumeId, Seq], PastImage] = OrderedDict()

    def image(self, volume: VolumeId, seq: Seq, wait: bool = True) -> PastImage:
        """The volume at a held moment. With wait=False: WouldBlock where it would have to be made first."""
        if not self.turn.acquire(blocking=wait):
            raise WouldBlock
        try:
            key = volume, seq
            image = self._images.get(key)
            if image is None:
                if not wait:
                    raise WouldBlock
                image = self._images[key] = self.history.image(volume, seq)
                if len(self._images) > IMAGES_MAX:
                    self._images.popitem(last=False)
            self._images.move_to_end(key)
            return image
        finally:
            self.turn.release()
