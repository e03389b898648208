"""The rules of delivery over every level: one scenario, four networks.

Several levels test the same rules. :data:`RULES` says which of them is the authority,
where the corner cases of a rule are tested; here each rule is shown once on the core,
on bare sockets and on both faces of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from support.conformance.network import ACCEPTED, LEVELS, MAX_MESSAGE, Clients, Network

TESTS: Final = Path(__file__).resolve().parents[1]

Make = Callable[[Clients], Network]
Scenario = Callable[[Make], None]


class Rule(NamedTuple):
    """A rule that more than one level tests.

    Attributes:
        scenario: Shows the rule.
        authority: The file below tests/ with its corner cases.
        source: The place in docs/protocol.md that states it.
    """

    scenario: Scenario
    authority: str
    source: str


def delivered(network: Make) -> None:
    """A message arrives with its payload and its sender's name, in the order sent."""
    net = network({"alice": {}, "bob": {}})
    alice, bob = net.join("alice"), net.join("bob")
    for number in range(5):
        assert alice.send("bob", bytes([number])) == ACCEPTED
    assert [bob.receive() for _ in range(5)] == [("alice", bytes([n])) for n in range(5)]


def delivered_to_sender_itself(network: Make) -> None:
    """A client may send to its own name."""
    alice = network({"alice": {}}).join("alice")
    assert alice.send("alice", b"x") == ACCEPTED
    assert alice.receive() == ("alice", b"x")


def refused_offline(network: Make) -> None:
    """A message to a client that is not connected is `offline`."""
    alice = network({"alice": {}, "bob": {}}).join("alice")
    assert alice.send("bob") == "offline"
    assert alice.request("bob")() == ("error", "offline")


def refused_no_such_client(network: Make) -> None:
    """A message to a name that is not configured is `no_such_client`."""
    assert network({"alice": {}}).join("alice").send("nobody") == "no_such_client"


def refused_denied(network: Make) -> None:
    """A message that `send_to` does not allow is `denied`, whether the name exists or
    not.
    """
    net = network({"alice": {"send_to": ["carol"]}, "bob": {}, "carol": {}})
    alice, _ = net.join("alice"), net.join("bob")
    assert (alice.send("bob"), alice.send("nobody")) == ("denied", "denied")


def refused_too_large(network: Make) -> None:
    """A payload of `max_message` bytes is accepted; one byte more is `too_large`."""
    net = network({"alice": {}, "bob": {}})
    alice, bob = net.join("alice"), net.join("bob")
    assert alice.send("bob", bytes(MAX_MESSAGE)) == ACCEPTED
    assert alice.send("bob", bytes(MAX_MESSAGE + 1)) == "too_large"
    assert alice.send("bob", b"after") == ACCEPTED
    assert [len(bob.receive().payload) for _ in range(2)] == [MAX_MESSAGE, 5]


def refused_expired(network: Make) -> None:
    """A message whose `ttl` is over is `expired`; within its `ttl` it is delivered."""
    net = network({"alice": {}, "bob": {}})
    alice, bob = net.join("alice"), net.join("bob")
    assert alice.send("bob", b"late", ttl=0) == "expired"
    assert alice.send("bob", b"in time", ttl=60) == ACCEPTED
    assert bob.receive().payload == b"in time"


def request_replied(network: Make) -> None:
    """A reply reaches the client that sent the request, and no other client."""
    net = network({"alice": {}, "bob": {}, "carol": {}})
    alice, bob, carol = net.join("alice"), net.join("bob"), net.join("carol")
    outcome = alice.request("bob", b"question")
    assert bob.receive() == ("alice", b"question")
    bob.reply(b"answer")
    assert outcome() == ("reply", b"answer")
    assert alice.send("carol", b"next") == ACCEPTED
    assert carol.receive() == ("alice", b"next")


def request_abandoned(network: Make) -> None:
    """A request that its recipient received before it disconnected is `abandoned`."""
    net = network({"alice": {}, "bob": {}})
    alice, bob = net.join("alice"), net.join("bob")
    outcome = alice.request("bob", b"question")
    assert bob.receive() == ("alice", b"question")
    bob.leave()
    assert outcome() == ("error", "abandoned")


def events_published(network: Make) -> None:
    """An event reaches every subscriber of its topic, with its publisher's name."""
    net = network({"alice": {}, "bob": {}, "carol": {}})
    alice, bob, carol = net.join("alice"), net.join("bob"), net.join("carol")
    assert bob.subscribe("jobs.>") == carol.subscribe("jobs.*.done") == ACCEPTED
    assert alice.publish("jobs.1.begun", b"a") == ACCEPTED
    assert alice.publish("jobs.1.done", b"b") == ACCEPTED
    assert [bob.event() for _ in range(2)] == [
        ("jobs.1.begun", "alice", b"a"),
        ("jobs.1.done", "alice", b"b"),
    ]
    assert carol.event() == ("jobs.1.done", "alice", b"b")


def events_denied(network: Make) -> None:
    """Topics that `publish` or `subscribe` do not allow are `denied`."""
    net = network({"alice": {"publish": ["ok.>"], "subscribe": ["ok.>"]}})
    alice = net.join("alice")
    assert (alice.publish("ok.1"), alice.publish("no.1")) == (ACCEPTED, "denied")
    assert (alice.subscribe("ok.*"), alice.subscribe("no.*")) == (ACCEPTED, "denied")


def presence_told(network: Make) -> None:
    """A watcher gets an event, in order, for each client that connects or leaves."""
    net = network({"alice": {}, "bob": {}})
    alice = net.join("alice")
    alice.watch()
    bob = net.join("bob")
    assert alice.presence() == ("bob", True)
    bob.leave()
    assert alice.presence() == ("bob", False)


RULES: Final = (
    Rule(delivered, "core/test_broker.py", "Order and outcome"),
    Rule(delivered_to_sender_itself, "core/test_broker.py", "Order and outcome"),
    Rule(refused_offline, "core/test_broker.py", "Order and outcome"),
    Rule(refused_no_such_client, "core/test_broker.py", "Order and outcome"),
    Rule(refused_denied, "core/test_broker.py", "Order and outcome"),
    Rule(refused_too_large, "net/test_messages.py", "Order and outcome"),
    Rule(refused_expired, "core/test_broker.py", "Order and outcome"),
    Rule(request_replied, "core/test_broker.py", "Order and outcome"),
    Rule(request_abandoned, "core/test_outcomes.py", "Order and outcome"),
    Rule(events_published, "core/test_topics.py", "Topics"),
    Rule(events_denied, "core/test_broker.py", "Topics"),
    Rule(presence_told, "core/test_broker.py", "Topics"),
)


@pytest.fixture(params=sorted(LEVELS))
def network(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a network at one level; it ends with the test."""
    open_networks: list[Any] = []

    def make(clients: Clients) -> Network:
        context = LEVELS[request.param](clients)
        open_networks.append(context)
        made: Network = context.__enter__()
        return made

    yield make
    for context in open_networks:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.scenario.__name__)
def test_rule_at_every_level_has_same_outcome(network: Make, rule: Rule) -> None:
    """Each rule's scenario has the same outcome at each level."""
    rule.scenario(network)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.scenario.__name__)
def test_rule_authority_and_source_exist(rule: Rule) -> None:
    """The file with the corner cases exists, and docs/protocol.md has the section."""
    page = (TESTS.parent / "docs" / "protocol.md").read_text(encoding="utf-8")

    assert (TESTS / rule.authority).is_file()
    assert any(line.startswith("#") and rule.source in line for line in page.splitlines()), (
        rule.source
    )
