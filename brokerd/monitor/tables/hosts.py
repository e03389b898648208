"""The table of the other hosts of the cluster."""

from __future__ import annotations

import asyncio

from brokerd.core.broker import Broker
from brokerd.monitor.tables.table import Row, Table

__all__ = ["HostTable"]


class HostTable(Table):
    """All other hosts that this broker knows."""

    COLUMNS = (
        "host",
        "state",
        "since",
        "names",
        "round_trip_ms",
        "in_flight",
        "in_doubt",
        "refused",
        "version",
        "digest",
        "last_error",
    )
    SEARCHED = ("host", "state", "last_error")

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker

    async def _read_rows(self, elapsed: float) -> list[Row]:
        traffic = self._broker.traffic
        if traffic is None:
            return []
        now = asyncio.get_running_loop().time()
        return [
            {column: each.get(column) for column in self.COLUMNS}
            for each in traffic.cluster.hosts(now)
        ]
