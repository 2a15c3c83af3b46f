"""Where chaos strikes: a mount with its appliances, whose processes can be killed, stopped and started one by one.

A site is at `World.source`, `World.mnt` and `World.store`; it says which parts it has and which links lie between them.
"""

from __future__ import annotations

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fusefs.mountpoint import is_dead, mount_at
from tests.system.harness import World, wait_for_end
from tests.system.network import TwoHosts

MOUNT = "mount"
FIRST = "first"
SECOND = "second"
PORT = 7070
IDENTITY = "REWINDFS_IDENTITY"
COMMANDS = {
    MOUNT: ["fusefs", "mount"],
    FIRST: ["fusefs", "appliance", "first"],
    SECOND: ["fusefs", "appliance", "second"],
}
"""How the command line of each part begins."""


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; none when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


class Site(ABC):
    """The processes and links of one protected directory."""

    parts: tuple[str, ...]
    """What can be killed and stopped; the mount is one of them."""
    links: tuple[str, ...] = ()
    """The faults that the network has here."""
    spools = False
    """Whether an outage of any length leaves no gap."""

    def __init__(self, world: World, mode: str, options: tuple[str, ...]) -> None:
        self.world = world
        self.mode = mode
        self.options = options
        """Of `rewindfs mount`."""

    def pid(self, part: str) -> int | None:
        """The part's process; None while it has none. Asks nobody: they may all be stopped."""
        words = COMMANDS[part]
        for pid in self.world.processes():
            command = command_of(pid)
            if any(command[at : at + len(words)] == words for at in range(len(command))):
                return pid
        return None

    @abstractmethod
    def start(self) -> None:
        """Starts every part that is not running; returns when the mount is ready, and knows of all of them."""

    @abstractmethod
    def restart(self, part: str) -> None:
        """Ends the part in the orderly way and starts it again. The mount must not be in use for its own restart."""

    def break_link(self, fault: str) -> None:
        """Makes one of the faults in `links`."""
        raise NotImplementedError(fault)

    def heal_link(self) -> None:
        """No fault is left on the network."""
        return

    def close(self) -> None:
        """Unmounts in the orderly way, and ends the services."""
        self.world.unmount()

    def give_up(self) -> None:
        """After a failure: whatever would not leave by itself is told to."""
        return

    def kill(self, part: str) -> bool:
        """kill −9, and waits for the end. False when there was nothing to kill."""
        if (pid := self.pid(part)) is None:
            return False
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        wait_for_end(pid)
        return True

    def stop(self, part: str) -> Callable[[], None]:
        """SIGSTOP; what is returned lets the process go on."""
        pid = self.pid(part)
        if pid is None:
            return lambda: None
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGSTOP)

        def go_on() -> None:
            try:
                signal.pidfd_send_signal(fd, signal.SIGCONT)
            except ProcessLookupError:
                pass  # it was killed meanwhile
            finally:
                os.close(fd)

        return go_on

    def mounted(self) -> bool:
        """Whether a living process is behind the mountpoint."""
        return mount_at(self.world.mnt) is not None and not is_dead(self.world.mnt)

    def remount(self) -> None:
        self.world.mount(self.mode, *self.options)

    def wait_until_well(self) -> None:
        """Until the mount says that it is protected, with the link it needs."""
        self.world.wait_for_status(
            lambda status: status["state"] == "protected" and status["link"] == "connected", "a protected mount"
        )


class Embedded(Site):
    """Everything on one machine: the second appliance is the mount's child, which the mount starts again itself."""

    parts = (MOUNT, SECOND)

    def start(self) -> None:
        if not self.mounted():
            self.remount()
        self.wait_until_well()

    def restart(self, part: str) -> None:
        if part == MOUNT:
            self.world.unmount()
        elif (pid := self.pid(part)) is not None:
            os.kill(pid, signal.SIGTERM)
            wait_for_end(pid)
        self.start()

    def kill(self, part: str) -> bool:
        second = self.pid(SECOND)
        killed = super().kill(part)
        if killed and part == MOUNT and second is not None:
            # It leaves with its parent. Stopped, it could not see that, and would keep the store.
            try:
                os.kill(second, signal.SIGCONT)
            except ProcessLookupError:
                return killed
            wait_for_end(second)
        return killed


class Remote(Site):
    """Two hosts: the mount on one, the second appliance on the other, TLS between them; `first` puts a first appliance
    with a spool on the mount's host."""

    links = ("pulled", "lost", "lost up", "lost down")

    def __init__(self, world: World, mode: str, options: tuple[str, ...], hosts: TwoHosts, *, first: bool) -> None:
        super().__init__(world, mode, options)
        self.parts = (MOUNT, FIRST, SECOND) if first else (MOUNT, SECOND)
        self.spools = first
        self._hosts = hosts
        self._address = f"tls://{hosts.other.address}:{PORT}"
        self._socket = world.directory / "first.sock"
        self._identities = make_identities(world)
        world.environment[IDENTITY] = str(self._identities.agent)
        world.enter = hosts.one.enter
        world.target = ("--appliance", f"unix:{self._socket}") if first else ("--store", self._address)

    def start(self) -> None:
        for part in (SECOND, FIRST):
            if part in self.parts and self.pid(part) is None:
                self._serve(part)
        if not self.mounted():
            self.remount()
        self.wait_until_well()

    def _serve(self, part: str) -> None:
        world = self.world
        if part == SECOND:
            host, identity = self._hosts.other, self._identities.second
            words = ("--store", world.store, "--listen", self._address)
        else:
            host, identity = self._hosts.one, self._identities.agent
            spool = ("--spool", world.directory / "spool", "--spool-limit", "1G")
            words = ("--listen", f"unix:{self._socket}", "--forward", self._address, "--mode", self.mode, *spool)
        command = ("env", f"{IDENTITY}={identity}", sys.executable, "-m", "fusefs", "appliance", part, *words)
        world.run(*host.enter, *command, "--log-file", world.directory / f"{part}.log")

    def restart(self, part: str) -> None:
        if part == MOUNT:
            self.world.unmount()
        else:
            self._leave(part)
        self.start()

    def _leave(self, part: str) -> None:
        if (pid := self.pid(part)) is not None:
            os.kill(pid, signal.SIGTERM)
            wait_for_end(pid)

    def break_link(self, fault: str) -> None:
        one, other = self._hosts.one, self._hosts.other
        match fault:
            case "pulled":
                self._hosts.pull()
            case "lost":
                self._hosts.lose(one, other)
            case "lost up":
                self._hosts.lose(one)
            case "lost down":
                self._hosts.lose(other)

    def heal_link(self) -> None:
        self._hosts.heal()

    def give_up(self) -> None:
        self.world.run("fusermount3", "-u", self.world.mnt, check=False)
        for part in (FIRST, SECOND):
            if (pid := self.pid(part)) is not None:
                os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        super().close()
        for part in (FIRST, SECOND):
            if part in self.parts:
                self._leave(part)


@dataclass(frozen=True, slots=True)
class Identities:
    """Directories of identities that trust one another."""

    agent: Path
    second: Path


def make_identities(world: World) -> Identities:
    """An agent's, and that of the appliance that lets it append."""
    made = Identities(world.directory / "agent-identity", world.directory / "second-identity")
    for place, other, role in ((made.agent, made.second, ()), (made.second, made.agent, ("--role", "agent"))):
        for identity in (place, other):
            if not identity.exists():
                world.rewindfs("identity", "create", "--identity", identity)
        certificate = world.directory / f"{other.name}.pem"
        certificate.write_text(world.rewindfs("identity", "show", "--identity", other).stdout)
        world.rewindfs("identity", "trust", certificate, *role, "--identity", place)
    return made
