"""What the network layer counts beside its work: how handshakes ended, and what should never happen.

Nothing here is touched for a message. The core keeps its own counters where its bytes move.
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
    """It answered with no client's key, or with one that may not be used here and now; or TLS failed."""
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

    handshakes: by how they ended. pauses: times that no connection could be accepted for want of descriptors.
    bugs: connections given up over a bug of ours.
    """

    handshakes: Counter[HandshakeOutcome] = field(default_factory=Counter)
    pauses: int = 0
    bugs: int = 0

    def values(self) -> dict[str, dict[str, int]]:
        """Return all of it as plain values, for another process."""
        handshakes = {outcome.value: count for outcome, count in self.handshakes.items()}
        return {"handshakes": handshakes, "others": {"pauses": self.pauses, "bugs": self.bugs}}

    def go_on_from(self, values: dict[str, dict[str, int]]) -> None:
        """Count on from what ``values`` of another process returned; what it did not count is 0.

        Raises BadSnapshot for what can't be that; then nothing has changed.
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
