"""Clusters on a simulated wire, with remote sessions that only count."""

from __future__ import annotations

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from brokerd.core.cluster.cluster import ALL, Cluster, ClusterSettings
from brokerd.core.cluster.hub import Outgoing
from brokerd.core.cluster.messages import frames_of
from brokerd.core.cluster.seam import HostFacts, Interest, Name, Run
from brokerd_client.wire.envelope import (
    BROKER,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
    parse,
)
from brokerd_client.wire.framing import frame
from brokerd_client.wire.layout import RECEIPT_FLAG

__all__ = ["ClusterNet", "FakeRemotes", "Host", "message"]

#: The wall clock when the event loop's clock shows 0.
WALL: Final = 1_700_000_000.0


def message(sender: str, message_id: int, *, size: int = 5, receipt: bool = True) -> bytes:
    """Return a MESSAGE as its recipient gets it."""
    flags = RECEIPT_FLAG if receipt else 0
    return frame(encode(Envelope(Kind.MESSAGE, message_id, sender, b"x" * size, flags=flags)))


def _outcome(kind: Kind, message_id: int, payload: bytes = b"") -> bytes:
    return frame(encode(Envelope(kind, message_id, BROKER, payload)))


class FakeRemotes:
    """Remote sessions that keep accounts.

    Attributes:
        outcomes: By the id of a message that was sent here, what was reported about it.
        delivered: The messages received here: target, sender, id.
        blocks: Whether frames wait instead of being accepted.
        refuses: Whether frames are refused with ``denied``.
        calls: Hosts that came and went, and what they told.
        names, interests: By host, what it has announced.
    """

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.queues: defaultdict[str, deque[Run]] = defaultdict(deque)
        self.outcomes: defaultdict[int, list[str]] = defaultdict(list)
        self.delivered: list[tuple[str, str, int]] = []
        self.blocks = self.refuses = False
        self.calls: list[tuple[Any, ...]] = []
        self.names: defaultdict[str, dict[str, Name]] = defaultdict(dict)
        self.interests: defaultdict[str, dict[tuple[str, str], Interest]] = defaultdict(dict)
        self.own: dict[str, Name] = {}
        self.own_patterns: dict[tuple[str, str], Interest] = {}
        self.up: set[str] = set()
        self.is_suspended = True
        self.ready: defaultdict[str, list[Run]] = defaultdict(list)
        self.waiting: dict[tuple[str, int], list[tuple[str, bytes]]] = {}
        self.on_take: Callable[[str], None] = lambda host: None

    # A client here

    def send(self, host: str, target: str, frames: bytes, *, ttl_ms: int = 0) -> None:
        """Send frames to a client of another host."""
        run = Run(target, frames, ttl_ms)
        if host not in self.up or self.is_suspended:
            self._refuse(run)
            return
        self.queues[host].append(run)
        assert self.cluster is not None
        self.cluster.touch(host)

    def _refuse(self, run: Run) -> None:
        for each in frames_of(run):
            self._note(parse(each[4:]).id, "offline")

    def _note(self, message_id: int, outcome: str) -> None:
        self.outcomes[message_id].append(outcome)

    # Called by the cluster

    def take_frames(self, host: str, room: int) -> list[Run]:
        self.on_take(host)
        queue, taken, runs = self.queues[host], 0, []
        while queue and taken < room:
            runs.append(queue.popleft())
            taken += len(runs[-1].frames)
        return runs

    def conclude(self, host: str, runs: Sequence[Run], now: float) -> None:
        for run in runs:
            for each in frames_of(run):
                envelope = parse(each[4:])
                is_error = envelope.kind is Kind.ERROR
                code = json.loads(envelope.payload)["code"] if is_error else "receipt"
                self._note(envelope.id, code)

    def fail(
        self, host: str, target: str, frame: memoryview, code: ErrorCode, reason: str, now: float
    ) -> None:
        assert reason
        self._note(parse(frame[4:]).id, code)

    def deliver(self, host: str, batch: int, runs: Sequence[Run], now: float) -> None:
        frames = [(run.target, bytes(each)) for run in runs for each in frames_of(run)]
        if self.blocks:
            self.waiting[host, batch] = frames
        else:
            self._take(host, batch, frames)

    def _take(self, host: str, batch: int, frames: list[tuple[str, bytes]]) -> None:
        for target, each in frames:
            envelope = parse(each[4:])
            if self.refuses:
                self._answer(host, envelope, ErrorCode.DENIED)
                continue
            self.delivered.append((target, envelope.name, envelope.id))
            if envelope.flags & RECEIPT_FLAG:
                self._answer(host, envelope, None)
        assert self.cluster is not None
        self.cluster.done(host, batch)

    def _answer(self, host: str, envelope: Envelope, code: ErrorCode | None) -> None:
        if code is None:
            outcome = _outcome(Kind.RECEIPT, envelope.id)
        else:
            outcome = _outcome(Kind.ERROR, envelope.id, error_payload(code, "no"))
        self.ready[host].append(Run(envelope.name, outcome))
        assert self.cluster is not None
        self.cluster.touch(host)

    def accept_now(self, host: str, frame: bytes) -> None:
        """Send the RECEIPT of a frame of a batch that still waits."""
        self._answer(host, parse(frame[4:]), None)

    def lose_later(self, host: str, sender: str, message_id: int) -> None:
        """Send an ERROR for a frame that was accepted before."""
        self._answer(host, Envelope(Kind.MESSAGE, message_id, sender), ErrorCode.OFFLINE)

    def unblock(self) -> None:
        """Accept what waits."""
        self.blocks = False
        waiting, self.waiting = self.waiting, {}
        for (host, batch), frames in waiting.items():
            self._take(host, batch, frames)

    def take_outcomes(self, host: str) -> list[Run]:
        return self.ready.pop(host, [])

    def host_up(self, facts: HostFacts, now_wall: float) -> None:
        assert facts.host not in self.up
        self.up.add(facts.host)
        self.calls.append(("up", facts.host))

    def host_down(self, host: str, reason: str, now_wall: float) -> None:
        self.up.remove(host)
        self.calls.append(("down", host, reason))
        self.names.pop(host, None)
        self.interests.pop(host, None)
        for run in self.queues.pop(host, ()):
            self._refuse(run)
        assert self.cluster is not None
        for (origin, batch), frames in list(self.waiting.items()):
            if origin == host:
                del self.waiting[origin, batch]
                for _, each in frames:
                    self._answer(host, parse(each[4:]), ErrorCode.OFFLINE)
                self.cluster.done(host, batch)

    def suspend(self, reason: str) -> None:
        self.is_suspended = True
        for queue in self.queues.values():
            for run in queue:
                self._refuse(run)
            queue.clear()

    def resume(self) -> None:
        self.is_suspended = False

    def names_changed(self, host: str, names: Sequence[Name], now_wall: float) -> None:
        assert host in self.up
        for name in names:
            self.names[host][name.name] = name
            if name.is_gone:
                del self.names[host][name.name]

    def interests_changed(self, host: str, interests: Sequence[Interest]) -> None:
        assert host in self.up
        for each in interests:
            self.interests[host][each.pattern, each.group] = each
            if not each.on:
                del self.interests[host][each.pattern, each.group]

    def told(self, host: str, body: dict[str, Any], now: float) -> None:
        self.calls.append(("told", host, body))

    def own_names(self) -> Iterable[Name]:
        return self.own.values()

    def own_interests(self) -> Iterable[Interest]:
        return self.own_patterns.values()


class Host:
    """One host: its cluster, its remote sessions, and its place on the wire."""

    def __init__(self, net: ClusterNet, name: str, boot: int, **settings: Any) -> None:
        self.net = net
        self.name = name
        self.remotes = FakeRemotes()
        fields: dict[str, Any] = {
            "host": name,
            "boot_id": f"{boot:016x}",
            "started_at": net.now_wall + boot / 1000,
            "version": "1",
            "digest": "d",
            "addresses": (f"{name}:6000",),
            "unanswered": 65536,
            "remote_timeout": 5.0,
        }
        self.cluster = Cluster(ClusterSettings(**{**fields, **settings}), self.remotes)
        self.remotes.cluster = self.cluster
        self.is_online = False
        #: Messages for this host, in order.
        self.inbox: deque[tuple[str, str, bytes]] = deque()
        self.is_frozen = False

    def connect(self, max_payload: int = 1 << 20) -> None:
        """Connect to NATS."""
        self.is_online = True
        self.cluster.connected(max_payload, self.net.now, self.net.now_wall)

    def disconnect(self) -> None:
        """Lose NATS, and all messages under way to this host."""
        self.is_online = False
        self.inbox.clear()
        self.cluster.disconnected("the connection was reset", self.net.now, self.net.now_wall)

    def announce(self, name: str, connections: int = 1, **fields: Any) -> None:
        """Announce a name of this host."""
        state = Name(name, connections, self.net.now_wall, **fields)
        self.remotes.own[name] = state
        if state.is_gone:
            del self.remotes.own[name]
        self.cluster.announce(state)

    def subscribe(self, pattern: str, group: str = "", *, on: bool = True) -> None:
        """Announce an interest of this host."""
        interest = Interest(pattern, group, on)
        self.remotes.own_patterns[pattern, group] = interest
        if not on:
            del self.remotes.own_patterns[pattern, group]
        self.cluster.announce_interest(interest)

    def state_of(self, host: str) -> str:
        """Return the state of the link to another host."""
        states = {each["host"]: str(each["state"]) for each in self.cluster.hosts(self.net.now)}
        return states.get(host, "unknown")


class ClusterNet:
    """Hosts on a wire that keeps the order between each pair, and may lose messages.

    Attributes:
        drop: Decides whether a message is lost: origin, its target, the message.
        counts: Published messages by kind.
    """

    def __init__(self) -> None:
        self.now = 100.0
        self.hosts: dict[str, Host] = {}
        self.drop: Callable[[str, str, Outgoing], bool] = lambda origin, to, message: False
        self.counts: Counter[str] = Counter()
        self._boots = 0

    @property
    def now_wall(self) -> float:
        """The time of day."""
        return WALL + self.now

    def start(self, name: str, *, is_online: bool = True, **settings: Any) -> Host:
        """Start a host, in place of one with its name."""
        self._boots += 1
        host = self.hosts[name] = Host(self, name, self._boots, **settings)
        if is_online:
            host.connect()
        return host

    def up(self, *names: str, **settings: Any) -> list[Host]:
        """Start hosts, and wait until all of them have met."""
        hosts = [self.start(name, **settings) for name in names]
        self.run(1.0)
        assert all(
            host.state_of(other.name) == "up" for host in hosts for other in hosts if host != other
        )
        return hosts

    def publish(self, host: Host) -> bool:
        """Publish what a host has to send; return whether there was something."""
        outgoing = host.cluster.take_outgoing(self.now)
        for each in outgoing:
            self.counts[each.kind] += 1
            assert len(each.payload) <= host.cluster.max_payload
            for other in self.hosts.values():
                if (
                    other is not host
                    and other.is_online
                    and host.is_online
                    and each.to in (ALL, other.name)
                    and not self.drop(host.name, other.name, each)
                ):
                    other.inbox.append((host.name, each.kind, each.payload))
        return bool(outgoing)

    def receive(self, host: Host, most: int = 1_000_000) -> bool:
        """Give a host its messages; return whether there were any."""
        count = min(most, len(host.inbox))
        for _ in range(count):
            origin, kind, payload = host.inbox.popleft()
            host.cluster.receive(origin, kind, payload, self.now, self.now_wall)
        return bool(count)

    def settle(self) -> None:
        """Carry messages until none is under way."""
        is_busy = True
        while is_busy:
            is_busy = False
            for host in [host for host in self.hosts.values() if not host.is_frozen]:
                is_busy |= self.publish(host)
                if host.cluster.has_work:
                    is_busy = True
                    host.cluster.run(self.now)
                is_busy |= self.receive(host)

    def run(self, seconds: float, step: float = 0.1) -> None:
        """Let time pass."""
        end = self.now + seconds
        self.settle()
        while self.now < end:
            self.now += step
            for host in [host for host in self.hosts.values() if not host.is_frozen]:
                deadline = host.cluster.next_deadline
                if deadline is not None and deadline <= self.now:
                    host.cluster.tick(self.now, self.now_wall)
            self.settle()
