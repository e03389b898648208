"""The sessions that stand for clients of other hosts, by host.

For each name that another host has announced, a *target* gets the frames that clients
here send to the name. For each connection there that has sent something, a *sender* sends
its frames on here; the answers go to that very connection. One more session of each host
subscribes to what is subscribed there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import ClientConfig, RateConfig, Source, WhenConnected, WhenFull
from brokerd.core.cluster.remote_outbox import RemoteOutbox
from brokerd.core.exchange import Client
from brokerd.core.outbox import StreamOutbox
from brokerd.core.session import Session

if TYPE_CHECKING:
    from brokerd.core.cluster.seam import Name, Run
    from brokerd.core.exchange import Exchange
    from brokerd.core.requests import DeliveredRequest, RequestKey

__all__ = ["EVENTS", "RemoteHost", "RemoteSessions", "host_of", "instance_suffix"]

#: What the target of a run of events begins with; the groups follow.
EVENTS: Final = ">"
#: Bytes of a host's events that may wait for its link.
_EVENT_QUEUE: Final = 4 * 1024 * 1024


def instance_suffix(host: str) -> str:
    """Return how the instances of a host's connections end."""
    return f"{host}{len(host)}" if host else ""


def host_of(instance: str) -> str:
    """Return the host in an instance, or "" if it names none."""
    size = int(instance[-1]) if instance[-1:].isdecimal() else 0
    return instance[-1 - size : -1] if 0 < size < len(instance) - 1 else ""


def _subscriber(host: str, now_wall: float) -> Client:
    """Return a client for the session that subscribes on behalf of a host."""
    config = ClientConfig(
        name=f"host {host}",
        keys=(),
        connections=1,
        send_to=(),
        publish=(),
        subscribe=(),
        queue=_EVENT_QUEUE,
        subscriptions=0,
        requests=0,
        # A publisher waits if mailboxes there store its event. Other events are dropped.
        when_full=WhenFull.WAIT,
        when_connected=WhenConnected.REFUSE,
        rate=RateConfig(None, None),
        allow_md5=False,
        peer_uid=None,
        admin=False,
        source=Source("", 0),
    )
    return Client(config, now_wall)


def _limit_of(name: Name, client: Client) -> int | None:
    """Return how many requests a client may have at a host without an outcome."""
    limit = client.config.in_flight
    return 0 if not name.free else limit and limit * name.connections


class RemoteHost:
    """The sessions that stand for clients of one other host.

    Attributes:
        name: The host.
        targets: By client name.
        senders: By identity, ``name/instance``.
        by_name: The same senders by client name, each client's in order of their first frame.
        requests: By client name: the requests delivered to the name there and not
            answered, which its target and its senders share.
        subscriber: Subscribes to what is subscribed there.
        touched: The sessions with frames for the host, in the order of the first.
        answering: The senders with answers of the broker's own.
        refusals: ERRORs to senders that this host does not know.
        addresses: Where clients can connect to the host.
        names: What the host has announced of each name.
    """

    def __init__(self, name: str, now_wall: float, connect: Callable[[str, str], Any]) -> None:
        self.name = name
        self._connect = connect
        self.targets: dict[str, Session] = {}
        self.senders: dict[str, Session] = {}
        self.by_name: dict[str, list[Session]] = {}
        self.requests: dict[str, dict[RequestKey, DeliveredRequest]] = {}
        self.subscriber = self._new(_subscriber(name, now_wall), "", EVENTS)
        self.touched: dict[Session, None] = {}
        self.answering: dict[Session, None] = {}
        self.refusals: list[Run] = []
        self.addresses: tuple[str, ...] = ()
        self.names: dict[str, Name] = {}

    def _new(self, client: Client, instance: str, target: str) -> Session:
        connection = self._connect(self.name, target)
        session = Session(
            client, instance, peer=f"host {self.name}", since=0.0, connection=connection
        )
        connection.session = session
        session.number = connection.number
        session.host = self.name
        session.outbox = RemoteOutbox(client.config.queue)
        session.outbox.owner = session
        session.incoming_requests = self.requests.setdefault(client.name, {})
        # Each cancelled request is reported; the host knows which of its connections asks.
        session.cancels = True
        return session

    def note_free(self, client: Client) -> None:
        """Note whether connections of a client there have room for requests."""
        target = self.targets.get(client.name)
        if target is not None:
            target.in_flight = _limit_of(self.names[client.name], client)
            if client.flight is not None and self.name in client.remotes:
                client.flight.update(target)

    def target(self, client: Client) -> Session:
        """Return the session that stands for any connection of a client there."""
        session = self.targets.get(client.name)
        if session is None:
            session = self._new(client, "", client.name)
            session.address = client.name
            session.sender_header = session.identity = client.name.encode()
            self.targets[client.name] = session
        return session

    def add_sender(self, client: Client, instance: str) -> Session:
        """Return a new session that stands for one connection of a client there."""
        identity = f"{client.name}/{instance}" if instance else client.name
        session = self._new(client, instance, identity)
        session.answers = StreamOutbox(client.config.queue)
        session.answers.owner = session
        self.senders[identity] = session
        self.by_name.setdefault(client.name, []).append(session)
        return session

    def remove_sender(self, session: Session) -> None:
        """Remove a sender whose connection there has ended."""
        del self.senders[session.connection.target]
        same_name = self.by_name[session.client.name]
        same_name.remove(session)
        if not same_name:
            del self.by_name[session.client.name]
        self.touched.pop(session, None)
        self.answering.pop(session, None)
        # Its target has the requests that are not answered, until the host's last word.
        session.incoming_requests = {}

    def find(self, target: str) -> Session | None:
        """Return the session whose frames are for that target, or None."""
        if target == EVENTS:
            return self.subscriber
        return self.senders.get(target) if "/" in target else self.targets.get(target)

    def sessions(self) -> list[Session]:
        """Return all of them."""
        return [*self.targets.values(), *self.senders.values(), self.subscriber]


class RemoteSessions:
    """The sessions that stand for clients of other hosts.

    Attributes:
        host: The name of this host.
        hosts: The other hosts that are there.
        is_suspended: Whether no host can be reached: NATS is away.
        largest_frame: Most bytes of a frame for another host, with its length.
        max_payload: Most bytes of one NATS message.
    """

    def __init__(self, exchange: Exchange, host: str) -> None:
        self._exchange = exchange
        self.host = host
        self.hosts: dict[str, RemoteHost] = {}
        self.is_suspended = False
        self.largest_frame = self.max_payload = 1024 * 1024

    def reach(self, client: Client) -> None:
        """Make a target of each host where a client is online.

        It is not made before it is used: most names are never sent to.
        """
        for name in client.hosts:
            host = self.hosts.get(name)
            if host is not None and name not in client.remotes and not self.is_suspended:
                target = host.target(client)
                host.note_free(client)
                client.add_remote(target)

    def reachable(
        self, source: Session, found: Session | None, client: Client, name: str
    ) -> Session | None:
        """Return the session that gets a frame for a name or an address, or None.

        A name and its addresses share one session for each host, so messages to them
        keep their order.

        found: the session that was found without regard to other hosts.
        """
        if found is None and "/" in name and client.is_pool and not self.is_suspended:
            instance = name.partition("/")[2]
            host = self.hosts.get(host_of(instance))
            if host is not None and host.name in client.remotes:
                found = client.remotes[host.name]
        if found is not None and found.host and source.host:
            # A frame passes from one host to another once.
            return None
        return found

    def home_of(self, source: Session, client: Client) -> Session | None:
        """Return the session that stands for a client's mailbox; None if its home is away."""
        host = self.hosts.get(client.config.home)
        if host is None or self.is_suspended or source.host:
            return None
        return host.target(client)

    def sender_of(
        self, host: RemoteHost, identity: str, *, publishes: bool = False
    ) -> Session | None:
        """Return the sender with that identity; None for one that the host can't have.

        publishes: its frame is an event, whose sender may be named by its address alone.
        """
        known = host.senders.get(identity)
        if known is not None:
            return known
        name, _, instance = identity.partition("/")
        client = self._exchange.resolve(name)
        is_named = publishes and not instance and not client.is_pool if client else False
        if client is None or not (is_named or host_of(instance) == host.name):
            return None
        return host.add_sender(client, instance)

    def find(self, address: str) -> Session | None:
        """Return the sender at another host with that address, or None."""
        name = address.partition("/")[0]
        for host in self.hosts.values():
            for session in reversed(host.by_name.get(name, ())):
                if session.address == address:
                    return session
        return None

    def forget_revoked(self, source: Session, requester: str, message_id: int) -> bool:
        """Forget that a request to a host was revoked: the host's last word has come."""
        host = self.hosts.get(source.host)
        target = None if host is None else host.targets.get(source.client.name)
        session = self._exchange.find(requester)
        if target is None or session is None:
            return False
        key = session.identity.decode(), message_id
        if key not in target.revoked:
            return False
        target.revoked.discard(key)
        return True
