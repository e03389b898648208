"""The digest and the validity read from a certificate's DER, for every common kind."""

from __future__ import annotations

import contextlib
import hashlib
import random
import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa

from brokerd_client.wire import certificate

UTC = timezone.utc  # noqa: UP017 - datetime.UTC is Python 3.11's
BEGIN = datetime(2024, 2, 29, 12, 30, 1, tzinfo=UTC)


def made(key: Any, digest: Any, end: datetime = BEGIN + timedelta(days=9), **more: Any) -> bytes:
    """Return a certificate in DER, signed by its own key."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test " * 10)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 2**159 - 1, BEGIN, end)
    return builder.sign(key, digest, **more).public_bytes(serialization.Encoding.DER)


RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("key", "digest", "expected"),
    [
        (RSA, hashes.SHA224(), "sha224"),
        (RSA, hashes.SHA256(), "sha256"),
        (RSA, hashes.SHA384(), "sha384"),
        (RSA, hashes.SHA512(), "sha512"),
        (RSA, hashes.SHA3_224(), "sha3_224"),
        (RSA, hashes.SHA3_384(), "sha3_384"),
        (EC, hashes.SHA224(), "sha224"),
        (EC, hashes.SHA256(), "sha256"),
        (EC, hashes.SHA384(), "sha384"),
        (EC, hashes.SHA512(), "sha512"),
        (EC, hashes.SHA3_224(), "sha3_224"),
        (EC, hashes.SHA3_256(), "sha3_256"),
        (ed25519.Ed25519PrivateKey.generate(), None, "sha256"),
        (ed448.Ed448PrivateKey.generate(), None, "sha256"),
    ],
)
def test_certificate_digest_is_that_of_signature(key: Any, digest: Any, expected: str) -> None:
    """The digest of the signature is used; SHA-256 for signatures that name none."""
    der = made(key, digest)

    assert certificate.signature_hash(der) == expected
    assert certificate.end_point(der) == hashlib.new(expected, der).digest()


@pytest.mark.parametrize(
    ("digest", "expected"), [(hashes.SHA256(), "sha256"), (hashes.SHA384(), "sha384")]
)
def test_certificate_digest_of_pss_is_read_from_parameters(digest: Any, expected: str) -> None:
    """RSASSA-PSS names its digest in the algorithm's parameters."""
    scheme = padding.PSS(padding.MGF1(digest), digest.digest_size)

    assert certificate.signature_hash(made(RSA, digest, rsa_padding=scheme)) == expected


def element(tag: int, *content: bytes) -> bytes:
    whole = b"".join(content)
    return bytes([tag, len(whole)]) + whole


def bare(*algorithm: bytes) -> bytes:
    """Return DER with the outer form of a certificate and nothing in it."""
    return element(
        0x30, element(0x30, b"\x02\x01\x01"), element(0x30, *algorithm), element(3, b"\0")
    )


PSS = element(6, bytes.fromhex("2a864886f70d01010a"))


@pytest.mark.parametrize(
    "algorithm",
    [
        (element(6, bytes.fromhex("2a864886f70d010104")),),
        (element(6, bytes.fromhex("2a864886f70d010105")), b"\5\0"),
        (PSS, element(0x30, element(0xA2, b"\2\1\x20"))),
        (PSS,),
    ],
    ids=["md5", "sha1", "PSS with SHA-1 by default", "PSS without parameters"],
)
def test_certificate_weak_digest_is_replaced_by_sha256(algorithm: tuple[bytes, ...]) -> None:
    """RFC 5929: MD5 and SHA-1 are replaced by SHA-256."""
    assert certificate.signature_hash(bare(*algorithm)) == "sha256"


def test_certificate_digest_agrees_with_openssl(tmp_path: Path) -> None:
    """The digest is the one that openssl names in the certificate's text."""
    der = made(EC, hashes.SHA384())
    (tmp_path / "c.der").write_bytes(der)
    try:
        text = subprocess.run(
            [
                "openssl",
                "x509",
                "-inform",
                "DER",
                "-in",
                str(tmp_path / "c.der"),
                "-noout",
                "-text",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout
    except FileNotFoundError:
        pytest.skip("there is no openssl command")
    assert "ecdsa-with-SHA384" in text
    assert certificate.signature_hash(der) == "sha384"


@pytest.mark.parametrize("end", [BEGIN + timedelta(days=9), datetime(2051, 1, 1, tzinfo=UTC)])
def test_certificate_validity_in_both_time_forms_is_read(end: datetime) -> None:
    """Times up to 2049 have two digits for the year, later ones four."""
    assert certificate.validity(made(EC, hashes.SHA256(), end)) == (BEGIN, end)


def test_certificate_validity_of_1970_and_version_1_is_read() -> None:
    """A year of 50 or more belongs to the 20th century. A certificate of version 1
    holds no version number.
    """
    times = element(0x30, element(0x17, b"700101000000Z"), element(0x18, b"20300101000000Z"))
    tbs = element(0x30, element(2, b"\1"), element(0x30, b"\5\0"), element(0x30, b"\5\0"), times)

    begin, end = certificate.validity(element(0x30, tbs))

    assert (begin.year, end.year) == (1970, 2030)


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"\x30",
        b"\x30\x05\0",
        b"\x30\x80\0\0",
        b"\x30\x85\1\1\1\1\1",
        b"\x30\x82\1",
        bare(b"\5\0"),
    ],
)
def test_certificate_damaged_raises_value_error(der: bytes) -> None:
    """Bytes that are not a valid certificate raise ValueError."""
    with pytest.raises(ValueError, match="certificate"):
        certificate.signature_hash(der)


def test_certificate_validity_without_time_raises_value_error() -> None:
    """Another type in the place of the time is refused."""
    times = element(0x30, element(4, b"700101000000Z"), element(0x18, b"20300101000000Z"))
    tbs = element(0x30, element(2, b"\1"), element(0x30, b"\5\0"), element(0x30, b"\5\0"), times)

    with pytest.raises(ValueError, match="not a valid time"):
        certificate.validity(element(0x30, tbs))


def test_certificate_random_damage_raises_at_most_value_error() -> None:
    """Whichever bytes are changed, reading raises nothing but a ValueError."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = made(EC, hashes.SHA256())
    for _ in range(3000):
        der = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            der[rng.randrange(len(der))] = rng.randrange(256)
        for read in (certificate.end_point, certificate.validity):
            with contextlib.suppress(ValueError):
                read(bytes(der[: rng.choice((len(der), rng.randrange(len(der))))]))
