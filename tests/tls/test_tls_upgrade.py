"""The daemon replaces itself while some of its connections use TLS, which the new
process can't continue.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.channels import OPEN, channel, is_refused, joining, listening
from support.keys import key_of
from support.raw_client import MESSAGE, RECEIPT, Raw, packed
from support.tls.authority import Authority, Issued
from support.tls.raw_client import TlsRaw

import brokerd_client
from brokerd_client.address import parse

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)


def test_upgrade_tls_connections_are_closed_after_queued_messages(
    socket_dir: Path, server: Issued, authority: Authority
) -> None:
    """The queued messages arrive, the log gives the reason, and the library connects
    again. Plain connections continue.
    """
    clients = {"ops": {"admin": True}, "alice": None, "bob": None, "carol": None}
    listen = [{"address": "127.0.0.1:0", "tls": server.entry()}]
    # The silent connection does not time out before the upgrade.
    limits = {"handshake_timeout": "60s"}
    with BrokerProcess(socket_dir, clients, listen=listen, limits=limits) as broker:
        tls = parse(broker.wait("daemon.started")[0]["listeners"][1])
        ops, alice = broker.login("ops"), broker.login("alice")
        silent = Raw(tls)
        with TlsRaw(tls, authority.context()) as bob:
            bob.log_in(key_of("bob"), b"bob")
            back = brokerd_client.connect(
                str(tls), "carol", key_of("carol"), ssl=authority.context(), timeout=30
            )
            for number in range(100):
                alice.send(MESSAGE, "bob", b"%03d" % number)

            assert ops.ask("upgrade").json["upgraded"]

            assert [bob.recv().body for _ in range(100)] == [
                b"%03d" % number for number in range(100)
            ]
            assert bob.is_closed("shutting_down")
        reason = broker.wait("client.disconnected")[0]["reason"]
        assert reason.startswith("the broker is replaced by")
        assert back.ping() > 0
        back.close()
        alice.ping()
        # No bytes had been sent on this connection.
        assert silent.is_closed()
        for raw in (ops, alice, silent):
            raw.close()


def test_upgrade_tls_channel_is_closed_after_its_bytes(
    socket_dir: Path, server: Issued, authority: Authority
) -> None:
    """Those that its plain end has sent arrive; an OPEN over TLS is refused. A channel
    whose ends are plain continues.
    """
    clients = {"ops": {"admin": True}, "alice": None, "bob": None}
    listen = [{"address": "127.0.0.1:0", "tls": server.entry()}]
    with (
        BrokerProcess(socket_dir, clients, listen=listen) as broker,
        broker.login("ops") as ops,
        listening(broker, "bob") as bob,
        channel(broker, "alice", "bob", bob) as plain,
        TlsRaw(broker.addresses()[1], authority.context()) as alice,
        TlsRaw(broker.addresses()[1], authority.context()) as pending,
    ):
        first = packed(OPEN, "bob", message_id=1)
        alice.log_in(key_of("alice"), b"alice channel", behind=first)
        with joining(broker, "bob", bob.recv().id) as other:
            assert alice.recv().kind == other.recv().kind == RECEIPT
            pending.log_in(key_of("alice"), b"alice channel", behind=first)
            assert bob.recv().kind == OPEN
            other.write(b"last words")
            assert ops.ask("upgrade").json["upgraded"]
            assert alice.read_to_end() == b"last words"
            assert other.read_to_end() == b""
            assert is_refused(pending, "shutting_down")
        plain[0].write(b"x")
        assert plain[1].read(1) == b"x"


@pytest.mark.parametrize("upgrades", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_upgrade_under_load_loses_no_plain_send_over_tls(
    socket_dir: Path, server: Issued, authority: Authority, upgrades: int
) -> None:
    """Each message arrives once, or is reported to its sender once. The clients
    reconnect to the new process.
    """
    clients = {"ops": {"admin": True}, "alice": None, "bob": {"queue": "64MiB"}}
    with BrokerProcess(
        socket_dir, clients, listen=[{"address": "127.0.0.1:0", "tls": server.entry()}]
    ) as broker:
        tls = str(parse(broker.wait("daemon.started")[0]["listeners"][1]))
        ops, context = broker.login("ops"), authority.context()
        alice, bob = (
            brokerd_client.connect(tls, name, key_of(name), ssl=context, timeout=30)
            for name in ("alice", "bob")
        )
        sent: dict[int, bytes] = {}
        arrived: Counter[bytes] = Counter()
        reported: Counter[int] = Counter()
        alice.on_undelivered(lambda error: reported.update([getattr(error, "message_id", -1)]))
        bob.on_message(lambda message: arrived.update([message.body]))
        ended = threading.Event()

        def send() -> None:
            while not ended.is_set():
                for _ in range(20):
                    body = b"%d" % len(sent)
                    sent[alice.send("bob", body, timeout=30)] = body
                threading.Event().wait(0.001)

        sending = threading.Thread(target=send)
        sending.start()
        for _ in range(upgrades):
            assert ops.ask("upgrade").json["upgraded"]
        ended.set()
        sending.join()
        for _ in range(1000):
            if len(arrived) + len(reported) >= len(sent):
                break
            threading.Event().wait(0.01)
        assert max(arrived.values()) == 1
        assert max(reported.values(), default=1) == 1
        lost = [
            message_id
            for message_id, body in sent.items()
            if not arrived[body] and not reported[message_id]
        ]
        twice = [
            message_id
            for message_id, body in sent.items()
            if arrived[body] and reported[message_id]
        ]
        assert (lost, twice) == ([], [])
        for client in (alice, bob):
            client.close()
        ops.close()
