"""How an address given to a command is reached: with which keys, and whether plain TCP may leave this machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from msgspec import Struct

if TYPE_CHECKING:
    from replication.identity import Identity

F = TypeVar("F", bound=Callable[..., Any])


class Route(Struct, frozen=True):
    """`identity` None is the one of `identity.default_directory()`; only tls:// looks at it."""

    identity: Identity | None = None
    insecure_tcp: bool = False

    @property
    def words(self) -> list[str]:
        """The options that a command gets it by."""
        identity = [] if self.identity is None else ["--identity", str(self.identity.directory)]
        return [*identity, *(["--insecure-tcp"] if self.insecure_tcp else [])]


def route_options(command: F) -> Callable[..., Any]:
    """Adds `--identity DIR` and `--insecure-tcp` to a click command, which gets them as `route`."""

    @click.option(
        "--identity",
        "identity_directory",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="For tls://: the keys; see rewindfs identity.",
    )
    @click.option(
        "--insecure-tcp", is_flag=True, help="Allow tcp:// beyond this machine: anybody on the way can read it."
    )
    @wraps(command)
    def wrapped(*args: Any, identity_directory: Path | None, insecure_tcp: bool, **kwargs: Any) -> Any:
        identity = None
        if identity_directory is not None:
            from replication.identity import Identity  # most commands are given none, and are quicker without it

            identity = Identity(identity_directory.absolute())
        return command(*args, route=Route(identity, insecure_tcp), **kwargs)

    return wrapped
