"""Counters of the network layer: how handshakes ended, and events that should never
happen.

Routing a message touches none of them. The core has its own counters where it moves
bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from brokerd.core.snapshot_check import BadSnapshot, check_counts

__all__ = ["Counters", "HandshakeOutcome"]


class HandshakeOutcome(StrEnum):
    """How a handshake ended."""

    ACCEPTED = "accepted"
    """The peer proved who it is and was let in."""
    REJECTED = "rejected"
    """It answered with no client's key, or with one that may not be used here and now;
    or TLS failed.
    """
    REFUSED = "refused"
    """It may have been right, and there was no room for it, or the broker was stopping."""
    MALFORMED = "malformed"
    """What it said was no handshake."""
    TIMEOUT = "timeout"
    """It had not finished within ``limits.handshake_timeout``."""
    LOST = "lost"
    """It closed, or its connection broke, before it had proved anything."""
    LEFT = "left"
    """It closed without having sent a byte, as health checks do."""


@dataclass(slots=True)
class Counters:
    """Counters of one server since the broker started.

    handshakes: number of handshakes by outcome.
    pauses: times that the system had no descriptor for another connection.
    bugs: connections closed because of a bug in the broker.
    """

    handshakes: Counter[HandshakeOutcome] = field(default_factory=Counter)
    pauses: int = 0
    bugs: int = 0

    def values(self) -> dict[str, dict[str, int]]:
        """Return all counters as plain values, for another process."""
        handshakes = {outcome.value: count for outcome, count in self.handshakes.items()}
        return {"handshakes": handshakes, "others": {"pauses": self.pauses, "bugs": self.bugs}}

    def go_on_from(self, values: dict[str, dict[str, int]]) -> None:
        """Add the counts that ``values`` of another process returned; a missing count
        is 0.

        Raises BadSnapshot for an invalid argument; then nothing has changed.
        """
        if not isinstance(values, dict):
            raise BadSnapshot("tally is no object")
        handshakes, others = values.get("handshakes", {}), values.get("others", {})
        check_counts(handshakes, "tally.handshakes")
        check_counts(others, "tally.others")
        for outcome in HandshakeOutcome:
            self.handshakes[outcome] += handshakes.get(outcome.value, 0)
        self.pauses += others.get("pauses", 0)
        self.bugs += others.get("bugs", 0)
