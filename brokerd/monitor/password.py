"""The check of the monitor's password, by HTTP's Basic authentication, without I/O."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

__all__ = ["is_right"]


def is_right(header: str, password: bytes) -> bool:
    """Return whether an Authorization header has the password, with any user name.

    The time that this takes tells nothing of the password.
    """
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(encoded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(password).digest())
