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

    # Enum's own hash is a method in Python.
    __hash__ = str.__hash__

    ACCEPTED = "accepted"
    """The peer proved its identity and was accepted."""
    REJECTED = "rejected"
    """The peer's answer was made with no client's key, or with a key that may not be
    used here and now; or TLS failed.
    """
    REFUSED = "refused"
    """There was no room for the connection, or the broker was stopping."""
    MALFORMED = "malformed"
    """The peer's bytes were not a handshake."""
    TIMEOUT = "timeout"
    """The handshake had not finished within ``limits.handshake_timeout``."""
    LOST = "lost"
    """The connection ended before the peer had proved its identity."""
    LEFT = "left"
    """The peer closed without having sent a byte, as health checks do."""


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
            raise BadSnapshot("tally is not an object")
        handshakes, others = values.get("handshakes", {}), values.get("others", {})
        check_counts(handshakes, "tally.handshakes")
        check_counts(others, "tally.others")
        for outcome in HandshakeOutcome:
            self.handshakes[outcome] += handshakes.get(outcome.value, 0)
        self.pauses += others.get("pauses", 0)
        self.bugs += others.get("bugs", 0)
