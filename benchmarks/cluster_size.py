"""Measure a cluster as it grows: the real core and links on a simulated wire.

Run it with ``python -m benchmarks.cluster_size [hosts] [names]``; what 100 hosts and
100,000 names take, and the figures, are in docs/cluster.md. All hosts are in this
process, so memory of a host is that of this process divided by the hosts.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Final

from brokerd.config.values import ClientConfig, RateConfig, Rule, Source, WhenConnected, WhenFull
from brokerd.core.broker import Broker
from brokerd.core.cluster.cluster import ALL, Cluster, ClusterSettings
from brokerd.core.cluster.remote_traffic import join_cluster
from brokerd.core.outbox import StreamOutbox
from brokerd.core.session import Session
from brokerd_client.wire.envelope import BROKER, CodecId, Envelope, Kind, encode

_WALL: Final = 1_700_000_000.0
_EVERYTHING: Final = (Rule(">"),)


def _config(name: str) -> ClientConfig:
    return ClientConfig(
        name=name,
        keys=(),
        connections=1,
        send_to=(Rule("*"),),
        publish=_EVERYTHING,
        subscribe=_EVERYTHING,
        queue=1 << 20,
        subscriptions=1000,
        requests=1000,
        when_full=WhenFull.WAIT,
        when_connected=WhenConnected.REFUSE,
        rate=RateConfig(None, None),
        allow_md5=False,
        peer_uid=None,
        admin=False,
        source=Source("", 0),
    )


class _Connection:
    """A client that reads everything."""

    writing = False

    def __init__(self) -> None:
        self.session: Session

    def write(self) -> None:
        outbox = self.session.outbox
        outbox.sent(outbox.waiting)
        assert isinstance(outbox, StreamOutbox)


class _Host:
    def __init__(self, wire: Wire, name: str, number: int, configs: list[ClientConfig]) -> None:
        self.wire = wire
        self.name = name
        self.broker = Broker(configs)
        self.traffic = join_cluster(self.broker, name, lambda: wire.now)
        settings = ClusterSettings(
            name, f"{number:016x}", _WALL, "", "", (f"{name}:6000",), 8 << 20, 5.0, 1000
        )
        self.cluster = self.traffic.cluster = Cluster(settings, self.traffic)
        self.traffic.write_touched = self.settle
        self.inbox: deque[tuple[str, str, bytes]] = deque()
        self.received: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()

    def connect(self, name: str) -> Session:
        connection = _Connection()
        connection.session = self.broker.attach(
            name,
            f"x{self.wire.numbers()}{self.broker.instance_suffix}",
            peer="",
            now_wall=_WALL,
            connection=connection,
        )
        return connection.session

    def settle(self) -> None:
        broker = self.broker
        while broker.touched or broker.held.released or broker.has_deferred_work:
            while broker.touched:
                session = broker.touched.pop()
                session.outbox.touched = False
                if session.open:
                    session.connection.write()
            for session in broker.held.take_released():
                if session.host:
                    session.connection.resume()
            broker.run_deferred(1000)
        broker.replies.log_events.take()


class Wire:
    """The hosts, and the time."""

    def __init__(self, hosts: int, names: int) -> None:
        self.now = 100.0
        self._number = 0
        self.names = [f"client{number}" for number in range(names)]
        configs = [_config(name) for name in self.names]
        self.hosts: dict[str, _Host] = {}
        for number in range(hosts):
            name = f"h{number}"
            self.hosts[name] = _Host(self, name, number + 1, configs)

    def numbers(self) -> int:
        self._number += 1
        return self._number

    def settle(self) -> None:
        """Carry messages until none is under way."""
        hosts = list(self.hosts.values())
        is_busy = True
        while is_busy:
            is_busy = False
            for host in hosts:
                host.settle()
                for each in host.cluster.take_outgoing(self.now):
                    is_busy = True
                    for other in hosts if each.to == ALL else (self.hosts[each.to],):
                        if other is not host:
                            other.inbox.append((host.name, each.kind, each.payload))
            for host in hosts:
                while host.inbox:
                    origin, kind, payload = host.inbox.popleft()
                    host.received[kind] += 1
                    host.received_bytes[kind] += len(payload)
                    host.cluster.receive(origin, kind, payload, self.now, _WALL + self.now)

    def run(self, seconds: float) -> None:
        """Move the clock on, and carry what is sent."""
        for _ in range(int(seconds * 4)):
            self.now += 0.25
            for host in self.hosts.values():
                due = host.cluster.next_deadline
                if due is not None and due <= self.now:
                    host.cluster.tick(self.now, _WALL + self.now)
            self.settle()

    def counts(self) -> tuple[Counter[str], Counter[str]]:
        """Return and clear what the hosts have received: messages and bytes by kind."""
        messages: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for host in self.hosts.values():
            messages += host.received
            sizes += host.received_bytes
            host.received, host.received_bytes = Counter(), Counter()
        return messages, sizes


def _resident() -> int:
    """Return the memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _subscribe(broker: Broker, session: Session, topic: str, now: float) -> None:
    request = json.dumps({"op": "subscribe", "topic": topic}).encode()
    frame = encode(Envelope(Kind.REQUEST, 1, BROKER, request, codec=CodecId.JSON))
    broker.handle(session, memoryview(frame), now)


def _show(what: str, wire: Wire, seconds: float, started: float) -> None:
    messages, sizes = wire.counts()
    count = len(wire.hosts)
    used = (time.process_time() - started) / count
    per_host = ", ".join(
        f"{kind} {messages[kind] / count:,.0f} ({sizes[kind] / count / 1024:,.0f} KiB)"
        for kind in sorted(messages)
    )
    print(f"{what}: per host {used * 1000:,.0f} ms of processor time; {per_host}")
    if seconds:
        total = sum(messages.values()) / count / seconds
        print(f"    {total:,.0f} messages a second")


def main() -> None:
    """Print the figures."""
    hosts = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    names = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000
    # Nothing of it is garbage, and looking for some takes longer than all else.
    gc.disable()
    began = _resident()
    wire = Wire(hosts, names)
    before = _resident() - began
    print(f"{hosts} hosts, {names} names: {before / hosts / names:,.0f} B a name without a cluster")
    rng = random.Random(1)
    places = list(wire.hosts.values())
    where = {}
    sessions = {}
    for name in wire.names:
        where[name] = rng.choice(places)
        sessions[name] = where[name].connect(name)
    connected = _resident()
    started = time.process_time()
    for host in places:
        host.cluster.connected(1 << 20, wire.now, _WALL)
    wire.run(3)
    online = sum(client.online for client in places[0].broker.exchange.clients.values())
    assert online == names, (online, names)
    known = _resident() - connected
    print(f"what is known of other hosts: {known / hosts / names:,.0f} B a name")
    print(f"memory: {_resident() / hosts / 1e6:,.0f} MB a host")
    _show("all hosts join", wire, 0, started)
    started = time.process_time()
    wire.run(10)
    _show("idle, 10 s", wire, 10, started)
    started = time.process_time()
    for _ in range(10):
        for name in rng.sample(wire.names, names // 100):
            old = sessions[name]
            where[name].broker.detach(old, _WALL)
            where[name] = rng.choice(places)
            sessions[name] = where[name].connect(name)
        wire.run(1)
    _show("1 % of the names move each second, 10 s", wire, 10, started)
    before = _resident()
    patterns = min(1000, names // 10)
    started = time.process_time()
    for second in range(10):
        for name in rng.sample(wire.names, patterns):
            _subscribe(where[name].broker, sessions[name], f"orders.{name}.{second}.*", wire.now)
        wire.run(1)
    _show(f"{patterns:,} new patterns each second, 10 s", wire, 10, started)
    held = (_resident() - before) / hosts / (10 * patterns)
    print(f"an interest: {held:,.0f} B at each host")
    # The time until a name that moved is found: steps of the wire, each one way.
    name = wire.names[0]
    where[name].broker.detach(sessions[name], _WALL)
    target = next(host for host in places if host is not where[name])
    sessions[name] = target.connect(name)
    sender = next(host for host in places if host not in (target, where[name]))
    other = next(each for each in sender.broker.exchange.clients.values() if each.sessions)
    source = next(iter(other.sessions.values()))
    frame = memoryview(encode(Envelope(Kind.MESSAGE, 7, name, b"x")))
    wire.settle()
    before_out = sessions[name].outbox.frames
    sender.broker.handle(source, frame, wire.now)
    wire.settle()
    print(f"memory at the end: {_resident() / 1e9:,.1f} GB")
    print(f"found after one broadcast: {sessions[name].outbox.frames - before_out == 1}")


if __name__ == "__main__":
    main()
