"""Brokers of a cluster under random events: every id has one outcome, whatever is lost.

Three hosts with the real core and the real links; the wire loses messages, hosts freeze,
die and come back, and NATS goes away. The accounts are kept from outside, as a client
could keep them.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import pytest
from support.fake_network import Peer, client
from support.joined_brokers import BrokerHost, JoinedBrokers

from brokerd.core.broker import CoreLimits
from brokerd_client.wire.envelope import BROKER, Envelope, Kind

#: Random events per run.
STEPS = 250
NAMES = ("ann", "bob", "cat", "pool")
HOSTS = ("a", "b", "c")
#: Outcomes that say that the frame was not and will not be delivered.
DEFINITE = {"offline", "full", "denied", "no_such_client", "shutting_down", "too_large"}


class Sent:
    """One frame with an id, and what became of it.

    Attributes:
        outcomes: What its sender has heard.
        deliveries: How often it arrived.
        is_answered: Whether its recipient has sent a REPLY.
    """

    def __init__(self, sender: Peer, kind: Kind, to: str, receipt: bool) -> None:
        self.sender = sender
        self.kind = kind
        self.to = to
        self.receipt = receipt
        self.outcomes: list[str] = []
        self.deliveries: list[Peer] = []
        self.is_answered = False


class Accounts:
    """What each client has sent and heard."""

    def __init__(self) -> None:
        self.sent: dict[int, Sent] = {}
        #: The last message that arrived, by its sender's and its recipient's connection.
        self.last: defaultdict[tuple[Peer, Peer], int] = defaultdict(int)
        self._ids = 0

    def send(self, peer: Peer, kind: Kind, to: str, *, receipt: bool) -> None:
        """Send one frame."""
        self._ids += 1
        self.sent[self._ids] = Sent(peer, kind, to, receipt)
        payload = b"%d" % self._ids
        if kind is Kind.MESSAGE:
            peer.message(to, payload, self._ids, receipt=receipt)
        else:
            peer.request(to, payload, self._ids, receipt=receipt)

    def hear(self, peer: Peer, envelope: Envelope, owed: list[tuple[Peer, str, int]]) -> None:
        """Enter one frame that a client has received; add a request to ``owed``."""
        if envelope.name == BROKER:
            self._hear_outcome(peer, envelope)
        elif envelope.kind is Kind.REPLY:
            sent = self.sent[envelope.id]
            assert sent.sender is peer
            sent.outcomes.append("reply")
        elif envelope.kind in (Kind.MESSAGE, Kind.REQUEST):
            assert envelope.payload == b"%d" % envelope.id
            sent = self.sent[envelope.id]
            sent.deliveries.append(peer)
            assert len(sent.deliveries) == 1, f"{envelope.id} was delivered twice"
            if envelope.kind is Kind.MESSAGE and sent.to != "pool":
                # What a member has not received may be passed on to another one, later.
                key = sent.sender, peer
                assert self.last[key] < envelope.id, f"{envelope.id} came out of order"
                self.last[key] = envelope.id
            elif envelope.kind is Kind.REQUEST:
                owed.append((peer, envelope.name, envelope.id))

    def _hear_outcome(self, peer: Peer, envelope: Envelope) -> None:
        outcome = "receipt"
        if envelope.kind is Kind.ERROR:
            outcome = json.loads(envelope.payload)["code"]
        sent = self.sent.get(envelope.id)
        assert sent is not None, envelope
        if sent.sender is not peer:
            # To an answer: its responder learns that nobody waits for it.
            assert peer in sent.deliveries, (peer, envelope, outcome)
            return
        sent.outcomes.append(outcome)

    def check(self, message_id: int, sent: Sent, *, at_end: bool) -> None:
        """Check what a client has heard of one frame."""
        story = f"{message_id} {sent.kind.name} to {sent.to}: {sent.outcomes}"
        final = [each for each in sent.outcomes if each != "receipt"]
        assert sent.outcomes.count("receipt") <= 1, story
        assert len(final) <= 1, story
        if "receipt" in sent.outcomes:
            assert sent.receipt, story
            # A RECEIPT that was lost is repeated, perhaps after the REPLY.
            assert sent.outcomes[0] == "receipt" or "reply" in final, story
            assert "in_doubt" not in final or sent.kind is Kind.REQUEST, story
        if at_end and not sent.sender.gone:
            assert sent.outcomes or not sent.receipt, story
            assert final or sent.kind is not Kind.REQUEST, story
        if sent.is_answered:
            # A requester hears that the answer was refused.
            return
        if DEFINITE.intersection(final) and "receipt" not in sent.outcomes:
            assert not sent.deliveries, f"{story}, and it was delivered"


class World:
    """Hosts, their clients, and a random hand."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.net = JoinedBrokers(
            client("ann"),
            client("bob", queue=300),
            client("cat"),
            client("pool", connections=6, in_flight=2),
            limits=CoreLimits(wait_timeout=4.0),
        )
        self.accounts = Accounts()
        self.owed: list[tuple[Peer, str, int]] = []
        self.net.up(*HOSTS)
        self.loss = 0.0
        self.net.drop = lambda origin, to, message: self.random.random() < self.loss

    @property
    def running(self) -> list[BrokerHost]:
        """The hosts that are not frozen."""
        hosts = [host for host in self.net.hosts.values() if not host.is_frozen]
        assert all(isinstance(host, BrokerHost) for host in hosts)
        return hosts  # type: ignore[return-value]

    def peers(self, *, running: bool = True) -> list[Peer]:
        """Return all connections."""
        hosts: Any = self.running if running else self.net.hosts.values()
        return [peer for host in hosts for peer in host.broker_net.peers]

    def step(self) -> None:
        """Let one thing happen."""
        choice = self.random.choice
        kind = self.random.random()
        peers = self.peers()
        host = choice(self.running) if self.running else None
        if kind < 0.45 and peers:
            self._send(choice(peers))
        elif kind < 0.6 and self.owed:
            self._answer()
        elif kind < 0.66 and peers:
            peer = choice(peers)
            if peer.room is None:
                peer.block(self.random.randrange(100))
            else:
                peer.read()
        elif kind < 0.72 and host is not None:
            self._connect(host)
        elif kind < 0.75 and peers:
            self._end(choice(peers))
        elif kind < 0.9:
            self.net.run(self.random.choice((0.1, 0.1, 0.3, 1.0)))
        elif kind < 0.93:
            self.loss = choice((0.0, 0.0, 0.05, 0.5))
        elif host is not None:
            self._break(host)
        if self.random.random() < 0.5:
            self.net.settle()
        self.look()

    def _send(self, peer: Peer) -> None:
        there = [each for each in self.peers(running=False) if "/" in each.address]
        to = self.random.choice([name for name in NAMES if name != peer.name])
        if there and self.random.random() < 0.2:
            to = self.random.choice(there).address
            if to == peer.address:
                return
        kind = self.random.choice((Kind.MESSAGE, Kind.MESSAGE, Kind.REQUEST))
        for _ in range(self.random.choice((1, 1, 5))):
            self.accounts.send(peer, kind, to, receipt=self.random.random() < 0.6)

    def _answer(self) -> None:
        peer, to, message_id = self.owed.pop(self.random.randrange(len(self.owed)))
        if not peer.gone and peer not in self.peers():
            # Its host is frozen.
            self.owed.append((peer, to, message_id))
        elif not peer.gone:
            self.accounts.sent[message_id].is_answered = True
            peer.reply(to, b"", message_id)

    def _connect(self, host: BrokerHost) -> None:
        name = self.random.choice(NAMES)
        if name != "pool" and any(peer.name == name for peer in self.peers(running=False)):
            # The admission of a name over all hosts is not a part of this.
            return
        host.connect_client(name)

    def _end(self, peer: Peer) -> None:
        peer.leave()
        self.look()

    def _break(self, host: BrokerHost) -> None:
        kind = self.random.random()
        if kind < 0.4:
            if host.is_online:
                host.disconnect()
            else:
                host.connect()
        elif kind < 0.7:
            host.is_frozen = True
        elif kind < 0.75:
            self.look()
            is_online = host.is_online
            host.hold()
            if self.random.random() < 0.8:
                # The upgrade may fail.
                host.hand_over()
            if is_online:
                host.connect()
            else:
                host.disconnect()
        elif kind < 0.85:
            self.look()
            for peer in list(host.broker_net.peers):
                peer.gone = "its host has died"
            self.net.start(host.name)
        for frozen in self.net.hosts.values():
            if frozen.is_frozen and self.random.random() < 0.5:
                frozen.is_frozen = False

    def look(self) -> None:
        """Enter what the clients have received."""
        for peer in self.peers(running=False):
            for envelope in peer.take():
                self.accounts.hear(peer, envelope, self.owed)

    def heal(self) -> None:
        """Repair everything, answer everything, and let all timeouts pass."""
        self.loss = 0.0
        for host in self.net.hosts.values():
            host.is_frozen = False
            if not host.is_online:
                host.connect()
        for peer in self.peers():
            peer.read()
        for _ in range(40):
            self.net.run(1.5, step=0.5)
            self.look()
            while self.owed:
                self._answer()
        self.net.run(140.0, step=1.0)
        self.look()


@pytest.mark.parametrize("seed", range(24))
def test_cluster_under_random_events_gives_each_id_one_outcome(seed: int) -> None:
    """And it repeats, reorders and resurrects no message."""
    world = World(seed)
    for _ in range(STEPS):
        world.step()
        for message_id, sent in world.accounts.sent.items():
            if sent.outcomes:
                world.accounts.check(message_id, sent, at_end=False)
    world.heal()
    for message_id, sent in world.accounts.sent.items():
        world.accounts.check(message_id, sent, at_end=True)
