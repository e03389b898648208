"""The keys of the clients in tests."""

from __future__ import annotations


def key_of(name: str) -> bytes:
    """Return the client's key; logs and errors are searched for its last word."""
    return f"{name}'s key is a canary".encode()
