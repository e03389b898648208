"""A small broker for tests, built on the wire modules alone: no rules and no quotas.

FakeBroker is sans-I/O: sessions take bytes and have bytes to send. FakeServer is a
thread that moves them.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from brokerd_client.topics import matches
from brokerd_client.wire import handshake
from brokerd_client.wire.envelope import (
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    encode,
    error_payload,
    parse,
)
from brokerd_client.wire.framing import FrameReader, frame


class Session:
    """The broker's end of one connection."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.name = ""
        self.out = bytearray()
        self.subscriptions: list[tuple[str, str]] = []
        self.failed = False
        self._reader = FrameReader()
        self._handshake: handshake.Handshake | None = handshake.as_listener(
            os.urandom(40), named=True
        )
        self._advance(next(self._handshake))

    def _advance(self, step: object) -> None:
        """Carry out the steps of the handshake, until it waits for a frame."""
        assert self._handshake is not None
        while step is not handshake.RECEIVE:
            if isinstance(step, handshake.Send):
                self.out += frame(step.body)
                step = self._handshake.send(None)
            else:
                assert isinstance(step, handshake.Proof)
                key = next((key for key in self.broker.keys.values() if step.made_with(key)), None)
                step = self._handshake.send(key)

    def receive(self, data: bytes) -> None:
        """Handle bytes from the client."""
        self._reader.feed(data)
        while (body := self._reader.next_frame(256 if self._handshake else 2**31)) is not None:
            if self._handshake is None:
                self.broker.on_frame(self, parse(body))
                continue
            try:
                self._advance(self._handshake.send(body))
            except StopIteration as end:
                self._handshake = None
                self.name = next(
                    name for name, key in self.broker.keys.items() if key == end.value.key
                )
                self.broker.joined(self)
            except handshake.AuthenticationError:
                self.failed = True
                return

    def deliver(self, envelope: Envelope) -> None:
        """Send one frame to the client."""
        self.out += frame(encode(envelope))


class FakeBroker:
    """Named sessions, and the frames that pass between them.

    Attributes:
        intercept: Called with (session, envelope) first; a true result means that it
            has handled the frame.
        limits, features: What whoami tells of them.
        on_left: Called with each session whose connection has ended.
    """

    def __init__(self, keys: dict[str, bytes]) -> None:
        self.keys = keys
        self.online: dict[str, Session] = {}
        self.seen: list[Envelope] = []
        self.intercept: Callable[[Session, Envelope], object] | None = None
        self.limits: dict[str, object] = {}
        self.features: list[str] = []
        self.on_left: Callable[[Session], object] = lambda session: None

    def joined(self, session: Session) -> None:
        """Add a session that has authenticated."""
        self.online[session.name] = session
        self.emit("$broker.online." + session.name)

    def left(self, session: Session) -> None:
        """Remove a session whose connection has ended."""
        self.on_left(session)
        if self.online.get(session.name) is session:
            del self.online[session.name]
            self.emit("$broker.offline." + session.name)

    def emit(self, topic: str, source: str = "$broker", **fields: object) -> None:
        """Send an event to every subscribed session, once."""
        for session in self.online.values():
            if any(matches(pattern, topic) for pattern, _ in session.subscriptions):
                session.deliver(Envelope(Kind.EVENT, name=source, topic=topic, **fields))  # type: ignore[arg-type]

    def on_frame(self, session: Session, envelope: Envelope) -> None:
        """Handle a client's frame as a broker does."""
        self.seen.append(envelope)
        if self.intercept is not None and self.intercept(session, envelope):
            return
        if envelope.kind is Kind.EVENT:
            self.emit(
                envelope.topic,
                session.name,
                id=envelope.id,
                payload=envelope.payload,
                codec=envelope.codec,
            )
        elif envelope.name == "$broker":
            self._operate(session, envelope)
            return
        elif envelope.name not in self.keys:
            self.refuse(session, envelope, ErrorCode.NO_SUCH_CLIENT)
            return
        elif (recipient := self.online.get(envelope.name)) is None:
            self.refuse(session, envelope, ErrorCode.OFFLINE)
            return
        else:
            recipient.deliver(
                Envelope(
                    envelope.kind,
                    envelope.id,
                    session.name,
                    envelope.payload,
                    envelope.codec,
                    extension=envelope.extension,
                )
            )
        if envelope.flags & Flag.RECEIPT:
            session.deliver(Envelope(Kind.RECEIPT, envelope.id, "$broker"))

    def refuse(self, session: Session, envelope: Envelope, code: ErrorCode) -> None:
        """Answer with an ERROR about the frame's recipient."""
        payload = error_payload(code, f"{envelope.name}: {code}", envelope.name)
        session.deliver(Envelope(Kind.ERROR, envelope.id, "$broker", payload, 2))

    def _operate(self, session: Session, envelope: Envelope) -> None:
        operation = json.loads(envelope.payload)
        answer: dict[str, object] = {}
        if operation["op"] == "whoami":
            answer = {
                "name": session.name,
                "address": session.name,
                "version": "0",
                "protocol": 1,
                "limits": self.limits,
                "features": self.features,
            }
        elif operation["op"] == "clients":
            answer = {
                "clients": [
                    {"name": name, "online": name in self.online, "since": 1.5}
                    for name in self.keys
                ]
            }
        elif operation["op"] == "subscribe":
            if operation["topic"].startswith("denied"):
                self.refuse(session, envelope, ErrorCode.DENIED)
                return
            # A subscription that is made twice is one, as in a real broker.
            if (operation["topic"], operation.get("group", "")) not in session.subscriptions:
                session.subscriptions.append((operation["topic"], operation.get("group", "")))
        elif operation["op"] == "unsubscribe":
            with contextlib.suppress(ValueError):
                session.subscriptions.remove((operation["topic"], operation.get("group", "")))
        elif operation["op"] not in ("ping", "goaway", "finished", "listen", "unlisten"):
            self.refuse(session, envelope, ErrorCode.UNSUPPORTED)
            return
        session.deliver(
            Envelope(Kind.REPLY, envelope.id, "$broker", json.dumps(answer).encode(), 2)
        )


class FakeServer:
    """A thread that serves a FakeBroker on a Unix socket."""

    def __init__(self, path: str, keys: dict[str, bytes]) -> None:
        self.path = path
        self.broker = FakeBroker(keys)
        #: Bytes accepted from clients are read only while this is set.
        self.reading = True
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen; return when clients can connect."""
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(128)
        self._wake, self._waker_in = socket.socketpair()
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="fake broker")
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and the listener, at once."""
        if self._thread is not None:
            self._stopping = True
            # The thread may have noticed that itself, and have ended.
            with contextlib.suppress(OSError):
                self.wake()
            self._thread.join(10)
            assert not self._thread.is_alive()
            self._thread = None

    def wake(self) -> None:
        """Wake the thread, so that it checks everything again."""
        self._waker_in.send(b"!")

    def drop(self, name: str) -> None:
        """Close the connection of one client without sending anything."""
        with self._lock:
            session = self.broker.online[name]
            session.failed = True
            session.out.clear()
        self.wake()

    def act(self, action: Callable[[FakeBroker], object]) -> None:
        """Change the broker between two frames, and send the results."""
        with self._lock:
            action(self.broker)
        self.wake()

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        sessions: dict[socket.socket, Session] = {}
        selector.register(self._listener, selectors.EVENT_READ)
        selector.register(self._wake, selectors.EVENT_READ)
        while not self._stopping:
            for key, mask in selector.select(5):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                with self._lock:
                    if sock is self._listener:
                        client = sock.accept()[0]
                        client.setblocking(False)
                        sessions[client] = Session(self.broker)
                        selector.register(client, selectors.EVENT_READ)
                    elif sock is self._wake:
                        sock.recv(100)
                    elif mask & selectors.EVENT_READ:
                        try:
                            data = sock.recv(65536)
                        except OSError:
                            data = b""
                        if data:
                            sessions[sock].receive(data)
                        else:
                            # Remaining bytes are sent first, as by a real broker.
                            self._flush(sock, sessions[sock])
                            sessions[sock].failed = True
            with self._lock:
                for sock, session in list(sessions.items()):
                    self._flush(sock, session)
                    if session.failed:
                        self._watch(selector, sock, 0)
                        sock.close()
                        del sessions[sock]
                        self.broker.left(session)
                for sock, session in sessions.items():
                    self._flush(sock, session)
                    mask = selectors.EVENT_READ if self.reading else 0
                    mask |= selectors.EVENT_WRITE if session.out else 0
                    self._watch(selector, sock, mask)
        for sock in (*sessions, self._listener, self._wake, self._waker_in):
            sock.close()
        self.broker.online.clear()
        selector.close()

    @staticmethod
    def _watch(selector: selectors.BaseSelector, sock: socket.socket, mask: int) -> None:
        watched = sock in selector.get_map()
        if mask and watched:
            selector.modify(sock, mask)
        elif mask:
            selector.register(sock, mask)
        elif watched:
            selector.unregister(sock)

    @staticmethod
    def _flush(sock: socket.socket, session: Session) -> None:
        with contextlib.suppress(OSError):
            while session.out:
                del session.out[: sock.send(session.out)]
