"""OPEN and JOIN: the first frame of a connection in any pieces, and any sequence of OPENs,
answers and ends, compared with a plain account of who waits for whom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from support.fake_network import FakeNet, Peer, client
from support.fuzz.script import Script, item

from brokerd.core.channels import Channel, ChannelRefused, Opening
from brokerd.core.status import CoreLimits
from brokerd.net.relay.first_frame import LONGEST, begins_channel, id_of, is_whole, kind_of
from brokerd_client.errors import ExtensionTooDeep, FrameTooBig, MalformedEnvelope
from brokerd_client.wire.envelope import Envelope, Kind, encode, parse, split
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.layout import HEADER

NAMES = ("ann", "bob", "cat", "pool")
LISTEN, UNLISTEN, FIRST, ERROR, LEAVE, TIME, END, WITHDRAW, RULES, DISCONNECT = range(10)
LIMITS = CoreLimits(channels=6, open_timeout=10.0)


class _Relay:
    """What the network layer would put into a channel."""

    relayed = 1

    def describe(self) -> dict[str, Any]:
        return {}


class _World:
    """A broker, its connections, and a plain account of its OPENs and channels."""

    def __init__(self) -> None:
        entries = [client(name, channels=4) for name in NAMES[:3]]
        self.net = FakeNet(*entries, client("pool", connections=2), limits=LIMITS)
        self.channels = self.net.broker.channels
        self.members: list[Peer] = [self.net.connect(name) for name in (*NAMES, "pool")]
        #: The OPENs without an outcome, and the channels, by token.
        self.waiting: dict[int, Opening] = {}
        self.open: list[Channel] = []
        self.token = 0

    def member(self, number: int) -> Peer:
        number %= len(self.members)
        if self.members[number].gone:
            self.members[number] = self.net.connect(self.members[number].name)
        return self.members[number]

    def first(self, name: str, stream: bytes, steps: list[int]) -> None:
        """Let the bytes arrive on a new connection, and serve its first frame."""
        reader, fed, turn = FrameReader(), 0, 0
        while not (begins_channel(reader) and is_whole(reader)):
            if fed >= len(stream) or (kind_of(reader) is not None and not begins_channel(reader)):
                return
            step = steps[turn % len(steps)]
            reader.feed(stream[fed : fed + step])
            fed, turn = fed + step, turn + 1
        assert reader.buffered <= LONGEST + 12 + max(steps)
        message_id = id_of(reader)
        caller = self.net.broker.exchange.clients[name]
        try:
            body = reader.next_frame(LONGEST)
            assert body is not None
            envelope, start = split(body)
            assert message_id == envelope.id
            if envelope.kind is Kind.OPEN:
                self.token += 1
                opening = self.channels.ask(
                    caller, envelope, body[start:], self, self.token, self.net.now
                )
                assert len(body) - start <= 1024
                self.waiting[self.token] = opening
            else:
                opening = self.channels.take(caller, envelope, body[start:])
                assert opening is self.waiting.pop(envelope.id)
                assert opening.recipient is caller
                self.open.append(self.channels.begin(opening, _Relay(), self.net.now))
        except (ChannelRefused, FrameTooBig, MalformedEnvelope, ExtensionTooDeep):
            # Nothing has been added; a refused JOIN may have ended its OPEN.
            pass
        self.net.settle()

    def check(self) -> None:
        """Compare the broker's numbers with the account."""
        channels = self.channels
        for opening, answer, _, _ in channels.refusals:
            # Each OPEN has one outcome.
            assert self.waiting.pop(opening.token) is opening
            refusal = parse(answer[4:])
            assert (refusal.kind, refusal.id) == (Kind.ERROR, opening.id)
        channels.refusals.clear()
        for channel, _ in channels.closing:
            self.end(channel)
        channels.closing.clear()
        assert channels.openings() == list(self.waiting.values())
        assert list(channels.open) == self.open
        held: Counter[str] = Counter()
        load: Counter[Any] = Counter()
        for opening in self.waiting.values():
            held[opening.caller.name] += 1
            load[opening.listener] += 1
            assert opening.listener.open
        for channel in self.open:
            held.update(each.name for each in channel.clients)
            if channel.listener is not None:
                load[channel.listener] += 1
        assert {each.name: count for each, count in channels._held.items()} == held
        assert dict(channels._load) == dict(load)
        assert len(self.waiting) + len(self.open) <= LIMITS.channels
        pairs = Counter((each.caller, each.recipient) for each in self.waiting.values())
        assert max(pairs.values(), default=0) <= 8

    def end(self, channel: Channel) -> None:
        if channel in self.open:
            self.open.remove(channel)
        self.channels.end(channel, 1)


def target(data: bytes) -> None:
    """Follow the script; after each step the broker's numbers are right."""
    script, world = Script(data), _World()
    for _ in range(60):
        if not script.left:
            break
        action, number = script.number() % 10, script.number()
        if action == LISTEN:
            world.member(number).op("listen")
        elif action == UNLISTEN:
            world.member(number).op("unlisten")
        elif action == FIRST:
            steps = [1 + step for step in script.item()] or [4096]
            world.first(NAMES[number % len(NAMES)], script.item(2), steps)
        elif action == ERROR:
            token = script.number()
            world.member(number).send(Envelope(Kind.ERROR, token, "", script.item()))
        elif action == LEAVE:
            world.member(number).leave()
        elif action == TIME:
            world.net.advance(number / 16)
        elif action == END and world.open:
            world.end(world.open[number % len(world.open)])
        elif action == WITHDRAW and world.waiting:
            token = list(world.waiting)[number % len(world.waiting)]
            world.channels.forget(world.waiting.pop(token))
        elif action == RULES:
            name = NAMES[number % 3]
            changed = client(name, channels=4, open_from=("ann", "cat") if number & 64 else ("*",))
            entries = {each: world.net.broker.exchange.clients[each].config for each in NAMES}
            world.net.broker.reconfigure({**entries, name: changed}, LIMITS, world.net.now)
        elif action == DISCONNECT:
            name = NAMES[number % len(NAMES)]
            world.channels.disconnect(world.net.broker.exchange.clients[name], "why")
        world.check()


def opened(caller: int, to: str, payload: bytes = b"", steps: bytes = b"") -> bytes:
    """Return the step that lets a client ask for a channel."""
    whole = frame(encode(Envelope(Kind.OPEN, 7, to, payload)))
    return bytes([FIRST, caller]) + item(steps) + item(whole, 2)


def joined(recipient: int, token: int) -> bytes:
    """Return the step that lets a client answer an OPEN."""
    whole = frame(encode(Envelope(Kind.JOIN, token)))
    return bytes([FIRST, recipient]) + item(b"") + item(whole, 2)


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield the life of channels, the limits, and first frames that are refused."""
    listening = bytes([LISTEN, 1, LISTEN, 3, LISTEN, 4])
    one = listening + opened(0, "bob", b"hello", b"\0\2") + joined(1, 1)
    yield "opened", one
    yield "ended", one + bytes([END, 0]) + joined(1, 1)
    yield "disconnected", one + bytes([DISCONNECT, 0])
    yield "listener-left", one + opened(2, "bob") + bytes([LEAVE, 1])
    yield "refused", listening + opened(0, "bob") + bytes([ERROR, 1, 1]) + item(b'{"code":"x"}')
    yield "intruder", listening + opened(0, "bob") + joined(2, 1) + joined(1, 1)
    yield "expired", listening + opened(0, "bob") + bytes([TIME, 200]) + joined(1, 1)
    yield "withdrawn", listening + opened(0, "bob") + bytes([WITHDRAW, 0]) + joined(1, 1)
    yield "rules", one + opened(1, "pool") + bytes([RULES, 65, RULES, 1])
    yield "pool", listening + opened(0, "pool") * 3 + joined(3, 1) + joined(3, 2)
    yield "full", listening + opened(0, "bob") * 5 + opened(2, "bob") * 5
    yield "itself", listening + opened(1, "bob") + joined(1, 1)
    yield "not-listening", listening + bytes([UNLISTEN, 1]) + opened(0, "bob")
    yield "longest", listening + opened(0, "bob", bytes(1024))
    yield "too-long", listening + opened(0, "bob", bytes(1025)) + opened(0, "bob", bytes(9000))
    yield "nobody", opened(0, "nobody") + opened(0, "$broker") + opened(0, "bob/x")
    flags = frame(HEADER.pack(Kind.OPEN, 7, 0, 3, 1) + b"bob\0\2{}")
    yield "flags", bytes([FIRST, 0, 0]) + item(flags, 2)
    yield "short", bytes([FIRST, 0, 0]) + item(frame(b"\x08"), 2)
    yield "other", bytes([FIRST, 0, 0]) + item(frame(encode(Envelope(Kind.MESSAGE, 1, "bob"))), 2)
