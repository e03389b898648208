"""Hosts on real NATS servers, with remote sessions that only count."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from support.cluster_net import FakeRemotes
from support.nats_server import NatsServer
from support.running_daemon import Recorder

from brokerd.config.values import ClusterConfig, Source
from brokerd.core.cluster.cluster import Cluster, ClusterSettings
from brokerd.net.cluster.membership import Membership

__all__ = ["NatsHost", "eventually", "run_limited"]

_BOOTS: Final = itertools.count(1)


def run_limited(main: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine, for 60 s at most."""

    async def limited() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(limited())


async def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Return when a condition holds; fail after that many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.005)


class NatsHost:
    """One host: its membership, its cluster and its remote sessions."""

    def __init__(
        self,
        name: str,
        *servers: NatsServer,
        remote_timeout: float = 5.0,
        unanswered: int = 1 << 20,
        urls: tuple[str, ...] = (),
        **config: Any,
    ) -> None:
        self.name = name
        self.remotes = FakeRemotes()
        self.log = Recorder()
        boot = next(_BOOTS)
        self.settings = ClusterSettings(
            host=name,
            boot_id=f"{boot:016x}",
            started_at=time.time() + boot / 1000,
            version="1",
            digest="d",
            addresses=(),
            unanswered=unanswered,
            remote_timeout=remote_timeout,
        )
        self.cluster = Cluster(self.settings, self.remotes)
        self.remotes.cluster = self.cluster
        self.config = ClusterConfig(
            host=name,
            nats=urls or tuple(each.url for each in servers),
            source=Source("", 0),
            **config,
        )
        self.membership = Membership(
            self.config,
            self.cluster,
            max_message=1 << 16,
            log=self.log.logger,
            wall=time.time,
            settle=lambda: None,
            settle_read=lambda: None,
        )

    async def start(self) -> None:
        """Join."""
        await self.membership.start()

    def send(self, to: str, frames: bytes) -> None:
        """Send frames to a client of another host."""
        self.remotes.send(to, "bob", frames)
        self.membership.publish()

    async def meet(self, *others: NatsHost) -> None:
        """Return when this host has met others, and they it."""
        for other in others:
            await eventually(lambda other=other: other.name in self.remotes.up)
            await eventually(lambda other=other: self.name in other.remotes.up)
