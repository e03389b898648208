"""One authenticated connection, as the core sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd.config.values import ClientConfig, WhenFull
from brokerd.core.outbox import FrameOutbox, Outbox, StreamOutbox

if TYPE_CHECKING:
    from brokerd.core.allowance import Allowance
    from brokerd.core.broker import Broker
    from brokerd.core.events import Spread
    from brokerd.core.exchange import Client, Rank
    from brokerd.core.goaway import Marks
    from brokerd.core.routing import RouteEntry, WriteBuffer
    from brokerd_client.wire.envelope import ErrorCode

__all__ = ["Session", "new_outbox"]


def new_outbox(config: ClientConfig) -> Outbox:
    """Return an empty outbox of the kind that the client's entry calls for."""
    edited = config.connections > 1 or config.when_full is WhenFull.DROP_OLDEST
    return FrameOutbox(config.queue) if edited else StreamOutbox(config.queue)


class Session:
    """One authenticated connection.

    client: whose it is. address: how others see and reach it: the name, or ``name/instance`` in a pool.
    stamp: that address as it is written into every frame this session sends.
    link: the connection's handle in the network layer; the core only carries it.

    skip: bytes of an oversized frame still to be passed over.
    held_by: nothing more is read from it until that session has room; hold_deadline says until when
        the frame it was held for may wait.
    arrived: when the frame being handled came; its ttl counts from there.
    charged: the frame being handled has been counted against the sender's rate already.
    closing: why it is to be closed once its outbox is written, or "".
    closing_code: what its client is told then, or None.
    cut: it is to be closed at once, written or not.
    slow: its queue was full, and has not been empty since.
    allowance: how long it may hold senders; None while it never has.
    waiters: sessions held because this one's queue is full, in the order they came.

    owed: requests delivered here and not answered yet, by (address of who asked, id).
    asked: its own requests not answered yet, by (id, address of who was asked).
    spread: its event that is on the way to very many subscribers. reached_by_event: those that have it.
    expiring: until when an answer may come, of those of its requests that have a ttl.
    widest: how many outboxes the largest event that the routing loop remembers for it goes to.
    rank: its place among the connections of its pool: see Client.pick.
    number, left_at: where in the order of all that came and went it came, and went.
    reached: whom it has sent something that the broker may have to answer for.

    goaway: it has asked to be told before the broker closes it. told: it has been.
    parting: its new messages are refused, because its connection is about to end.
    finishing: the id of its request ``finished``, once it has asked. finished: that has been answered.
    marks, marked_at: see :func:`brokerd.core.goaway.has_finished`.
    retired: nothing more is delivered to it. mute: nothing more is sent to it at all.
    """

    __slots__ = (
        "address",
        "allowance",
        "arrived",
        "bytes_in",
        "bytes_to_skip",
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
        "held_by",
        "hold_deadline",
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
        "retired",
        "routes",
        "sender_header",
        "since",
        "slow",
        "spread",
        "subscriptions",
        "told",
        "topics_version",
        "waiters",
        "widest",
    )

    def __init__(self, client: Client, instance: str, *, peer: str, since: float, connection: Any = None) -> None:
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
        self.recipients: set[Client] = set()
        self.spread: Spread | None = None
        self.reached_by_event: dict[Session, None] | None = None
        self.subscriptions: set[tuple[str, str | None]] = set()
        self.goaway = self.told = self.parting = False
        self.finishing: int | None = None
        self.finished = self.retired = self.mute = False
        self.marks: Marks | None = None
        self.marked_at = 0
        self.messages_in = 0
        self.bytes_in = 0
        self.errors_in = 0

    def caches(self, broker: Broker) -> tuple[dict[bytes, RouteEntry], dict[bytes, tuple[WriteBuffer, ...]]]:
        """Return what the routing loop remembers of earlier frames, emptied where it is no longer true.

        By recipient: the seat a message goes to. By topic: the outboxes an event goes to.
        A frame that the broker has begun with goes back to it, not past it: then nothing is remembered. Nor is
        anything for a connection that is about to end.
        """
        if self.charged or self.parting or self.mute:
            return {}, {}
        if self.generation != broker.generation:
            self.generation = broker.generation
            self.routes.clear()
            self.fanouts.clear()
            self.widest = 0
        if self.topics_version != broker.topics.version:
            self.topics_version = broker.topics.version
            self.fanouts.clear()
            self.widest = 0
        return self.routes, self.fanouts

    @property
    def messages_out(self) -> int:
        """Frames passed on to this connection."""
        return self.outbox.frames

    @property
    def bytes_out(self) -> int:
        """Bytes of those frames."""
        return self.outbox.size

    def renew_outbox(self) -> None:
        """Begin an outbox of the kind that a changed entry calls for; nothing may be waiting."""
        old, self.outbox = self.outbox, new_outbox(self.client.config)
        self.outbox.owner = self
        self.outbox.frames, self.outbox.size, self.outbox.touched = old.frames, old.size, old.touched

    def __repr__(self) -> str:
        return f"<Session {self.address} from {self.peer}>"
