"""Keys and certificates: made, and read where a person gives one. A process that only serves or connects needs none of
this: it compares certificates byte by byte."""

from __future__ import annotations

import base64
import datetime
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replication.identity import FINGERPRINT_PREFIX, Fingerprint, IdentityError

NOT_BEFORE: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
NOT_AFTER: Final = datetime.datetime(2125, 1, 1, tzinfo=datetime.UTC)
"""A pinned key ends when it is revoked, not on a day; and a clock that is wrong must not break the link."""
PEM_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate that a peer can be pinned by."""

    pem: str
    fingerprint: Fingerprint


def make_identity() -> tuple[bytes, Certificate]:
    """A new Ed25519 key with its self-signed certificate, both in PEM, and that certificate."""
    key = Ed25519PrivateKey.generate()
    # Nothing about the machine, for whoever knocks at a TLS port is shown it; and a subject of its own, for that is
    # what the TLS library looks a trusted certificate up by.
    name = _subject(_fingerprint(key.public_key()))
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
        # No authority: a peer whose key is trusted can vouch for nobody else.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, algorithm=None)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    made = _certificate(certificate)
    return private + made.pem.encode(), made


def read_certificate(pem: bytes, where: str) -> Certificate:
    """The one certificate in `pem`, which a person gave as `where`; text around it is ignored. Raises IdentityError."""
    if b"PRIVATE KEY-----" in pem:
        raise IdentityError(
            f"{where} holds a private key, which must not leave its machine; give what `rewindfs identity show` prints"
        )
    if len(pem) > PEM_BYTES_MAX:
        raise IdentityError(f"{where} is too large to be a certificate")
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise IdentityError(
            f"{where} holds no certificate in PEM; give what `rewindfs identity show` prints over there"
        ) from error
    if len(found) != 1:
        raise IdentityError(f"{where} holds {len(found)} certificates; give one at a time")
    return _checked(found[0], where)


def own_certificate(pem: bytes, where: str) -> Certificate:
    """The certificate in an identity, which stands behind its private key. Raises IdentityError."""
    try:
        return _certificate(x509.load_pem_x509_certificate(pem))
    except ValueError as error:
        raise IdentityError(
            f"{where} is damaged: {error}; restore it, or make a new key with `rewindfs identity create --replace`"
        ) from error


def _checked(certificate: x509.Certificate, where: str) -> Certificate:
    """Refuses at once what the TLS library would refuse at each connection, without a word about why."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"{where} is not signed by its own key, so it cannot be pinned; make one with `rewindfs identity create`"
        ) from error
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise IdentityError(
            f"{where} is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d} only, and today is {now:%Y-%m-%d}"
        )
    key = certificate.public_key()
    if not isinstance(key, Ed25519PublicKey) or certificate.subject != _subject(_fingerprint(key)):
        raise IdentityError(f"{where} is of another form; make one with `rewindfs identity create`")
    return _certificate(certificate)


def _certificate(certificate: x509.Certificate) -> Certificate:
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    return Certificate(pem, _fingerprint(certificate.public_key()))


def _fingerprint(key: CertificatePublicKeyTypes) -> Fingerprint:
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = base64.b64encode(hashlib.sha256(encoded).digest()).rstrip(b"=").decode()
    return Fingerprint(f"{FINGERPRINT_PREFIX}{digest}")


def _subject(fingerprint: Fingerprint) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, fingerprint)])
