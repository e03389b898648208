"""Facts of the broker as a whole, and not of one client."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from brokerd.core.changes import Changes

__all__ = ["CoreLimits", "Status"]


class CoreLimits(NamedTuple):
    """The core's ``limits:``.

    Attributes:
        max_message: Payload bytes.
        wait_timeout: Seconds.
        channels: Most channels of all clients.
        open_timeout: Seconds.
    """

    max_message: int = 16 * 1024 * 1024
    wait_timeout: float = 30.0
    channels: int = 1000
    open_timeout: float = 10.0


@dataclass(slots=True)
class Status:
    """Facts of the broker as a whole.

    Attributes:
        limits: The configured limits.
        version: The version of the daemon.
        routing: The name of the routing loop.
        started_at: When the first process started, in seconds since the epoch.
        generation: The number of the rules in force; an older route cache is stale.
        draining: Whether a drain has begun.
        upgrades: Live upgrades so far, that is processes that served before this one.
        totals: The counters of closed sessions, summed.
        presence_changes: How often a client has come online or gone offline.
        changes: The changes since an upgrade began to copy the state; None without an
            upgrade.
    """

    limits: CoreLimits
    version: str
    routing: str
    started_at: float
    generation: int = 1
    draining: bool = False
    upgrades: int = 0
    totals: Counter[str] = field(default_factory=Counter)
    presence_changes: int = 0
    changes: Changes | None = None
