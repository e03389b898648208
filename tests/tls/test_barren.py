"""Peers whose TLS records carry no payload, or next to none. They are read in small
pieces, and disconnected in the end.

The bytes read per turn of the event loop are counted, not timed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.raw_client import MESSAGE, Raw, packed
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.tls.authority import Authority, Issued
from support.tls.raw_client import tls_login
from support.tls.records import APPLICATION_DATA, Forger, forger_of

from brokerd.net.connection import connection as connection_module
from brokerd_client.tls.engine import Engine

#: Some hundred kilobytes of each kind of record without payload. Each record costs some
#: microseconds.
FLOODS: dict[str, Callable[[Forger], bytes]] = {
    "updates of keys": lambda forger: b"".join(forger.key_update() for _ in range(8000)),
    "updates of keys to be answered": lambda forger: b"".join(
        forger.key_update(answered=True) for _ in range(8000)
    ),
    "empty records": lambda forger: b"".join(
        forger.record(APPLICATION_DATA, b"") for _ in range(8000)
    ),
}


@pytest.fixture
def broker(server: Issued) -> Iterator[RunningDaemon]:
    """A broker with one TLS listener."""
    listen = {"address": "127.0.0.1:0", "tls": server.entry()}
    with running_daemon(configuration(listen, limits={"handshake_timeout": "60s"})) as broker:
        yield broker


@pytest.fixture
def bytes_per_turn(broker: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Bytes of TLS that the broker has read, per turn of its event loop."""
    taken: Counter[int] = Counter()
    turn = 0
    feed = Engine.feed

    def count() -> None:
        nonlocal turn
        turn += 1
        broker._loop.call_soon(count)

    def note(self: Engine, data: bytes | memoryview) -> None:
        # An engine without an end point belongs to a client in this process.
        if self._end_point is not None:
            taken[turn] += len(data)
        feed(self, data)

    monkeypatch.setattr(Engine, "feed", note)
    broker.call(count)
    return taken


def write_at_once(broker: RunningDaemon, forger: Forger, flood: bytes) -> None:
    """Make as much of the flood as fits ready before the broker reads, then send the
    rest.
    """
    forger.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    first = flood[:200_000]
    broker.call(lambda: forger.write_bare(first))
    # The broker may have closed the connection meanwhile.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        forger.write_bare(flood[len(first) :])


@pytest.mark.parametrize("kind", FLOODS)
def test_empty_records_from_client_are_read_slowly_and_end_connection(
    kind: str,
    broker: RunningDaemon,
    bytes_per_turn: Counter[int],
    authority: Authority,
    tmp_path: Path,
) -> None:
    """No turn of the loop goes to that client only. Other clients are served, and the
    log says why it was disconnected.
    """
    with (
        tls_login(broker.address, authority.context(), "bob") as bob,
        forger_of(broker.address, authority.context(), tmp_path / "secrets", "alice") as alice,
    ):
        alice.ping()
        write_at_once(broker, alice, FLOODS[kind](alice))
        bob.ping()
        (disconnected,) = broker.log.wait("client.disconnected")
        assert "TLS" in str(disconnected.fields["reason"])
        bob.ping()
    # One large piece before the flood is recognised, then at most two small pieces per
    # turn.
    sizes = sorted(bytes_per_turn.values(), reverse=True)
    assert sizes[0] <= 36 * 1024
    assert sizes[1] <= 12 * 1024
    assert sum(sizes) < 150_000


def test_empty_records_from_pending_connection_end_handshake(
    broker: RunningDaemon, bytes_per_turn: Counter[int], authority: Authority, tmp_path: Path
) -> None:
    """A peer that has not authenticated gets a smaller budget, and the reason is
    logged.
    """
    with (
        tls_login(broker.address, authority.context(), "bob") as bob,
        Forger(broker.address, authority.context(), tmp_path / "secrets") as peer,
    ):
        bob.ping()
        bytes_per_turn.clear()
        write_at_once(broker, peer, FLOODS["updates of keys"](peer))
        (refused,) = broker.log.wait("client.refused")
        assert "with nothing in them" in str(refused.fields["reason"])
        bob.ping()
    assert max(bytes_per_turn.values()) <= 4 * 1024
    assert sum(bytes_per_turn.values()) < 40_000


def test_one_byte_records_are_assembled_in_turns(
    broker: RunningDaemon, bytes_per_turn: Counter[int], authority: Authority, tmp_path: Path
) -> None:
    """Messages in records of one byte each all arrive, in order. Meanwhile other
    clients have their turns.
    """
    count = 500
    data = b"".join(packed(MESSAGE, "bob", bytes(20), message_id=number) for number in range(count))
    with (
        tls_login(broker.address, authority.context(), "bob") as bob,
        forger_of(broker.address, authority.context(), tmp_path / "secrets", "alice") as alice,
    ):
        alice.ping()
        write_at_once(broker, alice, alice.records(data, 1))
        assert [bob.recv().id for _ in range(count)] == list(range(count))
        alice.ping()
        assert broker.log.named("client.disconnected") == []
    sizes = sorted(bytes_per_turn.values(), reverse=True)
    assert sizes[0] <= 36 * 1024
    assert sizes[1] <= 12 * 1024


def test_tls_connection_invalid_record_ends_connection(
    broker: RunningDaemon, authority: Authority, tmp_path: Path
) -> None:
    """Plaintext frames in the middle of it are not read as frames, and the log says
    what was wrong.
    """
    with (
        tls_login(broker.address, authority.context(), "bob") as bob,
        forger_of(broker.address, authority.context(), tmp_path / "secrets", "alice") as alice,
    ):
        alice.send(MESSAGE, "bob", b"encrypted")
        alice.write_bare(packed(MESSAGE, "bob", b"in the clear"))
        (disconnected,) = broker.log.wait("client.disconnected")
        assert "TLS" in str(disconnected.fields["reason"])
        assert "minimum" not in str(disconnected.fields["reason"])
        assert bob.recv().body == b"encrypted"
        bob.ping()


def test_tls_handshake_in_one_byte_records_is_read_in_turns(
    broker: RunningDaemon, bytes_per_turn: Counter[int], authority: Authority
) -> None:
    """The longest possible ClientHello, each byte in a record of its own, causes no
    long turn of the loop.
    """
    hello = b"\x01" + (131_000).to_bytes(3, "big") + b"\x03\x03" + bytes(131_000)
    with tls_login(broker.address, authority.context(), "bob") as bob, Raw(broker.address) as peer:
        flood = b"".join(b"\x16\x03\x01\0\1" + hello[at : at + 1] for at in range(len(hello)))
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        broker.call(lambda: peer.write(flood[:200_000]))
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bob.ping()
    assert max(bytes_per_turn.values()) <= 36 * 1024


def test_empty_records_before_message_of_disconnected_client_are_read(
    broker: RunningDaemon, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message after many empty records is delivered, although another connection
    takes the name at once.
    """
    with tls_login(broker.address, authority.context(), "bob") as bob:
        alice = forger_of(broker.address, authority.context(), tmp_path / "secrets", "alice")
        alice.ping()
        flood = b"".join(alice.key_update() for _ in range(2000))
        last = alice.records(packed(MESSAGE, "bob", b"the last one"))

        def leave() -> bool:
            # This runs in the broker's thread, so that the broker does not read before
            # all is sent.
            alice.write_bare(flood + last)
            alice.close()
            (connection,) = [
                connection
                for connection in broker.daemon._server.connections
                if connection.session.address == "alice"
            ]  # type: ignore[union-attr]
            return connection.is_gone()

        assert broker.call(leave)
        assert bob.recv().body == b"the last one"


def test_tls_connection_decrypted_bytes_are_read_on_presence_check(
    broker: RunningDaemon, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second login with the same name makes the broker look at this connection. The
    broker then reads on, although the socket has no more bytes.
    """
    monkeypatch.setattr(connection_module, "_READS", 1)
    with (
        tls_login(broker.address, authority.context(), "bob") as bob,
        tls_login(broker.address, authority.context(), "alice") as alice,
    ):
        alice.ping()
        count = 20
        data = b"".join(
            packed(MESSAGE, "bob", bytes(1024), message_id=number) for number in range(count)
        )

        def look() -> bool:
            # This runs in the broker's thread, so that the broker does not read before
            # all is sent. It is more than the read buffer holds.
            broker.daemon.server.context.buffer = memoryview(bytearray(8192))
            alice.write(data)
            (connection,) = [
                connection
                for connection in broker.daemon.server.connections
                if connection.session.address == "alice"
            ]
            return connection.is_gone()

        assert not broker.call(look)
        assert [bob.recv().id for _ in range(count)] == list(range(count))


@pytest.mark.skipif(
    shutil.which("openssl") is None, reason="needs the program openssl (apt-get install openssl)"
)
def test_tls_renegotiation_is_refused(server: Issued, authority: Authority) -> None:
    """In TLS 1.2 a client may ask for another handshake, each of which would cost a
    signature. The listener refuses.
    """
    with running_daemon(
        configuration({"address": "127.0.0.1:0", "tls": server.entry(minimum="1.2")})
    ) as broker:
        command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{broker.address.port}"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, **pipes) as openssl:  # type: ignore[call-overload]
            output = b""
            # Otherwise the broker's first frame would appear in the middle of the
            # output.
            while b"#CHALLENGE#" not in output:
                output += (piece := os.read(openssl.stdout.fileno(), 4096))
                assert piece, output
            output += openssl.communicate(b"R\n" * 50, timeout=30)[0]
        assert b"RENEGOTIATING" in output
        assert b"no renegotiation" in output
        with tls_login(broker.address, authority.context(), "bob") as bob:
            bob.ping()
