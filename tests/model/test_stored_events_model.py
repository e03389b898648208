"""Events for the mailboxes of three hosts under random events: each has one outcome.

A RECEIPT says that the event is on disk in all mailboxes. A definite ERROR names those
without it. The wire loses messages, NATS goes away, and the stores answer late.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest
from support.fake_network import Peer, client
from support.joined_brokers import BrokerHost, JoinedBrokers
from support.mailbox_net import MailboxNet, with_mailbox

from brokerd.config.values import Rule
from brokerd_client.topics import matches
from brokerd_client.wire.envelope import Envelope, Kind
from brokerd_client.wire.layout import FRAME_HEAD

#: Random events per run.
STEPS = 150
#: The home of each mailbox, and the topics that it stores.
HOMES = {"abe": "a", "bob": "b", "cat": "c"}
TOPICS = {"abe": ("t.*",), "bob": ("t.*",), "cat": ("t.all",)}


class StoringHost(BrokerHost):
    """A host with a store, where only the mailboxes live whose home it is."""

    def _make_net(self, net: JoinedBrokers, name: str) -> MailboxNet:
        configs = [client("ann", connections=20)]
        for mailbox, home in HOMES.items():
            if home == name:
                box = {"subscribe": TOPICS[mailbox], "messages": 30}
                configs.append(with_mailbox(mailbox, entry={"home": home}, **box))
            else:
                patterns = tuple(map(Rule, TOPICS[mailbox]))
                configs.append(client(mailbox, home=home, home_subscribe=patterns))
        return MailboxNet(*configs, limits=net.limits)


class World:
    """Three hosts, a publisher at each, and a random hand."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.net = JoinedBrokers()
        self.net.make = StoringHost
        self.net.up(*HOMES.values())
        self.loss = 0.0
        self.net.drop = lambda origin, to, message: self.random.random() < self.loss
        self.peers: list[Peer] = []
        for host in self.hosts:
            peer = host.connect_client("ann")
            assert peer is not None
            self.peers.append(peer)
        #: By id: topic, whether a RECEIPT was asked for, the outcomes.
        self.sent: dict[int, tuple[str, bool, list[dict[str, Any]]]] = {}

    @property
    def hosts(self) -> list[StoringHost]:
        """All hosts."""
        return [host for host in self.net.hosts.values() if isinstance(host, StoringHost)]

    def step(self) -> None:
        """Do one random thing: publish, upgrade a host, let time pass and so on."""
        kind = self.random.random()
        host = self.random.choice(self.hosts)
        store = host.broker_net
        assert isinstance(store, MailboxNet)
        if kind < 0.5:
            self._publish()
        elif kind < 0.6:
            store.is_prompt = not store.is_prompt
        elif kind < 0.85:
            self.net.run(self.random.choice((0.1, 0.3, 1.0)))
        elif kind < 0.93:
            self.loss = self.random.choice((0.0, 0.05, 0.5))
        elif kind < 0.95 and host.is_online:
            store.is_prompt = True
            host.upgrade()
        elif host.is_online:
            host.disconnect()
        else:
            host.connect()
        self.look()

    def _publish(self) -> None:
        number = len(self.sent) + 1
        topic = self.random.choice(("t.all", "t.two"))
        receipt = self.random.random() < 0.7
        self.sent[number] = topic, receipt, []
        self.random.choice(self.peers).publish(topic, b"%d" % number, number, receipt=receipt)

    def look(self) -> None:
        """Enter what the publishers have heard."""
        for peer in self.peers:
            for envelope in peer.take():
                self.sent[envelope.id][2].append(_outcome(envelope))

    def heal(self) -> None:
        """Repair everything, and let all timeouts pass."""
        self.loss = 0.0
        for host in self.hosts:
            net = host.broker_net
            assert isinstance(net, MailboxNet)
            net.is_prompt = True
            if not host.is_online:
                host.connect()
        self.net.run(150.0, step=1.0)
        self.look()

    def stored(self, mailbox: str) -> Counter[int]:
        """Return how often each event is in a mailbox."""
        net = self.net.hosts[HOMES[mailbox]].broker_net  # type: ignore[attr-defined]
        box = net.store.disk.get(mailbox)
        frames = () if box is None else (row.frame for row in box.rows.values())
        return Counter(int(FRAME_HEAD.unpack_from(frame)[-1]) for frame in frames)

    def check(self) -> None:
        """Check each event against what is on disk."""
        stored = {mailbox: self.stored(mailbox) for mailbox in HOMES}
        for number, (topic, receipt, outcomes) in self.sent.items():
            story = f"{number} on {topic}: {outcomes}"
            assert len(outcomes) == 1 or not (receipt or outcomes), story
            code = outcomes[0]["code"] if outcomes else "receipt"
            missing = outcomes[0].get("names", []) if outcomes else []
            for mailbox, patterns in TOPICS.items():
                count = stored[mailbox][number]
                if not any(matches(pattern, topic) for pattern in patterns):
                    assert count == 0, story
                elif code == "in_doubt":
                    assert count <= 1, story
                else:
                    assert count == (mailbox not in missing), f"{story} {mailbox}"


def _outcome(envelope: Envelope) -> dict[str, Any]:
    if envelope.kind is Kind.RECEIPT:
        return {"code": "receipt"}
    outcome: dict[str, Any] = json.loads(envelope.payload)
    return outcome


@pytest.mark.parametrize("seed", range(16))
def test_stored_events_under_random_events_have_one_outcome_each(seed: int) -> None:
    """And each is stored where its outcome says so, once."""
    world = World(seed)
    for _ in range(STEPS):
        world.step()
    world.heal()
    world.check()
