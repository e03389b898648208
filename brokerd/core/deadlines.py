"""Deadlines of requests that wait for an answer.

Adding and removing a deadline costs the same, however many there are. Time is divided
into slots. A deadline is reported when its slot is over: up to one slot late, and never
early.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heapify, heappop, heappush
from math import ceil
from typing import Any, Final

__all__ = ["Deadlines"]

#: Time slots per second.
_SLOTS: Final = 32
#: Most entries of the heap beyond twice the slots in use; with more, the heap is
#: rebuilt.
_STALE: Final = 64


class Deadlines:
    """Keys, each with a deadline in seconds on the clock of ``now``."""

    def __init__(self) -> None:
        self._slots: dict[int, dict[Hashable, None]] = {}
        self._heap: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._slots)

    def add(self, deadline: float, key: Hashable) -> None:
        """Add a deadline."""
        number = ceil(deadline * _SLOTS)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = {}
            heappush(self._heap, number)
        slot[key] = None

    def discard(self, deadline: float, key: Hashable) -> None:
        """Remove a deadline, if it is still there."""
        number = ceil(deadline * _SLOTS)
        slot = self._slots.get(number)
        if slot is not None:
            slot.pop(key, None)
            if not slot:
                del self._slots[number]
                if len(self._heap) > _STALE + 2 * len(self._slots):
                    self._heap = list(self._slots)
                    heapify(self._heap)

    @property
    def next(self) -> float | None:
        """The time at which ``due`` returns a key; None without any deadline."""
        while self._heap and self._heap[0] not in self._slots:
            heappop(self._heap)
        return self._heap[0] / _SLOTS if self._heap else None

    def due(self, now: float, limit: int) -> list[Any]:
        """Remove and return up to ``limit`` keys whose slot is over."""
        keys: list[Any] = []
        while len(keys) < limit and (earliest := self.next) is not None and earliest <= now:
            number = self._heap[0]
            slot = self._slots[number]
            while slot and len(keys) < limit:
                keys.append(slot.popitem()[0])
            if not slot:
                del self._slots[number]
        return keys
