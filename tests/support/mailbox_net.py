"""A network without sockets whose broker has mailboxes, and a store in memory."""

from __future__ import annotations

import json
from typing import Any

from support.fake_network import FakeNet, Peer, client
from support.memory_store import MemoryStore

from brokerd.config.values import ClientConfig, MailboxConfig, Rule, WhenFull
from brokerd.core.broker import CoreLimits
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd_client.wire.envelope import CodecId, Envelope, Flag, Kind

__all__ = ["MailboxNet", "ack", "mailbox", "open_mailbox", "receipts", "seqs", "with_mailbox"]


def mailbox(**changes: Any) -> MailboxConfig:
    """Return a mailbox with the default limits; patterns may be given as text."""
    values: dict[str, Any] = {
        "size": 1 << 30,
        "messages": 1_000_000,
        "ttl": None,
        "subscribe": (),
        "window": 64,
        "attempts": 10,
        "when_full": WhenFull.REFUSE,
        "dead": 0.2,
        "max_message": 1 << 20,
        "ack_timeout": None,
    } | changes
    values["subscribe"] = tuple(Rule(pattern) for pattern in values["subscribe"])
    return MailboxConfig(**values)


def with_mailbox(name: str = "bob", *, entry: dict[str, Any] | None = None, **box: Any) -> Any:
    """Return a client with a mailbox. entry: other values of its entry."""
    return client(name, mailbox=mailbox(**box), **(entry or {}))


class MailboxNet(FakeNet):
    """The broker, its connections, the time and the store.

    is_prompt: whether the store answers everything at once.
    """

    def __init__(
        self,
        *configs: ClientConfig,
        store: MemoryStore | None = None,
        limits: CoreLimits | None = None,
        is_prompt: bool = True,
    ) -> None:
        super().__init__(*configs, limits=limits)
        self.is_prompt = is_prompt
        self.store = (store or MemoryStore()).open(self.broker.mailboxes)

    def settle(self) -> None:
        """Carry out the core's decisions, and the store's requests."""
        super().settle()
        while self.is_prompt and not self._settling and self.store.step():
            super().settle()

    def answer(self, count: int | None = None) -> None:
        """Have the store answer its first ``count`` requests, or all."""
        while self.store.step(count):
            super().settle()
            if count is not None:
                break

    def take_over(self) -> None:
        """Replace the broker by the new one of ``copy``; the store stays."""
        self.broker.mailboxes.pause()
        self.settle()
        self.answer()
        super().take_over()
        self.broker.mailboxes.clock.set(self.now, self.now)
        self.store.mailboxes = self.broker.mailboxes
        self.broker.mailboxes.attached(self.store)
        self.settle()

    def box(self, name: str = "bob") -> Mailbox:
        """Return a mailbox."""
        return self.broker.mailboxes.boxes[name]


def open_mailbox(peer: Peer, **arguments: Any) -> dict[str, Any]:
    """Open the peer's mailbox; return the reply. Deliveries stay in ``peer.got``."""
    peer.op("open_mailbox", 77, **arguments)
    answers = [envelope for envelope in peer.got if envelope.id == 77]
    peer.got = [envelope for envelope in peer.got if envelope.id != 77]
    (answer,) = answers
    assert answer.kind is Kind.REPLY, answer.payload
    reply = json.loads(answer.payload)
    assert isinstance(reply, dict)
    return reply


def ack(
    peer: Peer, seq: int, verb: str = "", *, receipt: bool = False, upto: bool = False, **more: Any
) -> None:
    """Acknowledge a message. upto: all that the connection holds up to this one."""
    flags = (Flag.RECEIPT if receipt else 0) | (Flag.ACK if upto else 0)
    if verb or more:
        payload = json.dumps({"verb": verb, **more}).encode()
        peer.send(Envelope(Kind.ACK, seq, "", payload, codec=CodecId.JSON, flags=flags))
    else:
        peer.send(Envelope(Kind.ACK, seq, "", flags=flags))


def seqs(peer: Peer) -> list[int]:
    """Remove what a peer got; return the seqs of the deliveries among it."""
    return [
        envelope.seq
        for envelope in peer.take()
        if envelope.kind in (Kind.MESSAGE, Kind.EVENT) and envelope.flags & Flag.ACK
    ]


def receipts(peer: Peer) -> list[int]:
    """Remove what a peer got; return the ids of the RECEIPTs among it."""
    return [envelope.id for envelope in peer.take() if envelope.kind is Kind.RECEIPT]
