"""One authenticated connection, as the core sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd.config.values import ClientConfig, WhenFull
from brokerd.core.outbox import FrameOutbox, Outbox, StreamOutbox

if TYPE_CHECKING:
    from brokerd.core.exchange import Client

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
    charged: the frame being handled has been counted against the sender's rate already.
    closing: why it is to be closed once its outbox is written, or "".
    cut: it is to be closed at once, written or not.
    waiters: sessions held because this one's queue is full, in the order they came.

    owed: requests delivered here and not answered yet, by (address of who asked, id).
    asked: its own requests not answered yet, by (id, address of who was asked).
    """

    __slots__ = (
        "address",
        "asked",
        "bytes_in",
        "bytes_out",
        "charged",
        "client",
        "closing",
        "cut",
        "errors_in",
        "generation",
        "held_by",
        "hold_deadline",
        "instance",
        "link",
        "messages_in",
        "messages_out",
        "open",
        "outbox",
        "owed",
        "peer",
        "routes",
        "since",
        "skip",
        "stamp",
        "subscriptions",
        "touched",
        "waiters",
    )

    def __init__(self, client: Client, instance: str, *, peer: str, since: float, link: Any = None) -> None:
        config = client.config
        self.client = client
        self.instance = instance
        self.address = f"{client.name}/{instance}" if config.connections > 1 else client.name
        self.stamp = self.address.encode()
        self.peer = peer
        self.since = since
        self.link = link
        self.outbox: Outbox = new_outbox(config)
        self.routes: dict[bytes, Client] = {}
        self.generation = 0
        self.skip = 0
        self.open = True
        self.touched = False
        self.held_by: Session | None = None
        self.hold_deadline: float | None = None
        self.charged = False
        self.closing = ""
        self.cut = False
        self.waiters: dict[Session, None] = {}
        self.owed: dict[tuple[str, int], Session] = {}
        self.asked: dict[tuple[int, str], Session] = {}
        self.subscriptions: set[tuple[str, str | None]] = set()
        self.messages_in = 0
        self.bytes_in = 0
        self.messages_out = 0
        self.bytes_out = 0
        self.errors_in = 0

    def __repr__(self) -> str:
        return f"<Session {self.address} from {self.peer}>"
