"""Hosts of a cluster and NATS servers that no longer reach each other: the account of all
messages balances, and local traffic goes on.

Each broker and each NATS server has a network of its own. Packets are dropped without a
word, as a broken switch does, or a device is down.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.nats_server import needs_nats
from support.outages.cluster_processes import ClusterProcesses
from support.outages.traffic import Account, Traffic
from support.system.network import Link, needs_networks

pytestmark = [pytest.mark.system, needs_networks(), needs_nats]

#: The clients' hosts: s0 and r0 are at one, r1 at another, and s1 sends to both.
PLACES = {"s0": "a", "r0": "a", "r1": "b", "s1": "b"}
LOCAL = [("s0", "r0"), ("s1", "r1")]


@dataclass
class World:
    """The processes, their networks, and the traffic."""

    link: Link
    cluster: ClusterProcesses
    traffic: Traffic


@contextmanager
def world(
    folder: Path, hosts: dict[str, str], *, delay_ms: float = 0.0, timeout: str = "1s"
) -> Iterator[World]:
    """Run a cluster with traffic."""
    ends = [*hosts, *sorted(set("".join(hosts.values())))]
    with ExitStack() as stack:
        made = Link.carried(*ends, delay_ms=delay_ms) if delay_ms else Link.wire(*ends)
        link = stack.enter_context(made)
        cluster = stack.enter_context(
            ClusterProcesses(folder, hosts, list(PLACES), link=link, timeout=timeout)
        )
        yield World(link, cluster, stack.enter_context(cluster.traffic(PLACES)))


def finish(at: World, fault: str) -> Account:
    """Return the account; its messages go on after the fault, everywhere."""
    at.cluster.meet()
    at.traffic.goes_on()
    at.traffic.goes_on(more=100)
    for broker in at.cluster.brokers.values():
        lost = broker.events("cluster.host_lost")
        # Perhaps each of both hosts has given the other one up, at different times.
        assert len(lost) <= 2 * (len(at.cluster.brokers) - 1), lost
    return at.traffic.finish(fault)


@pytest.mark.parametrize("way", ["cut", "unplugged"])
def test_host_parted_from_nats_serves_its_clients(socket_dir: Path, way: str) -> None:
    """Longer than limits.remote_timeout: the hosts lose and find each other."""
    with world(socket_dir, {"a": "x", "b": "x"}) as at:
        if way == "cut":
            at.link.cut("b")
        else:
            at.link.unplug("b")
        at.cluster.lose("a", "b")
        at.cluster.lose("b", "a")
        at.traffic.goes_on(pairs=LOCAL, more=100)
        if way == "cut":
            at.link.heal("b")
        else:
            at.link.plug("b")
        account = finish(at, f"a host that is {way} from NATS, longer than the timeouts")
    assert account.refused > 0
    account.record("local clients were served")


@pytest.mark.parametrize("servers", ["xy", "xyz"])
def test_nats_servers_parted_leave_two_sides(socket_dir: Path, servers: str) -> None:
    """Each server keeps its broker. What waits between the servers when the partition
    ends is not delivered, if it was reported as offline.
    """
    hosts = dict(zip("abc", servers, strict=False))
    with world(socket_dir, hosts) as at:
        others = [server for server in servers if server != "y"]
        at.link.cut("y", *others)
        for host in hosts:
            if host != "b":
                at.cluster.lose(host, "b")
                at.cluster.lose("b", host)
        at.traffic.goes_on(pairs=LOCAL, more=100)
        at.link.heal("y", *others)
        account = finish(at, f"a NATS server that is cut from {len(others)} others")
    assert account.refused > 0
    account.record("local clients were served")


def test_host_parted_from_one_of_two_nats_servers_uses_the_other(socket_dir: Path) -> None:
    with world(socket_dir, {"a": "xy", "b": "yx"}) as at:
        at.link.cut("b", "y")
        at.cluster.brokers["b"].wait("cluster.nats_found")
        at.cluster.meet()
        at.traffic.goes_on()
        at.link.heal("b", "y")
        account = finish(at, "a host that is cut from its NATS server, and reaches another one")
    account.record("the cluster went on")


def test_partition_shorter_than_timeouts_loses_no_message(socket_dir: Path) -> None:
    with world(socket_dir, {"a": "x", "b": "y"}, timeout="30s") as at:
        at.link.cut("y", "x")
        at.traffic.goes_on(pairs=LOCAL, more=12)
        at.link.heal("y", "x")
        account = finish(at, "NATS servers that are cut from each other for a moment")
        assert not at.cluster.brokers["a"].events("cluster.host_lost")
    assert account.in_doubt == 0
    account.record("local clients were served")


def test_partition_over_slow_network_leaves_one_outcome_for_each_id(socket_dir: Path) -> None:
    """A packet takes 25 ms from each host or server to each other one."""
    with world(socket_dir, {"a": "x", "b": "y"}, delay_ms=25) as at:
        at.link.cut("y", "x")
        at.cluster.lose("a", "b")
        at.traffic.goes_on(pairs=LOCAL, more=100)
        at.link.heal("y", "x")
        account = finish(at, "packets 25 ms late, and NATS servers that are cut from each other")
    account.record("local clients were served")
