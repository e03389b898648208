"""Client: how long it waits, and what it says when it does not get through."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.connection
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.wrong_ports import SPEECHES, speaking

from brokerd_client.connection import (
    AuthenticationError,
    Client,
    InvalidKey,
    Listener,
    MessageTooBig,
    TimedOut,
    dialing,
)
from brokerd_client.wire.framing import frame

TIMEOUT_S = 30


@pytest.fixture(params=["AF_INET", "AF_UNIX"])
def server(request: pytest.FixtureRequest, socket_dir: Path) -> Iterator[socket.socket]:
    """A bare listening socket, for listeners that behave as no Listener does."""
    with socket.socket(getattr(socket, request.param)) as sock:
        sock.bind(("127.0.0.1", 0) if request.param == "AF_INET" else str(socket_dir / "s"))
        sock.listen(1)
        yield sock


def serve(server: socket.socket, data: bytes) -> threading.Thread:
    """Accept one peer, say something and no more, and wait until it has gone."""

    def run() -> None:
        peer, _ = server.accept()
        # A client that goes with something unread resets the connection.
        with peer, contextlib.suppress(OSError):
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.timing
def test_client_silent_listener_times_out(server: socket.socket) -> None:
    """A listener that never challenges is given up after the timeout, with a
    TimeoutError that names it.
    """
    start = time.monotonic()
    with pytest.raises(TimedOut, match=r"listener at .* sent nothing within [\d.]+ s") as caught:
        Client(server.getsockname(), authkey="k", timeout=0.3)
    assert isinstance(caught.value, TimeoutError)
    assert 0.3 <= time.monotonic() - start < TIMEOUT_S


def test_client_full_queue_times_out(socket_dir: Path) -> None:
    """A Unix socket whose queue is full is tried until the timeout, not refused at
    once.
    """
    with Listener(str(socket_dir / "s"), backlog=0) as listener, Client(listener.address):
        start = time.monotonic()
        with pytest.raises(TimedOut):
            Client(listener.address, timeout=0.05)
        assert time.monotonic() - start >= 0.05


def test_client_full_queue_waits_for_a_place(socket_dir: Path, aside: Any) -> None:
    """A Unix socket whose queue is full is connected to as soon as there is room."""
    with Listener(str(socket_dir / "s"), backlog=0) as listener, Client(listener.address):
        second = aside(Client, listener.address, timeout=TIMEOUT_S)
        listener.accept(TIMEOUT_S).close()
        second.result(TIMEOUT_S).close()


def test_client_timeout_ends_with_the_handshake() -> None:
    """A connection made with a timeout has none itself."""
    with (
        Listener() as listener,
        Client(listener.address, timeout=TIMEOUT_S) as dialer,
        listener.accept(TIMEOUT_S) as accepted,
    ):
        with socket.socket(fileno=socket.dup(dialer.fileno())) as sock:
            assert sock.getblocking() or sock.gettimeout() is None
        thread = threading.Thread(target=lambda: accepted.send(dialer.poll(0) or "late"))
        thread.start()
        assert dialer.recv() == "late"
        thread.join()


def test_client_no_listener_is_refused(socket_dir: Path) -> None:
    """Without a listener, the system's own error is raised."""
    with pytest.raises(FileNotFoundError):
        Client(str(socket_dir / "none"), timeout=TIMEOUT_S)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            Client(sock.getsockname(), timeout=TIMEOUT_S)


def test_client_listener_that_closes_raises_eoferror(server: socket.socket) -> None:
    """A listener that closes during the handshake is an EOFError that names it."""
    thread = serve(server, b"")
    with pytest.raises(EOFError, match="closed the connection during the handshake"):
        Client(server.getsockname(), authkey="k", timeout=TIMEOUT_S)
    thread.join()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"\x7fELF and more", "at most 256 are accepted: this is not a handshake"),
        (b"\xff\xff\xff\xf0", "can't have the length -16"),
        (frame(b"hello"), "is authentication switched on at both ends"),
        (frame(b"#CHALLENGE#" + bytes(5)), "too short"),
        (frame(b"#CHALLENGE#{rot13}" + bytes(40)), "names no digest known here"),
        (frame(b"#CHALLENGE#" + bytes(20)) + frame(b"#FAILURE#"), "the peer rejected our answer"),
        (frame(b"#CHALLENGE#" + bytes(20)) + frame(b"hm"), "neither #WELCOME# nor #FAILURE#"),
    ],
)
def test_client_peer_that_is_not_a_listener_raises(
    server: socket.socket, answer: bytes, message: str
) -> None:
    """Whatever else a listener says is an AuthenticationError that names it, and what
    was wrong.
    """
    thread = serve(server, answer)
    with pytest.raises(AuthenticationError, match=r"^the listener at .*: ") as caught:
        Client(server.getsockname(), authkey="k", timeout=TIMEOUT_S)
    assert message in str(caught.value)
    thread.join()


def test_client_listener_with_a_wrong_key_is_rejected(aside: Any) -> None:
    """A listener that accepts every client but can't prove that it knows the key is
    rejected by the client.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def impostor() -> bytes:
            peer, _ = server.accept()
            with peer:
                peer.sendall(frame(b"#CHALLENGE#{sha256}" + bytes(40)) + frame(b"#WELCOME#"))
                peer.sendall(frame(b"{sha256}" + bytes(32)))
                received = b""
                while data := peer.recv(4096):
                    received += data
            return received

        received = aside(impostor)
        with pytest.raises(AuthenticationError, match="made with a key that is not accepted here"):
            Client(server.getsockname(), authkey="k", timeout=TIMEOUT_S)
        assert received.result(TIMEOUT_S).endswith(frame(b"#FAILURE#"))


def test_handshake_errors_hold_no_key(aside: Any) -> None:
    """Neither side's error shows either key."""
    with Listener(authkey="right-secret") as listener:
        accepting = aside(listener.accept, TIMEOUT_S)
        with pytest.raises(AuthenticationError) as caught:
            Client(listener.address, authkey="wrong-secret", timeout=TIMEOUT_S)
        for error in (caught.value, accepting.exception(TIMEOUT_S)):
            while error is not None:
                assert "secret" not in repr(error)
                error = error.__cause__
        assert "secret" not in repr(listener)


def test_max_message_holds_on_both_sides() -> None:
    """max_message of a Listener and of a Client is that of their connections."""
    with (
        Listener(authkey="k", max_message=100) as listener,
    ):
        accepted: list[Any] = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept(TIMEOUT_S)))
        thread.start()
        with Client(listener.address, authkey="k", timeout=TIMEOUT_S, max_message=50) as dialer:
            thread.join()
            with accepted[0] as connection:
                assert (dialer.max_message, connection.max_message) == (50, 100)
                connection.send_bytes(bytes(51))
                with pytest.raises(MessageTooBig):
                    dialer.recv_bytes()
                dialer.send_bytes(bytes(101))
                with pytest.raises(MessageTooBig):
                    connection.recv_bytes()


# Listeners that are not what a client looks for.


@pytest.mark.parametrize(("speech", "name"), SPEECHES)
def test_client_at_a_wrong_port_names_its_protocol(speech: bytes, name: str) -> None:
    """The first bytes of another protocol's server are recognised."""
    with (
        speaking(speech) as address,
        pytest.raises(AuthenticationError, match=f"the peer speaks {name}"),
    ):
        Client(address, authkey=b"key", timeout=TIMEOUT_S)


@pytest.mark.parametrize("speech", [b"\x7fELF\x02", b"\xff\xfb\x01", b"MZ\x90\0"])
def test_client_at_a_port_of_an_unknown_protocol_says_no_handshake(speech: bytes) -> None:
    """Bytes of an unknown protocol are not a handshake; no name is guessed."""
    with (
        speaking(speech + bytes(20)) as address,
        pytest.raises(AuthenticationError, match="this is not a handshake"),
    ):
        Client(address, authkey=b"key", timeout=TIMEOUT_S)


def test_client_of_a_keyless_listener_says_that_no_challenge_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default too, after a time; what is likely wrong is in the error."""
    monkeypatch.setattr(dialing, "CHALLENGE_TIMEOUT_S", 0.1)
    with Listener() as listener:
        for timeout in (None, 0.2):
            with pytest.raises(
                TimedOut, match="no challenge came: the listener seems to have no authkey"
            ):
                Client(listener.address, authkey=b"key", timeout=timeout)


def test_client_without_timeout_waits_for_the_rest_of_a_handshake(
    monkeypatch: pytest.MonkeyPatch, aside: Any
) -> None:
    """The limit is for the challenge: what comes after it may take its time; and
    infinity has no limit.
    """
    monkeypatch.setattr(dialing, "CHALLENGE_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def slowly(delay_s: float) -> None:
            sock, _ = server.accept()
            with multiprocessing.connection.Connection(sock.detach()) as here:
                time.sleep(delay_s)
                here.send_bytes(b"#CHALLENGE#{sha256}" + bytes(40))
                here.recv_bytes()
                time.sleep(1.2)
                here.send_bytes(b"#FAILURE#")

        for timeout, delay_s in ((None, 0.0), (math.inf, 1.2)):
            served = aside(slowly, delay_s)
            with pytest.raises(AuthenticationError, match="rejected our answer"):
                Client(server.getsockname(), authkey=b"key", timeout=timeout)
            served.result(TIMEOUT_S)


def test_client_whose_listener_stops_in_the_handshake_says_so() -> None:
    """A listener that has sent its challenge has a key: the error does not speak of
    none.
    """
    challenge = b"#CHALLENGE#{sha256}" + bytes(40)
    late = pytest.raises(TimedOut, match="did not finish the handshake")
    with speaking(frame(challenge)) as address, late:
        Client(address, authkey=b"key", timeout=0.3)


@pytest.mark.parametrize("end", [Client, Listener])
def test_key_that_is_not_valid_text_is_refused_without_repeating_it(
    end: Any, socket_dir: Path
) -> None:
    """An environment variable of other bytes is such a text: neither the error nor its
    context holds the key.
    """
    with pytest.raises(InvalidKey, match="give it as bytes") as refused:
        end(str(socket_dir / "s"), authkey="a canary\udcff")
    assert refused.value.__cause__ is refused.value.__context__ is None
