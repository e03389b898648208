"""The log of those who were turned away: each by itself while they are few, counted while they are many.

A stranger can knock thousands of times a second. A line for each would cost more than turning him away, and
bury the others.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from brokerd.net.door import Knock
    from brokerd.net.server import Log

__all__ = ["Refusals"]

#: Refusals that have a line of their own, within one period.
_LINES: Final = 50
_PERIOD: Final = 1.0


class Refusals:
    """Logs refusals; keeps a timer only while there were some."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self.log = log
        self._loop = loop
        self._lines = 0
        self._counted: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, knock: Knock, reason: str) -> None:
        """Log that a connection was turned away, now or as one of many."""
        if self._timer is None:
            self._timer = self._loop.call_later(_PERIOD, self._end_period)
        self._lines += 1
        if self._lines > _LINES:
            self._counted[reason] += 1
            return
        client = knock.credential.client.name if knock.credential is not None else None
        fields = {} if client is None else {"name": client}
        self.log.warning("client.refused", reason=reason, peer=knock.peer, listener=knock.listener, **fields)

    def close(self) -> None:
        """Log what was only counted until now."""
        if self._timer is not None:
            self._timer.cancel()
            self._end_period()

    def _end_period(self) -> None:
        self._timer = None
        self._lines = 0
        if self._counted:
            counted, self._counted = self._counted, Counter()
            self.log.warning("client.refused_more", count=counted.total(), reasons=dict(counted.most_common(5)))
