"""One authenticated connection, as the core sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd.config.values import ClientConfig, WhenFull
from brokerd.core.outbox import FrameOutbox, Outbox, Queued, StreamOutbox

if TYPE_CHECKING:
    from brokerd.core.allowance import Allowance
    from brokerd.core.events import Spread
    from brokerd.core.exchange import Client, Rank
    from brokerd.core.flight import WaitingRequest
    from brokerd.core.goaway import Marks
    from brokerd.core.routing import RouteEntry, WriteBuffer
    from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Session", "new_outbox"]


def new_outbox(config: ClientConfig) -> Outbox:
    """Return an empty outbox of the kind that the client's configuration needs."""
    edited = config.connections > 1 or config.when_full is WhenFull.DROP_OLDEST
    return FrameOutbox(config.queue) if edited else StreamOutbox(config.queue)


class Session:
    """One authenticated connection.

    Attributes:
        client: The client that it belongs to.
        address: Its address for other clients: the name, or ``name/instance`` in a
            pool.
        sender_header: That address as it is written into every frame of this session.
        connection: The connection in the network layer; the core only carries it.

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

        incoming_requests: The requester of each request delivered here and not answered
            yet, by (requester's address, id).
        outgoing_requests: The responder of each of its own requests not answered yet,
            by (id, responder's address).
        expiring: The deadlines of those outgoing requests that have a ttl, by the same
            key.
        addresses_asked: The responders' addresses of those outgoing requests, by id.
        waiting_requests: Its requests that wait for a recipient with room in flight, by
            id.
        waiting_count: The number of those requests.
        in_flight: Its own limit of delivered requests without an outcome, or None.
        retained: Frames of delivered requests that another member of the pool can get,
            by the key of incoming_requests.
        cancels: Whether it is told that a request delivered to it is over.
        revoked: Cancelled requests whose frames may still wait in its outbox, by that
            key.
        spread: Its event that is still on its way to many subscribers, or None.
        reached_by_event: The subscribers that have been chosen for that event so far.
        routes, fanouts: The routing loop's caches of recipients and topics: see
            ``caches``.
        widest: Outboxes in the largest fan-out in that cache.
        rank: Its rank among the connections of its pool: see Client.pick.
        number, closed_number: Its positions in the order of all attaches and detaches.
        recipients: The clients that it has sent frames for which the broker may owe a
            report.

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
        "addresses_asked",
        "allowance",
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
        "cut",
        "errors_in",
        "expiring",
        "fanouts",
        "finished",
        "finishing",
        "generation",
        "goaway",
        "goaway_sent",
        "held_by",
        "hold_deadline",
        "in_flight",
        "incoming_requests",
        "instance",
        "marked_at",
        "marks",
        "messages_in",
        "mute",
        "number",
        "open",
        "outbox",
        "outgoing_requests",
        "parting",
        "peer",
        "rank",
        "reached_by_event",
        "recipients",
        "retained",
        "retired",
        "revoked",
        "routes",
        "sender_header",
        "since",
        "slow",
        "spread",
        "subscriptions",
        "topics_version",
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
        self.peer = peer
        self.since = since
        self.connection = connection
        self.outbox: Outbox = new_outbox(config)
        self.outbox.owner = self
        self.rank: Rank | None = None
        self.number = 0
        self.closed_number = 0
        self.routes: dict[bytes, RouteEntry] = {}
        self.fanouts: dict[bytes, tuple[WriteBuffer, ...]] = {}
        self.widest = 0
        self.topics_version = 0
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
        self.incoming_requests: dict[tuple[str, int], Session] = {}
        self.outgoing_requests: dict[tuple[int, str], Session] = {}
        self.expiring: dict[tuple[int, str], float] = {}
        self.addresses_asked: dict[int, tuple[str, ...]] = {}
        self.waiting_requests: dict[int, list[WaitingRequest]] = {}
        self.waiting_count = 0
        self.in_flight: int | None = None
        self.retained: dict[tuple[str, int], Queued] = {}
        self.cancels = False
        self.revoked: set[tuple[str, int]] = set()
        self.recipients: set[Client] = set()
        self.spread: Spread | None = None
        self.reached_by_event: dict[Session, None] | None = None
        self.subscriptions: set[tuple[str, str | None]] = set()
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

    def caches(
        self, generation: int, topics_version: int
    ) -> tuple[dict[bytes, RouteEntry], dict[bytes, tuple[WriteBuffer, ...]]]:
        """Return the routing loop's caches, emptied where they are stale.

        They are the route entry of each recipient, and the outboxes of each topic.

        generation, topics_version: the numbers of the rules and subscriptions in force.
        """
        if self.needs_slow_path:
            return {}, {}
        if self.generation != generation:
            self.generation = generation
            self.routes.clear()
            self.fanouts.clear()
            self.widest = 0
        if self.topics_version != topics_version:
            self.topics_version = topics_version
            self.fanouts.clear()
            self.widest = 0
        return self.routes, self.fanouts

    @property
    def in_flight_limit(self) -> int | None:
        """Most requests delivered to this connection without an outcome; None: no limit."""
        configured = self.client.config.in_flight
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

    def renew_outbox(self) -> None:
        """Replace an empty outbox by one of the kind that a changed entry needs."""
        old, self.outbox = self.outbox, new_outbox(self.client.config)
        self.outbox.owner = self
        self.outbox.frames, self.outbox.size, self.outbox.touched = (
            old.frames,
            old.size,
            old.touched,
        )

    def __repr__(self) -> str:
        return f"<Session {self.address} from {self.peer}>"
