"""The parser of a certificate's DER, compared with a library that reads certificates."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from brokerd_client.wire.certificate import end_point, signature_hash, validity


def target(data: bytes) -> None:
    """Parse the bytes: the result equals the library's if that can read them. Otherwise
    any result or ValueError will do.
    """
    try:
        digest = signature_hash(data)
        assert end_point(data) == hashlib.new(digest, data).digest()
    except ValueError:
        digest = ""
    try:
        begin, end = validity(data)
        assert begin.tzinfo is end.tzinfo is UTC
    except ValueError:
        begin = end = datetime.max.replace(tzinfo=UTC)
    try:
        with warnings.catch_warnings():
            # It warns of what it will refuse one day.
            warnings.simplefilter("ignore")
            read = x509.load_der_x509_certificate(data)
        moments = (read.not_valid_before_utc, read.not_valid_after_utc)
    except (ValueError, x509.InvalidVersion):
        return
    assert (begin, end) == moments
    try:
        algorithm = read.signature_hash_algorithm
    except (UnsupportedAlgorithm, ValueError):
        return
    name = "sha256" if algorithm is None else algorithm.name.replace("-", "_")
    assert digest == {"md5": "sha256", "sha1": "sha256"}.get(name, name)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield certificates of the common kinds, from keys made for the purpose and
    forgotten.
    """
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fuzz")])
    begin = datetime(2024, 2, 29, 12, 30, 1, tzinfo=UTC)

    def made(key: Any, digest: Any = None, days: int = 9, scheme: Any = None) -> bytes:
        builder = x509.CertificateBuilder(
            name, name, key.public_key(), 77, begin, begin + timedelta(days=days)
        )
        return builder.sign(key, digest, rsa_padding=scheme).public_bytes(
            serialization.Encoding.DER
        )

    curve = ec.generate_private_key(ec.SECP256R1())
    for digest in (
        hashes.SHA224(),
        hashes.SHA256(),
        hashes.SHA384(),
        hashes.SHA512(),
        hashes.SHA3_256(),
    ):
        yield f"ec-{digest.name}", made(curve, digest)
    yield "ec-after-2050", made(curve, hashes.SHA256(), 12000)
    yield "ed25519", made(ed25519.Ed25519PrivateKey.generate())
    key = rsa.generate_private_key(65537, 1024)
    yield "rsa-sha256", made(key, hashes.SHA256())
    yield "rsa-sha512", made(key, hashes.SHA512())
    for digest in (hashes.SHA256(), hashes.SHA384()):
        yield f"pss-{digest.name}", made(key, digest, 9, padding.PSS(padding.MGF1(digest), 32))
    whole = made(curve, hashes.SHA256())
    for cut in (0, 1, 2, 4, 30, len(whole) - 1):
        yield f"cut-{cut}", whole[:cut]
    yield "no-length", b"\x30\x80" + whole[4:]
    yield "long-length", b"\x30\x85\0" + whole[2:]
    yield "more", whole + b"\0\0"
