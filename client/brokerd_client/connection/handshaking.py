"""A handshake under way: moves the bytes that a generator of wire/handshake.py asks for, as far as they have come.

It never waits, never reads a byte beyond the handshake - those belong to the connection - and never decides: what
comes out is the generator's result, or why there is none. Who waits, and for how long, is the caller's business.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from brokerd_client.connection.keys import Key, key_bytes
from brokerd_client.connection.readiness import readable
from brokerd_client.connection.stream import Connection, adopted
from brokerd_client.errors import AuthenticationError, FrameError
from brokerd_client.wire import handshake
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import LIMIT, NONCE_SIZE, Handshake, Proof, Send, next_message, unframed

__all__ = ["Negotiation", "PeerStream", "SocketPeer", "answer_challenge", "deliver_challenge", "described", "nonce"]


def nonce() -> bytes:
    """Return the random part of a challenge."""
    return os.urandom(NONCE_SIZE)


class PeerStream(Protocol):
    """What a handshake runs over, and a connection once it is over."""

    def fileno(self) -> int: ...

    def wait(self, timeout: float | None) -> object:
        """Wait until the peer has sent something or left, or the time is over."""

    def send_frame(self, body: bytes) -> None:
        """Send a frame of a handshake at once. Raises OSError where that can't be done."""

    def next_frame(self) -> bytes | None:
        """Return a frame of at most LIMIT bytes, or None until more comes. Raises EOFError, OSError, FrameError."""

    def into_connection(self, max_message: int | None) -> Any:
        """Return the connection, which owns what the channel owned."""

    def close(self) -> None:
        """Hang up."""


class SocketPeer:
    """A handshake's frames over a stream socket, which it owns and makes non-blocking."""

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
        # A handshake sends less than any socket's buffer holds, so nobody has to wait for a peer here.
        if self._socket.send(data) != len(data):
            raise OSError("the peer's socket takes no more")

    def next_frame(self) -> bytes | None:
        try:
            # Exactly what is missing: the first message may already be there, behind the last frame of the handshake.
            while missing := self._reader.missing(LIMIT):
                data = self._socket.recv(missing)
                if not data:
                    raise EOFError("the peer closed the connection")
                self._reader.feed(data)
        except BlockingIOError:
            return None
        except FrameError as error:
            raise unframed(self._reader, error) from error
        return next_message(self._reader)

    def into_connection(self, max_message: int | None) -> Connection:
        self._socket.settimeout(None)
        return adopted(self._socket, max_message=max_message)

    def close(self) -> None:
        self._socket.close()


class Negotiation:
    """One handshake over one channel.

    peer: who is at the other end, as the socket module gives it; kept for whoever asks. deadline: on the caller's
    clock, in seconds; kept likewise.
    """

    def __init__(
        self, peer_stream: PeerStream, conversation: Handshake, key: bytes, peer: object, deadline: float
    ) -> None:
        self.peer_stream: Final = peer_stream
        self.peer: Final = peer
        self.deadline = deadline
        self._conversation = conversation
        self._key = key
        self._step: object = next(conversation)
        #: True while the conversation moves, and for good where an exception cut that off.
        self._moving = False
        #: Whether the peer has said anything yet.
        self.heard = False

    def advance(self) -> bool:
        """Go on as far as the bytes that have come allow; return whether the handshake is over, and succeeded.

        Raises AuthenticationError: one side rejected the other. FrameError: what came is no frame of a handshake.
        EOFError, OSError: the peer is gone. After any other exception the handshake can't go on: bytes may be lost, and
        a generator that an exception has left looks like one that is through.
        """
        if self._moving:
            raise OSError("the handshake was cut off by an exception at this end")
        self._moving = True
        while True:
            result: bytes | None = None
            if isinstance(self._step, Send):
                self.peer_stream.send_frame(self._step.body)
            elif isinstance(self._step, Proof):
                result = self._key if self._step.made_with(self._key) else None
            else:
                result = self.peer_stream.next_frame()
                if result is None:
                    self._moving = False
                    return False
                self.heard = True
            try:
                self._step = self._conversation.send(result)
            except StopIteration as end:
                if end.value is None:
                    raise OSError("the handshake was cut off by an exception at this end") from None
                self._moving = False
                return True


class _Messages(Protocol):
    """What deliver_challenge and answer_challenge need of a connection."""

    def send_bytes(self, buf: Any, /) -> object: ...

    def recv_bytes(self, maxlength: int, /) -> bytes: ...


#: What each connection's end turned out to be by the first of the two calls below: a listener delivers first.
_listening: Final[WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()


def _is_listening(connection: object, first_call_says: bool) -> bool:
    """Return whether this end is the listener of a handshake whose calls follow the standard library's order."""
    try:
        return _listening.setdefault(connection, first_call_says)
    except TypeError:
        # It can't be remembered; then it is what listeners and clients of the standard library are.
        return True


def deliver_challenge(
    connection: _Messages, authkey: Key, digest_name: str = "sha256", *, allow_md5: bool = True
) -> None:
    """Demand of the peer proof that it knows the key, and tell it the result.

    digest_name: what the challenge asks for. allow_md5: whether an answer made with HMAC-MD5, all that
        Python 3.11 and older know, is good enough. On a connection that answered a challenge first, and so is the
        client's, the challenge is marked as a client's.
    Raises AuthenticationError: the answer is wrong. It blocks until the peer has answered.
    """
    key = key_bytes(authkey)
    random = nonce() if _is_listening(connection, True) else nonce() + handshake.CLIENT_MARK
    _converse(connection, handshake.deliver_challenge(random, digest=digest_name, allow_md5=allow_md5), key)


def answer_challenge(connection: _Messages, authkey: Key, *, allow_md5: bool = True) -> None:
    """Prove to the peer that the key is known here.

    On a connection that has not delivered a challenge before, and so is the client's, a client's challenge is refused.
    Raises AuthenticationError: the peer does not accept it, or is no listener.
    """
    key = key_bytes(authkey)
    dialing = not _is_listening(connection, False)
    _converse(connection, handshake.answer_challenge(key, allow_md5=allow_md5, dialing=dialing), key)


def _converse(connection: _Messages, conversation: Handshake, key: bytes) -> None:
    step: object = next(conversation)
    while True:
        result: bytes | None = None
        if isinstance(step, Send):
            connection.send_bytes(step.body)
        elif isinstance(step, Proof):
            result = key if step.made_with(key) else None
        else:
            result = connection.recv_bytes(LIMIT)
        try:
            step = conversation.send(result)
        except StopIteration:
            return


def described(error: Exception, peer: str) -> AuthenticationError:
    """Return the error for people: with whom the handshake failed, and why."""
    reason = str(error)
    if isinstance(error, FrameError):
        reason = f"{reason}: this is no handshake; is it a Listener or Client, with a key on both sides?"
    return AuthenticationError(f"{peer}: {reason}")
