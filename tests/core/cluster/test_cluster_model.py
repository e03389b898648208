"""A wire that loses messages, cuts and freezes hosts: each id has one outcome."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from support.cluster_net import ClusterNet, Host, message

from brokerd.core.cluster.hub import Outgoing


class Story:
    """Random work of three hosts under random faults."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.net = ClusterNet()
        self.net.drop = self._drops
        self.loss = 0.0
        self.cut: set[tuple[str, str]] = set()
        self.senders: dict[int, Host] = {}
        self.receipted: set[int] = set()
        self.everyone: list[Host] = []
        self.next_id = 1
        for name in "abc":
            self.start(name)

    def start(self, name: str) -> None:
        self.everyone.append(self.net.start(name))

    def _drops(self, origin: str, to: str, message: Outgoing) -> bool:
        return (origin, to) in self.cut or self.random.random() < self.loss

    def send(self) -> None:
        host = self.random.choice(list(self.net.hosts.values()))
        if host.is_frozen:
            return
        to = self.random.choice([name for name in "abc" if name != host.name])
        frames = b""
        for _ in range(self.random.randint(1, 4)):
            size = self.random.choice((5, 5, 5, 3000))
            receipt = self.random.random() < 0.7
            frames += message(f"client-of-{host.name}", self.next_id, size=size, receipt=receipt)
            self.senders[self.next_id] = host
            if receipt:
                self.receipted.add(self.next_id)
            self.next_id += 1
        host.remotes.send(to, f"client-of-{to}", frames)

    def disturb(self) -> None:
        chance = self.random
        host = chance.choice(list(self.net.hosts.values()))
        match chance.randrange(14):
            case 0:
                self.loss = chance.choice((0.0, 0.05, 0.3))
            case 1:
                self.cut.add((chance.choice("abc"), chance.choice("abc")))
            case 2 | 3:
                self.cut.clear()
            case 4 if host.is_online and not host.is_frozen:
                host.disconnect()
            case 5 | 6 if not host.is_online and not host.is_frozen:
                host.connect()
            case 7:
                host.is_frozen = True
            case 8 | 9:
                host.is_frozen = False
            case 10 if not host.is_frozen:
                host.remotes.blocks = True
            case 11 | 12 if not host.is_frozen:
                host.remotes.unblock()
            case 13 if chance.random() < 0.2 and not host.is_frozen:
                self.start(host.name)

    def tell(self, steps: int) -> None:
        self.net.run(1.0)
        for _ in range(steps):
            for _ in range(self.random.randint(0, 5)):
                self.send()
            if self.random.random() < 0.2:
                self.disturb()
            self.net.run(self.random.choice((0.0, 0.05, 0.2, 1.0)), 0.05)
        self.end()

    def end(self) -> None:
        """Repair everything, and wait until all is quiet."""
        self.loss = 0.0
        self.cut.clear()
        for host in self.net.hosts.values():
            host.is_frozen = False
            if not host.is_online:
                host.connect()
        self.net.run(1.0)
        for host in self.net.hosts.values():
            host.remotes.unblock()
        self.net.run(12.0)


@pytest.mark.parametrize("seed", range(20))
def test_cluster_under_faults_gives_each_id_one_outcome(seed: int) -> None:
    """No frame is repeated, reordered, or delivered after a definite refusal."""
    story = Story(seed)
    story.tell(60)

    for host in story.net.hosts.values():
        for other in story.net.hosts:
            assert host.name == other or host.state_of(other) == "up"
    delivered = [each for host in story.everyone for each in host.remotes.delivered]
    times = Counter(message_id for _, _, message_id in delivered)
    assert max(times.values(), default=0) <= 1
    for host in story.everyone:
        order = defaultdict(list)
        for target, sender, message_id in host.remotes.delivered:
            order[target, sender].append(message_id)
        assert all(ids == sorted(ids) for ids in order.values())
    for message_id, host in story.senders.items():
        if story.net.hosts[host.name] is not host:
            continue  # its own broker was restarted
        outcomes = host.remotes.outcomes[message_id]
        if not outcomes and message_id not in story.receipted:
            outcomes = ["receipt"]
        assert len(outcomes) == 1, (message_id, outcomes)
        if outcomes == ["receipt"]:
            assert times[message_id] == 1
        elif outcomes == ["offline"]:
            assert times[message_id] == 0
        else:
            assert outcomes == ["in_doubt"]
