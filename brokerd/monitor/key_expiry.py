"""Key expiry for the metrics: for clients, and for single keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from brokerd.config.model import Config

__all__ = ["Expiry", "ends_of_keys", "expiry_of"]


@dataclass(frozen=True, slots=True)
class Expiry:
    """Clients and the ends of their last keys, in seconds since the epoch.

    Attributes:
        expired: How many clients can no longer connect.
        next: When the next client can no longer connect, or None.
    """

    expired: int
    next: float | None


def expiry_of(ends: Mapping[str, datetime], now: float) -> Expiry:
    """Return the expiry of clients. ends: by client, when its last key expires."""
    moments = [end.timestamp() for end in ends.values()]
    coming = [moment for moment in moments if moment >= now]
    return Expiry(len(moments) - len(coming), min(coming, default=None))


def ends_of_keys(config: Config) -> list[tuple[str, str, float]]:
    """Return (client, id of the key, end) for every key with an end; slow with many
    keys.
    """
    return [
        (client.name, key.key_id, key.not_after.timestamp())
        for client in config.clients.values()
        for key in client.keys
        if key.not_after is not None
    ]
