"""Clients, pools and presence: the sessions behind each configured name.

A Client is a configured name; it lives as long as the configuration has it. A Session
is one of its connections. A client with ``connections: 1`` has at most one session,
whose address is the client's name. In a pool, each session also has an address of its
own.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

from brokerd.config.values import ClientConfig, Rule
from brokerd.core.flight import Flight
from brokerd.core.policy import Policy
from brokerd.core.rate import Meter
from brokerd.core.session import Session
from brokerd.core.write_buffer import RouteEntry

if TYPE_CHECKING:
    from brokerd.core.mailboxes.mailbox import Mailbox

__all__ = ["Client", "Exchange"]


#: The rank in its pool of a session that does not read: bytes that wait, the turn in
#: which it was last picked, and its number. The lowest rank is picked.
Rank: TypeAlias = tuple[int, int, int]
#: Stale ranks that one pool's heap may hold, beyond twice its sessions, before it is
#: rebuilt.
_STALE: Final = 64


#: What most clients have, without a cluster all of them; never changed.
_NO_REMOTES: Final[dict[str, Session]] = {}
_NO_HOSTS: Final[dict[str, float]] = {}


class Client(RouteEntry):
    """One configured name.

    sessions: its connections by address, oldest first.
    remotes: the sessions that stand for it at other hosts, by host, where it can be reached.
    hosts: since when it is online at other hosts, by host, in seconds since the epoch.
    changed_at: when it last came online or went offline, in seconds since the epoch.
    mailbox: its mailbox, or None.
    shown_online, shown_since: its presence, as far as that has been published.
    """

    __slots__ = (
        "_numbered",
        "_ranks",
        "changed_at",
        "config",
        "hosts",
        "mailbox",
        "name",
        "policy",
        "remotes",
        "sessions",
        "shown_online",
        "shown_since",
    )

    def __init__(self, config: ClientConfig, now_wall: float, policy: Policy | None = None) -> None:
        """Begin without connections.

        policy: another client's, which this client shares if it has the same rules.
        """
        super().__init__()
        self.name = config.name
        self.config = config
        self.policy = policy if policy is not None and policy.is_of(config) else Policy(config)
        self.mailbox: Mailbox | None = None
        self.meter = Meter.for_rate(config.rate)
        self.request_limit = config.requests
        self.publish_rules = _as_text(config.publish)
        self.is_pool = config.connections > 1
        self.sessions: dict[str, Session] = {}
        self.remotes: dict[str, Session] = _NO_REMOTES
        self.hosts: dict[str, float] = _NO_HOSTS
        self.changed_at = self.shown_since = now_wall
        self.shown_online = False
        #: Heap of the sessions that do not read by load, the least first: see pick.
        self._ranks: list[Rank] = []
        self._numbered: dict[int, Session] = {}
        if config.connections > 1 or config.in_flight is not None:
            self.track()

    def track(self) -> Flight:
        """Return the requests in flight, which are counted from now on."""
        if self.flight is None:
            self.flight = Flight()
            for session in (*self.sessions.values(), *self.remotes.values()):
                self.flight.update(session)
        return self.flight

    @property
    def online(self) -> bool:
        """Whether the client has at least one connection, here or at another host."""
        return bool(self.sessions or self.hosts)

    def pick(self) -> Session | None:
        """Return the least loaded session, or None; a remote one if none is local.

        Sessions that read come first, in turn: their bytes only wait for the next write.
        Then comes the session with the fewest bytes waiting, then the one that was picked
        longest ago. A growing load is not noticed at once, so a rank may be too low. It
        is corrected when it comes first. A shrinking load is reported to ``eased``, so
        that no rank is too high.
        """
        sessions = self.sessions
        if len(sessions) == 1 or not (sessions or self.ring):
            return next(iter(sessions.values()), None)
        self.turn += 1
        if self.ring:
            picked: Session = self.ring[(self.turn - 1) % len(self.ring)].owner
            return picked
        ranks = self._ranks
        while True:
            rank = ranks[0]
            session = self._numbered.get(rank[2])
            if session is None or session.rank is not rank:
                heapq.heappop(ranks)
                continue
            waiting = session.outbox.waiting
            if waiting > rank[0]:
                session.rank = (waiting, rank[1], session.number)
                heapq.heapreplace(ranks, session.rank)
                continue
            session.rank = (waiting, self.turn, session.number)
            heapq.heapreplace(ranks, session.rank)
            return session

    def note_blocked(self, session: Session) -> None:
        """Note that a session has ceased to read, or reads again."""
        if self.sessions.get(session.address) is not session:
            return
        if session.outbox.blocked:
            self.ring.remove(session.outbox)
            self._rank(session, self.turn)
        else:
            session.rank = None
            self.ring.append(session.outbox)

    def eased(self, session: Session) -> None:
        """Lower the rank of a session that has fewer bytes waiting than before."""
        rank = session.rank
        assert rank is not None, "the outbox reports ranked sessions only"
        self._rank(session, rank[1])

    def _rank(self, session: Session, turn: int) -> None:
        """Rank a session that does not read; turn: when it was last picked."""
        if len(self._ranks) > _STALE + 2 * len(self.sessions):
            self._ranks = [each.rank for each in self.sessions.values() if each.rank is not None]
            heapq.heapify(self._ranks)
        session.rank = (session.outbox.waiting, turn, session.number)
        heapq.heappush(self._ranks, session.rank)

    def _place(self, session: Session) -> None:
        """Put a session where ``pick`` finds it."""
        if session.outbox.blocked:
            self._rank(session, self.turn)
        else:
            session.rank = None
            self.ring.append(session.outbox)

    def add(self, session: Session) -> None:
        """Add a session."""
        self.sessions[session.address] = session
        self._numbered[session.number] = session
        self._place(session)
        if self.flight is not None:
            self.flight.update(session)
        self._choose_direct()

    def note_host(self, host: str, since: float | None) -> None:
        """Note since when the client is online at another host; None for offline."""
        hosts = {name: at for name, at in self.hosts.items() if name != host}
        self.hosts = hosts if since is None else {**hosts, host: since}

    def add_remote(self, session: Session) -> None:
        """Add the session that stands for this client at another host."""
        self.remotes = {**self.remotes, session.host: session}
        if self.flight is not None:
            self.flight.update(session)
        self._choose_direct()

    def remove_remote(self, host: str) -> None:
        """Remove the session that stands for this client at another host, if any."""
        session = self.remotes.get(host)
        if session is not None:
            self.remotes = {name: each for name, each in self.remotes.items() if name != host}
            if self.flight is not None:
                self.flight.remove(session)
            self._choose_direct()

    def remove(self, session: Session) -> None:
        """Remove a session."""
        del self.sessions[session.address]
        del self._numbered[session.number]
        session.rank = None
        if session.route is not None:
            session.route.direct = None
        if session.outbox in self.ring:
            self.ring.remove(session.outbox)
        if self.flight is not None:
            self.flight.remove(session)
        if not self.sessions:
            self._ranks = []
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
        self.request_limit = config.requests
        self.publish_rules = _as_text(config.publish)
        self.is_pool = config.connections > 1
        self.policy = Policy(config)
        for session in self.sessions.values():
            if session.outbox.waiting:
                session.outbox.limit = config.queue
            else:
                session.renew_outbox()
        self.ring, self._ranks = [], []
        for session in self.sessions.values():
            self._place(session)
        for session in self.remotes.values():
            session.outbox.limit = config.queue
        if config.connections > 1 or config.in_flight is not None:
            self.track()
        if self.flight is not None:
            for session in self.sessions.values():
                self.flight.update(session)
        self._choose_direct()

    def _choose_direct(self) -> None:
        reached = self.sessions
        if self.remotes or (self.ring and self.ring[0].is_remote):
            # Other hosts are only for a client without a connection here.
            if reached:
                self.ring = [outbox for outbox in self.ring if not outbox.is_remote]
            else:
                reached = self.remotes
                self.ring = [session.outbox for session in reached.values()]
        first = next(iter(reached.values()), None)
        self.direct = first.outbox if first is not None and len(reached) == 1 else None


def _as_text(rules: Iterable[Rule]) -> str:
    """Return the patterns of rules as one object, the same for the same patterns."""
    return sys.intern("\n".join([rule.pattern for rule in rules]))


class Exchange:
    """All configured clients."""

    def __init__(self, configs: Iterable[ClientConfig] = (), now_wall: float = 0.0) -> None:
        self.clients: dict[str, Client] = {}
        policy: Policy | None = None
        for config in configs:
            client = self.clients[config.name] = Client(config, now_wall, policy)
            policy = client.policy

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

    def identify(self, identity: str) -> Session | None:
        """Return the connection with exactly that identity, or None."""
        name, _, instance = identity.partition("/")
        client = self.clients.get(name)
        if client is None:
            return None
        session = client.sessions.get(identity) or client.sessions.get(name)
        return None if session is None or session.instance != instance else session
