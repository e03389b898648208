"""Names, pools and presence: who is where.

A Client is a configured name and lives as long as the configuration has it; a Session is one of its
connections. A name with ``connections: 1`` has one session or none and is reached by its name; a pool's
sessions each have an address of their own as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from brokerd.config.values import ClientConfig
from brokerd.core.outbox import StreamOutbox
from brokerd.core.policy import Policy
from brokerd.core.rate import Meter
from brokerd.core.routing import Seat
from brokerd.core.session import Session

__all__ = ["Client", "Exchange"]


class Client(Seat):
    """One configured name.

    sessions: its connections, oldest first, by address. changed_at: when it last came online or
    went offline, in seconds since the epoch. shown_online, shown_since: the same, as far as it has been told.
    """

    __slots__ = (
        "changed_at",
        "config",
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

    @property
    def online(self) -> bool:
        """Whether at least one connection is there."""
        return bool(self.sessions)

    def pick(self) -> Session | None:
        """Return the least loaded session: one that reads, fewest bytes waiting, then whoever's turn it is."""
        sessions = self.sessions
        if len(sessions) <= 1:
            return next(iter(sessions.values()), None)
        self.turn += 1
        ordered = list(sessions.values())
        start = self.turn % len(ordered)
        return min(ordered[start:] + ordered[:start], key=_load)

    def add(self, session: Session) -> None:
        """Take in a session."""
        self.sessions[session.address] = session
        self._choose_direct()

    def remove(self, session: Session) -> None:
        """Forget a session."""
        del self.sessions[session.address]
        self._choose_direct()

    def reconfigure(self, config: ClientConfig) -> None:
        """Take over a changed entry; the connections stay.

        A connection that has bytes waiting keeps the kind of outbox it began with.
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
        self._choose_direct()

    def _choose_direct(self) -> None:
        outbox = next((session.outbox for session in self.sessions.values()), None)
        self.direct = outbox if isinstance(outbox, StreamOutbox) else None


def _load(session: Session) -> tuple[bool, int]:
    # While its outbox is not blocked, what waits there is only on its way.
    return session.outbox.blocked, session.outbox.waiting


class Exchange:
    """All configured names."""

    def __init__(self, configs: Iterable[ClientConfig] = (), now_wall: float = 0.0) -> None:
        self.clients: dict[str, Client] = {config.name: Client(config, now_wall) for config in configs}

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
