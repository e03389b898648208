"""One authenticated connection, as the core sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import ClientConfig, WhenFull
from brokerd.core.outbox import FrameOutbox, Outbox, StreamOutbox
from brokerd.core.write_buffer import RouteEntry, WriteBuffer

if TYPE_CHECKING:
    from brokerd.core.allowance import Allowance
    from brokerd.core.consumer import Consumer
    from brokerd.core.events import Spread
    from brokerd.core.exchange import Client, Rank
    from brokerd.core.flight import WaitingRequest
    from brokerd.core.goaway import Marks
    from brokerd.core.requests import DeliveredRequest, RequestKey
    from brokerd_client.wire.envelope import ErrorCode

__all__ = ["NARROW", "Session", "new_outbox"]

#: A fan-out with more outboxes than this is wide. The routing loop uses a wide fan-out
#: only in turns that are cut short: see Session.widest.
NARROW: Final = 64


def new_outbox(config: ClientConfig) -> Outbox:
    """Return an empty outbox of the kind that the client's configuration needs."""
    edited = config.when_full is WhenFull.DROP_OLDEST
    return FrameOutbox(config.queue) if edited else StreamOutbox(config.queue)


class Session:
    """One authenticated connection.

    Attributes:
        client: The client that it belongs to.
        address: Its address for other clients: the name, or ``name/instance`` in a
            pool.
        sender_header: That address as it is written into every frame of this session.
        identity: ``name/instance``, of this connection alone: it is written into frames
            for other hosts.
        host: The other host that it stands for a client of, or "".
        connection: The connection in the network layer; the core only carries it.
        answers: Where the broker's own frames for it are written; None for its outbox.

        bytes_to_skip: Bytes of an oversized frame still to be skipped.
        held_by: The session whose full queue keeps the broker from reading this one,
            or None.
        hold_deadline: Until when the frame that it is held for may wait.
        arrived: When the frame being handled arrived; its ttl counts from then.
        charged: Whether that frame has been counted against the client's rate already.
        closing: Why it is to be closed once its outbox is written, or "".
        closing_code: The code of the ERROR that its client receives then, or None.
        cut: Whether it is to be closed at once, even with bytes unwritten.
        slow: Whether its queue was full, and has not been empty since (slow consumer).
        allowance: How long it may hold senders; None if it has never held any.
        waiters: Sessions held because this one's queue is full, in order of arrival.

        incoming_requests: The requests delivered here and not answered yet, by
            (requester's address, id); of several with both, an answer ends the oldest.
        outgoing_requests: Its own requests that were delivered and are not answered
            yet, by id.
        outgoing_count: The number of those requests.
        waiting_requests: Its requests that wait for a recipient with room in flight, by
            id.
        waiting_count: The number of those requests.
        in_flight: Its own limit of delivered requests without an outcome, or None.
        cancels: Whether it is told that a request delivered to it is over.
        revoked: Cancelled requests whose frames may still wait in its outbox, by that
            key.
        spread: Its event that is still on its way to many subscribers, or None.
        reached_by_event: The subscribers that have been chosen for that event so far.
        route: The route entry of its own address in a pool, if it was needed.
        routes: The routing loop's cache of recipients: see ``known_routes``.
        widest: Outboxes in the largest fan-out that the routing loop may use for it.
        rank: Its rank among the connections of its pool that do not read, or None: see
            Client.pick.
        number, closed_number: Its positions in the order of all attaches and detaches.
        recipients: The clients that it has sent frames for which the broker may owe a
            report.

        listens: Whether it is asked for channels to its client.
        consumer: Its part in its client's mailbox, or None if it has not opened that.
        uncommitted: Its messages for mailboxes, and its ACKs with the flag RECEIPT, that
            have no outcome yet.

        goaway: Whether it has asked for a notice before the broker closes it.
        goaway_sent: Whether that notice has been sent.
        parting: Whether its new messages are refused because its connection is about to
            end.
        finishing: The id of its request ``finished``, or None.
        finished: Whether that request has been answered.
        marks, marked_at: See :func:`brokerd.core.goaway.has_finished`.
        retired: Whether it receives no more deliveries.
        mute: Whether the broker sends it nothing.
    """

    __slots__ = (
        "address",
        "allowance",
        "answers",
        "arrived",
        "bytes_in",
        "bytes_to_skip",
        "cancels",
        "charged",
        "client",
        "closed_number",
        "closing",
        "closing_code",
        "connection",
        "consumer",
        "cut",
        "errors_in",
        "finished",
        "finishing",
        "generation",
        "goaway",
        "goaway_sent",
        "held_by",
        "hold_deadline",
        "host",
        "identity",
        "in_flight",
        "incoming_requests",
        "instance",
        "listens",
        "marked_at",
        "marks",
        "messages_in",
        "mute",
        "number",
        "open",
        "outbox",
        "outgoing_count",
        "outgoing_requests",
        "parting",
        "peer",
        "rank",
        "reached_by_event",
        "recipients",
        "retired",
        "revoked",
        "route",
        "routes",
        "sender_header",
        "since",
        "slow",
        "spread",
        "subscriptions",
        "uncommitted",
        "waiters",
        "waiting_count",
        "waiting_requests",
        "widest",
    )

    def __init__(
        self, client: Client, instance: str, *, peer: str, since: float, connection: Any = None
    ) -> None:
        config = client.config
        self.client = client
        self.instance = instance
        self.address = f"{client.name}/{instance}" if config.connections > 1 else client.name
        self.sender_header = self.address.encode()
        self.identity = f"{client.name}/{instance}".encode()
        self.host = ""
        self.peer = peer
        self.since = since
        self.connection = connection
        self.outbox: Outbox = new_outbox(config)
        self.answers: WriteBuffer | None = None
        self.outbox.owner = self
        self.rank: Rank | None = None
        self.number = 0
        self.closed_number = 0
        self.routes: dict[bytes, RouteEntry] = {}
        self.route: RouteEntry | None = None
        self.widest = NARROW
        self.generation = 0
        self.bytes_to_skip = 0
        self.open = True
        self.held_by: Session | None = None
        self.hold_deadline: float | None = None
        self.arrived = 0.0
        self.charged = False
        self.closing = ""
        self.closing_code: ErrorCode | None = None
        self.cut = False
        self.slow = False
        self.allowance: Allowance | None = None
        self.waiters: dict[Session, None] = {}
        self.incoming_requests: dict[RequestKey, DeliveredRequest] = {}
        self.outgoing_requests: dict[int, tuple[DeliveredRequest, ...]] = {}
        self.outgoing_count = 0
        self.waiting_requests: dict[int, list[WaitingRequest]] = {}
        self.waiting_count = 0
        self.in_flight: int | None = None
        self.cancels = False
        self.listens = False
        self.revoked: set[tuple[str, int]] = set()
        self.recipients: set[Client] = set()
        self.spread: Spread | None = None
        self.reached_by_event: dict[Session, None] | None = None
        self.subscriptions: set[tuple[str, str | None]] = set()
        self.consumer: Consumer | None = None
        self.uncommitted = 0
        self.goaway = self.goaway_sent = self.parting = False
        self.finishing: int | None = None
        self.finished = self.retired = self.mute = False
        self.marks: Marks | None = None
        self.marked_at = 0
        self.messages_in = 0
        self.bytes_in = 0
        self.errors_in = 0

    @property
    def needs_slow_path(self) -> bool:
        """Whether the broker, and not the routing loop, must see each of its frames.

        It must while it is handling a frame: that frame goes back to the broker, not
        past it. It also must while the connection is about to end.
        """
        return self.charged or self.parting or self.mute

    def known_routes(self, generation: int) -> dict[bytes, RouteEntry]:
        """Return the routing loop's cache of route entries, emptied if it is stale.

        generation: the number of the rules in force.
        """
        if self.needs_slow_path:
            return {}
        if self.generation != generation:
            self.generation = generation
            self.routes.clear()
            self.widest = NARROW
        return self.routes

    @property
    def in_flight_limit(self) -> int | None:
        """Most requests delivered to this connection without an outcome; None: no limit."""
        configured = None if self.host else self.client.config.in_flight
        if configured is None or self.in_flight is None:
            return self.in_flight if configured is None else configured
        return min(configured, self.in_flight)

    @property
    def messages_out(self) -> int:
        """Frames passed on to this connection."""
        return self.outbox.frames

    @property
    def bytes_out(self) -> int:
        """Bytes of those frames."""
        return self.outbox.size

    def own_route(self) -> RouteEntry:
        """Return the route entry of its own address."""
        if self.route is None:
            self.route = RouteEntry()
            self.route.is_pinned = True
            self.route.direct = self.outbox
        return self.route

    def renew_outbox(self) -> None:
        """Replace an empty outbox by one of the kind that a changed entry needs."""
        old, self.outbox = self.outbox, new_outbox(self.client.config)
        self.outbox.owner = self
        self.outbox.frames, self.outbox.size, self.outbox.touched = (
            old.frames,
            old.size,
            old.touched,
        )
        if self.route is not None:
            self.route.direct = self.outbox

    def __repr__(self) -> str:
        return f"<Session {self.address} from {self.peer}>"
