"""The two routing loops side by side, each behind a broker of its own, fed the same and
compared after every step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from support.fake_network import FakeNet, Feed, Peer, client
from support.mailbox_net import with_mailbox
from support.memory_store import MemoryStore

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import _routing_py
from brokerd.core.broker import CoreLimits
from brokerd.core.mailboxes.journal import Append, Record
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd.core.outbox import Outbox, StreamOutbox

__all__ = ["HEADER", "MAX_MESSAGE", "Recorded", "agree", "frame"]

HEADER = struct.Struct("!BBBBQ")
MAX_MESSAGE = 200
#: What is written down: calls of the broker, and of its replies.
CALLS = ("handle", "too_large")
REPLIES = ("malformed", "answer", "refuse")
#: The calls that both loops make: the compiled one passes on by itself what its twin
#: hands to the broker.
REFUSALS = ("too_large", "malformed", "refuse")


def frame(body: bytes, *, length: int | None = None, long: bool = False) -> bytes:
    size = len(body) if length is None else length
    return (struct.pack("!iQ", -1, size) if long else struct.pack("!i", size)) + body


class Recorded(FakeNet):
    """A broker that records every call from the loop."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(
            client("a"),
            client("b", queue=2000),
            client("c", send_to=("a", "b"), publish=("t.>",), queue=600, when_full=WhenFull.REFUSE),
            client("pool", connections=3, in_flight=3, queue=4000),
            client("drops", queue=500, when_full=WhenFull.DROP_OLDEST),
            client("slow", queue=300, when_full=WhenFull.DISCONNECT),
            client("metered", rate=RateConfig(3, 400)),
            with_mailbox("box", messages=60, size=8000, max_message=150),
            limits=CoreLimits(MAX_MESSAGE, 30.0),
            feed=feed,
        )
        self.store = MemoryStore().open(self.broker.mailboxes)
        self.calls: list[tuple[Any, ...]] = []
        for name in CALLS:
            self._record(self.broker, name)
        for name in REPLIES:
            self._record(self.broker.replies, name)
        self.entries = [
            self.connect(name)
            for name in ("a", "b", "c", "pool", "pool", "slow", "metered", "drops")
        ]
        self.all_peers: list[Peer] = list(self.entries)
        self.box: Peer | None = None
        self._warm_up()

    def _warm_up(self) -> None:
        """Fill every cache, so that everything that leaves the routing loop is an
        exception.
        """
        self.entries[1].op("subscribe", 1, topic="t.>")
        for entry in self.entries[:6]:
            for name in ("a", "b", "c", "box"):
                entry.message(name, b"first")
            entry.publish("t.x", b"first")
        assert self.entries[0].session.routes.keys() == {b"a", b"b", b"c", b"box"}
        assert self.broker.topics.cache.topics.keys() >= {b"t.x"}
        self.calls.clear()

    def _record(self, part: object, name: str) -> None:
        original = getattr(part, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            self.calls.append((name, *map(_plain, arguments), options))
            return original(*arguments, **options)

        setattr(part, name, recorded)

    def play(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("advance", seconds):
                self.advance(seconds)
            case ("send", entry, whole, size):
                self.entries[entry].send_bytes(b"".join(whole), size)
            case ("repeat", entry, each, times):
                self.entries[entry].send_bytes(each * times)
            case ("answer", entry, which, kind, flags, payload):
                peer = self.entries[entry]
                requests = list(peer.session.incoming_requests)
                if requests and not peer.gone:
                    address, message_id = requests[which % len(requests)][:2]
                    header = HEADER.pack(kind, flags, 0, len(address), message_id)
                    extension = b"\0\x0b" + b'{"ttl": 50}' if flags & 2 else b""
                    peer.send_bytes(frame(header + address.encode() + extension + payload))
            case ("subscribe", entry, topic, group):
                if not self.entries[entry].gone:
                    options = {"group": group} if group else {}
                    self.entries[entry].op("subscribe", 1, topic=topic, **options)
            case ("block", entry, room):
                self.entries[entry].block(room)
            case ("store", count, failure):
                self.store.failure = failure
                self.store.step(count)
                self.store.failure = None
                self.settle()
            case ("acknowledge", places):
                self._acknowledge(places)
            case ("read", entry, size):
                if not self.entries[entry].gone:
                    self.entries[entry].read(size)
            case ("reconnect", entry):
                name = self.entries[entry].name
                self.entries[entry].leave()
                again = self.try_connect(name)
                if again is not None:
                    self.entries[entry] = again
                    self.all_peers.append(again)

    def _acknowledge(self, places: Iterable[int]) -> None:
        """Let the client of the mailbox acknowledge some of what it holds, or holds not."""
        if self.box is None or self.box.gone:
            self.box = self.connect("box")
            self.all_peers.append(self.box)
            self.box.op("open_mailbox", 1, window=20)
        consumer = self.box.session.consumer
        held = [*consumer.held] if consumer is not None else []
        seqs = [held[place] if place < len(held) else place for place in places]
        self.box.send_bytes(b"".join(frame(HEADER.pack(7, 0, 0, 0, seq)) for seq in seqs))

    def state(self) -> dict[str, Any]:
        """Return all state that is visible from outside, and the loop's counters."""
        return {
            "refusals": [call for call in self.calls if call[0] in REFUSALS],
            "refused": self.broker.replies.refused,
            "dropped": self.broker.replies.dropped,
            "flight": [
                (
                    client.name,
                    client.turn,
                    client.flight.size,
                    client.flight.retained,
                    [
                        (
                            request.requester.address,
                            request.id,
                            request.to,
                            bytes(request.queued.frame),
                            request.queued.receipt,
                            request.queued.pinned,
                            request.queued.deadline,
                        )
                        for request, _ in client.flight.waiting()
                    ],
                )
                for client in self.broker.exchange.clients.values()
                if client.flight is not None
            ],
            "mailbox": _contents(self.broker.mailboxes.boxes["box"]),
            "stored": [
                [_whole(record) for record in batch.records] for batch in self.store.batches
            ],
            "next deadline": self.broker.next_deadline,
            "turns of groups": {
                topic: matches.turn
                for topic, matches in self.broker.topics.cache.topics.items()
                if matches.turn
            },
            "peers": [
                (
                    bytes(peer.stream),
                    peer.content,
                    peer.gone,
                    peer.reading,
                    peer.session.bytes_to_skip,
                    peer.session.messages_in,
                    peer.session.bytes_in,
                    peer.session.messages_out,
                    peer.session.bytes_out,
                    peer.session.outbox.waiting,
                    peer.session.uncommitted,
                    [
                        (key, request.requester.address, request.id, request.deadline)
                        for key, request in peer.session.incoming_requests.items()
                    ],
                    list(peer.session.outgoing_requests),
                    peer.session.outgoing_count,
                    sorted(client.name for client in peer.session.recipients),
                    list(peer.session.outbox.marks),
                    _queue(peer.session.outbox),
                    sorted(peer.session.routes),
                )
                for peer in self.all_peers
            ],
        }


def _contents(box: Mailbox) -> tuple[Any, ...]:
    counts = (box.messages, box.size, box.uncommitted, box.next_seq, box.unloaded, [*box.held])
    return (*counts, [message.frame for message in box.ready], len(box.waiting))


def _whole(record: Record) -> tuple[Any, ...]:
    if isinstance(record, Append):
        return (*record[:3], tuple(record.messages))
    return tuple(record)


def _queue(outbox: Outbox) -> list[tuple[Any, ...]]:
    """Return the frames that wait one by one, with what is known of each."""
    if isinstance(outbox, StreamOutbox):
        return []
    return [
        (
            bytes(queued.frame),
            queued.receipt,
            queued.pinned,
            getattr(queued.sender, "address", None),
            queued.kept,
            queued.deadline,
        )
        for queued in outbox.queue()
    ]


def _plain(argument: Any) -> Any:
    if isinstance(argument, memoryview):
        return bytes(argument)
    return getattr(argument, "address", argument)


def agree(steps: Iterable[tuple[Any, ...]]) -> Recorded:
    """Play the steps to both loops; return the Python one."""
    # Here, so that what is fed only to the plain loop does without the compiled one.
    from brokerd.core import _routing_c

    plain, compiled = Recorded(_routing_py.feed), Recorded(_routing_c.feed)
    for step in steps:
        plain.play(step)
        compiled.play(step)
        assert compiled.state() == plain.state(), step
    return plain
