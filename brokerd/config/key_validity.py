"""The validity of a client's keys: their states, and the time at which the last one
expires.

Only dates are compared; no clock is read here. Source of the rules:
docs/configuration.md, "keys".
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

from brokerd.config.values import ClientConfig, Key

__all__ = ["KeyState", "ending", "let_in_until", "state_of"]


class KeyState(StrEnum):
    """Whether a key is accepted at a given time."""

    VALID = "valid"
    """It is accepted."""
    NOT_YET = "not yet"
    """Its not_before is still to come."""
    EXPIRED = "expired"
    """Its not_after is past; it will not be accepted again."""


def state_of(key: Key, now: datetime) -> KeyState:
    """Return the state of the key at ``now``, a time with its zone."""
    if key.expired_at(now):
        return KeyState.EXPIRED
    return KeyState.VALID if key.valid_at(now) else KeyState.NOT_YET


def ending(clients: Iterable[ClientConfig]) -> list[ClientConfig]:
    """Return the clients that have a key with an expiry time."""
    return [client for client in clients if any(key.not_after is not None for key in client.keys)]


def let_in_until(keys: Iterable[Key], now: datetime) -> Key | None:
    """Return the key at whose ``not_after`` the client loses access.

    The result is None if access has no end, or if no key is accepted at ``now``. A key
    that begins no later than another one ends extends the access. A key that begins
    later leaves a gap, and the access ends at the gap.
    """
    windowed = sorted(keys, key=lambda key: key.not_before or now)
    last: Key | None = None
    for key in windowed:
        reached = now if last is None or last.not_after is None else last.not_after
        if key.expired_at(now) or (key.not_before is not None and key.not_before > reached):
            continue
        if key.not_after is None:
            return None
        if last is None or key.not_after > reached:
            last = key
    return last
