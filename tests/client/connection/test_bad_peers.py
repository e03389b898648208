"""Peers that say nothing, half of it, garbage, or have the wrong key: none holds up or
ends the accepting of others.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerd_client.connection import AuthenticationError, Client, Closed, Listener, TimedOut
from brokerd_client.connection import listener as listener_module
from brokerd_client.connection.handshaking import PendingHandshake, SocketPeer
from brokerd_client.errors import FrameError
from brokerd_client.wire.framing import FrameReader, frame
from brokerd_client.wire.handshake import (
    CHALLENGE,
    LIMIT,
    NONCE_SIZE,
    RECEIVE,
    Send,
    as_dialer,
    as_listener,
)

TIMEOUT_S = 30
KEY = b"the key"


def receive_frame(sock: socket.socket) -> bytes:
    reader = FrameReader()
    while missing := reader.missing(LIMIT):
        data = sock.recv(missing)
        assert data, "the listener hung up"
        reader.feed(data)
    body = reader.next_frame(LIMIT)
    assert body is not None
    return body


def silent(sock: socket.socket) -> None:
    """Send nothing."""


def half(sock: socket.socket) -> None:
    """Begin an answer and never end it."""
    sock.sendall(frame(b"{sha256}" + bytes(32))[:20])


def half_length(sock: socket.socket) -> None:
    """Begin the length of an answer."""
    sock.sendall(b"\0\0")


def browser(sock: socket.socket) -> None:
    """Take it for another protocol."""
    sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def negative(sock: socket.socket) -> None:
    """Announce a length that no frame can have."""
    sock.sendall(b"\xff\xff\xff\xfe" + bytes(100))


def endless(sock: socket.socket) -> None:
    """Announce 2**64 - 1 bytes."""
    sock.sendall(b"\xff" * 12)


def gone(sock: socket.socket) -> None:
    """Leave at once."""
    sock.close()


def gone_hard(sock: socket.socket) -> None:
    """Leave with a reset where the family has one."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


NEVER_ANSWER = [silent, half, half_length, browser, negative, endless, gone, gone_hard]


@pytest.mark.parametrize("behave", NEVER_ANSWER)
@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_accept_bad_peer_delays_no_other_peer(
    behave: Any, family: str, dial: Any, aside: Any
) -> None:
    """With a hundred bad peers before it a good one is accepted, by one call of
    accept() that raises nothing.
    """
    with Listener(family=family, authkey=KEY) as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        for _ in range(100):
            behave(dial(listener.address))
        with (
            Client(listener.address, authkey=KEY, timeout=TIMEOUT_S) as good,
            accepting.result(TIMEOUT_S) as accepted,
        ):
            good.send("hello")
            assert accepted.recv() == "hello"


@settings(max_examples=200)
@given(
    st.lists(st.one_of(st.binary(max_size=300), st.binary(max_size=100).map(frame)), max_size=4),
    st.booleans(),
)
def test_handshake_random_bytes_raise_documented_errors_only(
    pieces: list[bytes], listening: bool
) -> None:
    """Whatever bytes a peer sends, a handshake waits for more or fails with an error
    that is expected of it.
    """
    listener_end, peer_end = socket.socketpair()
    steps = as_listener(bytes(NONCE_SIZE)) if listening else as_dialer(KEY, bytes(NONCE_SIZE))
    peer_stream = SocketPeer(listener_end)
    pending_handshake = PendingHandshake(peer_stream, steps, KEY, None, 0.0)
    with peer_end:
        try:
            for data in pieces:
                peer_end.sendall(data)
                assert not pending_handshake.advance(), "nobody proves himself by chance"
            peer_end.shutdown(socket.SHUT_WR)
            assert not pending_handshake.advance()
            pytest.fail("the end of the peer was not noticed")
        except (AuthenticationError, FrameError, EOFError):
            pass
        finally:
            peer_stream.close()


def test_accept_wrong_key_raises_once_and_accepts_other_peers(aside: Any) -> None:
    """By default accept() raises the AuthenticationError of a wrong key; the next call
    returns the next peer.
    """
    with Listener(("localhost", 0), authkey=KEY) as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        with pytest.raises(AuthenticationError, match="the peer rejected our answer"):
            Client(listener.address, authkey=b"wrong", timeout=TIMEOUT_S)
        error = accepting.exception(TIMEOUT_S)
        assert isinstance(error, AuthenticationError)
        assert str(error).startswith("127.0.0.1:")
        assert "the peer's answer was made with a key that is not accepted here" in str(error)

        accepting = aside(listener.accept, TIMEOUT_S)
        with Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepting.result(TIMEOUT_S):
            pass


def test_accept_peer_that_rejects_listener_is_told_apart(dial: Any) -> None:
    """When it is the peer that rejects the listener's proof, the error says that."""
    with Listener(authkey=KEY) as listener:
        peer = dial(listener.address)
        steps = as_dialer(KEY, bytes(40))
        step: Any = next(steps)
        with pytest.raises(TimedOut):
            listener.accept(0)
        challenge = receive_frame(peer)
        step = steps.send(challenge)
        peer.sendall(frame(step.body))
        with pytest.raises(TimedOut):
            listener.accept(0)
        assert receive_frame(peer) == b"#WELCOME#"
        peer.sendall(frame(CHALLENGE + b"{sha256}" + bytes(40)) + frame(b"#FAILURE#"))
        with pytest.raises(AuthenticationError, match="the peer rejected our answer"):
            listener.accept(TIMEOUT_S)


def test_on_error_skip_raises_no_error(aside: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With on_error="skip" a wrong key ends no accept(): the error is logged, without
    the key.
    """
    caplog.set_level(logging.INFO, "brokerd_client.connection")
    with Listener(authkey=KEY, on_error="skip") as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        with pytest.raises(AuthenticationError):
            Client(listener.address, authkey=b"wrong", timeout=TIMEOUT_S)
        with Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepting.result(TIMEOUT_S):
            pass
    assert "made with a key that is not accepted here" in caplog.text
    assert "the key'" not in caplog.text


def test_on_error_callable_gets_every_error(
    dial: Any, aside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callable given as on_error hears of every bad peer, whatever it did, with its
    address.
    """
    late = 0
    monkeypatch.setattr(
        listener_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late)
    )
    reports: queue.SimpleQueue[tuple[AuthenticationError, Any]] = queue.SimpleQueue()
    with Listener(
        ("localhost", 0),
        authkey=KEY,
        handshake_timeout=60,
        on_error=lambda *report: reports.put(report),
    ) as listener:
        accepting = aside(listener.accept)
        addresses = {}
        for behave in (silent, half, browser, negative, gone):
            peer = dial(listener.address)
            addresses[peer.getsockname()] = behave
            behave(peer)
        with pytest.raises(AuthenticationError):
            Client(listener.address, authkey=b"wrong", timeout=TIMEOUT_S)
        reported = [reports.get(timeout=TIMEOUT_S) for _ in range(4)]
        late = 60
        listener._server.wake()
        reported += [reports.get(timeout=TIMEOUT_S) for _ in range(2)]
        with Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepting.result(TIMEOUT_S):
            pass

    reasons = {addresses.get(peer): str(error) for error, peer in reported}
    assert len(reasons) == 6
    assert all(isinstance(error, AuthenticationError) for error, _ in reported)
    assert "did not finish the handshake within 60 s" in reasons[silent]
    assert "did not finish the handshake within 60 s" in reasons[half]
    assert "at most 256 are accepted: this is not a handshake" in reasons[browser]
    assert "can't have the length -2" in reasons[negative]
    # The system may report an end with unread bytes behind it as a reset.
    assert "closed" in reasons[gone] or "reset" in reasons[gone]
    assert "not accepted here" in reasons[None]


def test_on_error_exception_is_raised_by_accept(dial: Any) -> None:
    """A callable that raises makes accept() raise: a server can get every error so."""

    def complain(error: AuthenticationError, peer: Any) -> None:
        raise error

    with Listener(authkey=KEY, on_error=complain) as listener:
        browser(dial(listener.address))
        with pytest.raises(AuthenticationError, match="this is not a handshake"):
            listener.accept(TIMEOUT_S)


def test_on_error_closes_listener_accept_raises_closed(dial: Any) -> None:
    """A callable that closes the listener ends the accept() it was called from."""
    listener = Listener(authkey=KEY, on_error=lambda *_: listener.close())
    browser(dial(listener.address))
    with pytest.raises(OSError, match="listener is closed"):
        listener.accept(TIMEOUT_S)


def test_handshake_silent_peer_is_disconnected(dial: Any, aside: Any) -> None:
    """A peer that has not proved itself in time is hung up on, and accept() goes on
    waiting.
    """
    with Listener(authkey=KEY, handshake_timeout=0.05) as listener:
        peer = dial(listener.address)
        accepting = aside(listener.accept, TIMEOUT_S)
        assert receive_frame(peer).startswith(CHALLENGE)
        assert peer.recv(1) == b""
        assert not accepting.done()
        listener.close()
        assert isinstance(accepting.exception(TIMEOUT_S), Closed)


@pytest.mark.timing
def test_handshake_slow_bytes_do_not_extend_the_deadline(dial: Any, aside: Any) -> None:
    """A peer that sends its answer a byte at a time has no more time than any other."""
    with Listener(authkey=KEY, handshake_timeout=0.2) as listener:
        start = time.monotonic()
        peer = dial(listener.address)
        accepting = aside(listener.accept, TIMEOUT_S)
        receive_frame(peer)
        peer.settimeout(0.05)
        for byte in frame(bytes(200)):
            try:
                peer.send(bytes([byte]))
                if peer.recv(1) == b"":
                    break
            except socket.timeout:  # noqa: UP041 - not a TimeoutError before Python 3.10
                continue
            except OSError:
                break
        # All of its bytes would take ten seconds.
        assert 0.2 <= time.monotonic() - start < 8
        listener.close()
        assert accepting.exception(TIMEOUT_S) is not None


def test_handshakes_pending_are_bounded(dial: Any, aside: Any) -> None:
    """Above max_handshakes the peer that has been silent longest is dropped, not the
    new one.
    """
    with Listener(authkey=KEY, max_handshakes=3) as listener:
        peers = [dial(listener.address) for _ in range(5)]
        accepting = aside(listener.accept, TIMEOUT_S)
        for peer in peers:
            assert receive_frame(peer).startswith(CHALLENGE)
        for peer in peers[:2]:
            assert peer.recv(1) == b""
        with Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepting.result(TIMEOUT_S):
            assert len(listener._pending_handshakes) <= 3
            peers[4].setblocking(False)
            with pytest.raises(BlockingIOError):
                peers[4].recv(1)


def test_handshake_deadline_pauses_between_accepts(
    dial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time without a call of accept() does not count against a peer."""
    now = time.monotonic()
    monkeypatch.setattr(listener_module, "time", SimpleNamespace(monotonic=lambda: now))
    with Listener(authkey=KEY, handshake_timeout=5) as listener:
        peer = dial(listener.address)
        with pytest.raises(TimedOut):
            listener.accept(0)
        receive_frame(peer)
        now += 3600
        with pytest.raises(TimedOut):
            listener.accept(0)
        peer.setblocking(False)
        with pytest.raises(BlockingIOError):  # still connected
            peer.recv(1)


def test_accept_ready_connection_comes_before_an_error(dial: Any, aside: Any) -> None:
    """When a good and a bad peer have both finished, accept() returns the good one
    first and raises afterwards.
    """
    with Listener(authkey=KEY) as listener:
        listener._errors.append(AuthenticationError("somebody else"))
        with Client(listener.address) as unasked:  # never authenticates
            listener._ready.append((unasked, None))
            assert listener.accept(TIMEOUT_S) is unasked
        with pytest.raises(AuthenticationError, match="somebody else"):
            listener.accept(TIMEOUT_S)


def test_accept_without_descriptors_drops_the_oldest_handshake(
    dial: Any, monkeypatch: pytest.MonkeyPatch, aside: Any
) -> None:
    """With no file descriptor left, an unfinished handshake is given up for the next
    peer.
    """
    with Listener(authkey=KEY) as listener:
        accept = listener._server.accept
        failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

        def take_or_fail() -> Any:
            if failures and listener._pending_handshakes:
                raise failures.pop()
            return accept()

        monkeypatch.setattr(listener._server, "accept", take_or_fail)
        stranger = dial(listener.address)
        accepting = aside(listener.accept, TIMEOUT_S)
        receive_frame(stranger)
        with Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepting.result(TIMEOUT_S):
            assert stranger.recv(1) == b""

        def fail() -> Any:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(listener._server, "accept", fail)
        dial(listener.address)
        with pytest.raises(OSError, match="Too many open files"):
            listener.accept(TIMEOUT_S)


def test_handshake_message_behind_the_welcome_is_delivered(dial: Any, aside: Any) -> None:
    """A message in the same segment as the last frame of the handshake is not lost:
    poll() sees it and recv gets it.
    """
    first = b"A" * 1000
    with Listener(authkey=KEY) as listener:
        peer = dial(listener.address)
        accepting = aside(listener.accept, TIMEOUT_S)
        steps = as_dialer(KEY, bytes(40))
        step: Any = next(steps)
        pending = b""
        while True:
            try:
                if isinstance(step, Send):
                    pending = frame(step.body)
                    if step.body == b"#WELCOME#":
                        pending += frame(first) + frame(b"second")
                    peer.sendall(pending)
                    step = steps.send(None)
                else:
                    assert step is RECEIVE or step.made_with(KEY)
                    step = steps.send(receive_frame(peer) if step is RECEIVE else KEY)
            except StopIteration:
                break
        with accepting.result(TIMEOUT_S) as connection:
            assert connection.poll(TIMEOUT_S)
            assert connection.recv_bytes() == first
            assert connection.recv_bytes() == b"second"
