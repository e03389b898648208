"""The time of the current turn, for mailboxes."""

from __future__ import annotations

__all__ = ["Clock"]


class Clock:
    """The time, as the network layer has told it.

    Attributes:
        now: Seconds of a monotonic clock.
        wall: Seconds since the epoch.
    """

    __slots__ = ("now", "wall")

    def __init__(self, wall: float = 0.0) -> None:
        self.now = 0.0
        self.wall = wall

    def set(self, now: float, wall: float) -> None:
        """Set both times."""
        self.now = now
        self.wall = wall

    def advance(self, now: float) -> None:
        """Set the monotonic time, unless it is earlier; the wall clock moves as much."""
        if now > self.now:
            self.wall += now - self.now
            self.now = now

    def monotonic(self, wall: float) -> float:
        """Return the monotonic time of a wall clock's time."""
        return self.now + wall - self.wall
