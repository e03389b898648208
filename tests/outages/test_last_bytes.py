"""The last bytes and a reset arrive together: both the bytes and the end are handled."""

from __future__ import annotations

import select
import signal
import socket
import struct
import sys
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import MESSAGE, Raw, packed, prefixed
from support.waiting import until

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs signals and /proc as on Linux"
)

#: Far less than limits.handshake_timeout and limits.keepalive here.
SOON_S = 10.0
LIMITS = {"handshake_timeout": "60s", "keepalive": "60s"}


def stop(broker: BrokerProcess) -> None:
    """Stop the process, so that the broker sees all that follows at once."""
    broker.signal(signal.SIGSTOP)
    stat = Path(f"/proc/{broker.popen.pid}/stat")
    until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T", "it does not stop")


def reset(raw: Raw) -> None:
    raw.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_message_with_reset_is_delivered_and_sender_disconnected(
    socket_dir: Path, family: str
) -> None:
    """The message is delivered. The broker notices that its sender is gone, though
    nothing is written to it.
    """
    with (
        BrokerProcess(socket_dir, listen=["127.0.0.1:0"], limits=LIMITS) as broker,
        broker.login("bob") as bob,
    ):
        alice = broker.login("alice", broker.addresses()[family == "tcp"])
        alice.ping()
        # Closing a Unix socket with unread bytes resets it.
        bob.send(MESSAGE, "alice", b"unread")
        assert select.select([alice.sock], [], [], SOON_S)[0]
        stop(broker)
        alice.write(packed(MESSAGE, "bob", b"the last one"))
        reset(alice)
        broker.signal(signal.SIGCONT)
        assert bob.recv().body == b"the last one"
        until(lambda: bool(broker.events("client.disconnected")), "it stays online", SOON_S)


def test_handshake_half_done_with_reset_ends_at_once(socket_dir: Path) -> None:
    """The pending connection ends at once, and not at its timeout."""
    with BrokerProcess(socket_dir, listen=["127.0.0.1:0"], limits=LIMITS) as broker:
        raw = Raw(broker.addresses()[1])
        answer = prefixed(raw.answer(key_of("alice"), b"alice"))
        stop(broker)
        raw.write(answer[:20])
        reset(raw)
        broker.signal(signal.SIGCONT)
        until(lambda: bool(broker.events("client.refused")), "it stays pending", SOON_S)


def test_handshake_done_with_reset_disconnects_client(socket_dir: Path) -> None:
    """A client that is accepted and gone at once does not stay online."""
    with (
        BrokerProcess(socket_dir, listen=["127.0.0.1:0"], limits=LIMITS) as broker,
        broker.login("bob") as bob,
    ):
        raw = Raw(broker.addresses()[1])
        raw.write(prefixed(raw.answer(key_of("alice"), b"alice")))
        raw.read_body()
        raw.challenge(key_of("alice"))
        stop(broker)
        raw.write(prefixed(b"#WELCOME#") + packed(MESSAGE, "bob", b"the last one"))
        reset(raw)
        broker.signal(signal.SIGCONT)
        assert bob.recv().body == b"the last one"
        until(lambda: bool(broker.events("client.disconnected")), "it stays online", SOON_S)
