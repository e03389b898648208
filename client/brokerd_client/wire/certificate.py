"""Reading of those fields of an X.509 certificate that the ssl module does not expose.

The module walks through the certificate's DER. Sources: RFC 5280, 4.1 (the
certificate); RFC 4055 (RSASSA-PSS); RFC 5929, 4 (tls-server-end-point). It verifies
nothing: the TLS library has already read, or verified, the certificates.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from typing import Final

__all__ = ["end_point", "signature_hash", "validity"]

_OID: Final = 0x06
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18
_CONTEXT_0: Final = 0xA0

_PSS: Final = "2a864886f70d01010a"
#: The digest to use by algorithm identifier: the bytes of the OID in hexadecimal. For
#: MD5 and SHA-1 it is SHA-256, as RFC 5929 says. So it is for all others that are not
#: listed: Ed25519 and Ed448 name no digest.
_HASHES: Final = {
    "2a864886f70d01010c": "sha384",  # sha384WithRSAEncryption
    "2a864886f70d01010d": "sha512",  # sha512WithRSAEncryption
    "2a864886f70d01010e": "sha224",  # sha224WithRSAEncryption
    "2a8648ce3d040301": "sha224",  # ecdsa-with-SHA224
    "2a8648ce3d040303": "sha384",  # ecdsa-with-SHA384
    "2a8648ce3d040304": "sha512",  # ecdsa-with-SHA512
    "608648016503040202": "sha384",  # sha384, in the parameters of RSASSA-PSS
    "608648016503040203": "sha512",  # sha512
    "608648016503040204": "sha224",  # sha224
    "608648016503040205": "sha512_224",  # sha512-224
    "608648016503040206": "sha512_256",  # sha512-256
    "608648016503040207": "sha3_224",  # sha3-224
    "608648016503040208": "sha3_256",  # sha3-256
    "608648016503040209": "sha3_384",  # sha3-384
    "60864801650304020a": "sha3_512",  # sha3-512
    "608648016503040301": "sha224",  # dsa-with-sha224
    "608648016503040303": "sha384",  # dsa-with-sha384
    "608648016503040304": "sha512",  # dsa-with-sha512
    "608648016503040309": "sha3_224",  # ecdsa-with-SHA3-224
    "60864801650304030a": "sha3_256",  # ecdsa-with-SHA3-256
    "60864801650304030b": "sha3_384",  # ecdsa-with-SHA3-384
    "60864801650304030c": "sha3_512",  # ecdsa-with-SHA3-512
    "60864801650304030d": "sha3_224",  # rsassa-pkcs1-v1_5-with-sha3-224
    "60864801650304030e": "sha3_256",  # rsassa-pkcs1-v1_5-with-sha3-256
    "60864801650304030f": "sha3_384",  # rsassa-pkcs1-v1_5-with-sha3-384
    "608648016503040310": "sha3_512",  # rsassa-pkcs1-v1_5-with-sha3-512
}


def end_point(der: bytes) -> bytes:
    """Return the channel binding data ``tls-server-end-point`` for a listener's
    certificate. Raises ValueError.
    """
    return hashlib.new(signature_hash(der), der).digest()


def signature_hash(der: bytes) -> str:
    """Return hashlib's name of the digest to use with a certificate: its signature's
    digest.

    Raises ValueError.
    """
    algorithm = _fields(_fields(_fields(der)[0][1], 2)[1][1])
    if algorithm[0][0] != _OID:
        raise ValueError("the certificate's signature names no algorithm")
    name = algorithm[0][1].hex()
    if name == _PSS:
        name = _pss_hash(algorithm[1:])
    return _HASHES.get(name, "sha256")


def validity(der: bytes) -> tuple[datetime, datetime]:
    """Return (not before, not after). Raises ValueError."""
    tbs = _fields(_fields(der)[0][1])[0][1]
    # A version 1 certificate has no version [0]; then serial number, signature, issuer,
    # validity.
    position = 4 if tbs[:1] == bytes([_CONTEXT_0]) else 3
    not_before, not_after, *_ = _fields(_fields(tbs, position + 1)[position][1], 2)
    return _moment(*not_before), _moment(*not_after)


def _pss_hash(parameters: list[tuple[int, bytes]]) -> str:
    """Return the OID of the digest in RSASSA-PSS parameters, "" for the default, SHA-1."""
    for tag, content in _fields(parameters[0][1]) if parameters else ():
        if tag == _CONTEXT_0:
            return _fields(_fields(content)[0][1])[0][1].hex()
    return ""


def _moment(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        # RFC 5280, 4.1.2.5.1: the years 50 to 99 are 1950 to 1999.
        text = ("19" if text >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate's validity is not a valid time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)


def _fields(data: bytes, min_count: int = 1) -> list[tuple[int, bytes]]:
    """Return (tag, content) of every element.

    Raises ValueError if there are fewer than ``min_count``, or the data is not valid
    DER.
    """
    elements: list[tuple[int, bytes]] = []
    position = 0
    while position < len(data):
        if position + 2 > len(data):
            raise ValueError("the certificate is truncated")
        tag, size = data[position], data[position + 1]
        position += 2
        if size & 0x80:
            width = size & 0x7F
            if not 1 <= width <= 4:
                raise ValueError("the certificate has an element whose length is not valid")
            size = int.from_bytes(data[position : position + width], "big")
            position += width
        if position + size > len(data):
            raise ValueError("the certificate is truncated")
        elements.append((tag, data[position : position + size]))
        position += size
    if len(elements) < min_count:
        raise ValueError("the certificate lacks a required element")
    return elements
