"""A pending handshake: moves the bytes that a generator of wire/handshake.py asks for.

It never waits, and never reads a byte beyond the handshake, which belongs to the
connection. It makes no decision either: the result is the generator's result or error.
The caller decides how long to wait.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from brokerd_client.connection.keys import Key, key_bytes
from brokerd_client.connection.readiness import readable
from brokerd_client.connection.stream import Connection, adopt_socket
from brokerd_client.errors import AuthenticationError, FrameError, KeyRejected
from brokerd_client.wire import handshake
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import (
    LIMIT,
    NONCE_SIZE,
    Handshake,
    Proof,
    Send,
    unframed,
)

__all__ = [
    "PeerStream",
    "PendingHandshake",
    "SocketPeer",
    "answer_challenge",
    "authentication_error",
    "deliver_challenge",
    "nonce",
]


def nonce() -> bytes:
    """Return the random part of a challenge."""
    return os.urandom(NONCE_SIZE)


class PeerStream(Protocol):
    """A stream that carries a handshake, and becomes a connection afterwards."""

    def fileno(self) -> int: ...

    def wait(self, timeout: float | None) -> object:
        """Wait until the peer has sent bytes or closed, or ``timeout`` seconds have
        passed.
        """

    def send_frame(self, body: bytes) -> None:
        """Send a frame of a handshake at once.

        Raises OSError if that is not possible.
        """

    def next_frame(self) -> bytes | None:
        """Return a frame of at most LIMIT bytes, or None if it is not complete yet.

        Raises EOFError, OSError or FrameError.
        """

    def into_connection(self, max_message: int | None) -> Any:
        """Return a connection that takes over the stream's descriptor."""

    def close(self) -> None:
        """Close the stream."""


class SocketPeer:
    """A peer's stream socket during a handshake; it is owned and made non-blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._reader = FrameReader()

    def fileno(self) -> int:
        return self._socket.fileno()

    def wait(self, timeout: float | None) -> None:
        readable([self.fileno()], timeout)

    def send_frame(self, body: bytes) -> None:
        data = frame(body)
        # A handshake sends less than any socket's buffer holds, so sending need not
        # wait.
        if self._socket.send(data) != len(data):
            raise OSError("the peer's socket buffer is full")

    def next_frame(self, limit: int = LIMIT) -> bytes | None:
        try:
            # Read exactly the missing bytes: the first message may already have
            # arrived, after the last frame of the handshake.
            while missing := self._reader.missing(limit):
                data = self._socket.recv(missing)
                if not data:
                    raise EOFError("the peer closed the connection")
                self._reader.feed(data)
            return self._reader.next_frame(limit)
        except BlockingIOError:
            return None
        except FrameError as error:
            raise unframed(self._reader, error) from error

    def into_connection(self, max_message: int | None) -> Connection:
        self._socket.settimeout(None)
        return adopt_socket(self._socket, max_message=max_message)

    def close(self) -> None:
        self._socket.close()


class PendingHandshake:
    """One handshake over one stream.

    Args:
        peer_stream: The stream to the peer.
        steps: The generator that makes and checks the frames.
        key: The key of this end.
        peer: The peer's address, as the socket module returns it; stored for the
            caller.
        deadline: Seconds on the caller's clock; stored for the caller.
    """

    def __init__(
        self,
        peer_stream: PeerStream,
        steps: Handshake,
        key: bytes,
        peer: object,
        deadline: float,
    ) -> None:
        self.peer_stream: Final = peer_stream
        self.peer: Final = peer
        self.deadline = deadline
        self._steps = steps
        self._key = key
        self._step: object = next(steps)
        #: True during a call of advance(), and permanently after an exception has
        #: interrupted one.
        self._advancing = False
        #: Whether the peer has sent a whole frame.
        self.heard = False

    def advance(self) -> bool:
        """Advance the handshake with the bytes that have arrived; return whether it
        succeeded.

        After an unlisted exception the handshake can't continue: bytes may be lost. A
        generator that an exception has left looks like a finished one.

        Raises:
            AuthenticationError: One side rejected the other.
            FrameError: The bytes are not a frame of a handshake.
            EOFError: The peer closed the connection.
            OSError: The connection is lost.
        """
        if self._advancing:
            raise OSError("the handshake was cut off by an exception at this end")
        self._advancing = True
        while True:
            result: bytes | None = None
            if isinstance(self._step, Send):
                self.peer_stream.send_frame(self._step.body)
            elif isinstance(self._step, Proof):
                result = self._key if self._step.made_with(self._key) else None
            else:
                result = self.peer_stream.next_frame()
                if result is None:
                    self._advancing = False
                    return False
                self.heard = True
            try:
                self._step = self._steps.send(result)
            except StopIteration as end:
                if end.value is None:
                    raise OSError("the handshake was cut off by an exception at this end") from None
                self._advancing = False
                return True


class _MessageConnection(Protocol):
    """A connection of this library, or of the standard library."""

    def send_bytes(self, buf: Any, /) -> object: ...

    def recv_bytes(self, maxlength: int, /) -> bytes: ...


#: Whether each connection is a listener's, as its first challenge showed: a listener
#: delivers first.
_listening: Final[WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()


def _is_listening(connection: object, first_call_says: bool) -> bool:
    """Return whether this end is the listener of a handshake whose calls follow the
    standard library's order.
    """
    try:
        return _listening.setdefault(connection, first_call_says)
    except TypeError:
        # The connection can't be remembered; assume the order of the standard library.
        return True


def deliver_challenge(
    connection: _MessageConnection,
    authkey: Key,
    digest_name: str = "sha256",
    *,
    allow_md5: bool = True,
) -> None:
    """Challenge the peer to prove that it knows the key, and send it the result.

    This blocks until the peer has answered. A channel's ``recv`` unpickles afterwards. A
    connection that answered a challenge
    first is a client's connection; its challenge is marked as a client's.

    Args:
        connection: The connection to the peer.
        authkey: The key.
        digest_name: The digest that the challenge asks for.
        allow_md5: Whether to accept an answer made with HMAC-MD5, the only digest that
            Python 3.11 and older support.

    Raises:
        AuthenticationError: The peer's answer is wrong, or uses a digest that is not
            allowed.
        EOFError: The peer closed the connection.
        OSError: The connection is lost.
    """
    key = key_bytes(authkey)
    random = nonce() if _is_listening(connection, True) else nonce() + handshake.CLIENT_MARK
    _run_steps(
        connection,
        handshake.deliver_challenge(random, digest=digest_name, allow_md5=allow_md5),
        key,
    )
    if isinstance(connection, Connection):
        connection._unpickles = True


def answer_challenge(
    connection: _MessageConnection, authkey: Key, *, allow_md5: bool = True
) -> None:
    """Answer the peer's challenge, to prove that this end knows the key.

    A connection that has not delivered a challenge before is a client's connection. It
    refuses a challenge that is marked as a client's.

    Args:
        connection: The connection to the peer.
        authkey: The key.
        allow_md5: Whether to answer a challenge that asks for HMAC-MD5, the only digest
            that Python 3.11 and older support.

    Raises:
        AuthenticationError: The peer rejects the answer, or is not a listener.
        EOFError: The peer closed the connection.
        OSError: The connection is lost.
    """
    key = key_bytes(authkey)
    dialing = not _is_listening(connection, False)
    _run_steps(
        connection, handshake.answer_challenge(key, allow_md5=allow_md5, dialing=dialing), key
    )


def _run_steps(connection: _MessageConnection, steps: Handshake, key: bytes) -> None:
    step: object = next(steps)
    while True:
        result: bytes | None = None
        if isinstance(step, Send):
            connection.send_bytes(step.body)
        elif isinstance(step, Proof):
            result = key if step.made_with(key) else None
        else:
            result = connection.recv_bytes(LIMIT)
        try:
            step = steps.send(result)
        except StopIteration:
            return


def authentication_error(error: Exception, peer: str) -> AuthenticationError:
    """Return a readable error that names the peer and the reason of the failure."""
    reason = str(error)
    if isinstance(error, FrameError):
        reason = (
            f"{reason}: this is not a handshake; is it a Listener or Client, with a key on both"
            " sides?"
        )
    cls = KeyRejected if isinstance(error, KeyRejected) else AuthenticationError
    return cls(f"{peer}: {reason}")
