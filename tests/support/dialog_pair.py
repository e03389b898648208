"""A client's dialog joined to a fake broker's session, without a socket."""

from __future__ import annotations

from typing import Any

from support.fake_broker import FakeBroker, Session

from brokerd_client.errors import Disconnected
from brokerd_client.message import Message
from brokerd_client.protocol.dialog import Dialog, Effects
from brokerd_client.wire.envelope import Envelope, Kind, encode
from brokerd_client.wire.framing import frame

NONCE = b"n" * 40
LOST = Disconnected("cut")


class Owner:
    """A client that accepts no pickles."""

    allow_pickle_from: frozenset[str] = frozenset()
    json_codec = None


OWNER = Owner()


def merge(into: Effects[Message], more: Effects[Message]) -> None:
    """Add the effects of one call to another's."""
    for field in (
        "messages",
        "stored",
        "outcomes",
        "events",
        "ended",
        "undelivered",
        "unreadable",
        "warnings",
        "changes",
    ):
        getattr(into, field).extend(getattr(more, field))
    into.size += more.size
    into.broken = into.broken or more.broken


class Pair:
    """A dialog and a broker's session, joined with no socket."""

    def __init__(
        self,
        broker: FakeBroker | None = None,
        name: str = "alice",
        key: bytes = b"alice",
        **options: Any,
    ):
        self.broker = broker or FakeBroker(
            {each: each.encode() for each in ("alice", "bob", "carol")}
        )
        self.dialog: Dialog[Message] = Dialog(key, name, 1000, Message, **options)
        self.session: Session | None = None
        self.now = 0.0

    def connect(self, step: int = 2**20) -> Effects[Message]:
        """Dial, and exchange bytes until neither side has any."""
        self.dialog.dialing(self.now)
        self.dialog.opened(NONCE)
        self.session = Session(self.broker)
        return self.talk(step)

    def talk(self, step: int = 2**20) -> Effects[Message]:
        """Move bytes both ways, ``step`` at a time, until there are none."""
        effects: Effects[Message] = Effects()
        assert self.session is not None
        while True:
            data = self.dialog.data_to_send()
            self.dialog.wrote(len(data))
            self.session.receive(data)
            if not data and not self.session.out:
                return effects
            data_received = bytes(self.session.out)
            self.session.out.clear()
            for start in range(0, len(data_received), step):
                merge(effects, self.hear(data_received[start : start + step]))

    def hear(self, data: bytes) -> Effects[Message]:
        """Give these bytes to the dialog."""
        return self.dialog.receive(data, OWNER, self.now)

    def hear_frame(
        self, kind: Kind, message_id: int = 0, name: str = "bob", **fields: Any
    ) -> Effects[Message]:
        """Give one frame to the dialog."""
        return self.hear(frame(encode(Envelope(kind, message_id, name, **fields))))

    def lose(self, jitter: float = 0.5, **options: Any) -> Effects[Message]:
        """Cut the connection."""
        if self.session is not None:
            self.broker.left(self.session)
        return self.dialog.lost(LOST, self.now, jitter, **options)
