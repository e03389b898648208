"""Brokers of several hosts, with their links, on a simulated wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.cluster_net import ClusterNet, Host
from support.fake_network import FakeNet, Peer

from brokerd.config.values import ClientConfig
from brokerd.core.broker import Broker, CoreLimits
from brokerd.core.cluster.cluster import Cluster
from brokerd.core.cluster.remote_sessions import instance_suffix
from brokerd.core.cluster.remote_traffic import join_cluster

__all__ = ["BrokerHost", "JoinedBrokers"]


class BrokerHost(Host):
    """One host: a broker with its connections, and its place on the wire."""

    def __init__(
        self,
        net: JoinedBrokers,
        name: str,
        boot: int,
        **settings: Any,
    ) -> None:
        super().__init__(net, name, boot, **settings)
        self.broker_net = self._make_net(net, name)
        self.broker_net.suffix = instance_suffix(name)
        # Instances are new in practice, also after a restart.
        self.broker_net._instances = boot * 1000
        self.broker_net.now = net.now
        self.cluster = self._join(self.broker_net.broker)

    def _join(self, broker: Broker) -> Cluster:
        """Return the links of a broker that is this host's."""
        traffic = join_cluster(broker, self.name, lambda: self.net.now)
        traffic.cluster = Cluster(self.cluster.settings, traffic)
        traffic.write_touched = self.broker_net.write_touched
        return traffic.cluster

    def hold(self) -> None:
        """Ask the other hosts to send nothing, and disconnect from NATS: an upgrade begins."""
        self.cluster.hold(self.net.now, self.net.now_wall)
        self.net.settle()
        self.is_online = False
        self.inbox.clear()

    def hand_over(self, *configs: ClientConfig) -> None:
        """Go on in another process, with the same entries or others, and without NATS."""
        self.cluster.settle_ends(self.net.now)
        self.broker_net.settle()
        self.broker_net.copy(*configs)
        assert self.broker_net._copies is not None
        cluster = self._join(self.broker_net._copies[0])
        self.broker_net.take_over()
        self.cluster = cluster
        self.broker_net.settle()

    def upgrade(self) -> None:
        """Go on in another process."""
        self.hold()
        self.hand_over()
        self.connect()

    def _make_net(self, net: JoinedBrokers, name: str) -> FakeNet:
        """Return the broker and its connections."""
        return FakeNet(*net.configs, limits=net.limits)

    def connect_client(self, name: str) -> Peer | None:
        """Connect a client to this host; None if it is refused."""
        peer = self.broker_net.try_connect(name)
        self.net.publish(self)
        return peer


class JoinedBrokers(ClusterNet):
    """Hosts with the same clients.

    configs: the clients of each host.
    """

    def __init__(self, *configs: ClientConfig, limits: CoreLimits | None = None) -> None:
        super().__init__()
        self.configs = configs
        self.limits = limits
        self.make: Callable[..., BrokerHost] = BrokerHost

    def start(self, name: str, *, is_online: bool = True, **settings: Any) -> BrokerHost:
        """Start a host, in place of one with its name."""
        self._boots += 1
        host = self.make(self, name, self._boots, **settings)
        self.hosts[name] = host
        if is_online:
            host.connect()
        return host

    def receive(self, host: Host, most: int = 1_000_000) -> bool:
        """Give a host its messages, and settle; return whether there were any."""
        received = super().receive(host, most)
        self._settle(host)
        return received

    def publish(self, host: Host) -> bool:
        """Settle a host, and publish what it has to send."""
        self._settle(host)
        return super().publish(host)

    def _settle(self, host: Host) -> None:
        assert isinstance(host, BrokerHost)
        net = host.broker_net
        if net.now < self.now:
            net.advance(self.now - net.now)
        net.settle()
