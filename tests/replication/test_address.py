"""Addresses: what is one, what is none, and where plain TCP may go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.address import AddressError, NetworkAddress, UnixAddress, parse_address, store_path

HOSTS = st.one_of(
    st.ip_addresses().map(str),
    st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\.[a-z]{2,5})?", fullmatch=True),
)


@given(HOSTS, st.integers(0, 65535), st.booleans())
def test_a_network_address_is_read_as_it_is_written(host: str, port: int, tls: bool) -> None:
    address = NetworkAddress(host, port, tls)
    assert parse_address(str(address)) == address


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused_in_one_line(text: str) -> None:
    try:
        address = parse_address(text)
    except AddressError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(address, UnixAddress) or parse_address(str(address)) == address


def test_unix_sockets_and_stores() -> None:
    assert parse_address("unix:/run/x") == UnixAddress(Path("/run/x"))
    assert parse_address("a/store") == UnixAddress(Path("a/store/socket"), Path("a/store"))
    assert parse_address(Path("tls://h:1")) == UnixAddress(Path("tls:/h:1/socket"), Path("tls:/h:1"))
    assert parse_address("./tls://h:1").store == Path("tls:/h:1")  # type: ignore[union-attr]
    assert [str(parse_address(text)) for text in ("unix:/run/x", "a/store")] == ["unix:/run/x", "a/store"]
    assert store_path("a/store") == store_path(Path("a/store")) == Path("a/store")
    assert store_path("unix:/run/x") is store_path("tls://h:1") is None


def test_ipv6_is_written_in_brackets() -> None:
    assert parse_address("tls://[fe80::1%eth0]:7") == NetworkAddress("fe80::1%eth0", 7, True)
    assert str(parse_address("tcp://[::1]:7")) == "tcp://[::1]:7"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "unix:",
            "http://h:1",
            "://h:1",
            "tls://",
            "tls://h",
            "tls://:1",
            "tls://h:",
            "tls://h:x",
            "tls://h:65536",
        ),
        *(
            "tls://h:-1",
            "tls://h:1/",
            "tls://h:٣",
            "tls://a b:1",
            "tls://u@h:1",
            "tcp://::1:1",
            "tcp://[::1]",
            "tcp://[h]:1",
        ),
        *("tcp://[::1:1", "tcp://::1]:1", "tls://h:000001", "TLS://h:1"),
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError, match="write|use"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LOCALHOST"])
def test_plain_tcp_on_the_loopback(host: str) -> None:
    address = parse_address(f"tcp://{host}:1")
    assert isinstance(address, NetworkAddress)
    address.allow(insecure_tcp=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "10.0.0.1", "localhost.example", "127.0.0.1.example", "[fe80::1%lo]"]
)
def test_plain_tcp_elsewhere_needs_the_flag(host: str) -> None:
    address = parse_address(f"tcp://{host}:1")
    assert isinstance(address, NetworkAddress)
    with pytest.raises(AddressError, match="use tls://, or allow it with --insecure-tcp"):
        address.allow(insecure_tcp=False)
    address.allow(insecure_tcp=True)
    NetworkAddress(address.host, 1, tls=True).allow(insecure_tcp=False)
