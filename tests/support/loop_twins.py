"""The two routing loops side by side, each behind a broker of its own, fed the same and
compared after every step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from support.fake_network import FakeNet, Feed, Peer, client

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import _routing_py
from brokerd.core.broker import CoreLimits

__all__ = ["HEADER", "MAX_MESSAGE", "Recorded", "agree", "frame"]

HEADER = struct.Struct("!BBBBQ")
MAX_MESSAGE = 200
#: What is written down: calls of the broker, and of its replies.
CALLS = ("handle", "too_large")
REPLIES = ("malformed", "answer", "refuse")


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
            client("pool", connections=3),
            client("drops", queue=500, when_full=WhenFull.DROP_OLDEST),
            client("slow", queue=300, when_full=WhenFull.DISCONNECT),
            client("metered", rate=RateConfig(3, 400)),
            limits=CoreLimits(MAX_MESSAGE, 30.0),
            feed=feed,
        )
        self.calls: list[tuple[Any, ...]] = []
        for name in CALLS:
            self._record(self.broker, name)
        for name in REPLIES:
            self._record(self.broker.replies, name)
        self.entries = [
            self.connect(name) for name in ("a", "b", "c", "pool", "pool", "slow", "metered")
        ]
        self.all_peers: list[Peer] = list(self.entries)
        self._warm_up()

    def _warm_up(self) -> None:
        """Fill every cache, so that everything that leaves the routing loop is an
        exception.
        """
        self.entries[1].op("subscribe", 1, topic="t.>")
        for entry in self.entries[:6]:
            for name in ("a", "b", "c"):
                entry.message(name, b"first")
            entry.publish("t.x", b"first")
        assert self.entries[0].session.routes.keys() == {b"a", b"b", b"c"}
        assert self.entries[0].session.fanouts.keys() == {b"t.x"}
        self.calls.clear()

    def _record(self, part: object, name: str) -> None:
        original = getattr(part, name)

        def recorded(*arguments: Any) -> Any:
            self.calls.append((name, *(_plain(argument) for argument in arguments)))
            return original(*arguments)

        setattr(part, name, recorded)

    def play(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("advance", seconds):
                self.advance(seconds)
            case ("send", entry, whole, size):
                self.entries[entry].send_bytes(b"".join(whole), size)
            case ("repeat", entry, each, times):
                self.entries[entry].send_bytes(each * times)
            case ("subscribe", entry, topic):
                if not self.entries[entry].gone:
                    self.entries[entry].op("subscribe", 1, topic=topic)
            case ("block", entry, room):
                self.entries[entry].block(room)
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

    def state(self) -> dict[str, Any]:
        """Return all state that is visible from outside, and the loop's counters."""
        return {
            "calls": self.calls,
            "refused": self.broker.replies.refused,
            "dropped": self.broker.replies.dropped,
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
                    sorted(peer.session.routes),
                    sorted(peer.session.fanouts),
                )
                for peer in self.all_peers
            ],
        }


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
