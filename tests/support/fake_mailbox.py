"""A mailbox of a fake broker, kept in memory: no time, no quota and no dead letters.

Attempts are counted as a broker counts them, and messages are delivered from the head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from support.fake_broker import FakeBroker, Session

from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    error_payload,
)


@dataclass
class Stored:
    """A message of a mailbox, and the session that holds it."""

    envelope: Envelope
    attempt: int = 1
    holder: Session | None = None


@dataclass
class FakeMailbox:
    """The mailbox of one client, which answers for its broker.

    Attributes:
        owner: The name of the client.
        messages: What is stored, by seq.
        windows: The window of each session that has opened it.
        acks: Each ACK: its seq, and its verb and what else its payload has.
        ends: The operations that opened and closed it, in order.
        ack_error: The code with which ACKs are refused, or "".
    """

    broker: FakeBroker
    owner: str
    messages: dict[int, Stored] = field(default_factory=dict)
    windows: dict[int, tuple[Session, int]] = field(default_factory=dict)
    acks: list[tuple[int, dict[str, object]]] = field(default_factory=list)
    ends: list[dict[str, object]] = field(default_factory=list)
    ack_error: str = ""
    next_seq: int = 1

    def __post_init__(self) -> None:
        self.broker.limits = {**self.broker.limits, "dedup": 3600}
        self.broker.intercept = self.handle
        self.broker.on_left = self.left

    def store(
        self, payload: bytes, sender: str = "alice", topic: str = "", **fields: object
    ) -> int:
        """Store a message, or an event if it has a topic; return its seq."""
        kind = Kind.EVENT if topic else Kind.MESSAGE
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        envelope = Envelope(kind, seq + 100, sender, payload, topic=topic, **fields)  # type: ignore[arg-type]
        self.messages[seq] = Stored(envelope)
        self.deliver()
        return seq

    def handle(self, session: Session, envelope: Envelope) -> bool:
        """Handle a frame that concerns the mailbox; return whether it does."""
        if envelope.kind is Kind.ACK and session.name == self.owner:
            self._on_ack(session, envelope)
        elif envelope.kind is Kind.MESSAGE and envelope.name == self.owner:
            self.store(envelope.payload, session.name, extension=envelope.extension)
            if envelope.flags & Flag.RECEIPT:
                session.deliver(Envelope(Kind.RECEIPT, envelope.id, BROKER))
        elif envelope.kind is Kind.REQUEST and envelope.name == BROKER:
            operation = json.loads(envelope.payload)
            if operation["op"] not in ("open_mailbox", "close_mailbox"):
                return False
            self._operate(session, envelope, operation)
        else:
            return False
        return True

    def _operate(self, session: Session, envelope: Envelope, operation: dict[str, object]) -> None:
        if session.name != self.owner:
            self.broker.refuse(session, envelope, ErrorCode.UNSUPPORTED)
            return
        self.ends.append(operation)
        if operation["op"] == "open_mailbox":
            window = operation.get("window", 64)
            assert isinstance(window, int)
            self.windows[id(session)] = session, window
        else:
            self.windows.pop(id(session), None)
            self._return(session, failed=False)
        session.deliver(Envelope(Kind.REPLY, envelope.id, BROKER, b"{}", CodecId.JSON))
        self.deliver()

    def _on_ack(self, session: Session, envelope: Envelope) -> None:
        seq = envelope.id
        fields = json.loads(envelope.payload) if envelope.payload else {"verb": "done"}
        assert envelope.codec == (CodecId.JSON if envelope.payload else CodecId.RAW)
        stored = self.messages.get(seq)
        held = stored is not None and stored.holder is session
        self.acks.append((seq, fields if held else {**fields, "late": True}))
        code = self.ack_error or ("" if held else "expired")
        if code:
            payload = error_payload(code, "why", self.owner, seq=seq)  # type: ignore[arg-type]
            session.deliver(
                Envelope(Kind.ERROR, seq, BROKER, payload, CodecId.JSON, flags=Flag.ACK)
            )
            return
        assert stored is not None
        if fields["verb"] in ("done", "dead"):
            del self.messages[seq]
        else:
            stored.holder = None
            stored.attempt += fields["verb"] == "failed"
        self.deliver()

    def _return(self, session: Session, *, failed: bool) -> None:
        for stored in self.messages.values():
            if stored.holder is session:
                stored.holder = None
                stored.attempt += failed

    def left(self, session: Session) -> None:
        """Take back what a session held whose connection has ended."""
        self.windows.pop(id(session), None)
        self._return(session, failed=True)

    def deliver(self) -> None:
        """Deliver what the windows allow."""
        for session, window in list(self.windows.values()):
            held = sum(stored.holder is session for stored in self.messages.values())
            for seq, stored in self.messages.items():
                if held >= window:
                    break
                if stored.holder is None:
                    stored.holder = session
                    held += 1
                    session.deliver(self.delivery(seq))

    def delivery(self, seq: int) -> Envelope:
        """Return the frame that delivers a message."""
        stored = self.messages[seq]
        given = stored.envelope
        return Envelope(
            given.kind,
            given.id,
            given.name,
            given.payload,
            given.codec,
            Flag.ACK,
            given.topic,
            given.extension,
            seq,
            stored.attempt,
        )
