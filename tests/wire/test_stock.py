"""The handshake, compared with that of the running interpreter byte for byte.

Python 3.12 and later challenge with a digest's name; 3.11 knows only HMAC-MD5 and
challenges with 20 bare bytes.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import (
    CLIENT_MARK,
    LIMIT,
    NONCE_SIZE,
    Handshake,
    Proof,
    Send,
    answer_challenge,
    as_dialer,
    as_listener,
    deliver_challenge,
)

KEY = b"alice's key"
NONCE = bytes(range(NONCE_SIZE))
OTHER_NONCE = bytes(range(100, 100 + NONCE_SIZE))
ONLY_MD5 = sys.version_info < (3, 12)
TIMEOUT_S = 30


class Recording(multiprocessing.connection.Connection):
    """The standard library's connection, which also keeps every byte that it writes."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle)
        self.written = bytearray()

    def _send(self, buf: bytes, *args: Any) -> None:
        self.written += buf
        super()._send(buf, *args)


class Stock(threading.Thread):
    """The standard library's side of a handshake, in a thread.

    Its outcome is the exception that it raised, or None.

    Args:
        mark: Bytes that follow the nonce in a challenge.
    """

    def __init__(
        self,
        handle: int,
        nonce: bytes,
        steps: list[Callable[[Any, bytes], None]],
        key: bytes,
        mark: bytes = b"",
    ) -> None:
        super().__init__(daemon=True)
        self.connection = Recording(handle)
        self.nonce = nonce
        self.mark = mark
        self.steps = steps
        self.key = key
        self.outcome: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            for step in self.steps:
                step(self.connection, self.key)
        except (multiprocessing.AuthenticationError, OSError, EOFError) as error:
            self.outcome = error
            self.connection.close()

    def finish(self) -> bytes:
        """Wait for the end, and return the bytes written."""
        self.join(TIMEOUT_S)
        assert not self.is_alive(), "the standard library's side did not finish"
        self.connection.close()
        return bytes(self.connection.written)


DELIVER = multiprocessing.connection.deliver_challenge
ANSWER = multiprocessing.connection.answer_challenge


@pytest.fixture
def known_nonces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the standard library the nonce of its thread instead of a random one."""
    draw = os.urandom

    def urandom(size: int) -> bytes:
        thread = threading.current_thread()
        if not isinstance(thread, Stock):
            return draw(size)
        return thread.nonce[:size] + thread.mark

    monkeypatch.setattr(os, "urandom", urandom)


@contextmanager
def stream() -> Iterator[tuple[int, socket.socket]]:
    """Yield the two ends of a stream: a handle, which the caller closes, and a socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(TIMEOUT_S)
    with ours:
        yield theirs.detach(), ours


def play(conversation: Handshake, sock: socket.socket, key: bytes = KEY) -> bytes:
    """Run our side of a handshake on the socket, and return every byte that it wrote."""
    reader = FrameReader()
    written = bytearray()
    value: bytes | None = None
    try:
        while True:
            step = conversation.send(value)
            value = None
            if isinstance(step, Send):
                written += frame(step.body)
                sock.sendall(frame(step.body))
            elif isinstance(step, Proof):
                value = key if step.made_with(key) else None
            else:
                while (value := reader.next_frame(LIMIT)) is None:
                    data = sock.recv(1024)
                    assert data, "the standard library's side hung up"
                    reader.feed(data)
    except StopIteration:
        return bytes(written)


def both_stock(
    listener_key: bytes = KEY, dialer_key: bytes = KEY, mark: bytes = b""
) -> tuple[Stock, Stock]:
    """Run the standard library's handshake with itself, and return both sides."""
    ours, theirs = socket.socketpair()
    listener = Stock(ours.detach(), NONCE, [DELIVER, ANSWER], listener_key)
    dialer = Stock(theirs.detach(), OTHER_NONCE, [ANSWER, DELIVER], dialer_key, mark)
    listener.join(TIMEOUT_S)
    dialer.join(TIMEOUT_S)
    return listener, dialer


@pytest.mark.usefixtures("known_nonces")
@pytest.mark.skipif(ONLY_MD5, reason="the interpreter knows HMAC-MD5 only")
def test_handshake_equals_that_of_standard_library() -> None:
    """With the same key and nonces, each role writes exactly the bytes of the standard
    library's. Only the mark of a client's challenge differs.
    """
    stock_listener, _ = both_stock()
    _, stock_dialer = both_stock(mark=CLIENT_MARK)
    with stream() as (handle, sock):
        dialer = Stock(handle, OTHER_NONCE, [ANSWER, DELIVER], KEY)
        our_listener_wrote = play(as_listener(NONCE), sock)
        dialer.finish()
    with stream() as (handle, sock):
        listener = Stock(handle, NONCE, [DELIVER, ANSWER], KEY)
        our_dialer_wrote = play(as_dialer(KEY, OTHER_NONCE), sock)
        listener.finish()

    assert our_listener_wrote == stock_listener.finish()
    assert our_dialer_wrote == stock_dialer.finish()
    assert (listener.outcome, dialer.outcome) == (None, None)


@pytest.mark.usefixtures("known_nonces")
def test_handshake_answer_equals_that_of_standard_library() -> None:
    """Challenged by the standard library, we write what its own answer_challenge
    writes: on 3.11, bare MD5.
    """
    ours, theirs = socket.socketpair()
    stock_listener = Stock(ours.detach(), NONCE, [DELIVER], KEY)
    stock_dialer = Stock(theirs.detach(), b"", [ANSWER], KEY)
    expected = stock_dialer.finish()
    stock_listener.finish()
    with stream() as (handle, sock):
        listener = Stock(handle, NONCE, [DELIVER], KEY)
        written = play(answer_challenge(KEY), sock)
        listener.finish()

    assert written == expected
    assert len(written) == 4 + (16 if ONLY_MD5 else len("{sha256}") + 32)
    assert listener.outcome is None


@pytest.mark.usefixtures("known_nonces")
def test_handshake_verdict_equals_that_of_standard_library() -> None:
    """Answered by the standard library, we write what its own deliver_challenge writes
    after its challenge.
    """
    ours, theirs = socket.socketpair()
    stock_listener = Stock(ours.detach(), NONCE, [DELIVER], KEY)
    Stock(theirs.detach(), b"", [ANSWER], KEY).finish()
    expected = stock_listener.finish()
    with stream() as (handle, sock):
        dialer = Stock(handle, b"", [ANSWER], KEY)
        written = play(deliver_challenge(NONCE), sock)
        dialer.finish()

    welcome = frame(b"#WELCOME#")
    assert written.endswith(welcome)
    assert expected.endswith(welcome)
    assert written == expected or ONLY_MD5
    assert dialer.outcome is None


@pytest.mark.parametrize("ours", ["listener", "dialer"])
def test_handshake_with_standard_library_authenticates(ours: str) -> None:
    """With random nonces, both roles succeed against the standard library of this
    interpreter.
    """
    with stream() as (handle, sock):
        if ours == "listener":
            peer = Stock(handle, b"", [ANSWER, DELIVER], KEY)
            play(as_listener(os.urandom(NONCE_SIZE)), sock)
        else:
            peer = Stock(handle, b"", [DELIVER, ANSWER], KEY)
            play(as_dialer(KEY, os.urandom(NONCE_SIZE)), sock)
        peer.finish()

    assert peer.outcome is None


@pytest.mark.parametrize("ours", ["listener", "dialer"])
def test_handshake_wrong_key_raises_standard_authentication_error(ours: str) -> None:
    """With different keys, both our side and the standard library raise
    multiprocessing.AuthenticationError.
    """
    with stream() as (handle, sock):
        steps = [ANSWER, DELIVER] if ours == "listener" else [DELIVER, ANSWER]
        peer = Stock(handle, b"", steps, b"wrong")
        conversation = as_listener(NONCE) if ours == "listener" else as_dialer(KEY, NONCE)
        with pytest.raises(multiprocessing.AuthenticationError):
            play(conversation, sock)
        peer.finish()

    assert isinstance(peer.outcome, multiprocessing.AuthenticationError)
