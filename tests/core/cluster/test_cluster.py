"""Hosts meet, announce names, leave, and don't share a name."""

from __future__ import annotations

from typing import Any

from support.cluster_net import WALL, ClusterNet, Host, message

from brokerd.core.cluster.hub import HostEvent
from brokerd.core.cluster.messages import encode_json, pack
from brokerd.core.cluster.seam import Interest, Name


def events_of(host: Host) -> list[str]:
    """Remove and return the names of a host's log events."""
    names = [event.event for event in host.cluster.events]
    host.cluster.events.clear()
    return names


def test_hosts_meet_and_pass_on_what_they_announce() -> None:
    net = ClusterNet()
    a = net.start("a")
    a.announce("alice")
    a.subscribe("orders.>", "workers")
    net.run(1.0)
    b = net.start("b")
    b.announce("bob")
    net.run(1.0)
    assert a.remotes.calls == [("up", "b")]
    assert b.remotes.names["a"]["alice"].connections == 1
    assert a.remotes.names["b"]["bob"].connections == 1
    assert b.remotes.interests["a"] == {
        ("orders.>", "workers"): Interest("orders.>", "workers", True)
    }
    a.announce("alice", 0)
    a.announce("carol", 2, free=False)
    a.subscribe("orders.>", "workers", on=False)
    net.settle()
    assert set(b.remotes.names["a"]) == {"carol"}
    assert b.remotes.interests["a"] == {}
    assert events_of(a) == ["cluster.joined", "cluster.host_found"]


def test_hosts_meet_within_the_time_of_joining() -> None:
    net = ClusterNet()
    a = net.start("a")
    net.run(1.0)
    b = net.start("b")
    net.run(0.3)
    assert a.state_of("b") == b.state_of("a") == "up"


def test_lost_change_is_repaired_by_the_next_hello() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    net.drop = lambda origin, to, message: message.kind == "changes"
    a.announce("alice")
    net.settle()
    net.drop = lambda origin, to, message: False
    net.run(1.5)
    assert set(b.remotes.names["a"]) == {"alice"}


def test_lost_change_is_repaired_by_the_next_change() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    net.drop = lambda origin, to, message: message.kind == "changes"
    a.announce("alice")
    net.settle()
    net.drop = lambda origin, to, message: False
    a.announce("anna")
    net.settle()
    assert set(b.remotes.names["a"]) == {"alice", "anna"}


def test_lost_state_is_asked_for_again() -> None:
    net = ClusterNet()
    net.drop = lambda origin, to, message: message.kind == "state"
    a, b = net.start("a"), net.start("b")
    net.run(3.0)
    assert a.state_of("b") == "joining"
    net.drop = lambda origin, to, message: False
    net.run(1.5)
    assert a.state_of("b") == b.state_of("a") == "up"


def test_host_that_stops_says_so() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.cluster.leave(net.now, net.now_wall)
    net.settle()
    assert b.remotes.calls[-1] == ("down", "a", "its broker has stopped")
    assert b.cluster.hosts(net.now) == []


def test_restarted_host_is_recognised_at_once() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    b.remotes.blocks = True
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    b = net.start("b")
    net.run(0.5)
    assert a.remotes.outcomes[1] == ["in_doubt"]
    assert [call[:2] for call in a.remotes.calls] == [("up", "b"), ("down", "b"), ("up", "b")]
    a.remotes.send("b", "bob", message("alice", 2))
    net.settle()
    assert a.remotes.outcomes[2] == ["receipt"]
    assert b.remotes.delivered == [("bob", "alice", 2)]


def test_message_of_an_earlier_boot_is_dropped() -> None:
    """It was under way while both brokers were started again."""
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.remotes.send("b", "bob", message("alice", 1))
    net.publish(a)
    late = [each for each in b.inbox if each[1] == "data"]
    hello = ("a", "hello", pack(1, 0, encode_json(a.cluster._facts())))
    b = net.start("b")
    net.run(1.0)
    b.inbox.extend(late)
    net.settle()
    a = net.start("a")
    net.run(1.0)
    b.inbox.append(hello)
    b.inbox.extend(late)
    net.settle()
    assert not b.remotes.delivered
    assert b.state_of("a") == "up"
    assert b.cluster.hosts(net.now)[0]["boot_id"] == a.cluster.settings.boot_id


def test_earlier_boot_is_accepted_when_the_later_one_is_silent() -> None:
    """A clock that was set back does not keep a restarted host out."""
    net = ClusterNet()
    a, b = net.up("a", "b")
    del net.hosts["b"]
    net.run(7.0)
    b = net.start("b", started_at=WALL - 1000)
    net.run(1.0)
    assert a.state_of("b") == b.state_of("a") == "up"


def test_broker_with_name_of_another_does_not_join() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    net.hosts["the other a"] = other = Host(net, "a", 77)
    other.connect()
    net.run(1.0)
    assert "another broker is host a" in other.cluster.conflict
    assert not other.cluster.has_joined
    assert events_of(other) == ["cluster.refused_to_join"]
    assert a.state_of("b") == b.state_of("a") == "up"
    assert b.cluster.hosts(net.now)[0]["boot_id"] == a.cluster.settings.boot_id
    net.run(3.0)
    assert not events_of(other)
    assert a.cluster.conflict == ""
    del net.hosts["a"]
    net.run(8.0)
    assert other.cluster.conflict == ""
    assert other.state_of("b") == "up"


def test_earlier_of_two_brokers_with_one_name_leaves_after_a_partition() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.disconnect()
    net.hosts["the other a"] = other = Host(net, "a", 77)
    other.connect()
    net.run(1.0)
    assert other.state_of("b") == "up"
    a.connect()
    net.run(2.0)
    assert a.cluster.conflict
    assert not other.cluster.conflict
    assert a.remotes.up == set()
    assert b.cluster.hosts(net.now)[0]["boot_id"] == other.cluster.settings.boot_id


def test_host_that_does_not_join_ignores_the_others() -> None:
    net = ClusterNet()
    net.up("a", "b")
    net.hosts["the other a"] = other = Host(net, "a", 77)
    other.connect()
    net.run(1.0)
    net.start("c")
    net.run(1.0)
    assert other.cluster.hosts(net.now) == []


def test_json_object_is_told_to_the_other_broker() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.cluster.tell("b", {"op": "check"})
    a.cluster.tell("nowhere", {"op": "check"})
    net.settle()
    assert b.remotes.calls[-1] == ("told", "a", {"op": "check"})


def test_message_that_can_not_be_read_is_logged_once() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    events_of(b)
    for _ in range(3):
        b.cluster.receive("a", "data", b"\xff" + bytes(20), net.now, net.now_wall)
    assert b.cluster.events == [
        HostEvent(
            "warning",
            "cluster.malformed",
            {
                "host": "a",
                "kind": "data",
                "reason": "it has version 255 of the format between hosts, not 3",
            },
        )
    ]
    assert b.state_of("a") == a.state_of("b") == "up"


def test_message_of_a_foreign_program_is_ignored() -> None:
    net = ClusterNet()
    _, b = net.up("a", "b")
    events_of(b)
    boot = int(b.cluster.settings.boot_id, 16)

    def receive(origin: str, kind: str, boot_id: int, body: dict[str, Any]) -> None:
        payload = pack(boot_id, boot, encode_json(body))
        b.cluster.receive(origin, kind, payload, net.now, net.now_wall)

    receive("Not-A-Host", "hello", 5, {})
    receive("a", "unheard_of", 1, {})
    receive("nowhere", "data", 5, {})
    receive("a", "tell", 99, {"op": "check"})
    receive("b", "tell", 99, {"op": "check"})
    receive("b", "hello", boot, {})
    assert not b.cluster.events
    receive("c", "hello", 5, {})
    receive("c", "hello", 5, {"boot_id": 5})
    facts = {"boot_id": "6", "started_at": 1, "version": "", "digest": "", "addresses": []}
    facts["dedup"] = 0
    receive("c", "hello", 5, {**facts, "number": 0})
    assert [event.fields["reason"] for event in b.cluster.events][2] == "its boot ids differ"
    assert [each["host"] for each in b.cluster.hosts(net.now)] == ["a"]


def test_settings_change_while_hosts_are_connected() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    for host in (a, b):
        host.cluster.reconfigure(host.cluster.settings._replace(remote_timeout=1.0, digest="e"))
    net.run(1.0)
    assert a.cluster.hosts(net.now)[0]["digest"] == "e"
    b.is_frozen = True
    net.run(1.5)
    assert a.state_of("b") == "away"


def test_names_of_host_that_went_away_and_came_back_are_complete() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.announce("alice")
    a.announce("anna")
    net.settle()
    a.disconnect()
    net.run(7.0)
    assert not b.remotes.names["a"]
    a.announce("alice", 0)
    a.announce("adam")
    net.run(1.0)
    a.connect()
    net.run(2.0)
    assert b.remotes.names["a"] == {
        name: Name(name, 1, each.since) for name, each in b.remotes.names["a"].items()
    }
    assert set(b.remotes.names["a"]) == {"anna", "adam"}


def test_cluster_has_no_deadline_before_nats() -> None:
    net = ClusterNet()
    a = net.start("a", is_online=False)
    assert a.cluster.next_deadline is None
    a.cluster.tick(net.now, net.now_wall)
    a.cluster.reconfigure(a.cluster.settings)
    a.cluster.touch("b")
    assert a.cluster.has_outgoing
    assert a.cluster.take_outgoing(net.now) == []
    a.connect()
    a.cluster.tick(net.now, net.now_wall)
    net.run(0.1)
    assert not a.cluster.has_joined
    net.run(0.2)
    assert a.cluster.has_joined
    a.cluster.tick(net.now, net.now_wall)


def test_hosts_beyond_the_limit_are_ignored_and_logged_once() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b", hosts=1)
    events_of(a)
    net.start("c")
    net.run(3.0)
    assert [each["host"] for each in a.cluster.hosts(net.now)] == ["b"]
    assert events_of(a) == ["cluster.too_many_hosts"]
    net.start("b")
    net.run(1.0)
    assert a.state_of("b") == "up"
    assert b.name == "b"


def test_state_holds_what_was_not_told_yet() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    boot = int(b.cluster.settings.boot_id, 16)
    a.announce("alice")
    message = pack(boot, int(a.cluster.settings.boot_id, 16), ())
    a.cluster.receive("b", "ask", message, net.now, net.now_wall)
    net.settle()
    assert set(b.remotes.names["a"]) == {"alice"}
    assert b.remotes.up == {"a"}


def test_boot_id_of_an_earlier_process_is_taken_over_before_joining() -> None:
    net = ClusterNet()
    a, b = net.up("a", "b")
    a.cluster.leave(net.now, net.now_wall)
    net.settle()
    boot_id = a.cluster.settings.boot_id
    a = net.start("a", is_online=False)
    a.cluster.reconfigure(a.cluster.settings._replace(boot_id=boot_id))
    a.connect()
    net.run(1.0)
    assert b.cluster.hosts(net.now)[0]["boot_id"] == boot_id
    a.remotes.send("b", "bob", message("alice", 1))
    net.settle()
    assert a.remotes.outcomes[1] == ["receipt"]


def test_time_that_keys_are_remembered_is_the_least_of_all_stores() -> None:
    net = ClusterNet()
    a = net.start("a")
    assert a.cluster.dedup == 0
    net.start("b", dedup=3600.0)
    net.start("c", dedup=600.0)
    net.run(1.0)
    assert a.cluster.dedup == 600


def test_frames_for_a_host_that_has_not_joined_are_left() -> None:
    """It knows the other host, which does not send any before they have met."""
    net = ClusterNet()
    net.up("a")
    newcomer = net.start("b")
    net.settle()
    link = newcomer.cluster.links["a"]
    newcomer.cluster.receive("a", "data", link.head + b"not read", net.now, net.now_wall)
    assert newcomer.cluster.events == []
    net.run(1.0)
    assert newcomer.state_of("a") == "up"


def test_batch_of_a_host_that_is_lost_ends_unnoticed() -> None:
    net = ClusterNet()
    a = net.start("a")
    net.run(1.0)
    a.cluster.done("b", 1)
    a.cluster.forget("b", 1)
    assert a.cluster.links == {}
