"""One network of clients at four levels: core, sockets, and both faces of the library.

A scenario is written once against :class:`Network` and :class:`Party`, and sees only
what an application sees: outcomes, messages, events and changes of presence.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from support.client_faces import Asyncio, Blocking, Face
from support.fake_network import FakeNet, Peer, client, error_of
from support.keys import key_of
from support.raw_client import (
    ERROR,
    EVENT,
    EXTENSION,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_RECEIPT,
    Frame,
    Raw,
    packed,
)
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.core.broker import CoreLimits
from brokerd_client.errors import Refused
from brokerd_client.wire.envelope import Envelope, Kind

#: Largest payload that the networks accept, in bytes.
MAX_MESSAGE = 1000
#: The outcome of a confirmed send that the broker accepted.
ACCEPTED = "accepted"

Clients = Mapping[str, dict[str, Any]]
#: Waits for the outcome of a request: ("reply", payload) or ("error", code).
Outcome = Callable[[], tuple[str, Any]]


class Received(NamedTuple):
    """A message or request at its recipient."""

    sender: str
    payload: bytes


class Happened(NamedTuple):
    """An event at a subscriber."""

    topic: str
    sender: str
    payload: bytes


class Party(ABC):
    """One connected client. Payloads are bytes; every call returns when it is done."""

    @abstractmethod
    def send(self, to: str, payload: bytes = b"", *, ttl: float | None = None) -> str:
        """Send a message and return ACCEPTED or the error code."""

    @abstractmethod
    def receive(self) -> Received:
        """Return the next message or request."""

    @abstractmethod
    def request(self, to: str, payload: bytes = b"") -> Outcome:
        """Send a request."""

    @abstractmethod
    def reply(self, payload: bytes) -> None:
        """Answer the last request received."""

    @abstractmethod
    def subscribe(self, pattern: str, group: str | None = None) -> str:
        """Subscribe and return ACCEPTED or the error code."""

    @abstractmethod
    def publish(self, topic: str, payload: bytes = b"") -> str:
        """Publish an event and return ACCEPTED or the error code."""

    @abstractmethod
    def event(self) -> Happened:
        """Return the next event."""

    @abstractmethod
    def watch(self) -> None:
        """Watch the presence of other clients."""

    @abstractmethod
    def presence(self) -> tuple[str, bool]:
        """Return the next change of presence: (name, online)."""

    @abstractmethod
    def leave(self) -> None:
        """End the connection, and return when the broker has noticed."""


class Network(ABC):
    """A broker with configured clients."""

    @abstractmethod
    def join(self, name: str) -> Party:
        """Connect a client."""


# The core, without sockets


class _CoreParty(Party):
    def __init__(self, net: FakeNet, peer: Peer) -> None:
        self._net, self._peer = net, peer
        self._arrived: list[Envelope] = []
        self._last_id = 0
        self._request: Envelope | None = None

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _find(self, wanted: Callable[[Envelope], bool]) -> Envelope:
        self._arrived += self._peer.take()
        for index, envelope in enumerate(self._arrived):
            if wanted(envelope):
                return self._arrived.pop(index)
        raise AssertionError(f"{self._peer.name} got {self._arrived} instead")

    def _outcome(self, message_id: int) -> str:
        answer = self._find(
            lambda each: each.id == message_id and each.kind in (Kind.RECEIPT, Kind.ERROR)
        )
        return ACCEPTED if answer.kind is Kind.RECEIPT else error_of(answer)

    def send(self, to: str, payload: bytes = b"", *, ttl: float | None = None) -> str:
        message_id = self._next_id()
        options = {} if ttl is None else {"extension": {"ttl": ttl}}
        self._peer.message(to, payload, message_id, receipt=True, **options)
        return self._outcome(message_id)

    def receive(self) -> Received:
        envelope = self._find(lambda each: each.kind in (Kind.MESSAGE, Kind.REQUEST))
        if envelope.kind is Kind.REQUEST:
            self._request = envelope
        return Received(envelope.name, envelope.payload)

    def request(self, to: str, payload: bytes = b"") -> Outcome:
        message_id = self._next_id()
        self._peer.request(to, payload, message_id)

        def outcome() -> tuple[str, Any]:
            answer = self._find(
                lambda each: each.id == message_id and each.kind in (Kind.REPLY, Kind.ERROR)
            )
            if answer.kind is Kind.REPLY:
                return "reply", answer.payload
            return "error", error_of(answer)

        return outcome

    def reply(self, payload: bytes) -> None:
        assert self._request is not None
        self._peer.reply(self._request.name, payload, self._request.id)

    def subscribe(self, pattern: str, group: str | None = None) -> str:
        message_id = self._next_id()
        arguments = {"topic": pattern} if group is None else {"topic": pattern, "group": group}
        self._peer.op("subscribe", message_id, **arguments)
        answer = self._find(lambda each: each.id == message_id)
        return ACCEPTED if answer.kind is Kind.REPLY else error_of(answer)

    def publish(self, topic: str, payload: bytes = b"") -> str:
        message_id = self._next_id()
        self._peer.publish(topic, payload, message_id, receipt=True)
        return self._outcome(message_id)

    def event(self) -> Happened:
        envelope = self._find(lambda each: each.kind is Kind.EVENT)
        return Happened(envelope.topic or "", envelope.name, envelope.payload)

    def watch(self) -> None:
        assert self.subscribe("$broker.online.*") == self.subscribe("$broker.offline.*") == ACCEPTED

    def presence(self) -> tuple[str, bool]:
        event = self.event()
        return json.loads(event.payload)["name"], event.topic.startswith("$broker.online.")

    def leave(self) -> None:
        self._peer.leave()


class _CoreNetwork(Network):
    def __init__(self, clients: Clients) -> None:
        self._net = FakeNet(
            *(client(name, **options) for name, options in clients.items()),
            limits=CoreLimits(max_message=MAX_MESSAGE),
        )

    def join(self, name: str) -> Party:
        return _CoreParty(self._net, self._net.connect(name))


@contextmanager
def core(clients: Clients) -> Iterator[Network]:
    """Run a broker's core on a network without sockets."""
    yield _CoreNetwork(clients)


# A daemon and bare sockets


class _SocketParty(Party):
    def __init__(self, daemon: RunningDaemon, raw: Raw) -> None:
        self._daemon, self._raw = daemon, raw
        self._arrived: list[Frame] = []
        self._last_id = 0
        self._request: Frame | None = None

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _find(self, wanted: Callable[[Frame], bool]) -> Frame:
        for index, frame in enumerate(self._arrived):
            if wanted(frame):
                return self._arrived.pop(index)
        while not wanted(frame := self._raw.recv()):
            self._arrived.append(frame)
        return frame

    def _outcome(self, message_id: int) -> str:
        answer = self._find(lambda each: each.id == message_id and each.kind in (RECEIPT, ERROR))
        return ACCEPTED if answer.kind == RECEIPT else answer.code

    def send(self, to: str, payload: bytes = b"", *, ttl: float | None = None) -> str:
        message_id = self._next_id()
        flags, between = WANT_RECEIPT, b""
        if ttl is not None:
            text = json.dumps({"ttl": ttl}).encode()
            flags, between = flags | EXTENSION, len(text).to_bytes(2, "big") + text
        self._raw.send(MESSAGE, to, payload, message_id=message_id, flags=flags, between=between)
        return self._outcome(message_id)

    def receive(self) -> Received:
        frame = self._find(lambda each: each.kind in (MESSAGE, REQUEST))
        if frame.kind == REQUEST:
            self._request = frame
        body = frame.body
        if frame.flags & EXTENSION:
            body = body[2 + int.from_bytes(body[:2], "big") :]
        return Received(frame.name, body)

    def request(self, to: str, payload: bytes = b"") -> Outcome:
        message_id = self._next_id()
        self._raw.send(REQUEST, to, payload, message_id=message_id)

        def outcome() -> tuple[str, Any]:
            answer = self._find(lambda each: each.id == message_id and each.kind in (REPLY, ERROR))
            return ("reply", answer.body) if answer.kind == REPLY else ("error", answer.code)

        return outcome

    def reply(self, payload: bytes) -> None:
        assert self._request is not None
        self._raw.send(REPLY, self._request.name, payload, message_id=self._request.id)

    def subscribe(self, pattern: str, group: str | None = None) -> str:
        message_id = self._next_id()
        arguments = {"op": "subscribe", "topic": pattern}
        if group is not None:
            arguments["group"] = group
        text = json.dumps(arguments).encode()
        self._raw.write(packed(REQUEST, "$broker", text, message_id=message_id, codec=JSON))
        answer = self._find(lambda each: each.id == message_id and each.kind in (REPLY, ERROR))
        return ACCEPTED if answer.kind == REPLY else answer.code

    def publish(self, topic: str, payload: bytes = b"") -> str:
        message_id = self._next_id()
        between = bytes([len(topic)]) + topic.encode()
        self._raw.send(
            EVENT, "", payload, message_id=message_id, flags=WANT_RECEIPT, between=between
        )
        return self._outcome(message_id)

    def event(self) -> Happened:
        frame = self._find(lambda each: each.kind == EVENT)
        size = frame.body[0]
        return Happened(frame.body[1 : 1 + size].decode(), frame.name, frame.body[1 + size :])

    def watch(self) -> None:
        assert self.subscribe("$broker.online.*") == self.subscribe("$broker.offline.*") == ACCEPTED

    def presence(self) -> tuple[str, bool]:
        event = self.event()
        return json.loads(event.payload)["name"], event.topic.startswith("$broker.online.")

    def leave(self) -> None:
        _wait_for_the_end(self._daemon, self._raw.close)


def _wait_for_the_end(daemon: RunningDaemon, close: Callable[[], None]) -> None:
    """Close a connection and wait until the daemon has noticed."""
    before = len(daemon.log.named("client.disconnected"))
    close()
    daemon.log.wait("client.disconnected", before + 1)


class _SocketNetwork(Network):
    def __init__(self, daemon: RunningDaemon, stack: ExitStack) -> None:
        self._daemon, self._stack = daemon, stack

    def join(self, name: str) -> Party:
        raw = self._stack.enter_context(self._daemon.login(name))
        return _SocketParty(self._daemon, raw)


def _configured(clients: Clients) -> Any:
    return configuration("127.0.0.1:0", clients, limits={"max_message": MAX_MESSAGE})


@contextmanager
def sockets(clients: Clients) -> Iterator[Network]:
    """Run a daemon whose clients are bare sockets."""
    with running_daemon(_configured(clients)) as daemon, ExitStack() as stack:
        yield _SocketNetwork(daemon, stack)


# A daemon and the library


class _LibraryParty(Party):
    def __init__(self, daemon: RunningDaemon, connected: Any) -> None:
        self._daemon, self._client = daemon, connected
        self._request: Any = None
        self._subscription: Any = None
        self._watch: Any = None

    @staticmethod
    def _code(function: Callable[[], Any]) -> str:
        try:
            function()
        except Refused as error:
            return error.code
        return ACCEPTED

    def send(self, to: str, payload: bytes = b"", *, ttl: float | None = None) -> str:
        return self._code(lambda: self._client.send_confirmed(to, payload, ttl=ttl, timeout=20))

    def receive(self) -> Received:
        message = self._client.recv(timeout=20)
        if message.kind is Kind.REQUEST:
            self._request = message
        return Received(message.sender, message.payload)

    def request(self, to: str, payload: bytes = b"") -> Outcome:
        future: Future[tuple[str, Any]] = Future()

        def ask() -> None:
            try:
                answer = self._client.request(to, payload, timeout=20)
                future.set_result(("reply", answer.payload))
            except Refused as error:
                future.set_result(("error", error.code))
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                future.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()
        return lambda: future.result(20)

    def reply(self, payload: bytes) -> None:
        self._request.reply(payload)

    def subscribe(self, pattern: str, group: str | None = None) -> str:
        def subscribe() -> None:
            self._subscription = self._client.subscribe(pattern, group=group)

        return self._code(subscribe)

    def publish(self, topic: str, payload: bytes = b"") -> str:
        return self._code(lambda: self._client.publish_confirmed(topic, payload, timeout=20))

    def event(self) -> Happened:
        event = self._subscription.recv(timeout=20)
        return Happened(event.topic, event.sender, event.payload)

    def watch(self) -> None:
        self._watch = self._client.watch_presence()
        # A watch begins with one item for each client.
        for _ in self._client.clients():
            self.presence()

    def presence(self) -> tuple[str, bool]:
        change = self._watch.recv(timeout=20)
        return change.name, change.online

    def leave(self) -> None:
        _wait_for_the_end(self._daemon, self._client.close)


class _LibraryNetwork(Network):
    def __init__(self, daemon: RunningDaemon, face: Face) -> None:
        self._daemon, self._face = daemon, face

    def join(self, name: str) -> Party:
        connected = self._face.connect(str(self._daemon.address), name, key_of(name))
        return _LibraryParty(self._daemon, connected)


@contextmanager
def _library(clients: Clients, make_face: Callable[[], Face]) -> Iterator[Network]:
    with running_daemon(_configured(clients)) as daemon:
        face = make_face()
        try:
            yield _LibraryNetwork(daemon, face)
        finally:
            face.close()


def blocking(clients: Clients) -> Any:
    """Run a daemon whose clients are blocking ones."""
    return _library(clients, Blocking)


def asyncio(clients: Clients) -> Any:
    """Run a daemon whose clients are asyncio ones."""
    return _library(clients, Asyncio)


#: What a scenario runs over, by the level's name.
LEVELS: dict[str, Callable[[Clients], Any]] = {
    "core": core,
    "sockets": sockets,
    "blocking": blocking,
    "asyncio": asyncio,
}
