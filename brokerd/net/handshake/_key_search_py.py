"""Finds the key that made an HMAC-SHA256: the reference for ``_key_search_c.pyx``."""

from __future__ import annotations

import hmac
from typing import Final

__all__ = ["NAME", "SLICE", "find", "prepare"]

NAME: Final[str] = "python"
#: Keys tried in one slice of a search: some 60 microseconds of work.
SLICE: Final[int] = 32


def prepare(key: bytes) -> bytes:
    """Return a key in the form that ``find`` needs; as secret as the key."""
    return key


def find(prepared: list[bytes], start: int, stop: int, message: bytes, mac: bytes) -> int:
    """Return the position of the first key, in a part of a list, that made a MAC, or -1.

    Args:
        prepared: What ``prepare`` returned for each key.
        message: The input of the MAC, at most 256 bytes.
    """
    # A search can try a thousand keys: look up each name only once.
    are_equal, make_mac = hmac.compare_digest, hmac.digest
    for position in range(start, min(stop, len(prepared))):
        if are_equal(make_mac(prepared[position], message, "sha256"), mac):
            return position
    return -1
