"""A client written from docs/protocol.md alone: sockets, struct and hmac, nothing of
the library.

It is deliberately primitive, so that a test can send what no well-behaved client would.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from brokerd_client.address import Address

if TYPE_CHECKING:
    from typing import Self

HEADER = struct.Struct("!BBBBQ")
MESSAGE, REQUEST, REPLY, ERROR, EVENT, RECEIPT, ACK = range(1, 8)
WANT_RECEIPT, EXTENSION, WANT_ACK = 1, 2, 4
JSON = 2
TIMEOUT_S = 30.0
CHALLENGE, WELCOME, FAILURE = b"#CHALLENGE#", b"#WELCOME#", b"#FAILURE#"


class Frame(NamedTuple):
    """A broker frame, taken apart."""

    kind: int
    flags: int
    codec: int
    name: str
    id: int
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an ERROR."""
        assert self.kind == ERROR, self
        return str(self.json["code"])


class Rejected(Exception):
    """The broker refused the handshake; args[0] is every byte that it sent instead of
    #WELCOME#.
    """


def prefixed(body: bytes) -> bytes:
    """Return the body as one frame."""
    return struct.pack("!i", len(body)) + body


def packed(
    kind: int,
    to: str,
    payload: bytes = b"",
    *,
    message_id: int = 0,
    flags: int = 0,
    codec: int = 0,
    between: bytes = b"",
) -> bytes:
    """Return one whole broker frame.

    Args:
        between: The bytes between name and payload (topic, extension).
    """
    name = to.encode()
    return prefixed(
        HEADER.pack(kind, flags, codec, len(name), message_id) + name + between + payload
    )


def is_reason(data: bytes, code: str) -> bool:
    """Return whether the bytes are exactly the ERROR with the id 0 that gives this
    reason for closing.
    """
    body = data[4:]
    if len(body) < HEADER.size:
        return False
    kind, _, codec, size, message_id = HEADER.unpack_from(body)
    error = json.loads(body[12 + size :])
    return (
        prefixed(body),
        kind,
        codec,
        message_id,
        body[12 : 12 + size],
        error["code"],
        error["name"],
    ) == ((data, ERROR, JSON, 0, b"$broker", code, "$broker"))


class Raw:
    """One connection.

    Args:
        address: The address of the broker's listener.
    """

    def __init__(self, address: Address, *, timeout_s: float = TIMEOUT_S) -> None:
        if address.family == "AF_UNIX":
            self.sock = socket.socket(socket.AF_UNIX)
        else:
            family = socket.AF_INET6 if address.family == "AF_INET6" else socket.AF_INET
            self.sock = socket.socket(family)
        self.sock.settimeout(timeout_s)
        try:
            self.sock.connect(address.sockaddr)
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    # Bytes

    def write(self, data: bytes) -> None:
        self.sock.sendall(data)

    def write_bytewise(self, data: bytes) -> None:
        """Write a byte at a time, each as a segment of its own."""
        for position in range(len(data)):
            self.sock.sendall(data[position : position + 1])

    def read(self, size: int) -> bytes:
        """Return exactly ``size`` bytes. Raises EOFError."""
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError(f"closed after {len(data)} of {size} bytes")
            data += piece
        return bytes(data)

    def read_body(self) -> bytes:
        """Return the body of the next frame."""
        (size,) = struct.unpack("!i", self.read(4))
        return self.read(size)

    def read_to_end(self) -> bytes:
        """Return all bytes until the broker closes, which it may do with a reset."""
        data = bytearray()
        try:
            while piece := self.sock.recv(65536):
                data += piece
        except ConnectionResetError:
            pass
        return bytes(data)

    # The handshake

    def answer(self, key: bytes, name: bytes = b"", digest: str | None = "sha256") -> bytes:
        """Read the broker's challenge and return the correct answer.

        Args:
            digest: None for the bare MD5 of old Pythons.
        """
        challenge = self.read_body()
        assert challenge.startswith(CHALLENGE + b"{sha256}"), challenge
        message = challenge[len(CHALLENGE) :]
        if digest is None:
            return hmac.digest(key, message, "md5")
        return b"{%s}" % digest.encode() + hmac.digest(key, message, digest) + name

    def challenge(self, key: bytes, digest: str | None = "sha256") -> None:
        """Check that the broker knows the key."""
        message = os.urandom(20) if digest is None else b"{%s}" % digest.encode() + os.urandom(40)
        self.write(prefixed(CHALLENGE + message))
        answer = self.read_body()
        right = hmac.digest(key, message, digest or "md5")
        assert answer == (right if digest is None else b"{%s}" % digest.encode() + right)

    def log_in(
        self,
        key: bytes,
        name: bytes = b"",
        *,
        digest: str | None = "sha256",
        challenge_digest: str | None = "sha256",
        behind: bytes = b"",
    ) -> Raw:
        """Shake hands.

        Args:
            behind: Bytes to send in one segment with the last #WELCOME#.

        Raises:
            Rejected: The broker did not welcome the client.
        """
        self.write(prefixed(self.answer(key, name, digest)))
        data = self.read_body()
        if data != WELCOME:
            raise Rejected(prefixed(data) + self.read_to_end())
        self.challenge(key, challenge_digest)
        self.write(prefixed(WELCOME) + behind)
        return self

    # Broker frames

    def send(self, kind: int, to: str, payload: bytes = b"", **how: Any) -> None:
        self.write(packed(kind, to, payload, **how))

    def recv(self) -> Frame:
        """Return the next broker frame."""
        body = self.read_body()
        kind, flags, codec, size, message_id = HEADER.unpack_from(body)
        return Frame(
            kind, flags, codec, body[12 : 12 + size].decode(), message_id, body[12 + size :]
        )

    def ask(self, op: str, *, message_id: int = 7, **arguments: Any) -> Frame:
        """Return the broker's answer to an operation; no other frame may arrive first."""
        self.send(
            REQUEST,
            "$broker",
            json.dumps({"op": op, **arguments}).encode(),
            message_id=message_id,
            codec=JSON,
        )
        answer = self.recv()
        assert (answer.name, answer.id) == ("$broker", message_id), answer
        return answer

    def ping(self) -> None:
        """Wait for the broker's answer: all frames sent before have been handled then."""
        answer = self.ask("ping", message_id=0xFFFF_FFFF)
        assert answer.kind == REPLY, answer

    def is_closed(self, code: str = "") -> bool:
        """Wait until the broker closes; return whether nothing arrived before that, or
        only the ERROR with ``code``.
        """
        data = self.read_to_end()
        return is_reason(data, code) if code else data == b""

    def is_refused(self) -> bool:
        """Wait until the broker closes; return whether only #FAILURE# arrived before
        that.
        """
        return self.read_to_end() == prefixed(FAILURE)


def login(address: Address, key: bytes, name: bytes = b"", **how: Any) -> Raw:
    """Return an authenticated connection. Raises Rejected."""
    raw = Raw(address)
    try:
        return raw.log_in(key, name, **how)
    except BaseException:
        raw.close()
        raise
