"""The table of topics: the patterns that connections subscribe to."""

from __future__ import annotations

from collections import Counter
from typing import Final

from brokerd.core.broker import Broker
from brokerd.monitor.tables.table import Row, Table, in_turns

__all__ = ["TopicTable"]

#: Most subscriptions that are counted.
_COUNTED: Final = 200_000


class TopicTable(Table):
    """All patterns, each with the number of its subscriptions."""

    COLUMNS = ("pattern", "subscriptions")
    SEARCHED = ("pattern",)

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker

    async def _read_rows(self, elapsed: float) -> list[Row]:
        counts: Counter[str] = Counter()
        counted = 0
        async for session in in_turns(list(self._broker.exchange.sessions())):
            counts.update(pattern for pattern, _ in session.subscriptions)
            counted += len(session.subscriptions)
            if counted >= _COUNTED:
                break
        return [{"pattern": pattern, "subscriptions": count} for pattern, count in counts.items()]
