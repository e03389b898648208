"""Two daemons and a NATS server: clients of one reach clients of the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.nats_server import NatsServer, nats_server, needs_nats
from support.raw_client import MESSAGE, RECEIPT, REPLY, REQUEST, WANT_RECEIPT, Raw
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.net.cluster.errors import MembershipError

pytestmark = needs_nats


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Return when a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class Hosts:
    """Starts brokers on one NATS server."""

    def __init__(self, stack: ExitStack, server: NatsServer) -> None:
        self._stack = stack
        self.server = server

    def start(self, host: str, **more: Any) -> RunningDaemon:
        cluster = {"host": host, "nats": [self.server.url]}
        config = configuration("127.0.0.1:0", cluster=cluster, **more)
        return self._stack.enter_context(running_daemon(config))

    def pair(self) -> tuple[RunningDaemon, RunningDaemon]:
        """Start two brokers, and return when they have met."""
        a, b = self.start("a"), self.start("b")
        for each in (a, b):
            each.log.wait("cluster.host_found")
        return a, b


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """A NATS server, and brokers on it."""
    with nats_server(tmp_path) as server, ExitStack() as stack:
        yield Hosts(stack, server)


def sees_online(asker: Raw, name: str) -> bool:
    """Return whether a client is online for another."""
    clients = asker.ask("clients").json["clients"]
    return any(each["name"] == name and each["online"] for each in clients)


def test_message_and_request_cross_hosts(hosts: Hosts) -> None:
    a, b = hosts.pair()
    with a.login("alice") as alice, b.login("bob") as bob:
        until(lambda: sees_online(alice, "bob"))
        alice.send(MESSAGE, "bob", b"hello", message_id=5, flags=WANT_RECEIPT)
        receipt, got = alice.recv(), bob.recv()
        assert (receipt.kind, receipt.id) == (RECEIPT, 5)
        assert (got.kind, got.name, got.body) == (MESSAGE, "alice", b"hello")
        alice.send(REQUEST, "bob", b"2+2", message_id=6)
        asked = bob.recv()
        bob.send(REPLY, asked.name, b"4", message_id=asked.id)
        answer = alice.recv()
        assert (answer.kind, answer.id, answer.body) == (REPLY, 6, b"4")


def test_client_of_host_that_stops_is_offline(hosts: Hosts) -> None:
    a, b = hosts.pair()
    with a.login("alice") as alice, b.login("bob"):
        until(lambda: sees_online(alice, "bob"))
        b.stop_soon()
        until(lambda: not sees_online(alice, "bob"))
        alice.send(MESSAGE, "bob", b"hello", message_id=5, flags=WANT_RECEIPT)
        assert alice.recv().code == "offline"


def test_second_broker_of_a_host_does_not_start(hosts: Hosts) -> None:
    hosts.start("a")
    with pytest.raises(MembershipError, match="another broker is host a"):
        hosts.start("a")


def test_local_messages_pass_while_nats_is_away(hosts: Hosts) -> None:
    a, _ = hosts.pair()
    with a.login("alice") as alice, a.login("carol") as carol:
        hosts.server.kill()
        a.log.wait("cluster.nats_lost")
        alice.send(MESSAGE, "carol", b"hello", message_id=5)
        assert carol.recv().body == b"hello"
        alice.send(MESSAGE, "bob", b"hello", message_id=6)
        assert alice.recv().code == "offline"
