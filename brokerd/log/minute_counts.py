"""Events that are logged at most once a minute for the same parties, with their number.

The first event is logged at once, so that a person who looks finds it. Events of the
next minute are counted, and logged when it is over. The number of parties that are
counted separately is bounded. The module opens no file: its line goes to the log.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    import asyncio

    from structlog.typing import FilteringBoundLogger

__all__ = ["MOST", "MinuteCounts"]

#: Most parties with a line of their own per minute; the rest share one line.
MOST: Final = 100
_MINUTE_S: Final = 60.0
#: An event, and the names and values of its parties.
_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]


class _Count:
    """The events of one key in the current minute.

    times: those that have not been logged yet.
    ends: when the minute ends, on the clock of the event loop.
    """

    __slots__ = ("ends", "fields", "times")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.times = 0
        self.fields: dict[str, Any] = {}


class MinuteCounts:
    """Counts events, and logs each at most once a minute for the same parties."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: FilteringBoundLogger) -> None:
        self._loop = loop
        self._log = log
        #: The keys of this minute, the one whose minute ends first in front.
        self._counts: OrderedDict[_Key, _Count] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def note(self, event: str, parties: Mapping[str, str], times: int, **fields: Any) -> None:
        """Log an event at the level info, or count it if it was logged within a minute.

        Args:
            parties: The fields by which events are counted.
            times: How often it happened.
        """
        key = event, tuple(parties.items())
        if len(self._counts) >= MOST and key not in self._counts:
            # Parties beyond the bound are counted together.
            key, fields = (event, tuple((name, "others") for name in parties)), {}
        count = self._counts.get(key)
        if count is not None:
            count.times += times
            count.fields = fields
            return
        self._counts[key] = _Count(self._loop.time() + _MINUTE_S)
        self._write(key, times, fields)
        if self._timer is None:
            self._timer = self._loop.call_later(_MINUTE_S, self._on_minute)

    def close(self) -> None:
        """Log what was only counted so far."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for key, count in self._counts.items():
            if count.times:
                self._write(key, count.times, count.fields)
        self._counts.clear()

    def _write(self, key: _Key, times: int, fields: dict[str, Any]) -> None:
        event, parties = key
        named = {name: value for name, value in parties if value}
        self._log.info(event, **named, count=times, **fields)

    def _on_minute(self) -> None:
        """Log and forget the keys whose minute is over."""
        self._timer = None
        now = self._loop.time()
        while self._counts:
            key, count = next(iter(self._counts.items()))
            if count.ends > now:
                self._timer = self._loop.call_later(count.ends - now, self._on_minute)
                return
            del self._counts[key]
            if count.times:
                self._counts[key] = _Count(now + _MINUTE_S)
                self._write(key, count.times, count.fields)
