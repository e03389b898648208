"""The stream of the monitor's page: server-sent events, one each second.

A page's request says what it shows: one table with its order and filter, and the details
of a client or a mailbox. The number of streams is bounded. A browser that does not read
for some seconds is disconnected, and connects again by itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, Final

from aiohttp import web

from brokerd.monitor.history import History
from brokerd.monitor.sources import Sources
from brokerd.monitor.tables.channels import ChannelTable
from brokerd.monitor.tables.clients import ClientTable, details_of
from brokerd.monitor.tables.hosts import HostTable
from brokerd.monitor.tables.mailboxes import DeadLetters, MailboxTable
from brokerd.monitor.tables.table import Table
from brokerd.monitor.tables.topics import TopicTable

__all__ = ["MOST_STREAMS", "Live"]

#: Most streams at once.
MOST_STREAMS: Final = 8
#: Seconds within which a browser must take an event.
_PATIENCE_S: Final = 10.0


class Live:
    """All streams of one monitor."""

    def __init__(self, sources: Sources, history: History) -> None:
        self._sources = sources
        self._history = history
        broker = sources.broker
        self._tables: dict[str, Table] = {
            "clients": ClientTable(broker),
            "topics": TopicTable(broker),
            "channels": ChannelTable(broker),
            "mailboxes": MailboxTable(broker),
            "hosts": HostTable(broker),
        }
        self._dead_letters = DeadLetters(broker)
        #: How many streams show each table.
        self._shown: Counter[Table] = Counter()
        self._second = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None
        self.streams = 0
        history.on_sample = self._on_sample

    def _on_sample(self) -> None:
        if self.streams and (self._reading is None or self._reading.done()):
            self._reading = asyncio.get_running_loop().create_task(self._next_second())

    async def _next_second(self) -> None:
        """Read the tables that are shown, and let all streams go on."""
        for table in [table for table, count in self._shown.items() if count]:
            await table.read()
        second, self._second = self._second, asyncio.Event()
        second.set()

    def close(self) -> None:
        """Read nothing more."""
        if self._reading is not None:
            self._reading.cancel()

    async def serve(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Send events until the browser leaves."""
        query = dict(request.query)
        table = self._tables.get(query.get("view", "clients"))
        self.streams += 1
        if table is not None:
            self._shown[table] += 1
        try:
            await response.prepare(request)
            if table is not None:
                await table.read_if_old()
            first = {"history": list(self._history.samples), "facts": self._facts()}
            await self._send(response, first | await self._view(table, query))
            while True:
                await self._second.wait()
                sample = self._history.samples[-1] if self._history.samples else None
                news = {"sample": sample, "facts": self._facts()}
                await self._send(response, news | await self._view(table, query))
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.streams -= 1
            if table is not None:
                self._shown[table] -= 1

    async def _send(self, response: web.StreamResponse, event: dict[str, Any]) -> None:
        text = json.dumps(event, separators=(",", ":"))
        async with asyncio.timeout(_PATIENCE_S):
            await response.write(f"data: {text}\n\n".encode())

    async def _view(self, table: Table | None, query: dict[str, str]) -> dict[str, Any]:
        """Return what this page shows besides the charts."""
        shown: dict[str, Any] = {"table": None if table is None else await table.page(query)}
        if "client" in query:
            shown["client"] = details_of(self._sources.broker, query["client"])
        if "mailbox" in query:
            shown["mailbox"] = await self._dead_letters.details_of(query["mailbox"])
        return shown

    def _facts(self) -> dict[str, Any]:
        """Return what is true of the broker as a whole."""
        broker, config = self._sources.broker, self._sources.config()
        status = broker.status
        return {
            "version": status.version,
            "started_at": status.started_at,
            "routing": status.routing,
            "upgrades": status.upgrades,
            "not_ready": self._sources.not_ready(),
            "cluster_failure": self._sources.cluster_failure(),
            "host": None if broker.traffic is None else broker.traffic.host,
            "clients": len(broker.exchange.clients),
            "subscriptions": len(broker.topics),
            "channels": len(broker.channels.open),
            "mailboxes": len(broker.mailboxes.boxes),
            "limit": config.limits.connections,
            "reload_refused": self._sources.reloads.was_refused,
            "listeners": [str(listening.address) for listening in self._sources.server().listening],
        }
