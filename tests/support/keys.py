"""The keys of the clients in tests."""

from __future__ import annotations


def key_of(name: str) -> bytes:
    """Return the client's key. Its last word is searched for in logs and errors."""
    return f"{name}'s key is a canary".encode()
