"""`rewindfs identity`: the key of this machine for tls://, and the keys of others that it trusts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from dedup.terminal import json_option, print_json, print_table, shown
from replication.identity import (
    DIRECTORY_VARIABLE,
    NAME_CHARACTERS_MAX,
    Identity,
    IdentityError,
    Peer,
    check_name,
    default_directory,
)
from replication.messages import Role

F = TypeVar("F", bound=Callable[..., Any])
CERTIFICATE_BYTES_MAX: Final = 1 << 20


def _identity_option(function: F) -> F:
    return click.option(
        "--identity",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help=f"The key for tls:// and whom it trusts. Default: ${DIRECTORY_VARIABLE}, else {_default_text()}.",
    )(function)


def _default_text() -> str:
    return "/etc/rewindfs/identity for root, ~/.config/rewindfs/identity for others"


def _chosen(directory: Path | None) -> Identity:
    """The identity that the option named, or the default one; its path is absolute."""
    return Identity((directory or default_directory()).absolute())


@click.group()
def identity() -> None:
    """Keys for tls:// addresses: who this machine is, and whom it trusts.

    Each machine makes a key (`create`), and trusts the certificate that `show` prints on the other one: the appliance
    trusts an agent's with `--role agent`, the agent the appliance's without a role. Nothing else is trusted, no
    authority and no host name.
    """


@identity.command()
@click.option("--replace", is_flag=True, help="Give up the key that is there. Every peer must then trust the new one.")
@_identity_option
@json_option
def create(replace: bool, identity: Path | None, as_json: bool) -> None:
    """Make the key and the certificate of this machine."""
    here = _chosen(identity)
    certificate = here.create(replace=replace)
    if as_json:
        print_json({"fingerprint": certificate.fingerprint, "directory": str(here.directory)})
    else:
        click.echo(
            f"{certificate.fingerprint} in {here.directory}; `rewindfs identity show` prints what peers must trust"
        )


@identity.command()
@_identity_option
@json_option
def show(identity: Path | None, as_json: bool) -> None:
    """Print the fingerprint and the certificate of this machine. Neither is secret."""
    here = _chosen(identity)
    certificate = here.certificate()
    if as_json:
        print_json(
            {
                "fingerprint": certificate.fingerprint,
                "certificate": certificate.pem,
                "directory": str(here.directory),
            }
        )
    else:
        click.echo(certificate.fingerprint)
        click.echo(certificate.pem, nl=False)


@identity.command()
@click.argument("certificate", metavar="CERTIFICATE", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@click.option(
    "--role",
    type=click.Choice([role.value for role in Role]),
    help="What it may do where it connects to this machine. agent: append to its groups and read them; reader: read; "
    "admin: everything.",
)
@click.option(
    "--server", is_flag=True, help="This machine may connect to it; so it is without --role, and for an admin."
)
@click.option("--group", "groups", multiple=True, metavar="G", help="A group that it may touch; else all. Repeatable.")
@click.option(
    "--name", metavar="N", help="What to call it here. Default: what it is called already, or the file's name."
)
@_identity_option
@json_option
def trust(
    certificate: Path,
    role: str | None,
    server: bool,
    groups: tuple[str, ...],
    name: str | None,
    identity: Path | None,
    as_json: bool,
) -> None:
    """Trust CERTIFICATE: a file that `rewindfs identity show` printed on the other machine, or - for stdin.

    Without --role it is an appliance that this machine may connect to, and may do nothing here. With --role it may
    connect to this machine, and an admin may be connected to as well. What was said of a certificate before no longer
    counts. A running appliance takes note within seconds.
    """
    from replication.certificate import read_certificate  # here, because it brings cryptography

    if groups and role is None:
        raise click.UsageError("--group says what a client may touch; give its --role, too")
    if "" in groups:
        raise click.UsageError("--group must not be empty; leave it out for all groups")
    where = "stdin" if str(certificate) == "-" else str(certificate)
    given = read_certificate(_content(certificate), where)
    here = _chosen(identity)
    known = here.trusted()
    if name is None and where != "stdin" and all(one.peer.fingerprint != given.fingerprint for one in known):
        name = _name_of(certificate, {one.peer.name for one in known})
    may = Role(role) if role is not None else None
    peer = here.trust(given, role=may, server=server or may in (None, Role.ADMIN), groups=groups, name=name)
    if as_json:
        print_json(_fields(peer))
    else:
        click.echo(f"{shown(peer.name)} is trusted: {_what(peer)}; compare its fingerprint: {peer.fingerprint}")


@identity.command("list")
@_identity_option
@json_option
def list_(identity: Path | None, as_json: bool) -> None:
    """List whom this machine trusts."""
    peers = [one.peer for one in _chosen(identity).trusted()]
    if as_json:
        print_json([_fields(peer) for peer in peers])
    else:
        print_table(
            ["NAME", "TRUSTED AS", "GROUPS", "FINGERPRINT"],
            [[peer.name, _what(peer), ", ".join(sorted(peer.groups)) or "all", peer.fingerprint] for peer in peers],
        )


@identity.command()
@click.argument("who", metavar="FINGERPRINT|NAME")
@_identity_option
@json_option
def revoke(who: str, identity: Path | None, as_json: bool) -> None:
    """Trust a key no longer.

    A running appliance ends its sessions within seconds; what connected to it from here notices when it connects next.
    """
    peer = _chosen(identity).revoke(who)
    if as_json:
        print_json(_fields(peer))
    else:
        click.echo(f"{shown(peer.name)} is trusted no longer: {peer.fingerprint}")


def _content(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(CERTIFICATE_BYTES_MAX)
    with open(path, "rb") as file:
        return file.read(CERTIFICATE_BYTES_MAX)


def _name_of(path: Path, taken: set[str]) -> str | None:
    """What to call the peer whose certificate is in that file; None where the file's name does not tell it apart."""
    name = path.stem[:NAME_CHARACTERS_MAX]
    try:
        check_name(name)
    except IdentityError:
        return None
    return None if name in taken else name


def _what(peer: Peer) -> str:
    parts = ["server"] if peer.server else []
    return ", ".join([*([peer.role.value] if peer.role else []), *parts])


def _fields(peer: Peer) -> dict[str, object]:
    return {
        "name": peer.name,
        "fingerprint": peer.fingerprint,
        "role": peer.role.value if peer.role else None,
        "server": peer.server,
        "groups": sorted(peer.groups),
    }
