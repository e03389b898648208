"""Random numbers, all from the operating system: what a dialog takes as arguments, for both faces.

The modules random and secrets are not imported: they take longer to import than everything here takes to run.
"""

from __future__ import annotations

import os

from brokerd_client.wire.handshake import NONCE_SIZE

__all__ = ["first_id", "jitter", "nonce"]


def first_id() -> int:
    """Return a number below 2**62."""
    return int.from_bytes(os.urandom(8), "big") >> 2


def nonce() -> bytes:
    """Return what a handshake's challenge consists of."""
    return os.urandom(NONCE_SIZE)


def jitter() -> float:
    """Return a number in [0, 1)."""
    return int.from_bytes(os.urandom(4), "big") / 2**32
