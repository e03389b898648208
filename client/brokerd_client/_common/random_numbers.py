"""Random numbers from the operating system, for both faces: the arguments of a dialog.

The modules random and secrets are not imported: their import takes longer than these
functions take to run.
"""

from __future__ import annotations

import os

from brokerd_client.wire.handshake import NONCE_SIZE

__all__ = ["dedup_key", "first_id", "jitter", "nonce"]


def first_id() -> int:
    """Return a number below 2**62."""
    return int.from_bytes(os.urandom(8), "big") >> 2


def nonce() -> bytes:
    """Return NONCE_SIZE random bytes for a handshake's challenge."""
    return os.urandom(NONCE_SIZE)


def jitter() -> float:
    """Return a number in [0, 1)."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def dedup_key() -> str:
    """Return a key that no other message has."""
    return os.urandom(16).hex()
