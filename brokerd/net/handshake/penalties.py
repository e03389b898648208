"""Penalties of failed handshakes: each further failure of an origin is answered a
little later.

No penalty locks a peer out for good. Failures are counted by origin, which a peer
can't change at will. This module has no clock and no sockets: ``now`` is in seconds, on
any clock that does not go back. Source: docs/security.md.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

__all__ = ["Failures", "origin_of"]

#: Failures of one origin before its answers are delayed.
_FREE_FAILURES: Final = 10
_DELAY_STEP: Final = 0.05
_LONGEST_DELAY: Final = 1.0
#: Seconds after which the failures of an origin are forgotten.
_FORGET_AFTER: Final = 60.0
_REMEMBERED: Final = 10_000


class Failures:
    """The number of failures of each origin and the time of the last one.

    At most _REMEMBERED origins are kept, the latest last.
    """

    def __init__(self) -> None:
        self._of: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def count(self, origin: str, now: float) -> None:
        """Record one more failure."""
        count, _ = self._of.pop(origin, (0, 0.0))
        self._of[origin] = (count + 1, now)
        if len(self._of) > _REMEMBERED:
            self._of.popitem(last=False)

    def forgive(self, origin: str) -> None:
        """Forget the failures of an origin, because a peer there has proved its
        identity.
        """
        self._of.pop(origin, None)

    def delay(self, origin: str, now: float) -> float:
        """Return the seconds until one more failure may be sent to this origin; 0 means
        now.
        """
        count, at = self._of.get(origin, (0, 0.0))
        if now - at > _FORGET_AFTER:
            self.forgive(origin)
            count = 0
        return min(max(count - _FREE_FAILURES + 1, 0) * _DELAY_STEP, _LONGEST_DELAY)

    def ages(self, now: float) -> list[tuple[str, int, float]]:
        """Return (origin, failures, seconds since the last one) of each remembered
        origin.
        """
        return [(origin, count, now - at) for origin, (count, at) in self._of.items()]

    def remember(self, ages: Iterable[tuple[str, int, float]], now: float) -> None:
        """Restore the failures that ``ages`` of another process returned."""
        for origin, count, age in ages:
            self._of[origin] = (count, now - age)


def origin_of(peer: object, uid: int | None) -> str:
    """Return the origin of a peer: its user, its IPv4 address, or its IPv6 network of
    64 bits.

    The owner of one IPv6 address has its whole /64 to choose from (RFC 4291, 2.5.4).
    systemd makes sockets for both kinds of addresses. An IPv4 address that arrives
    there counts as IPv4 (2.5.5.2).

    Args:
        peer: The address that accept() returns.
    """
    if uid is not None:
        return f"uid {uid}"
    if isinstance(peer, tuple) and ":" in str(peer[0]):
        address = ipaddress.IPv6Address(peer[0])
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"
    return str(peer[0]) if isinstance(peer, tuple) else "unix"
