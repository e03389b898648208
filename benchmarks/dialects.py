"""The bytes that a client of each system sends: its login, and its encoded messages.

Setting up is done here, with sockets that block; the load generator then moves the
bytes. Nothing here is measured. Sources: docs/protocol.md; the NATS client protocol;
RESP; MQTT 3.1.1.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from brokerd_client.wire.envelope import HEADER, CodecId, Flag, Kind
from brokerd_client.wire.framing import frame
from brokerd_client.wire.handshake import NONCE_SIZE, Receive, Send, as_dialer

__all__ = [
    "ID",
    "NAME",
    "Brokerd",
    "Dialect",
    "Mqtt",
    "Nats",
    "Nothing",
    "Redis",
    "ThreadBroker",
    "key_of",
]

#: Operations that are sent before their replies are read.
_AT_ONCE: Final = 500
#: The place of a call's number in a message; calls.c fills it in.
ID: Final = b"########"
#: The place of a caller's name.
NAME: Final = b"@@@@@"

_LENGTH: Final = struct.Struct("!i")


def key_of(name: str) -> str:
    """Return the key or password of a client; as long as a fresh key of brokerd is."""
    return f"{name}-".ljust(43, "k")


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Return that many bytes. Raises EOFError."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the server closed the connection")
        data += piece
    return bytes(data)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    """Return bytes up to and including ``end``, byte by byte, so that nothing behind it
    is taken.
    """
    data = bytearray()
    while not data.endswith(end):
        data += read_exactly(sock, 1)
    return bytes(data)


class Dialect:
    """One system's way to talk.

    Attributes:
        stray: Size of what the server may send unasked.
        answers: Whether it answers a sender's every message.
    """

    stray = 0
    answers = False

    def enter(self, sock: socket.socket, name: str) -> None:
        """Authenticate as that client."""
        raise NotImplementedError

    def receive(self, sock: socket.socket, name: str) -> None:
        """Ask for the messages to that name."""

    def subscribe(self, sock: socket.socket, topic: str) -> None:
        """Ask for the events on that topic."""
        self.receive(sock, topic)

    def join(self, sock: socket.socket, name: str) -> None:
        """Ask for a share of the messages to that name, as a member of a pool."""
        raise NotImplementedError

    def await_replies(self, sock: socket.socket, name: str) -> None:
        """Ask for the replies to that name's requests."""

    def await_receipts(self, sock: socket.socket, name: str) -> None:
        """Ask for an answer to every confirmed message."""

    def subscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        """Subscribe to many topics, and wait until all are subscribed."""
        raise NotImplementedError

    def unsubscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        """Take back what subscribe_all() did with these topics."""
        raise NotImplementedError

    def change(self, topic: str) -> bytes:
        """Return a subscription and its end, as they are written."""
        raise NotImplementedError

    def message(self, to: str, payload: bytes) -> bytes:
        """Return one message, as it is written."""
        raise NotImplementedError

    def extended(self, to: str, payload: bytes, traceparent: str) -> bytes:
        """Return one message that also carries a trace context."""
        raise NotImplementedError

    def confirmed(self, to: str, payload: bytes) -> bytes:
        """Return one message that is answered with a receipt."""
        raise NotImplementedError

    def read_receipt(self, sock: socket.socket) -> bytes:
        """Return the answer to a confirmed message."""
        raise NotImplementedError

    def request(self, sender: str, to: str, payload: bytes) -> bytes:
        """Return one request, as it is written."""
        raise NotImplementedError

    def reply(self, to: str, payload: bytes) -> bytes:
        """Return the reply to a request of that name, as it is written."""
        raise NotImplementedError

    def event(self, topic: str, payload: bytes) -> bytes:
        """Return one event, as it is written."""
        return self.message(topic, payload)


class Brokerd(Dialect):
    """The protocol of brokerd, with the handshake that gives the name."""

    def enter(self, sock: socket.socket, name: str) -> None:
        self._shake_hands(sock, key_of(name).encode(), name.encode())

    def _shake_hands(self, sock: socket.socket, key: bytes, name: bytes) -> None:
        steps = as_dialer(key, os.urandom(NONCE_SIZE), name=name)
        result: bytes | None = None
        try:
            while True:
                step = steps.send(result)
                result = None
                if isinstance(step, Send):
                    sock.sendall(frame(step.body))
                elif isinstance(step, Receive):
                    result = self._read_frame(sock)
        except StopIteration:
            pass

    @staticmethod
    def _read_frame(sock: socket.socket) -> bytes:
        (size,) = _LENGTH.unpack(read_exactly(sock, _LENGTH.size))
        return read_exactly(sock, size)

    @staticmethod
    def operation(op: str, **arguments: str) -> bytes:
        """Return a request to the broker itself, as it is written."""
        body = json.dumps({"op": op, **arguments}).encode()
        return frame(HEADER.pack(Kind.REQUEST, 0, CodecId.JSON, 7, 1) + b"$broker" + body)

    def read_reply(self, sock: socket.socket) -> None:
        """Read the reply to an operation. Raises RuntimeError if it was refused."""
        answer = self._read_frame(sock)
        if answer[0] != Kind.REPLY:
            raise RuntimeError(f"the operation was refused: {answer!r}")

    def _operate(self, sock: socket.socket, op: str, topics: Sequence[str]) -> None:
        """Ask for the same operation with each topic, and read the replies."""
        for first in range(0, len(topics), _AT_ONCE):
            some = topics[first : first + _AT_ONCE]
            sock.sendall(b"".join(self.operation(op, topic=topic) for topic in some))
            for _ in some:
                self.read_reply(sock)

    def subscribe(self, sock: socket.socket, topic: str) -> None:
        self._operate(sock, "subscribe", [topic])

    def subscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        self._operate(sock, "subscribe", topics)

    def unsubscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        self._operate(sock, "unsubscribe", topics)

    def change(self, topic: str) -> bytes:
        return self.operation("subscribe", topic=topic) + self.operation("unsubscribe", topic=topic)

    def join(self, sock: socket.socket, name: str) -> None:
        """Do nothing: a pool's connections have joined it with their handshake."""

    def message(self, to: str, payload: bytes) -> bytes:
        return self._frame(Kind.MESSAGE, 0, to, bytes(8), payload)

    @staticmethod
    def _frame(kind: int, flags: int, to: str, number: bytes, body: bytes) -> bytes:
        (message_id,) = struct.unpack("!Q", number)
        header = HEADER.pack(kind, flags, CodecId.RAW, len(to), message_id)
        return frame(header + to.encode() + body)

    def extended(self, to: str, payload: bytes, traceparent: str) -> bytes:
        extension = json.dumps({"traceparent": traceparent}, separators=(",", ":")).encode()
        body = struct.pack("!H", len(extension)) + extension + payload
        return self._frame(Kind.MESSAGE, Flag.EXTENSION, to, bytes(8), body)

    def confirmed(self, to: str, payload: bytes) -> bytes:
        return self._frame(Kind.MESSAGE, Flag.RECEIPT, to, ID, payload)

    def read_receipt(self, sock: socket.socket) -> bytes:
        return frame(self._read_frame(sock))

    def request(self, sender: str, to: str, payload: bytes) -> bytes:
        return self._frame(Kind.REQUEST, 0, to, ID, payload)

    def reply(self, to: str, payload: bytes) -> bytes:
        return self._frame(Kind.REPLY, 0, to, ID, payload)

    def event(self, topic: str, payload: bytes) -> bytes:
        return frame(
            HEADER.pack(Kind.EVENT, 0, CodecId.RAW, 0, 0)
            + bytes([len(topic)])
            + topic.encode()
            + payload
        )


class ThreadBroker(Brokerd):
    """The same frames; one key for all, and the name in a frame of its own.

    See thread_broker.py.
    """

    def enter(self, sock: socket.socket, name: str) -> None:
        self._shake_hands(sock, key_of("all").encode(), b"")
        sock.sendall(frame(name.encode()))
        self._read_frame(sock)


class Nothing(Brokerd):
    """The bytes of brokerd, to a relay without clients' names."""

    def enter(self, sock: socket.socket, name: str) -> None:
        pass


class Nats(Dialect):
    """The text protocol of NATS."""

    #: A server greets a new client with a PING some seconds after it came.
    stray = len(b"PING\r\n")

    @staticmethod
    def introduction(name: str, *, verbose: bool = False) -> bytes:
        """Return what a client says first.

        verbose: whether the server answers everything that follows.
        """
        options = {
            "verbose": verbose,
            "pedantic": False,
            "headers": True,
            "user": name,
            "pass": key_of(name),
            "lang": "c",
            "version": "1",
        }
        return b"CONNECT %s\r\nPING\r\n" % json.dumps(options).encode()

    def enter(self, sock: socket.socket, name: str) -> None:
        read_until(sock, b"\r\n")
        sock.sendall(self.introduction(name))
        self._expect_pong(sock)

    @staticmethod
    def _expect_pong(sock: socket.socket) -> None:
        while (line := read_until(sock, b"\r\n")) != b"PONG\r\n":
            if line.startswith(b"-ERR"):
                raise RuntimeError(f"nats-server says {line!r}")

    def receive(self, sock: socket.socket, name: str) -> None:
        self._subscribe(sock, name)

    def _subscribe(self, sock: socket.socket, subject: str) -> None:
        sock.sendall(b"SUB %s 1\r\nPING\r\n" % subject.encode())
        self._expect_pong(sock)

    def subscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        # A subscription's number, which the client chooses, may be any word.
        lines = [b"SUB %s %s\r\n" % (topic.encode(), topic.encode()) for topic in topics]
        sock.sendall(b"".join(lines) + b"PING\r\n")
        self._expect_pong(sock)

    def unsubscribe_all(self, sock: socket.socket, topics: Sequence[str]) -> None:
        lines = [b"UNSUB %s\r\n" % topic.encode() for topic in topics]
        sock.sendall(b"".join(lines) + b"PING\r\n")
        self._expect_pong(sock)

    def change(self, topic: str) -> bytes:
        return b"SUB %s 2\r\nUNSUB 2\r\n" % topic.encode()

    def join(self, sock: socket.socket, name: str) -> None:
        self._subscribe(sock, f"{name} pool")

    def await_replies(self, sock: socket.socket, name: str) -> None:
        self._subscribe(sock, f"_INBOX.{name}.*")

    def await_receipts(self, sock: socket.socket, name: str) -> None:
        sock.sendall(self.introduction(name, verbose=True))
        self._expect_pong(sock)

    def message(self, to: str, payload: bytes) -> bytes:
        return b"PUB %s %d\r\n%s\r\n" % (to.encode(), len(payload), payload)

    def extended(self, to: str, payload: bytes, traceparent: str) -> bytes:
        head = b"NATS/1.0\r\ntraceparent: %s\r\n\r\n" % traceparent.encode()
        sizes = (len(head), len(head) + len(payload))
        return b"HPUB %s %d %d\r\n%s%s\r\n" % (to.encode(), *sizes, head, payload)

    def confirmed(self, to: str, payload: bytes) -> bytes:
        return self.message(to, payload)

    def read_receipt(self, sock: socket.socket) -> bytes:
        return read_until(sock, b"\r\n")

    def request(self, sender: str, to: str, payload: bytes) -> bytes:
        inbox = b"_INBOX.%s.%s" % (sender.encode(), ID)
        return b"PUB %s %s %d\r\n%s\r\n" % (to.encode(), inbox, len(payload), payload)

    def reply(self, to: str, payload: bytes) -> bytes:
        return b"PUB _INBOX.%s.%s %d\r\n%s\r\n" % (to.encode(), ID, len(payload), payload)


class Redis(Dialect):
    """RESP 3; a publication is answered with the number of its receivers."""

    answers = True

    @staticmethod
    def command(*words: bytes) -> bytes:
        return b"*%d\r\n" % len(words) + b"".join(
            b"$%d\r\n%s\r\n" % (len(word), word) for word in words
        )

    @classmethod
    def introduction(cls, name: str) -> bytes:
        """Return what a client says first."""
        return cls.command(b"AUTH", name.encode(), key_of(name).encode())

    def enter(self, sock: socket.socket, name: str) -> None:
        # In version 3 of its protocol a subscriber may publish, too.
        sock.sendall(self.command(b"HELLO", b"3", b"AUTH", name.encode(), key_of(name).encode()))
        first = read_until(sock, b"\r\n")
        if first[:1] != b"%":
            raise RuntimeError(f"redis-server says {first!r}")
        sock.sendall(self.command(b"PING"))
        read_until(sock, b"+PONG\r\n")

    def receive(self, sock: socket.socket, name: str) -> None:
        sock.sendall(self.command(b"SUBSCRIBE", name.encode()))
        read_until(sock, b":1\r\n")

    def message(self, to: str, payload: bytes) -> bytes:
        return self.command(b"PUBLISH", to.encode(), payload)


class Mqtt(Dialect):
    """MQTT 3.1.1 with quality of service 0."""

    @staticmethod
    def _packet(head: int, body: bytes) -> bytes:
        size, length = len(body), bytearray()
        while True:
            size, digit = divmod(size, 128)
            length.append(digit | (128 if size else 0))
            if not size:
                return bytes([head]) + bytes(length) + body

    @staticmethod
    def _text(text: str) -> bytes:
        return struct.pack("!H", len(text)) + text.encode()

    @classmethod
    def introduction(cls, name: str) -> bytes:
        """Return what a client says first: a clean session, no keep-alive."""
        fields = cls._text("MQTT") + bytes([4, 0xC2, 0, 0]) + cls._text(name) + cls._text(name)
        return cls._packet(0x10, fields + cls._text(key_of(name)))

    def enter(self, sock: socket.socket, name: str) -> None:
        sock.sendall(self.introduction(name))
        if (answer := read_exactly(sock, 4)) != b"\x20\x02\0\0":
            raise RuntimeError(f"mosquitto says {answer!r}")

    def receive(self, sock: socket.socket, name: str) -> None:
        sock.sendall(self._packet(0x82, b"\0\1" + self._text(name) + b"\0"))
        if (answer := read_exactly(sock, 5)) != b"\x90\x03\0\1\0":
            raise RuntimeError(f"mosquitto says {answer!r}")

    def message(self, to: str, payload: bytes) -> bytes:
        return self._packet(0x30, self._text(to) + payload)
