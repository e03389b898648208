"""Decides which pending handshake gives way to a new connection, and after what time.

The room is ``limits.handshakes``. A peer keeps its place for a time, its grace, in
which it should take the next step. New connections wait in the listen queue meanwhile.
Then a peer gives way: of the origin with the most pending handshakes, the least
advanced. The grace of its origin is halved each time, and doubled when a peer is
accepted. So clients are accepted as fast as they answer. Silent connections cost the
new ones one grace in all. This module has no clock and no sockets. Source:
docs/security.md.
"""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from brokerd.net.handshake.pending import PendingConnection

__all__ = ["GRACE_S", "Admission", "Rank"]

#: Seconds that a peer has for a step of the handshake before it may have to give way.
GRACE_S: Final = 2.0
#: Most halvings of a grace; then it is a hundredth of the time that the fastest peers
#: need.
_MOST_HALVINGS: Final = 14
#: Seconds after which an origin's shortened grace is forgotten.
_FORGET_AFTER_S: Final = 60.0
#: Most origins remembered.
_REMEMBERED: Final = 10_000
#: Most origins with equally many handshakes that are searched for a handshake that
#: gives way.
_LOOKS: Final = 32


class Rank(IntEnum):
    """How far a peer has got; of one origin, the lowest rank gives way first."""

    FAILED = 0
    SILENT = 1
    JUDGED = 2
    PROVED = 3


#: To ask the enumeration itself takes some times as long.
_RANKS: Final = tuple(Rank)
_SILENT: Final = Rank.SILENT
#: Weight that a handshake adds to its origin: a peer that has proved a key counts half.
_WEIGHTS: Final = {Rank.FAILED: 2, Rank.SILENT: 2, Rank.JUDGED: 2, Rank.PROVED: 1}


class _OriginHandshakes:
    """The pending handshakes of one origin by rank, oldest first in each rank."""

    __slots__ = ("origin", "ranks", "weight")

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.ranks: list[OrderedDict[PendingConnection, None]] = [OrderedDict() for _ in _RANKS]
        self.weight = 0

    def least(self) -> PendingConnection:
        """Return the handshake that would give way.

        A peer whose answer is being judged gives way after the silent peers. Only if
        such peers outnumber the silent peers does one of them give way first. Otherwise
        wrong answers would fill the room. A client would have no time for its own
        answer.
        """
        judged, silent = self.ranks[Rank.JUDGED], self.ranks[Rank.SILENT]
        if len(judged) > len(silent) and not self.ranks[Rank.FAILED]:
            return next(iter(judged))
        return next(iter(next(filter(None, self.ranks))))


class Admission:
    """All pending handshakes, and the record of the origins.

    While there is room, no handshake gives way. They are sorted by origin from the first
    call of ``least`` on, until none is left.
    """

    def __init__(self) -> None:
        #: All handshakes, oldest first, and whether they are sorted by origin.
        self._all: dict[PendingConnection, None] = {}
        self._is_sorted = False
        self._by_origin: dict[str, _OriginHandshakes] = {}
        #: The origins of each weight, with their handshakes.
        self._by_weight: dict[int, dict[str, _OriginHandshakes]] = {}
        self._most = 0
        #: For each origin: the halvings of its grace, and the time of the last change;
        #: latest last.
        self._halvings: OrderedDict[str, tuple[int, float]] = OrderedDict()
        #: The same for all origins without a record.
        self._without_record = (0, 0.0)

    def add(self, pending: PendingConnection, now: float) -> None:
        """Add a new handshake."""
        pending.rank, pending.moved_at = _SILENT, now
        self._all[pending] = None
        if self._is_sorted:
            self._insert(pending)

    def advance(self, pending: PendingConnection, rank: Rank, now: float) -> None:
        """Record that a peer has taken a step; the time for its next step begins."""
        former = pending.rank
        pending.rank, pending.moved_at = rank, now
        if self._is_sorted:
            handshakes = self._by_origin[pending.origin]
            del handshakes.ranks[former][pending]
            handshakes.ranks[rank][pending] = None
            change = _WEIGHTS[rank] - _WEIGHTS[former]
            if change:
                self._weigh(handshakes, change)

    def remove(self, pending: PendingConnection) -> None:
        """Remove a handshake that is over."""
        del self._all[pending]
        if self._is_sorted:
            handshakes = self._by_origin[pending.origin]
            del handshakes.ranks[pending.rank][pending]
            self._weigh(handshakes, -_WEIGHTS[pending.rank])
            if not handshakes.weight:
                del self._by_origin[pending.origin]
            self._is_sorted = bool(self._all)

    def _sort(self) -> None:
        """Sort all handshakes by origin; oldest first in each rank."""
        self._is_sorted = True
        for pending in sorted(self._all, key=_moved_at):
            self._insert(pending)

    def _insert(self, pending: PendingConnection) -> None:
        """Add a handshake to those of its origin."""
        handshakes = self._by_origin.get(pending.origin)
        if handshakes is None:
            handshakes = self._by_origin[pending.origin] = _OriginHandshakes(pending.origin)
        handshakes.ranks[pending.rank][pending] = None
        self._weigh(handshakes, _WEIGHTS[pending.rank])

    def _weigh(self, handshakes: _OriginHandshakes, change: int) -> None:
        if handshakes.weight:
            peers = self._by_weight[handshakes.weight]
            del peers[handshakes.origin]
            if not peers:
                del self._by_weight[handshakes.weight]
        handshakes.weight += change
        if handshakes.weight:
            self._by_weight.setdefault(handshakes.weight, {})[handshakes.origin] = handshakes
            self._most = max(self._most, handshakes.weight)
        while self._most and self._most not in self._by_weight:
            self._most -= 1

    def least(self, now: float) -> tuple[PendingConnection | None, float]:
        """Return the handshake that gives way first, or None, and the seconds until it
        may.
        """
        if not self._is_sorted and self._all:
            self._sort()
        first: PendingConnection | None = None
        first_wait = float("inf")
        for handshakes in islice(self._by_weight.get(self._most, {}).values(), _LOOKS):
            pending = handshakes.least()
            grace = 0.0 if pending.rank is Rank.FAILED else self.grace(handshakes.origin, now)
            wait = max(0.0, pending.moved_at + grace - now)
            if wait < first_wait:
                first, first_wait = pending, wait
                if not wait:
                    break
        return first, first_wait

    # The record of the origins

    def grace(self, origin: str, now: float) -> float:
        """Return the seconds that a peer of this origin keeps its place after each
        step.
        """
        halvings, at = self._halvings.get(origin, self._without_record)
        return GRACE_S / (1 << halvings) if now - at <= _FORGET_AFTER_S else GRACE_S

    def gave_way(self, origin: str, now: float) -> None:
        """Record a peer that left unaccepted while the room was full: halve its
        origin's grace.

        If the origin has no record, the grace of all such origins is halved too. A
        flood may come from thousands of origins.
        """
        record = self._halvings.get(origin)
        if record is None:
            record = self._without_record = (_next(self._without_record, 1, now), now)
        self._note(origin, _next(record, 1, now), now)

    def got_in(self, origin: str, now: float) -> None:
        """Record a peer that has finished its handshake: double its origin's grace
        again.
        """
        if self._without_record[0]:
            self._without_record = (_next(self._without_record, -1, now), self._without_record[1])
        record = self._halvings.get(origin)
        self._note(origin, 0 if record is None else _next(record, -1, now), now)

    def _note(self, origin: str, halvings: int, now: float) -> None:
        self._halvings.pop(origin, None)
        self._halvings[origin] = (halvings, now)
        if len(self._halvings) > _REMEMBERED:
            self._halvings.popitem(last=False)


def _moved_at(pending: PendingConnection) -> float:
    return pending.moved_at


def _next(before: tuple[int, float], change: int, now: float) -> int:
    """Return the new number of halvings of a grace."""
    halvings, at = before
    return min(max((halvings if now - at <= _FORGET_AFTER_S else 0) + change, 0), _MOST_HALVINGS)
