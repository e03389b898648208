"""The daemon replaces itself while some of its connections are encrypted, which no other process can go on with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from authority import Authority, Issued
from e2e.process import Process, key_of
from net.raw import MESSAGE, Raw
from stock import TlsRaw

import brokerd_client
from brokerd_client.address import parse

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only")


def test_encrypted_connections_are_closed_once_written_and_come_back(
    socket_dir: Path, server: Issued, authority: Authority
) -> None:
    """What waits for them arrives, the log says why, the library connects again; all others go on."""
    clients = {"ops": {"admin": True}, "alice": None, "bob": None, "carol": None}
    with Process(socket_dir, clients, listen=[{"address": "127.0.0.1:0", "tls": server.entry()}]) as broker:
        tls = parse(broker.wait("daemon.started")[0]["listeners"][1])
        ops, alice = broker.login("ops"), broker.login("alice")
        silent = Raw(tls)
        with TlsRaw(tls, authority.context()) as bob:
            bob.log_in(key_of("bob"), b"bob")
            back = brokerd_client.connect(str(tls), "carol", key_of("carol"), ssl=authority.context(), timeout=30)
            for number in range(100):
                alice.send(MESSAGE, "bob", b"%03d" % number)

            assert ops.ask("upgrade").json["upgraded"]

            assert [bob.recv().body for _ in range(100)] == [b"%03d" % number for number in range(100)]
            assert bob.is_closed()
        reason = broker.wait("client.disconnected")[0]["reason"]
        assert reason.startswith("the broker is replaced by")
        assert back.ping() > 0
        back.close()
        alice.ping()
        # Nothing had been said on this one.
        assert silent.is_closed()
        for raw in (ops, alice, silent):
            raw.close()
