"""Brokers of several hosts, whose links are simulated: nothing is lost unless a test says so.

The links do what :mod:`brokerd.core.cluster` promises of them at the seam, in the
simplest way. A batch stays on its way until :meth:`JoinedHosts.settle` or
:meth:`JoinedHosts.step` lets it arrive.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

from support.fake_network import FakeNet

from brokerd.config.values import ClientConfig
from brokerd.core.broker import CoreLimits
from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.cluster import ClusterSettings
from brokerd.core.cluster.remote_frames import walk
from brokerd.core.cluster.remote_sessions import instance_suffix
from brokerd.core.cluster.remote_traffic import join_cluster
from brokerd.core.cluster.seam import HostFacts, Interest, Name, Run
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["JoinedHosts", "SimulatedHost"]


def _copied(run: Run) -> Run:
    return Run(run.target, bytes(run.frames), run.ttl_ms)


class SimulatedLinks:
    """What a broker calls of its links."""

    largest_frame = 1 << 20
    is_connected = True
    conflict = ""
    max_payload = 1 << 20
    dedup = 0.0
    links: ClassVar[dict[str, Any]] = {}
    settings = ClusterSettings("", "0" * 16, 0.0, "test", "", (), 1 << 20, 5.0)

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host

    def capture(self, blob: Blob) -> dict[str, Any]:
        """Return that there are no links."""
        return {"boot": 0, "joined": True, "number": 0, "links": []}

    def touch(self, host: str) -> None:
        """Note that there is something for a host."""
        self._host.touched[host] = None

    def pull(self, host: str, now: float) -> None:
        """Take frames at once, as far as the window has room."""
        self._host.pull(host)

    def done(self, host: str, batch: int) -> None:
        """Note that a batch of another host is consumed."""
        self._host.send(host, "done", batch)

    def forget(self, host: str, batch: int) -> None:
        """Leave a batch of another host without an answer."""

    def announce(self, name: Name) -> None:
        """Announce a name to all hosts."""
        self._host.announcements += 1
        self._host.send_all("names", [name])

    def tell(self, host: str, body: dict[str, Any]) -> None:
        """Send an object to another host."""
        self._host.send(host, "tell", body)

    def hosts(self, now: float) -> list[dict[str, Any]]:
        """Return the names of the other hosts."""
        return [{"host": name} for name in self._host.hosts if name != self._host.name]

    def announce_interest(self, interest: Interest) -> None:
        """Announce an interest to all hosts."""
        self._host.announcements += 1
        self._host.send_all("interests", [interest])


class SimulatedHost:
    """One host.

    Attributes:
        window: Bytes in flight per other host.
        unanswered: By other host: the batches without an answer, by number.
        outbound: By other host: what is on its way, in order.
    """

    def __init__(self, name: str, hosts: dict[str, SimulatedHost], net: FakeNet) -> None:
        self.name = name
        self.net = net
        self.window = 1 << 20
        self.hosts = hosts
        self.touched: dict[str, None] = {}
        self.outbound: dict[str, deque[tuple[str, Any]]] = {}
        self.unanswered: dict[str, dict[int, list[Run]]] = {}
        self.announcements = 0
        self._batch = 0
        net.suffix = instance_suffix(name)
        self.traffic = join_cluster(net.broker, name, lambda: net.now)
        self.traffic.cluster = SimulatedLinks(self)  # type: ignore[assignment]
        self.traffic.write_touched = net.write_touched

    def send(self, host: str, kind: str, content: Any) -> None:
        """Put a message for another host on its way."""
        self.outbound.setdefault(host, deque()).append((kind, content))

    def send_all(self, kind: str, content: Any) -> None:
        """Put a message for all hosts on its way."""
        for host in self.hosts:
            if host != self.name:
                self.send(host, kind, content)

    def pull(self, host: str) -> None:
        """Make a batch of the frames for a host."""
        open_batches = self.unanswered.setdefault(host, {})
        in_flight = sum(len(run.frames) for runs in open_batches.values() for run in runs)
        runs = [_copied(run) for run in self.traffic.take_frames(host, self.window - in_flight)]
        if runs:
            self._batch += 1
            open_batches[self._batch] = runs
            self.send(host, "batch", (self._batch, runs))

    def flush(self) -> None:
        """Put everything that waits on its way."""
        while self.touched:
            host = self.touched.popitem()[0]
            self.pull(host)
            if outcomes := [_copied(run) for run in self.traffic.take_outcomes(host)]:
                self.send(host, "outcomes", outcomes)

    def receive(self, origin: str, kind: str, content: Any) -> None:
        """Take one message of another host."""
        net, traffic = self.net, self.traffic
        if kind == "batch":
            traffic.deliver(origin, content[0], content[1], net.now)
        elif kind == "outcomes":
            traffic.conclude(origin, content, net.now)
        elif kind == "done":
            self.unanswered[origin].pop(content, None)
            self.touched[origin] = None
        elif kind == "names":
            traffic.names_changed(origin, content, net.now)
        elif kind == "interests":
            traffic.interests_changed(origin, content)
        elif kind == "tell":
            traffic.told(origin, content, net.now)
        net.settle()

    def fail_unanswered(self, host: str, code: ErrorCode) -> None:
        """Report the frames of all batches without an answer."""
        for runs in self.unanswered.pop(host, {}).values():
            for target, frames, _ in runs:
                for start, end, *_ in walk(frames):
                    frame = memoryview(frames)[start - 4 : end]
                    self.traffic.fail(host, target, frame, code, "the link is lost", self.net.now)
        self.net.settle()

    def lose(self, host: str) -> None:
        """Find that another host is gone."""
        self.outbound.pop(host, None)
        self.fail_unanswered(host, ErrorCode.IN_DOUBT)
        self.traffic.host_down(host, "silent", self.net.now)
        self.net.settle()


class JoinedHosts:
    """Hosts that have announced everything to each other.

    configs: the clients of all hosts but those whose net is given by name.
    """

    def __init__(
        self,
        *configs: ClientConfig,
        names: str = "ab",
        limits: CoreLimits | None = None,
        **nets: FakeNet,
    ) -> None:
        self.hosts: dict[str, SimulatedHost] = {}
        for name in names:
            net = nets.get(name) or FakeNet(*configs, limits=limits)
            self.hosts[name] = SimulatedHost(name, self.hosts, net)
        for host in self.hosts.values():
            for other in self.hosts:
                if other != host.name:
                    facts = HostFacts(other, "0" * 16, 0.0, "test", "", (f"{other}:6000",))
                    host.traffic.host_up(facts, host.net.now)

    def __getitem__(self, name: str) -> SimulatedHost:
        return self.hosts[name]

    def step(self) -> bool:
        """Let the oldest message of each link arrive; return whether there was one."""
        arrived = False
        for host in self.hosts.values():
            host.net.settle()
            host.flush()
            for other, messages in list(host.outbound.items()):
                if messages:
                    arrived = True
                    self.hosts[other].receive(host.name, *messages.popleft())
        return arrived

    def settle(self) -> None:
        """Let everything arrive."""
        while self.step() or any(host.touched for host in self.hosts.values()):
            pass
