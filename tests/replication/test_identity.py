"""Identities: what is in their directory, what the commands print and refuse, what a crash leaves."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from replication import identity as identity_module
from replication.certificate import make_identity, read_certificate
from replication.identity import TRUSTED_MAX, Identity, IdentityError, default_directory
from replication.identity_cli import identity as command
from replication.messages import Role


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default identity is."""
    path = tmp_path / "config" / "identity"
    monkeypatch.setenv("REWINDFS_IDENTITY", str(path))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The certificate of another machine, as a file."""
    path = tmp_path / "other.pem"
    run("create", "--identity", tmp_path / "other")
    path.write_text(run("show", "--identity", tmp_path / "other"))
    return path


def run(*args: object, status: int = 0, stdin: str | None = None) -> str:
    """What it prints; its IdentityError is raised, as main would see it."""
    result = CliRunner().invoke(command, [str(arg) for arg in args], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_key_is_made_once(place: Path) -> None:
    made = json.loads(run("create", "--json"))
    assert made["directory"] == str(place) and made["fingerprint"].startswith("SHA256:")
    assert names(place) == ["identity.pem"]
    assert (mode_of(place), mode_of(place / "identity.pem")) == (0o700, 0o600)
    with pytest.raises(IdentityError, match="identity.pem exists; .*--replace"):
        run("create")
    shown = json.loads(run("show", "--json"))
    assert shown["fingerprint"] == made["fingerprint"]
    assert run("show") == made["fingerprint"] + "\n" + shown["certificate"]
    run("create", "--replace")
    assert json.loads(run("show", "--json"))["fingerprint"] != made["fingerprint"]
    assert "PRIVATE" not in run("show") and "PRIVATE" in (place / "identity.pem").read_text()


def test_the_certificate_tells_nothing_but_its_key() -> None:
    _content, made = make_identity()
    certificate = x509.load_pem_x509_certificate(made.pem.encode())
    for name in (certificate.subject, certificate.issuer):
        assert [attribute.value for attribute in name] == [made.fingerprint]
    assert certificate.not_valid_before_utc.year == 2000 and certificate.not_valid_after_utc.year == 2125


def test_the_fingerprint_is_that_of_the_public_key(place: Path) -> None:
    run("create")
    key = subprocess.run(
        ["openssl", "pkey", "-in", place / "identity.pem", "-pubout", "-outform", "DER"],
        capture_output=True,
        check=True,
    ).stdout
    digest = subprocess.run(
        ["openssl", "dgst", "-sha256", "-binary"], input=key, capture_output=True, check=True
    ).stdout
    encoded = subprocess.run(["base64"], input=digest, capture_output=True, check=True).stdout.decode()
    assert run("show").splitlines()[0] == "SHA256:" + encoded.strip().rstrip("=")


def test_whom_to_trust_and_what_for(place: Path, other: Path) -> None:
    trusted = json.loads(run("trust", other, "--json"))
    fingerprint = other.read_text().splitlines()[0]
    assert trusted == {"name": "other", "fingerprint": fingerprint, "role": None, "server": True, "groups": []}
    assert run("trust", other, "--role", "agent", "--group", "b", "--group", "a") == (
        f"other is trusted: agent; compare its fingerprint: {fingerprint}\n"
    )
    assert json.loads(run("list", "--json")) == [
        {"name": "other", "fingerprint": fingerprint, "role": "agent", "server": False, "groups": ["a", "b"]}
    ]
    assert run("list").splitlines()[1].split() == ["other", "agent", "a,", "b", fingerprint]
    both = json.loads(
        run("trust", "-", "--role", "reader", "--server", "--name", "n", "--json", stdin=other.read_text())
    )
    assert (both["name"], both["role"], both["server"], both["groups"]) == ("n", "reader", True, [])
    admin = json.loads(run("trust", other, "--role", "admin", "--json"))
    assert (admin["name"], admin["role"], admin["server"]) == ("n", "admin", True)
    assert mode_of(place / "trusted.json") == 0o600
    assert run("revoke", fingerprint) == f"n is trusted no longer: {fingerprint}\n"
    assert json.loads(run("list", "--json")) == []
    run("trust", other)
    assert json.loads(run("revoke", "other", "--json"))["fingerprint"] == fingerprint
    with pytest.raises(IdentityError, match="nobody called 'other' is trusted"):
        run("revoke", "other")


def test_names(place: Path, other: Path, tmp_path: Path) -> None:
    run("trust", other)
    run("create", "--replace", "--identity", tmp_path / "other")
    again = tmp_path / "x" / "other.pem"
    again.parent.mkdir()
    again.write_text(run("show", "--identity", tmp_path / "other"))
    # Another key under the same file name is called by its fingerprint, and takes nobody's place.
    second = json.loads(run("trust", again, "--json"))
    assert second["name"] == second["fingerprint"].removeprefix("SHA256:")[:12]
    assert len(json.loads(run("list", "--json"))) == 2
    with pytest.raises(IdentityError, match="another key is trusted as 'other'"):
        run("trust", again, "--name", "other")
    for name in ("", "a\nb", "x" * 65, "SHA256:x"):
        with pytest.raises(IdentityError, match="no name for a peer"):
            run("trust", again, "--name", name)
    assert len(json.loads(run("list", "--json"))) == 2


def test_what_cannot_be_trusted(place: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="private key, which must not leave its machine"):
        run("trust", tmp_path / "other" / "identity.pem")
    with pytest.raises(IdentityError, match="stdin holds no certificate in PEM"):
        run("trust", "-", stdin="hello")
    with pytest.raises(IdentityError, match="holds no certificate in PEM"):
        run("trust", "-", stdin=other.read_text().replace("MII", "MI!"))
    with pytest.raises(IdentityError, match="holds 2 certificates"):
        run("trust", "-", stdin=other.read_text() * 2)
    with pytest.raises(IdentityError, match="too large"):
        run("trust", "-", stdin="x" * (1 << 17))
    with pytest.raises(FileNotFoundError):
        run("trust", tmp_path / "none")
    assert "--role, too" in run("trust", other, "--group", "g", status=2)
    assert "must not be empty" in run("trust", other, "--role", "agent", "--group", "", status=2)
    assert "Invalid value for '--role'" in run("trust", other, "--role", "root", status=2)
    assert json.loads(run("list", "--json")) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["-newkey", "rsa:2048", "-days", "10000"], "is of another form"),
        (["-newkey", "ed25519", "-days", "10000"], "is of another form"),
    ],
)
def test_a_certificate_from_elsewhere(tmp_path: Path, options: list[str], why: str) -> None:
    path = tmp_path / "c.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=x", "-keyout", tmp_path / "k", "-out", path, *options],
        check=True,
        capture_output=True,
    )
    with pytest.raises(IdentityError, match=why):
        read_certificate(path.read_bytes(), str(path))


def test_a_certificate_that_another_key_has_signed(tmp_path: Path) -> None:
    commands = [
        "req -x509 -nodes -newkey ed25519 -subj /CN=ca -keyout ca.key -out ca.pem",
        "req -nodes -newkey ed25519 -subj /CN=x -keyout x.key -out x.csr",
        "x509 -req -in x.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out x.pem",
    ]
    for line in commands:
        subprocess.run(["openssl", *line.split()], check=True, capture_output=True, cwd=tmp_path)
    with pytest.raises(IdentityError, match="is not signed by its own key"):
        read_certificate((tmp_path / "x.pem").read_bytes(), "x.pem")


def test_a_directory_that_is_not_there(place: Path) -> None:
    with pytest.raises(IdentityError, match="there is no identity in .*config/identity; make one with"):
        run("show")
    assert json.loads(run("list", "--json")) == []
    with pytest.raises(IdentityError, match="No such file or directory"):
        run("revoke", "x")


def test_a_key_that_others_can_read_is_not_used(place: Path, other: Path) -> None:
    run("create")
    run("trust", other)
    here = Identity(place)
    here.key_path.chmod(0o640)  # a group of its own may read it
    here.check_key()
    here.key_path.chmod(0o604)
    with pytest.raises(IdentityError, match="identity.pem is open to others; `chmod 600`"):
        run("show")
    (place / "trusted.json").chmod(0o620)
    with pytest.raises(IdentityError, match="trusted.json can be written by others"):
        run("list")


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff", b'{"version":1,"peers":[{}]}', b'{"version":1,"peers":[1]}', b'{"version":2,"peers":[]}'],
)
def test_a_damaged_list_is_one_line(place: Path, content: bytes) -> None:
    place.mkdir(parents=True)
    (place / "trusted.json").write_bytes(content)
    (place / "trusted.json").chmod(0o600)
    with pytest.raises(IdentityError, match=r"trusted\.json is (damaged|of version 2)") as raised:
        run("list")
    assert str(raised.value).isprintable()


def test_a_damaged_key_is_one_line(place: Path) -> None:
    run("create")
    (place / "identity.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(IdentityError, match=r"identity\.pem is damaged: .*--replace") as raised:
        run("show")
    assert str(raised.value).isprintable()


def test_how_many_may_be_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "TRUSTED_MAX", 2)
    assert TRUSTED_MAX >= 64
    here = Identity(place)
    first, second, third = (make_identity()[1] for _ in range(3))
    for certificate in (first, second, second):
        here.trust(certificate, role=Role.AGENT, server=False)
    with pytest.raises(IdentityError, match="revoke one"):
        here.trust(third, role=Role.AGENT, server=False)
    here.revoke(first.fingerprint)
    here.trust(third, role=Role.AGENT, server=False)
    assert {one.peer.fingerprint for one in here.trusted()} == {second.fingerprint, third.fingerprint}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_what_was_there(place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    run("create")
    before = run("show")

    def fail(*_args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
        with pytest.raises(IdentityError, match="Input/output error"):
            run("create", "--replace")
    assert names(place) == ["identity.pem"] and run("show") == before


def test_what_a_killed_process_left_is_no_hindrance(place: Path, other: Path) -> None:
    place.mkdir(parents=True)
    for name in ("identity.pem.new", "trusted.json.new"):
        (place / name).write_bytes(b"half")
        (place / name).chmod(0o666)
    run("create")
    run("trust", other)
    assert names(place) == ["identity.pem", "trusted.json"]
    assert mode_of(place / "identity.pem") == mode_of(place / "trusted.json") == 0o600


def test_commands_at_the_same_time_lose_nothing(place: Path) -> None:
    certificates = [make_identity()[1] for _ in range(12)]
    threads = [
        threading.Thread(target=Identity(place).trust, args=(one,), kwargs={"role": Role.AGENT, "server": False})
        for one in certificates
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.peer.fingerprint for one in Identity(place).trusted()} == {one.fingerprint for one in certificates}


def test_every_change_shows_in_the_stamp(place: Path, other: Path) -> None:
    here = Identity(place)
    stamps = [here.stamp()]
    for args in (["create"], ["trust", other], ["trust", other, "--role", "agent"], ["revoke", "other"]):
        run(*args)
        stamps.append(here.stamp())
    run("create", "--replace")
    stamps.append(here.stamp())
    assert len(set(stamps)) == len(stamps)


def test_where_an_identity_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWINDFS_IDENTITY", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory() == Path("/etc/rewindfs/identity")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    assert default_directory() == Path("/home/u/.config/rewindfs/identity")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    assert default_directory() == Path("/c/rewindfs/identity")
    monkeypatch.setenv("REWINDFS_IDENTITY", "/i")
    assert default_directory() == Path("/i")
    monkeypatch.setenv("REWINDFS_IDENTITY", "i")
    with pytest.raises(IdentityError, match="must be an absolute path"):
        default_directory()


def test_who_only_connects_or_serves_loads_no_cryptography() -> None:
    code = "import sys, replication.endpoint, replication.identity_cli; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
