"""Clients, pools and presence: the sessions behind each configured name.

A Client is a configured name; it lives as long as the configuration has it. A Session
is one of its connections. A client with ``connections: 1`` has at most one session,
whose address is the client's name. In a pool, each session also has an address of its
own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from brokerd.config.values import ClientConfig
from brokerd.core.flight import Flight
from brokerd.core.outbox import StreamOutbox
from brokerd.core.policy import Policy
from brokerd.core.rate import Meter
from brokerd.core.routing import RouteEntry
from brokerd.core.session import Session

__all__ = ["Client", "Exchange"]


#: A session's rank in its pool: whether it does not read, bytes that wait, the turn in
#: which it was last picked, and its number. The lowest rank is picked.
Rank: TypeAlias = tuple[bool, int, int, int]
#: Stale ranks that one pool's heap may hold, beyond twice its sessions, before it is
#: rebuilt.
_STALE: Final = 64


class Client(RouteEntry):
    """One configured name.

    sessions: its connections by address, oldest first.
    changed_at: when it last came online or went offline, in seconds since the epoch.
    shown_online, shown_since: its presence, as far as that has been published.
    flight: its requests in flight; None where these are not limited.
    """

    __slots__ = (
        "_mixed",
        "_numbered",
        "_ranks",
        "changed_at",
        "config",
        "flight",
        "meter",
        "name",
        "policy",
        "sessions",
        "shown_online",
        "shown_since",
        "turn",
    )

    def __init__(self, config: ClientConfig, now_wall: float) -> None:
        super().__init__()
        self.name = config.name
        self.config = config
        self.policy = Policy(config)
        self.meter = Meter.for_rate(config.rate)
        self.sessions: dict[str, Session] = {}
        self.changed_at = self.shown_since = now_wall
        self.shown_online = False
        self.turn = 0
        #: Heap of the sessions of a pool by load, the least first: see pick.
        self._ranks: list[Rank] = []
        self._numbered: dict[int, Session] = {}
        #: Whether a session of the pool has a StreamOutbox, whose load is not tracked.
        self._mixed = False
        self.flight: Flight | None = None
        if config.connections > 1 or config.in_flight is not None:
            self.track()

    def track(self) -> Flight:
        """Return the requests in flight, which are counted from now on."""
        if self.flight is None:
            self.flight = Flight()
            for session in self.sessions.values():
                self.flight.update(session)
        return self.flight

    @property
    def online(self) -> bool:
        """Whether the client has at least one connection."""
        return bool(self.sessions)

    def pick(self) -> Session | None:
        """Return the least loaded session, or None.

        A session that reads comes first, then the fewest bytes waiting, then the
        session that was picked longest ago. A growing load is not noticed at once, so a
        rank may be too low. It is corrected when it comes first. A shrinking load is
        reported to ``eased``, so that no rank is too high.
        """
        sessions = self.sessions
        if len(sessions) <= 1:
            return next(iter(sessions.values()), None)
        self.turn += 1
        if self._mixed:
            return min(sessions.values(), key=_load)
        ranks = self._ranks
        while True:
            rank = ranks[0]
            session = self._numbered.get(rank[3])
            if session is None or session.rank is not rank:
                heapq.heappop(ranks)
                continue
            blocked, waiting = _load(session)
            if (blocked, waiting) > (rank[0], rank[1]):
                session.rank = (blocked, waiting, rank[2], session.number)
                heapq.heapreplace(ranks, session.rank)
                continue
            session.rank = (blocked, waiting, self.turn, session.number)
            heapq.heapreplace(ranks, session.rank)
            return session

    def eased(self, session: Session) -> None:
        """Lower the rank of a session that has fewer bytes waiting than before."""
        rank = session.rank
        assert rank is not None, "the outbox reports ranked sessions only"
        if len(self._ranks) > _STALE + 2 * len(self.sessions):
            self._rank_all()
        session.rank = (*_load(session), rank[2], session.number)
        heapq.heappush(self._ranks, session.rank)

    def _rank_all(self) -> None:
        """Rebuild the heap of ranks."""
        self._ranks = []
        for session in self.sessions.values():
            session.rank = (
                *_load(session),
                self.turn if session.rank is None else session.rank[2],
                session.number,
            )
            self._ranks.append(session.rank)
        heapq.heapify(self._ranks)

    def add(self, session: Session) -> None:
        """Add a session."""
        self.sessions[session.address] = session
        self._numbered[session.number] = session
        session.rank = (*_load(session), self.turn, session.number)
        heapq.heappush(self._ranks, session.rank)
        if self.flight is not None:
            self.flight.update(session)
        self._choose_direct()

    def remove(self, session: Session) -> None:
        """Remove a session."""
        del self.sessions[session.address]
        del self._numbered[session.number]
        session.rank = None
        if self.flight is not None:
            self.flight.remove(session)
        if not self.sessions:
            self._ranks = []
        elif len(self._ranks) > _STALE + 2 * len(self.sessions):
            self._rank_all()
        self._choose_direct()

    def put_in_order(self) -> None:
        """Order the sessions as they connected."""
        oldest_first = sorted(self.sessions.values(), key=lambda session: session.number)
        self.sessions = {session.address: session for session in oldest_first}
        self._choose_direct()

    def reconfigure(self, config: ClientConfig) -> None:
        """Apply a changed configuration entry; the connections stay.

        A connection that has bytes waiting keeps its present kind of outbox.
        """
        if config.rate != self.config.rate:
            self.meter = Meter.for_rate(config.rate)
        self.config = config
        self.policy = Policy(config)
        for session in self.sessions.values():
            if session.outbox.waiting:
                session.outbox.limit = config.queue
            else:
                session.renew_outbox()
        self._rank_all()
        if config.connections > 1 or config.in_flight is not None:
            self.track()
        if self.flight is not None:
            for session in self.sessions.values():
                self.flight.update(session)
        self._choose_direct()

    def _choose_direct(self) -> None:
        first = next(iter(self.sessions.values()), None)
        outbox = None if first is None else first.outbox
        self.direct = outbox if isinstance(outbox, StreamOutbox) else None
        pool = self.config.connections > 1
        self._mixed = pool and self.direct is not None


def _load(session: Session) -> tuple[bool, int]:
    # While an outbox is not blocked, its bytes are only waiting for the next write.
    waiting = session.outbox.waiting
    return session.outbox.blocked and waiting > 0, waiting


class Exchange:
    """All configured clients."""

    def __init__(self, configs: Iterable[ClientConfig] = (), now_wall: float = 0.0) -> None:
        self.clients: dict[str, Client] = {
            config.name: Client(config, now_wall) for config in configs
        }

    def resolve(self, name: str) -> Client | None:
        """Return the configured client of that name, or None."""
        return self.clients.get(name)

    def sessions(self) -> Iterator[Session]:
        """Yield every connection."""
        for client in self.clients.values():
            yield from client.sessions.values()

    def find(self, address: str) -> Session | None:
        """Return the connection with exactly that address, or None."""
        client = self.clients.get(address.partition("/")[0])
        return None if client is None else client.sessions.get(address)
