"""The parts of a daemon that its monitor reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from structlog.typing import FilteringBoundLogger

from brokerd.config.model import Config
from brokerd.core.broker import Broker
from brokerd.net.server import Server

__all__ = ["ReloadCounts", "Sources"]


@dataclass(slots=True)
class ReloadCounts:
    """The results of a daemon's reloads.

    accepted_at: when the configuration in use was taken over, in seconds since the
        epoch.
    results: the number of reloads that were ``accepted``, and that were ``refused``.
    was_refused: whether the last reload was refused.
    """

    accepted_at: float
    results: Counter[str] = field(default_factory=Counter)
    was_refused: bool = False

    def accept(self, now_wall: float) -> None:
        """Count a reload that was accepted now."""
        self.results["accepted"] += 1
        self.was_refused = False
        self.accepted_at = now_wall

    def refuse(self) -> None:
        """Count a reload that was refused."""
        self.results["refused"] += 1
        self.was_refused = True


@dataclass(slots=True, eq=False)
class Sources:
    """The parts of a daemon that its monitor reads.

    config: returns the configuration in use.
    server: returns the server, once the daemon has started.
    not_ready: returns the reason why no new client should be sent here, or "".
    cluster_failure: returns why no other host can be reached, or "".
    lost_lines: returns the number of log lines that could not be written.
    key_expiries: returns, by client, the time from which its keys can no longer
        authenticate it. Only clients whose keys have an end are included.
    """

    broker: Broker
    log: FilteringBoundLogger
    reloads: ReloadCounts
    config: Callable[[], Config]
    server: Callable[[], Server]
    not_ready: Callable[[], str]
    cluster_failure: Callable[[], str]
    key_expiries: Callable[[], dict[str, datetime]]
    lost_lines: Callable[[], int]
