"""One reading of every counter, taken from the running broker in slices so that messages go on meanwhile.

The counters are the core's and the network layer's own. A counter never falls from one reading to the next:
connections and what was counted of those that are gone are noted at one moment, and only then are the
connections' own counters added, which may have grown by then but never shrink.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from brokerd.config.model import Config
from brokerd.core.broker import Broker
from brokerd.core.session import Session
from brokerd.log.api import Log
from brokerd.net.connection.connection import Connection
from brokerd.net.server import Server

__all__ = ["Counts", "Departed", "Reading", "Share", "Watched", "take"]

#: Connections looked at in one turn of the loop, some 300 microseconds' work.
_SLICE: Final = 256


class Watched(Protocol):
    """A daemon, as far as the monitor looks.

    reloads: how reloads ended, ``accepted`` or ``refused``. reloaded_at: when the configuration in use was
    taken over, in seconds since the epoch.
    """

    config: Config
    broker: Broker
    log: Log
    reloads: Counter[str]
    reload_refused: bool
    reloaded_at: float

    @property
    def server(self) -> Server:
        """Every socket of the daemon."""

    @property
    def not_ready(self) -> str:
        """Why it should be sent no new client, or ""."""

    def key_expiries(self) -> dict[str, datetime]:
        """Return for each client whose keys have an end the moment from which it can't be let in any more."""


class Counts(NamedTuple):
    """The counters that every connection has, or sums of them. errors: messages that were refused."""

    messages_in: int = 0
    bytes_in: int = 0
    messages_out: int = 0
    bytes_out: int = 0
    errors: int = 0

    def plus(self, session: Session) -> Counts:
        """Return the sums with one connection's own counters added."""
        return Counts(
            self.messages_in + session.messages_in,
            self.bytes_in + session.bytes_in,
            self.messages_out + session.messages_out,
            self.bytes_out + session.bytes_out,
            self.errors + session.errors_in,
        )


_NOTHING: Final = Counts()


class Departed:
    """What was counted of connections that are gone, by client; kept only while it is asked for."""

    def __init__(self) -> None:
        self.clients: dict[str, Counts] = {}

    def note(self, session: Session) -> None:
        """Keep the counters of a connection that has just ended."""
        name = session.client.name
        self.clients[name] = self.clients.get(name, _NOTHING).plus(session)


@dataclass(slots=True)
class Share:
    """What one client has of everything."""

    counts: Counts
    connections: int = 0
    queued_bytes: int = 0


@dataclass(slots=True)
class Reading:
    """All counters at about one moment.

    fullest: how full the fullest queue is, 1.0 where nothing more is taken. slow: connections that take nothing at
    the moment. held: senders that are not read from. owed: requests not answered.
    clients: the names to tell of one by one, none unless asked for; departed: of their connections that are gone;
    shares: of those that have connections, both together.
    """

    counts: Counts
    refused: Counter[str]
    dropped: int
    connections: int
    clients: list[str] = field(default_factory=list)
    departed: dict[str, Counts] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    online: int = 0
    queued_bytes: int = 0
    fullest: float = 0.0
    slow: int = 0
    held: int = 0
    incoming_requests: int = 0

    def share(self, name: str) -> Share:
        """Return what one of ``clients`` has."""
        return self.shares.get(name) or Share(self.departed.get(name, _NOTHING))

    def add(self, session: Session) -> None:
        """Add one connection's part. It may have ended meanwhile: its counters stand all the same."""
        self.counts = self.counts.plus(session)
        share = None
        if self.clients:
            name = session.client.name
            share = self.shares[name] = self.share(name)
            share.counts = share.counts.plus(session)
        if not session.open:
            return
        outbox = session.outbox
        waiting = outbox.waiting
        self.queued_bytes += waiting
        self.fullest = max(self.fullest, waiting / outbox.limit)
        self.slow += outbox.blocked
        self.held += session.held_by is not None
        self.incoming_requests += len(session.incoming_requests)
        # The client's first connection stands for it.
        self.online += next(iter(session.client.sessions.values()), None) is session
        if share is not None:
            share.connections += 1
            share.queued_bytes += waiting


async def take(watched: Watched, departed: Departed | None) -> Reading:
    """Return a reading. departed: for metrics of each client, None where they are not asked for."""
    broker, server = watched.broker, watched.server
    connections = list(server.connections)
    totals = broker.totals
    reading = Reading(
        counts=Counts(*(totals[counter] for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out"))),
        refused=Counter(broker.refused),
        dropped=broker.dropped,
        connections=len(connections),
    )
    if departed is not None:
        reading.clients = list(broker.exchange.clients)
        reading.departed = departed.clients.copy()
    for part in _slices(connections):
        for connection in part:
            reading.add(connection.session)
        await asyncio.sleep(0)
    return reading


def _slices(connections: list[Connection]) -> Iterator[list[Connection]]:
    for start in range(0, len(connections), _SLICE):
        yield connections[start : start + _SLICE]
