"""A network without sockets: it carries out the core's decisions as brokerd.net does,
but nothing at once.

A Peer is one connection. ``room`` says how much of its outbox the "system" takes: None
for everything, a number for that many bytes more. Time stands still until
:meth:`FakeNet.advance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from brokerd.config.values import ClientConfig, RateConfig, Rule, Source, WhenConnected, WhenFull
from brokerd.core import routing
from brokerd.core.broker import Broker, CoreLimits
from brokerd.core.precopy import Copier, Copies
from brokerd.core.routing_result import RoutingResult
from brokerd.core.session import Session
from brokerd.core.snapshot import (
    Pieces,
    capture,
    capture_clients,
    capture_idle,
    restore,
    restore_clients,
    restore_idle,
)
from brokerd_client.wire.envelope import BROKER, Envelope, Flag, Kind, encode, parse
from brokerd_client.wire.framing import FrameReader, frame

__all__ = ["FakeNet", "Peer", "client", "error_of"]

#: A routing loop: the one that runs here, or one of the two by name.
Feed: TypeAlias = Callable[
    [Broker, Session, memoryview, int, int, float], tuple[int, RoutingResult]
]

#: More than any frame of the tests.
_NO_LIMIT = 1 << 62


def client(name: str, **changes: Any) -> ClientConfig:
    """Return a configured client that may do everything; patterns may be given as text."""
    values: dict[str, Any] = {
        "name": name,
        "keys": (),
        "connections": 1,
        "send_to": ("*",),
        "open_from": ("*",),
        "publish": (">",),
        "subscribe": (">", "$broker.>"),
        "queue": 1 << 20,
        "subscriptions": 10000,
        "requests": 10000,
        "when_full": WhenFull.WAIT,
        "when_connected": WhenConnected.REFUSE,
        "rate": RateConfig(None, None),
        "allow_md5": False,
        "peer_uid": None,
        "admin": False,
        "source": Source("test.yaml", 1),
    }
    values |= changes
    for rules in ("send_to", "open_from", "publish", "subscribe"):
        values[rules] = tuple(
            Rule(rule) if isinstance(rule, str) else rule for rule in values[rules]
        )
    return ClientConfig(**values)


def error_of(envelope: Envelope) -> str:
    """Return the code of an ERROR."""
    assert envelope.kind is Kind.ERROR
    code = json.loads(envelope.payload)["code"]
    assert isinstance(code, str)
    return code


class Peer:
    """One connection and the client behind it.

    Attributes:
        room: Bytes that the system still takes, None for all.
        got: Whole frames that have arrived and were not taken yet.
        gone: The reason for the connection's end, or an empty string.
        stream: Every byte that the system took, for tests that examine it.
    """

    def __init__(self, net: FakeNet, name: str) -> None:
        self.net = net
        self.name = name
        self.session: Session
        self.room: int | None = None
        self.got: list[Envelope] = []
        self.gone = ""
        self.stream = bytearray()
        self.content = b""
        self.reading = True
        self.writing = False
        self._reader = FrameReader()

    def __repr__(self) -> str:
        return f"<Peer {self.session.address}>"

    @property
    def address(self) -> str:
        """The address of exactly this connection."""
        return self.session.address

    @property
    def held(self) -> bool:
        """Whether the broker does not read from it because a recipient's queue is full."""
        return self.session.held_by is not None

    # What the client does

    def send_bytes(self, data: bytes, step: int | None = None) -> None:
        """Send bytes as they are, in segments of ``step``."""
        for start in range(0, len(data), step or max(1, len(data))):
            self.net.arrive(self, data[start : start + step] if step else data)

    def send(self, envelope: Envelope, step: int | None = None) -> None:
        """Send one frame."""
        self.send_bytes(frame(encode(envelope)), step)

    def message(
        self,
        to: str,
        payload: bytes = b"",
        message_id: int = 0,
        *,
        receipt: bool = False,
        **rest: Any,
    ) -> None:
        """Send a MESSAGE."""
        self.send(
            Envelope(
                Kind.MESSAGE, message_id, to, payload, flags=Flag.RECEIPT if receipt else 0, **rest
            )
        )

    def request(
        self,
        to: str,
        payload: bytes = b"",
        message_id: int = 0,
        *,
        receipt: bool = False,
        **rest: Any,
    ) -> None:
        """Send a REQUEST."""
        self.send(
            Envelope(
                Kind.REQUEST, message_id, to, payload, flags=Flag.RECEIPT if receipt else 0, **rest
            )
        )

    def reply(
        self,
        to: str,
        payload: bytes = b"",
        message_id: int = 0,
        *,
        receipt: bool = False,
        **rest: Any,
    ) -> None:
        """Send a REPLY."""
        self.send(
            Envelope(
                Kind.REPLY, message_id, to, payload, flags=Flag.RECEIPT if receipt else 0, **rest
            )
        )

    def publish(
        self,
        topic: str,
        payload: bytes = b"",
        message_id: int = 0,
        *,
        receipt: bool = False,
        **rest: Any,
    ) -> None:
        """Send an EVENT."""
        self.send(
            Envelope(
                Kind.EVENT,
                message_id,
                "",
                payload,
                topic=topic,
                flags=Flag.RECEIPT if receipt else 0,
                **rest,
            )
        )

    def op(self, op: str, message_id: int = 0, **arguments: Any) -> None:
        """Ask ``$broker``."""
        self.request(BROKER, json.dumps({"op": op, **arguments}).encode(), message_id, codec=2)

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Ask ``$broker`` and return its REPLY. The client must be reading, and must
        have looked at all earlier frames.
        """
        self.op(op, **arguments)
        (answer,) = self.take()
        assert answer.kind is Kind.REPLY, answer.payload
        assert answer.name == BROKER
        reply = json.loads(answer.payload)
        assert isinstance(reply, dict)
        return reply

    def take(self) -> list[Envelope]:
        """Return the envelopes that arrived, and remove them."""
        got, self.got = self.got, []
        return got

    def payloads(self) -> list[bytes]:
        """Return the payloads that arrived, and remove them."""
        return [envelope.payload for envelope in self.take()]

    def error(self) -> tuple[int, str]:
        """Return (id, code) of the one ERROR that arrived."""
        (envelope,) = self.take()
        assert envelope.name == BROKER
        return envelope.id, error_of(envelope)

    def block(self, room: int = 0) -> None:
        """Stop reading: the socket takes ``room`` bytes more."""
        self.room = room

    def read(self, size: int | None = None) -> None:
        """Read again: the socket takes ``size`` bytes more, or everything from now on."""
        self.room = None if size is None else (self.room or 0) + size
        if self.writing:
            self.net.on_writable(self)

    def leave(self, why: str = "connection closed by the client") -> None:
        """Close the connection."""
        self.net.lost(self, why)

    def is_gone(self) -> bool | None:
        """Return whether the client has closed."""
        return bool(self.gone)

    def have(self, data: bytes) -> None:
        """Start with a part of a frame that arrived earlier."""
        self._reader.feed(data)

    # What the system does

    def take_bytes(self, size: int) -> int:
        """Take up to ``size`` bytes of the outbox; return how many."""
        outbox = self.session.outbox
        limit = size if self.room is None else min(size, self.room)
        data = b"".join(outbox.pieces())[:limit]
        if self.room is not None:
            self.room -= len(data)
        outbox.sent(len(data))
        self.stream += data
        self._reader.feed(data)
        while (body := self._reader.next_frame(_NO_LIMIT)) is not None:
            self.got.append(parse(body))
        return len(data)


class FakeNet:
    """The broker, its connections and the time."""

    def __init__(
        self, *configs: ClientConfig, limits: CoreLimits | None = None, feed: Feed = routing.feed
    ) -> None:
        self.now = 1000.0
        self.feed = feed
        self.broker = Broker(configs, limits=limits, version="test", now_wall=self.now)
        self.broker.mailboxes.clock.set(self.now, self.now)
        self.peers: list[Peer] = []
        #: Called with a peer whose connection is about to end.
        self.on_losing: Callable[[Peer], None] = lambda peer: None
        self._instances = 0
        #: How the instances of connections end: the name of this host, in a cluster.
        self.suffix = ""
        self._settling = False
        #: Peers whose frame is handled again after the others had their turn.
        self._yielded: list[Peer] = []
        #: The broker that is about to take over, and what copies for it.
        self._copies: tuple[Broker, Copier, Copies] | None = None

    def connect(self, name: str) -> Peer:
        """Connect a client. There must be room, or a connection to be replaced."""
        peer = self.try_connect(name)
        assert peer is not None, f"{name} is not let in"
        return peer

    def try_connect(self, name: str) -> Peer | None:
        """Connect a client; return None if the broker refuses it."""
        there, leaving = self.broker.place_for(name)
        if not there:
            return None
        if leaving is not None:
            self.lost(leaving.connection, "connection replaced by a new one")
        peer = Peer(self, name)
        self._instances += 1
        instance = f"i{self._instances}{self.suffix}"
        peer.session = self.broker.attach(
            name, instance, peer="test", now_wall=self.now, connection=peer
        )
        self.peers.append(peer)
        self.settle()
        return peer

    def advance(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now += seconds
        self.broker.tick(self.now)
        self.settle()

    def arrive(self, peer: Peer, data: bytes) -> None:
        """Let bytes arrive from the peer: they are routed at once, or kept while it is
        not read from.
        """
        if peer.gone:
            return
        peer.content += data
        if peer.reading:
            self._route(peer)

    def _route(self, peer: Peer) -> None:
        data, peer.content = peer.content, b""
        if self.broker.status.changes is not None:
            self.broker.status.changes.note(peer.session)
        # Something lies before and behind, as in a buffer that others use too.
        view = memoryview(b"\x01\x02" + data + b"\x03" * 20)
        position, end = 2, 2 + len(data)
        taps = self.broker.taps
        if taps.active:
            taps.begin(peer.session, view, position, self.now)
        while True:
            position, verdict = self.feed(self.broker, peer.session, view, position, end, self.now)
            if verdict is RoutingResult.CHANNEL and not peer.session.messages_in:
                self.lost(peer, "the connection becomes a channel")
            elif verdict is RoutingResult.CHANNEL:
                continue
            if verdict is not RoutingResult.FLUSH:
                break
            self.write_touched()
            if peer.gone or peer.session.closing:
                verdict = RoutingResult.CLOSE
                break
        if taps.active:
            taps.end(view, position)
        if not peer.gone:
            if verdict is RoutingResult.CLOSE:
                peer.reading = False
            else:
                peer.content = bytes(view[position:end])
                peer.reading = verdict not in (RoutingResult.BLOCKED, RoutingResult.YIELD)
                if verdict is RoutingResult.YIELD:
                    self._yielded.append(peer)
        self.settle()

    def write_touched(self) -> None:
        """Write every touched outbox to its socket."""
        touched = self.broker.touched
        while touched:
            session = touched.pop()
            session.outbox.touched = False
            peer: Peer = session.connection
            if not session.open:
                continue
            if session.host:
                session.connection.write()
                continue
            if self.broker.status.changes is not None:
                self.broker.status.changes.note(session)
            if session.cut:
                self.lost(peer, session.closing)
            elif not (session.outbox.blocked and peer.writing):
                self.write(peer)

    def write(self, peer: Peer) -> None:
        """Write the peer's outbox to its socket."""
        outbox = peer.session.outbox
        moved = True
        while moved:
            before = outbox.waiting
            if outbox.timed:
                self.broker.expire(peer.session, self.now)
            moved = peer.take_bytes(_NO_LIMIT) > 0 or outbox.waiting != before
        outbox.blocked = peer.writing = bool(outbox.waiting)
        if peer.session.closing:
            peer.reading = False
            if not outbox.blocked:
                self.lost(peer, peer.session.closing)

    def on_writable(self, peer: Peer) -> None:
        """Continue to write, because the socket takes bytes again."""
        self.write(peer)
        if not peer.gone:
            self.broker.held.release_if_room(peer.session, self.now)
            self.broker.mailboxes.on_writable(peer.session)
        self.settle()

    def settle(self) -> None:
        """Carry out the core's decisions."""
        if self._settling:
            return
        self._settling = True
        broker = self.broker
        broker.send_copies()
        while broker.touched or broker.held.released or broker.has_deferred_work or self._yielded:
            broker.run_deferred(3)
            self.write_touched()
            yielded, self._yielded = self._yielded, []
            for peer in yielded:
                if not peer.gone and not peer.session.closing:
                    peer.reading = True
                    self._route(peer)
            for session in broker.held.take_released():
                if session.open and session.host:
                    session.connection.resume()
                elif session.open and not session.closing:
                    peer: Peer = session.connection
                    peer.reading = True
                    self._route(peer)
            broker.send_copies()
        self._settling = False

    def lost(self, peer: Peer, why: str) -> None:
        """End the peer's connection."""
        if peer.gone:
            return
        self.on_losing(peer)
        peer.gone = why
        peer.reading = False
        self.peers.remove(peer)
        self.broker.detach(peer.session, self.now)
        self.settle()

    @property
    def is_copying(self) -> bool:
        """Whether ``copy`` was called, and the copies were not used yet."""
        return self._copies is not None

    def copy(self, *configs: ClientConfig) -> None:
        """Copy to a new broker what was not copied yet, while this one works on.

        Args:
            configs: The new broker's entries, if they differ from this one's.
        """
        old = self.broker
        if self._copies is None:
            entries = configs or [client.config for client in old.exchange.clients.values()]
            new = Broker(entries, limits=old.status.limits, version="test", now_wall=self.now)
            self._copies = new, Copier(old, few=1, least=1), Copies(new)
            self._copies[1].watch([peer.session for peer in self.peers])
        new, copier, copies = self._copies
        for number in copier.take_left():
            copies.discard(number)
        for facts, blobs in copier.blocks(self.now):
            copies.add(json.loads(json.dumps(facts)), memoryview(b"".join(blobs)), self.now)
        for session in copier.changed_sessions():
            counters = copier.counted(session)
            if counters is not None:
                if counters:
                    copies.count(session.number, list(counters))
                copier.note_counted(session)
            elif (idle := capture_idle(old, session, self.now, copier)) is not None:
                restore_idle(new, json.loads(json.dumps(idle)), self.now, copies)
        for facts in capture_clients(old, self.now, copier):
            restore_clients(new, json.loads(json.dumps(facts)), self.now, copies)

    def hand_over(
        self, *configs: ClientConfig, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Replace the broker by a new one that continues with all its state.

        This is what another process would do, with other entries if given.

        Args:
            configs: The new broker's entries, if they differ from this one's.
            meanwhile: Called between the copying and the hand-over.
        """
        self.copy(*configs)
        meanwhile()
        self.copy()
        self.take_over()

    def take_over(self) -> None:
        """Replace the broker by the new one of ``copy``, with what has changed since."""
        assert self._copies is not None
        new, copier, copies = self._copies
        self._check_changes(copier)
        taken = capture(self.broker, copier.changed_sessions(), self.now, copier)
        copier.end()
        self.broker, self._copies = new, None
        pieces = Pieces(b"".join(taken.pieces))
        restored = restore(new, json.loads(json.dumps(taken.facts)), pieces, self.now, copies)
        assert not len(pieces), "bytes that no test asked for"
        there = [*new.exchange.sessions(), *restored.sessions, *restored.unconfigured_sessions]
        sessions = {session.number: session for session in there if session.open}
        assert sessions.keys() == {peer.session.number for peer in self.peers}
        for peer in self.peers:
            peer.session = sessions[peer.session.number]
            peer.session.connection = peer

    def _check_changes(self, copier: Copier) -> None:
        """Check that every session and client that differs from its copy was noted as
        changed.
        """
        sessions, clients = set(copier.changed_sessions()), set(copier.changed_clients())
        for peer in self.peers:
            assert peer.session in sessions or copier.counted(peer.session) == (), peer
        for client in self.broker.exchange.clients.values():
            assert client in clients or copier.is_client_as_copied(client), client.name

    def leftovers(self) -> Mapping[str, object]:
        """Return the broker's remaining state for connections; all of it is empty once
        they are gone.
        """
        broker = self.broker
        found: dict[str, object] = {
            "sessions": list(broker.exchange.sessions()),
            "subscriptions": len(broker.topics),
            "tree": not broker.topics._root.is_empty,
            "held": broker.held.deadlines,
            "deadlines": bool(broker.requests.deadlines),
            "touched": [session for session in broker.touched if session.open],
            "released": [session for session in broker.held.released if session.open],
        }
        return {what: value for what, value in found.items() if value}
