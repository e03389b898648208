"""The current sender's turn: how much of the broker's work it may cause."""

from __future__ import annotations

__all__ = ["Turn"]


class Turn:
    """The turn of the sender that is being read from.

    budget: slow-path frames that the sender may still have handled in this turn;
        negative for no limit. A slow-path frame takes a thousand times as long as one
        that stays in the routing loop.
    """

    __slots__ = ("budget",)

    def __init__(self) -> None:
        self.budget = -1

    def charge(self, count: int) -> None:
        """Charge ``count`` more frames to the current sender's budget."""
        if self.budget > 0:
            self.budget = max(0, self.budget - count)

    def end(self) -> None:
        """Leave the rest of the current sender's frames to its next turn."""
        self.budget = min(self.budget, 0)
