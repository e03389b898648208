"""The compiled routing loop and its readable twin are fed the same and must do the same, to the byte."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterable
from typing import Any

import pytest
from core.fakenet import FakeNet, Feed, Peer, client

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import _routing_py
from brokerd.core.broker import Limits

if os.environ.get("BROKERD_PURE") == "1":
    pytest.skip("BROKERD_PURE=1 leaves the compiled loop out", allow_module_level=True)
_routing_c = pytest.importorskip("brokerd.core._routing_c", reason="the compiled loop was not built")

HEADER = struct.Struct("!BBBBQ")
MAX_MESSAGE = 200
NAMES = ["a", "b", "c", "pool", "drops", "slow", "metered", "nobody", "$broker", "pool/x", "a" * 64, "B", "ä", "", "-"]
TOPICS = ["t", "t.x", "t.y.z", "u", "$t", "t..x", "*", "t" * 255, ""]
CALLS = ("handle", "too_large", "malformed", "answer", "refuse")


def frame(body: bytes, *, length: int | None = None, long: bool = False) -> bytes:
    size = len(body) if length is None else length
    return (struct.pack("!iQ", -1, size) if long else struct.pack("!i", size)) + body


def odd_frame(chance: random.Random) -> bytes:
    """Return a frame that is ordinary, odd or broken; most differ from an ordinary one in a single thing."""
    kind = chance.choice([1, 1, 1, 1, 5, 5, 5, 2, 3, 4, 6, 7, 0, 255])
    flags = chance.choice([0] * 9 + [1, 2, 3, 4, 8, 255])
    recipient = chance.choice(["a", "b", "c"] * 6 + NAMES)
    name = b"" if kind == 5 and chance.random() < 0.95 else recipient.encode()
    topic = chance.choice(["t.x"] * 12 + TOPICS).encode()
    between = bytes([len(topic)]) + topic if kind == 5 else b""
    if flags & 2:
        extension = chance.choice([b"{}", b'{"ttl": 5}', b'{"ttl": 0}', b"[]", b"{"])
        between += struct.pack("!H", len(extension)) + extension
    size = chance.choice([0, 1, 16, 40, MAX_MESSAGE - len(between), MAX_MESSAGE, MAX_MESSAGE + 1, 2 * MAX_MESSAGE])
    payload = chance.randbytes(max(size, 0))
    name_size = len(name)
    if chance.random() < 0.05:
        name_size = chance.choice([0, 255, min(255, len(name + between + payload) + chance.choice([0, 1]))])
    if kind == 5 and chance.random() < 0.1:
        # A topic that ends in the middle of nowhere.
        between = bytes([chance.choice([0, 255, min(255, len(between + payload) + chance.choice([-1, 0, 1]))])]) + topic
    body = HEADER.pack(kind, flags, chance.randrange(256), name_size, chance.getrandbits(64)) + name + between + payload
    match chance.randrange(60):
        case 0:
            return frame(body[: chance.randrange(20)])
        case 1:
            return frame(body, length=chance.choice([-2, -(2**31), 0, 5, 11, 2**31 - 1]))
        case 2:
            return frame(body, long=True, length=chance.choice([len(body), 2**63, 2**64 - 1, 0]))
        case 3:
            return chance.randbytes(30)
        case 4:
            return frame(body, long=True)
        case 5:
            flipped = bytearray(frame(body))
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
            return bytes(flipped)
    return frame(body)


def odd_step(chance: random.Random) -> tuple[Any, ...]:
    """Return something that happens to one of the seven connections, or to all."""
    seat = chance.randrange(7)
    match chance.randrange(20):
        case 0:
            return "repeat", seat, odd_frame(chance), chance.randrange(2, 60)
        case 1:
            return "subscribe", seat, chance.choice(["t.>", "t.*", ">", "t"])
        case 2 | 3:
            return "block", seat, chance.choice([0, 50, 300])
        case 4 | 5:
            return "read", seat, chance.choice([None, 20, 500])
        case 6:
            return "advance", chance.choice([0.1, 5.0, 40.0])
        case 7 | 8 | 9:
            return "reconnect", seat
    frames = [odd_frame(chance) for _ in range(chance.randrange(1, 12))]
    return "send", seat, frames, chance.choice([1, 7, 100, 5000, 5000])


class Recorded(FakeNet):
    """A broker whose every call from the loop is written down."""

    def __init__(self, feed: Feed) -> None:
        super().__init__(
            client("a"),
            client("b", queue=2000),
            client("c", send_to=("a", "b"), publish=("t.>",), queue=600, when_full=WhenFull.REFUSE),
            client("pool", connections=3),
            client("drops", queue=500, when_full=WhenFull.DROP_OLDEST),
            client("slow", queue=300, when_full=WhenFull.DISCONNECT),
            client("metered", rate=RateConfig(3, 400)),
            limits=Limits(MAX_MESSAGE, 30.0),
            feed=feed,
        )
        self.calls: list[tuple[Any, ...]] = []
        for name in CALLS:
            self._record(name)
        self.seats = [self.connect(name) for name in ("a", "b", "c", "pool", "pool", "slow", "metered")]
        self.everyone: list[Peer] = list(self.seats)
        self._warm_up()

    def _warm_up(self) -> None:
        """Have every cache filled: what is not ordinary then stands out."""
        self.seats[1].op("subscribe", 1, topic="t.>")
        for seat in self.seats[:6]:
            for name in ("a", "b", "c"):
                seat.message(name, b"first")
            seat.publish("t.x", b"first")
        assert self.seats[0].session.routes.keys() == {b"a", b"b", b"c"}
        assert self.seats[0].session.fans.keys() == {b"t.x"}
        self.calls.clear()

    def _record(self, name: str) -> None:
        original = getattr(self.broker, name)

        def recorded(*arguments: Any) -> Any:
            self.calls.append((name, *(_plain(argument) for argument in arguments)))
            return original(*arguments)

        setattr(self.broker, name, recorded)

    def play(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("advance", seconds):
                self.advance(seconds)
            case ("send", seat, whole, size):
                self.seats[seat].send_bytes(b"".join(whole), size)
            case ("repeat", seat, each, times):
                self.seats[seat].send_bytes(each * times)
            case ("subscribe", seat, topic):
                if not self.seats[seat].gone:
                    self.seats[seat].op("subscribe", 1, topic=topic)
            case ("block", seat, room):
                self.seats[seat].block(room)
            case ("read", seat, size):
                if not self.seats[seat].gone:
                    self.seats[seat].read(size)
            case ("reconnect", seat):
                name = self.seats[seat].name
                self.seats[seat].leave()
                again = self.try_connect(name)
                if again is not None:
                    self.seats[seat] = again
                    self.everyone.append(again)

    def state(self) -> dict[str, Any]:
        """Return all that can be seen from outside, and what the loop counts."""
        return {
            "calls": self.calls,
            "refused": self.broker.refused,
            "dropped": self.broker.dropped,
            "peers": [
                (
                    bytes(peer.stream),
                    peer.tail,
                    peer.gone,
                    peer.reading,
                    peer.session.skip,
                    peer.session.messages_in,
                    peer.session.bytes_in,
                    peer.session.messages_out,
                    peer.session.bytes_out,
                    peer.session.outbox.waiting,
                    sorted(peer.session.routes),
                    sorted(peer.session.fans),
                )
                for peer in self.everyone
            ],
        }


def _plain(argument: Any) -> Any:
    if isinstance(argument, memoryview):
        return bytes(argument)
    return getattr(argument, "address", argument)


def agree(steps: Iterable[tuple[Any, ...]]) -> Recorded:
    """Play the steps to both; return the plain one."""
    plain, compiled = Recorded(_routing_py.feed), Recorded(_routing_c.feed)
    for step in steps:
        plain.play(step)
        compiled.play(step)
        assert compiled.state() == plain.state(), step
    return plain


@pytest.mark.parametrize("step", [1, 3, 5000])
def test_both_pass_on_the_ordinary(step: int) -> None:
    """Runs of messages and events, in every segmentation: the loops do them without a call to the broker."""
    message = frame(HEADER.pack(1, 0, 9, 1, 7) + b"b" + b"x" * 30)
    event = frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.x" + b"y" * 30)
    plain = agree([("send", 0, [message] * 20 + [event] * 20, step)])
    assert not plain.calls
    assert plain.seats[1].session.messages_out > 40


def test_both_see_a_topic_that_ends_behind_its_frame() -> None:
    """What follows the frame in the buffer would complete a known topic, and is not looked at."""
    plain = agree([("send", 0, [frame(HEADER.pack(5, 0, 0, 0, 7) + b"\x03t.") + b"x" * 40], 5000)])
    assert [call[0] for call in plain.calls[:2]] == ["handle", "malformed"]


@pytest.mark.parametrize("seed", [random.randrange(2**32) for _ in range(int(os.environ.get("BROKERD_SEEDS", "60")))])
def test_both_do_the_same(seed: int) -> None:
    """Bytes out, bytes kept, calls to the broker and counters are equal after every step; the seed is in the name."""
    chance = random.Random(seed)
    agree(odd_step(chance) for _ in range(60))


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (3, 2), (0, 11), (11, 11)])
def test_the_compiled_loop_reads_nothing_outside_its_buffer(start: int, end: int) -> None:
    """Bounds that lie outside are refused before a byte is looked at."""
    net = Recorded(_routing_c.feed)
    with pytest.raises(ValueError, match="outside the buffer"):
        net.feed(net.broker, net.seats[0].session, memoryview(bytes(10)), start, end, 0.0)
