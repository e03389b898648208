"""A reading of every counter, taken from the running broker in slices while messages
pass.

The counters belong to the core and the network layer. A counter never falls from one
reading to the next. The list of connections and the totals of closed ones are copied at
one moment. Only then are the connections' own counters added, which may have grown
since but never shrink.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from brokerd.core.exchange import Client
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd.core.session import Session
from brokerd.monitor.sources import Sources
from brokerd.net.connection.connection import Connection

__all__ = ["Counts", "Departed", "Reading", "Share", "take"]

#: Connections that are read per turn of the event loop, some 300 microseconds' work.
_SLICE: Final = 256
#: Mailboxes counted in one turn: a millisecond's work.
_MAILBOXES: Final = 1000


class Counts(NamedTuple):
    """The counters of a connection, or sums of them.

    errors: messages that were refused.
    """

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
    """The counters of closed connections, by client; kept only for metrics of each
    client.
    """

    def __init__(self) -> None:
        self.clients: dict[str, Counts] = {}

    def note(self, session: Session) -> None:
        """Add the counters of a connection that has just closed."""
        name = session.client.name
        self.clients[name] = self.clients.get(name, _NOTHING).plus(session)


@dataclass(slots=True)
class Share:
    """The part of all counters that belongs to one client."""

    counts: Counts
    connections: int = 0
    queued_bytes: int = 0


@dataclass(slots=True)
class Reading:
    """All counters at about one moment.

    Attributes:
        fullest: How full the fullest queue is; a queue at 1.0 accepts nothing more.
        slow: Connections that accept no bytes at the moment.
        held: Senders that are not read from.
        incoming_requests: Requests delivered and not answered.
        waiting_requests: Requests that wait for a connection with room in flight.
        clients: The names with metrics of their own, empty unless asked for.
        departed: The counters of their closed connections.
        shares: For clients with connections, open and closed connections together.
        stored: Messages in all mailboxes, by state.
        stored_bytes: Bytes of these.
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
    waiting_requests: int = 0
    stored: Counter[str] = field(default_factory=Counter)
    stored_bytes: int = 0

    def add_mailbox(self, mailbox: Mailbox) -> None:
        """Add the counts of one mailbox."""
        self.stored.update(mailbox.counts())
        self.stored_bytes += mailbox.size

    def share(self, name: str) -> Share:
        """Return the share of one of ``clients``."""
        return self.shares.get(name) or Share(self.departed.get(name, _NOTHING))

    def _add_client(self, client: Client, share: Share | None) -> None:
        """Add the requests of an online client that wait for room in flight."""
        flight = client.flight
        if flight:
            self.waiting_requests += len(flight)
            self.queued_bytes += flight.size
            self.fullest = max(self.fullest, flight.size / client.config.queue)
            if share is not None:
                share.queued_bytes += flight.size

    def add(self, session: Session) -> None:
        """Add the counters of one connection.

        They count even if the connection has closed since the reading began.
        """
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
        # Only the client's first connection counts it as online.
        if next(iter(session.client.sessions.values()), None) is session:
            self.online += 1
            self._add_client(session.client, share)
        if share is not None:
            share.connections += 1
            share.queued_bytes += waiting


async def take(sources: Sources, departed: Departed | None) -> Reading:
    """Take a reading of all counters.

    departed: for metrics of each client; None where they are not asked for.
    """
    broker = sources.broker
    connections = list(sources.server().connections)
    totals = broker.status.totals
    reading = Reading(
        counts=Counts(
            *(
                totals[counter]
                for counter in ("messages_in", "bytes_in", "messages_out", "bytes_out")
            )
        ),
        refused=Counter(broker.replies.refused),
        dropped=broker.replies.dropped,
        connections=len(connections),
    )
    if departed is not None:
        reading.clients = list(broker.exchange.clients)
        reading.departed = departed.clients.copy()
    for part in _slices(connections):
        for connection in part:
            reading.add(connection.session)
        await asyncio.sleep(0)
    for number, mailbox in enumerate(list(broker.mailboxes.boxes.values()), 1):
        reading.add_mailbox(mailbox)
        if number % _MAILBOXES == 0:
            await asyncio.sleep(0)
    return reading


def _slices(connections: list[Connection]) -> Iterator[list[Connection]]:
    for start in range(0, len(connections), _SLICE):
        yield connections[start : start + _SLICE]
