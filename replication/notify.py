"""What a process in the foreground says to the service manager that started it: ready, what it does, stopping.

The protocol is systemd's sd_notify: datagrams of `NAME=value` lines to the socket named by NOTIFY_SOCKET.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

log = logging.getLogger("rewindfs.notify")

SOCKET_NAME: Final = "NOTIFY_SOCKET"
SECONDS_MAX: Final = 1.0
"""How long one message may wait for room in the manager's queue."""
STATUS_CHARACTERS_MAX: Final = 500


class ServiceManager:
    """Who started this process, if it wants to be told; else nobody, and nothing is said."""

    def __init__(self, address: str = "") -> None:
        """`address`: the path of a Unix datagram socket, or `@` and a name in the abstract namespace; "" for nobody."""
        self._address = address
        self._failed = False

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """The one that NOTIFY_SOCKET names. Takes the variable away: a child must not speak for this process."""
        address = os.environ.pop(SOCKET_NAME, "")
        if address and address[0] not in "/@":
            log.warning("%s=%r is no Unix socket: the service manager is not told of readiness", SOCKET_NAME, address)
            return cls()
        return cls(address)

    def ready(self, status: str = "") -> None:
        """Says that the process serves, and what. Blocks for SECONDS_MAX at most, as all of these; never raises."""
        self._say("READY=1", *_status(status))

    def status(self, status: str) -> None:
        """Says in one line how the process is doing."""
        self._say(*_status(status))

    def stopping(self, status: str = "") -> None:
        """Says that the process has begun to leave, which may take its time."""
        self._say("STOPPING=1", *_status(status))

    def _say(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(SECONDS_MAX)
                sock.sendto("\n".join(lines).encode(errors="surrogateescape"), os.fsencode(name))
        except OSError as error:
            # A service that works is worth more than one whose manager knows it; said once, not at each status.
            if not self._failed:
                log.warning("the service manager at %s cannot be told: %s", self._address, error)
            self._failed = True


def _status(status: str) -> list[str]:
    line = " ".join(status.split())[:STATUS_CHARACTERS_MAX]
    return [f"STATUS={line}"] if line else []
