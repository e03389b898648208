"""Each broker and each NATS server of three hosts is killed and stopped in turn; the
account of all messages balances.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.nats_server import needs_nats
from support.outages.cluster_processes import ClusterProcesses
from support.outages.traffic import Traffic
from support.waiting import until

import brokerd_client

pytestmark = [needs_nats, pytest.mark.slow]

#: Each broker uses its own NATS server, and another one while that is away.
HOSTS = {"a": "xyz", "b": "yzx", "c": "zxy"}
#: The hosts of two senders and three recipients.
PLACES = {"s0": "a", "s1": "b", "r0": "a", "r1": "b", "r2": "c"}
RECIPIENTS = ("r0", "r1", "r2")
#: Longer than limits.remote_timeout.
PAUSE_S = 2.5


@pytest.fixture
def cluster(socket_dir: Path) -> Iterator[ClusterProcesses]:
    """Three brokers and three NATS servers."""
    with ClusterProcesses(socket_dir, HOSTS, list(PLACES)) as running:
        yield running


@pytest.fixture
def traffic(cluster: ClusterProcesses) -> Iterator[Traffic]:
    """Clients of all hosts that send to each other."""
    with cluster.traffic(PLACES) as running:
        yield running


def test_each_broker_killed_in_turn_leaves_one_outcome(
    cluster: ClusterProcesses, traffic: Traffic
) -> None:
    for host in HOSTS:
        others = [other for other in HOSTS if other != host]
        cluster.brokers[host].popen.kill()
        for other in others:
            cluster.lose(other, host)
        traffic.goes_on(pairs=_pairs(but=host))
        cluster.start(host)
        cluster.meet()
        traffic.goes_on()
    traffic.goes_on(more=100)
    account = traffic.finish(
        "each of three brokers is killed, started again", killed=[*RECIPIENTS, "broker"]
    )
    account.record("the clients of the other hosts were served")


def test_each_broker_stopped_in_turn_leaves_one_outcome(
    cluster: ClusterProcesses, traffic: Traffic
) -> None:
    for host in HOSTS:
        others = [other for other in HOSTS if other != host]
        cluster.brokers[host].signal(signal.SIGSTOP)
        for other in others:
            cluster.lose(other, host)
        traffic.goes_on(pairs=_pairs(but=host))
        cluster.brokers[host].signal(signal.SIGCONT)
        cluster.meet()
        traffic.goes_on()
    traffic.goes_on(more=100)
    account = traffic.finish("each of three brokers is stopped for longer than the timeouts")
    account.record("the clients of the other hosts were served")


def test_each_nats_server_killed_in_turn_leaves_one_outcome(
    cluster: ClusterProcesses, traffic: Traffic
) -> None:
    """Its broker goes on at another server."""
    for server in cluster.servers.values():
        server.kill()
        traffic.goes_on()
        server.start()
        traffic.goes_on()
    cluster.meet()
    traffic.goes_on(more=100)
    account = traffic.finish("each of three NATS servers is killed, started again")
    account.record("the cluster went on")


def test_each_nats_server_stopped_in_turn_leaves_one_outcome(
    cluster: ClusterProcesses, traffic: Traffic
) -> None:
    for server in cluster.servers.values():
        server.signal(signal.SIGSTOP)
        traffic.goes_on(pairs=_pairs(but=""), more=100)
        time.sleep(PAUSE_S)
        server.signal(signal.SIGCONT)
        cluster.meet()
        traffic.goes_on()
    traffic.goes_on(more=100)
    account = traffic.finish("each of three NATS servers is stopped for longer than the timeouts")
    account.record("local clients were served")


def _pairs(*, but: str) -> list[tuple[str, str]]:
    """Return the senders and recipients at the same host, except for one host."""
    return [
        (sender, to)
        for sender, host in PLACES.items()
        for to, other in PLACES.items()
        if sender.startswith("s") and to.startswith("r") and host == other != but
    ]


@pytest.mark.parametrize("kind", ["refuse", "replace"])
def test_name_on_both_sides_of_a_partition_keeps_one_connection(
    socket_dir: Path, kind: str
) -> None:
    """refuse keeps the older one and replace the newer; each message went to one of them."""
    entries: dict[str, Any] = {"alice": {}, "bob": {"when_connected": kind}, "carol": {}}
    with ClusterProcesses(socket_dir, {"a": "x", "b": "y"}, entries) as cluster:
        alice, carol = (_connect(cluster, *who) for who in (("alice", "a"), ("carol", "b")))
        older = _Taker(cluster, "a")
        until(lambda: _is_online(carol, "bob"))
        cluster.servers["y"].signal(signal.SIGSTOP)
        try:
            for host, other in ("ab", "ba"):
                cluster.lose(host, other)
            newer = _Taker(cluster, "b")
            alice.send_confirmed("bob", "of alice")
            carol.send_confirmed("bob", "of carol")
        finally:
            cluster.servers["y"].signal(signal.SIGCONT)
        cluster.meet()
        stays, ends = (older, newer) if kind == "refuse" else (newer, older)
        assert ends.lost.wait(60)
        assert isinstance(ends.reason.__cause__, brokerd_client.Replaced)
        for sender in (alice, carol):
            until(lambda sender=sender: _is_accepted(sender, "bob"))
        stays.client.ping()
        assert not stays.lost.is_set()
        until(lambda: stays.got.count("afterwards") >= 2)
        assert [each for each in older.got if each != "afterwards"] == ["of alice"]
        assert [each for each in newer.got if each != "afterwards"] == ["of carol"]
        for client in (alice, carol, older.client, newer.client):
            client.close()


class _Taker:
    """A connection as bob, which is not made again."""

    def __init__(self, cluster: ClusterProcesses, host: str) -> None:
        self.got: list[Any] = []
        self.lost = threading.Event()
        self.reason: BaseException = RuntimeError("not lost")
        self.client = _connect(cluster, "bob", host, reconnect=False)
        self.client.on_message(lambda message: self.got.append(message.payload))
        self.client.on_connection(self._note)

    def _note(self, event: brokerd_client.ConnectionEvent) -> None:
        if event.state == "lost":
            assert event.reason is not None
            self.reason = event.reason
            self.lost.set()


def _connect(
    cluster: ClusterProcesses, name: str, host: str, **options: Any
) -> brokerd_client.Client:
    return brokerd_client.connect(cluster.address(host), name, key_of(name), **options)


def _is_online(client: brokerd_client.Client, name: str) -> bool:
    return any(each.name == name and each.online for each in client.clients())


def _is_accepted(client: brokerd_client.Client, to: str) -> bool:
    try:
        client.send_confirmed(to, "afterwards", timeout=20)
    except brokerd_client.BrokerdError:
        return False
    return True
