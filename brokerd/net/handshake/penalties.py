"""Who has failed at the door lately: each further failure is told a little later, and none locks anybody out for good.

Counted by origin: what a stranger can't change at will. No clock and no sockets here: ``now`` is in seconds, on any
clock that does not go back. Source: docs/security.md.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

__all__ = ["Failures", "origin_of"]

#: Failures an origin may have before its answers are slowed.
_FREE_FAILURES: Final = 10
_DELAY_STEP: Final = 0.05
_LONGEST_DELAY: Final = 1.0
#: Failures are forgotten after this many seconds.
_FORGET_AFTER: Final = 60.0
_REMEMBERED: Final = 10_000


class Failures:
    """The failures of each origin, and when its last one was; of so many origins, the latest last."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, origin: str, now: float) -> None:
        """Note one more failure."""
        count, _ = self._of.pop(origin, (0, 0.0))
        self._of[origin] = (count + 1, now)
        if len(self._of) > _REMEMBERED:
            self._of.popitem(last=False)

    def forgive(self, origin: str) -> None:
        """Forget its failures: it has proved who it is."""
        self._of.pop(origin, None)

    def delay(self, origin: str, now: float) -> float:
        """Return after how many seconds it may be told of one more failure; 0 for at once."""
        count, at = self._of.get(origin, (0, 0.0))
        if now - at > _FORGET_AFTER:
            self.forgive(origin)
            count = 0
        return min(max(count - _FREE_FAILURES + 1, 0) * _DELAY_STEP, _LONGEST_DELAY)

    def ages(self, now: float) -> list[tuple[str, int, float]]:
        """Return (origin, failures, seconds since the last one) of whoever failed lately."""
        return [(origin, count, now - at) for origin, (count, at) in self._of.items()]

    def remember(self, ages: Iterable[tuple[str, int, float]], now: float) -> None:
        """Take over what ``ages`` of another process returned."""
        for origin, count, age in ages:
            self._of[origin] = (count, now - age)


def origin_of(peer: object, uid: int | None) -> str:
    """Return by what a peer's failures are counted: its user, its IPv4 address, or its IPv6 network of 64 bits.

    Whoever has one IPv6 address has its whole /64 to choose from (RFC 4291, 2.5.4). An IPv4 address that came to a
    socket for both kinds, as systemd makes them, counts as what it is (2.5.5.2). peer: as accept() gives it.
    """
    if uid is not None:
        return f"uid {uid}"
    if isinstance(peer, tuple) and ":" in str(peer[0]):
        address = ipaddress.IPv6Address(peer[0])
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"
    return str(peer[0]) if isinstance(peer, tuple) else "unix"
