"""A name with one connection is admitted by one host, and where it is otherwise elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support.fake_network import FakeNet, client
from support.joined_hosts import JoinedHosts

from brokerd.config.values import WhenConnected
from brokerd.core.channels import ChannelRefused
from brokerd.core.cluster.admission import Verdict
from brokerd_client.wire.envelope import Envelope, ErrorCode, Kind


def hosts_of(when: WhenConnected = WhenConnected.REFUSE, **changes: Any) -> JoinedHosts:
    return JoinedHosts(client("ann", when_connected=when, **changes), client("bob", admin=True))


def judge(hosts: JoinedHosts, host: str, name: str = "ann") -> Verdict:
    net = hosts[host].net
    return net.broker.traffic.admission.judge(name, net.now)  # type: ignore[union-attr]


def test_name_that_is_nowhere_is_free_at_once() -> None:
    hosts = hosts_of()
    assert judge(hosts, "a") is Verdict.FREE
    assert judge(hosts, "a", "unknown") is Verdict.FREE


def test_name_at_another_host_is_taken_once_that_host_has_checked() -> None:
    hosts = hosts_of()
    hosts["b"].net.connect("ann")
    hosts.settle()
    assert judge(hosts, "a") is Verdict.ASKING
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    assert judge(hosts, "a") is Verdict.TAKEN
    # A verdict is given once.
    assert judge(hosts, "a") is Verdict.ASKING


def test_name_whose_client_has_left_another_host_is_free() -> None:
    hosts = hosts_of()
    ann = hosts["b"].net.connect("ann")
    hosts.settle()
    ann.leave()
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    assert judge(hosts, "a") is Verdict.FREE
    hosts["a"].net.connect("ann")
    hosts.settle()
    assert not ann.session.open


def test_newer_connection_replaces_the_one_at_another_host() -> None:
    hosts = hosts_of(WhenConnected.REPLACE)
    ann = hosts["b"].net.connect("ann")
    hosts.settle()
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    assert judge(hosts, "a") is Verdict.FREE
    assert "replaced by a new one at host a" in ann.gone


def test_host_that_does_not_answer_keeps_the_name_taken_until_it_is_away() -> None:
    hosts = hosts_of()
    hosts["b"].net.connect("ann")
    hosts.settle()
    assert judge(hosts, "a") is Verdict.ASKING
    hosts["a"].net.now += 5.0
    assert judge(hosts, "a") is Verdict.TAKEN
    assert judge(hosts, "a") is Verdict.ASKING
    hosts["a"].lose("b")
    assert judge(hosts, "a") is Verdict.FREE


def test_answer_that_no_connection_uses_is_forgotten() -> None:
    hosts = hosts_of()
    ann = hosts["b"].net.connect("ann")
    hosts.settle()
    ann.leave()
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    hosts["b"].net.connect("ann")
    hosts.settle()
    hosts["a"].net.now += 6.5
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    assert judge(hosts, "a") is Verdict.TAKEN


def test_pool_is_admitted_by_each_host_for_itself() -> None:
    hosts = hosts_of(connections=2)
    hosts["b"].net.connect("ann")
    hosts.settle()
    assert judge(hosts, "a") is Verdict.FREE


@pytest.mark.parametrize(
    ("when", "closed"), [(WhenConnected.REFUSE, "a"), (WhenConnected.REPLACE, "b")]
)
def test_name_on_both_sides_of_a_partition_keeps_one_connection(
    when: WhenConnected, closed: str
) -> None:
    """Both hosts have admitted it; the connection at b is the older."""
    hosts = hosts_of(when)
    peers = {}
    for host in "ba":
        peers[host] = hosts[host].net.connect("ann")
        hosts["a"].net.now += 1
    hosts.settle()
    (stays,) = {"a", "b"} - {closed}
    assert "is connected at host" in peers[closed].gone
    assert not peers[stays].gone


def test_name_connected_at_the_same_time_stays_at_the_first_host() -> None:
    hosts = hosts_of()
    peers = {host: hosts[host].net.connect("ann") for host in "ab"}
    hosts.settle()
    assert not peers["a"].gone
    assert peers["b"].gone


def test_told_nonsense_changes_nothing() -> None:
    hosts = hosts_of()
    for body in ({}, {"op": "check"}, {"op": "answer", "name": "ann"}, {"op": "x", "name": "ann"}):
        hosts["a"].traffic.told("b", body, 0.0)
    assert judge(hosts, "a") is Verdict.FREE


def test_only_a_name_with_one_connection_at_another_host_needs_an_answer() -> None:
    hosts = hosts_of()
    admission = hosts["a"].traffic.admission
    assert not admission.needs_answer("ann")
    assert not admission.needs_answer("unknown")
    hosts["b"].net.connect("ann")
    hosts.settle()
    assert admission.needs_answer("ann")


def test_pool_keeps_connections_at_several_hosts() -> None:
    hosts = hosts_of(connections=2)
    peers = [hosts[host].net.connect("ann") for host in "ab"]
    hosts.settle()
    assert [peer.gone for peer in peers] == ["", ""]
    assert not hosts["a"].traffic.admission.needs_answer("ann")


def test_connection_that_is_ending_does_not_keep_its_name() -> None:
    """Its client has closed, and the input before that is still routed."""
    hosts = hosts_of()
    ann = hosts["b"].net.connect("ann")
    hosts.settle()
    ann.is_gone = lambda: None  # type: ignore[method-assign]
    assert judge(hosts, "a") is Verdict.ASKING
    hosts.settle()
    assert judge(hosts, "a") is Verdict.FREE


# Elsewhere


def refused(hosts: JoinedHosts, to: str) -> ChannelRefused:
    net = hosts["a"].net
    bob = net.broker.exchange.resolve("bob")
    assert bob is not None
    envelope = Envelope(Kind.OPEN, 1, to)
    with pytest.raises(ChannelRefused) as refusal:
        net.broker.channels.ask(bob, envelope, b"", None, 7, net.now)
    return refusal.value


def test_channel_to_a_client_of_another_host_is_elsewhere() -> None:
    hosts = hosts_of()
    ann = hosts["b"].net.connect("ann")
    hosts.settle()
    refusal = refused(hosts, "ann")
    assert refusal.code is ErrorCode.ELSEWHERE
    assert (refusal.host, refusal.addresses) == ("b", ("b:6000",))
    assert refused(hosts, f"ann/{ann.session.instance}").code is ErrorCode.ELSEWHERE
    assert refused(hosts, "ann/x1z1").code is ErrorCode.OFFLINE
    ann.leave()
    hosts.settle()
    assert refused(hosts, "ann").code is ErrorCode.OFFLINE


def test_channel_that_is_not_allowed_is_denied_wherever_the_client_is() -> None:
    hosts = JoinedHosts(client("ann"), client("bob", send_to=()))
    hosts["b"].net.connect("ann")
    hosts.settle()
    refusal = refused(hosts, "ann")
    assert (refusal.code, refusal.host) == (ErrorCode.DENIED, "")


def test_mailbox_of_another_host_is_elsewhere() -> None:
    hosts = JoinedHosts(client("ann", home="b"), client("bob"))
    ann = hosts["a"].net.connect("ann")
    told = ann.ask("whoami")
    assert told["limits"]["home"] == "b"
    assert told["limits"]["dedup"] == 3600.0
    assert "window" not in told["limits"]
    assert ("mailboxes" in told["features"], told["host"]) == (True, "a")
    ann.op("open_mailbox", 5)
    (answer,) = ann.take()
    assert json.loads(answer.payload) == {
        "code": "elsewhere",
        "message": "the mailbox of ann is at host b: connect there",
        "name": "$broker",
        "host": "b",
        "addresses": ["b:6000"],
    }
    bob = hosts["a"].net.connect("bob")
    assert "home" not in bob.ask("whoami")["limits"]
    bob.op("open_mailbox", 6)
    assert bob.error() == (6, "unsupported")


# The operation hosts


def test_hosts_are_listed_for_administrators() -> None:
    hosts = hosts_of()
    bob, ann = hosts["a"].net.connect("bob"), hosts["a"].net.connect("ann")
    told = bob.ask("hosts")
    assert (told["host"], told["nats"]["connected"]) == ("a", True)
    assert [each["name"] for each in told["hosts"]] == ["b"]
    ann.op("hosts", 3)
    assert ann.error() == (3, "denied")


def test_hosts_of_a_broker_without_cluster_are_none() -> None:
    net = FakeNet(replace(client("bob"), admin=True))
    assert net.connect("bob").ask("hosts") == {"host": None, "hosts": []}
