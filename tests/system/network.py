"""Links of the system tests: a relay with a delay and faults, and two network namespaces as two hosts."""

from __future__ import annotations

import ipaddress
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.system.harness import ROOT, SEARCH_PATH, World

NETWORK = ipaddress.ip_network("192.0.2.0/24")
"""Reserved for examples: no real host has such an address. Each pair of namespaces is a world of its own."""
NOBODY = "02:00:00:00:00:ff"
"""A hardware address that no interface has: what is sent there is lost."""


class Relay:
    """A running `delaying_relay`, told what to do. A context manager; it also ends when this process does."""

    def __init__(self, listen: str, forward: str, environment: Mapping[str, str], *prefix: str) -> None:
        """`prefix`: what to start it with, as a host's `enter`."""
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.system.delaying_relay", listen, forward],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address: str = self._answer()
        """Where it listens, in its own form: tcp:HOST:PORT or unix:PATH."""

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, and with it all its connections."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def tell(self, *words: object) -> dict[str, Any]:
        """Has it obey one command; what it counts. It is in force when this returns."""
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = self._answer()
        return answer

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the relay has ended"
        return json.loads(line)


@dataclass(frozen=True, slots=True)
class Host:
    """A network namespace. The file system and the processes are those of everybody: only its network is its own."""

    name: str
    address: str
    other: str
    interface: str
    enter: tuple[str, ...]
    """Start a command with these words and it runs on this host. Only the network is entered: mounts stay shared."""


class TwoHosts:
    """Two hosts joined by one cable; made by `two_hosts`."""

    def __init__(self, one: Host, other: Host) -> None:
        self.one = one
        self.other = other

    def pull(self) -> None:
        """The cable is out: both sides see that there is no network."""
        _run(*self.one.enter, "ip", "link", "set", self.one.interface, "down")

    def lose(self, *senders: Host) -> None:
        """What these hosts send is lost on the way, and nobody is told."""
        for host in senders:
            neighbour = (host.other, "lladdr", NOBODY, "dev", host.interface, "nud", "permanent")
            _run(*host.enter, "ip", "neigh", "replace", *neighbour)

    def heal(self) -> None:
        """All is well again."""
        _run(*self.one.enter, "ip", "link", "set", self.one.interface, "up")
        for host in (self.one, self.other):
            _run(*host.enter, "ip", "neigh", "flush", "dev", host.interface, "nud", "permanent")
            _run(*host.enter, "ip", "neigh", "flush", "dev", host.interface)


@contextmanager
def two_hosts(world: World) -> Iterator[TwoHosts]:
    """Two network namespaces, until the block ends. They have no name that could stay behind: each lives as long as the
    process that holds it, which ends with this one, and as what was started in it."""
    with _namespace(world) as one, _namespace(world) as other:
        hosts = []
        for number, pid in enumerate((one, other), start=1):
            enter = ("nsenter", f"--net=/proc/{pid}/ns/net")
            hosts.append(Host(f"host{number}", str(NETWORK[number]), str(NETWORK[3 - number]), f"cable{number}", enter))
        first, second = hosts
        peer = ("peer", "name", second.interface, "netns", str(other))
        _run(*first.enter, "ip", "link", "add", first.interface, "type", "veth", *peer)
        for host in hosts:
            _run(*host.enter, "ip", "link", "set", "lo", "up")
            _run(*host.enter, "ip", "address", "add", f"{host.address}/{NETWORK.prefixlen}", "dev", host.interface)
            _run(*host.enter, "ip", "link", "set", host.interface, "up")
        yield TwoHosts(first, second)


@contextmanager
def _namespace(world: World) -> Iterator[int]:
    """The process that holds a new network namespace: it copies nothing from a pipe until that is closed."""
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec cat"],
        env=world.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.read(1), "no network namespace could be made"
        yield holder.pid
        holder.stdin.close()


def why_no_hosts() -> str | None:
    """What keeps this machine from making network namespaces."""
    try:
        _run("unshare", "--net", "ip", "link", "add", "probe1", "type", "veth", "peer", "name", "probe2")
    except FileNotFoundError:
        return "unshare is not installed"
    except AssertionError as error:
        return f"two network namespaces cannot be joined here: {error}"
    return None


def _run(*words: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in words], env={"PATH": SEARCH_PATH}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr.strip() or done.returncode}"
