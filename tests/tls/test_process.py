"""The daemon as a process, with TLS: an upgrade, and a health check."""

from __future__ import annotations

import os
import signal
import ssl
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.broker_process import BrokerProcess
from support.client_faces import PATIENCE
from support.keys import key_of
from support.tls.authority import Authority, Issued

import brokerd_client
from brokerd.cli.main import main


@pytest.mark.skipif(
    not hasattr(signal, "SIGUSR2") or os.name != "posix", reason="no process replaces itself here"
)
def test_upgrade_tls_connections_are_closed_and_reconnect(
    socket_dir: Path, server: Issued, trusting: ssl.SSLContext
) -> None:
    """When the daemon replaces itself, TLS connections are closed in order and opened
    again. Plain ones stay.
    """
    listen = [{"address": "127.0.0.1:0", "tls": server.entry()}]
    with BrokerProcess(
        socket_dir, {"alice": {}, "bob": {}, "ops": {"admin": True}}, listen=listen
    ) as broker:
        _, address = broker.addresses()
        assert address.tls
        with (
            broker.login("ops") as ops,
            brokerd_client.connect(address, "alice", key_of("alice"), ssl=trusting) as alice,
            brokerd_client.connect(address, "bob", key_of("bob"), ssl=trusting) as bob,
        ):
            alice.send_confirmed("bob", "before")
            assert bob.recv(PATIENCE).payload == "before"
            answer = ops.ask("upgrade").json
            assert answer["upgraded"], answer
            ops.ping()
            # The library has connected both again, to the new process.
            assert bob.ping() > 0
            alice.send_confirmed("bob", "after")
            assert bob.recv(PATIENCE).payload == "after"
            assert alice.counters["losses"] == bob.counters["losses"] == 1
        assert broker.events("daemon.bug") == []
        connected = broker.wait("client.connected", 3)
        assert {event["listener"] for event in connected[1:]} == {str(address)}
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0


def test_health_over_tls_is_well(socket_dir: Path, server: Issued, authority: Authority) -> None:
    """A health check succeeds over TLS, whether the listener demands client
    certificates or not.
    """
    listen = [
        {"address": "127.0.0.1:0", "tls": server.entry()},
        {"address": "localhost:0", "tls": server.entry(client_ca=authority.file)},
    ]
    with BrokerProcess(socket_dir, listen=listen) as broker:
        for address in broker.addresses()[1:]:
            result = CliRunner().invoke(main, ["health", "--address", str(address)])
            assert result.exit_code == 0, result.output
