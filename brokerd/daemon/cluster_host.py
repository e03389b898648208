"""The daemon's place in its cluster: joined at the start, left at the end.

What a cluster needs is imported only if the configuration has one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from brokerd import __version__
from brokerd.config.model import Config
from brokerd.daemon.threads import run_in_thread
from brokerd.net.cluster.errors import MembershipError

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from brokerd.core.broker import Broker
    from brokerd.core.cluster.cluster import ClusterSettings
    from brokerd.net.cluster.membership import Membership
    from brokerd.net.server import Server

__all__ = ["ClusterHost", "MembershipError"]


class ClusterHost:
    """The membership of one daemon, if its configuration has a cluster.

    Attributes:
        boot_id: Sixteen hexadecimal digits, new with each start; an upgrade keeps it.
        membership: None without a cluster, and before the start.
    """

    def __init__(
        self, broker: Broker, log: FilteringBoundLogger, settle: Callable[[], None]
    ) -> None:
        self._broker = broker
        self._log = log
        self._settle = settle
        self.boot_id = os.urandom(8).hex()
        self.membership: Membership | None = None

    @property
    def failure(self) -> str:
        """Why no other host can be reached, or ""."""
        return "" if self.membership is None else self.membership.failure

    async def prepare(self, config: Config) -> None:
        """Load what a cluster needs."""
        if config.cluster is not None:
            await run_in_thread(_preload)

    def attach(self, config: Config, server: Server) -> None:
        """Make the broker a host of the configured cluster; do nothing without one."""
        if config.cluster is None:
            return
        from brokerd.core.cluster.cluster import Cluster
        from brokerd.core.cluster.remote_traffic import join_cluster
        from brokerd.net.cluster.membership import Membership

        loop = asyncio.get_running_loop()
        traffic = join_cluster(self._broker, config.cluster.host, loop.time)
        traffic.cluster = Cluster(self._settings(config), traffic)
        settlement = server.context.settlement
        traffic.write_touched = settlement.write_touched
        self.membership = Membership(
            config.cluster,
            traffic.cluster,
            max_message=config.limits.max_message,
            log=self._log,
            wall=time.time,
            settle=self._settle,
            settle_read=settlement.settle_read,
        )
        settlement.cluster = traffic.cluster
        settlement.on_outgoing = self.membership.publish

    def _settings(self, config: Config) -> ClusterSettings:
        cluster = config.cluster
        assert cluster is not None
        from brokerd.core.cluster.cluster import ClusterSettings

        return ClusterSettings(
            host=cluster.host,
            boot_id=self.boot_id,
            started_at=self._broker.status.started_at,
            version=__version__,
            digest=cluster.digest,
            addresses=cluster.advertise,
            unanswered=cluster.unanswered,
            remote_timeout=config.limits.remote_timeout,
            hosts=cluster.hosts,
            dedup=0.0 if config.store is None else config.store.dedup,
        )

    async def join(self) -> None:
        """Join the cluster. Raises MembershipError if another broker has the host's name."""
        if self.membership is not None:
            await self.membership.start()

    async def hold(self) -> None:
        """Ask the other hosts to wait, because another process takes over."""
        if self.membership is not None:
            await self.membership.hold()

    def settle_ends(self) -> None:
        """Finish what goes on in later turns, before the state is captured."""
        if self.membership is not None:
            self.membership.cluster.settle_ends(asyncio.get_running_loop().time())
            self._settle()

    async def join_again(self) -> None:
        """Go on in the cluster, after another process of this broker or its failure."""
        # What is wrong is in the log; this broker serves its own clients.
        with contextlib.suppress(MembershipError):
            await self.join()

    def reconfigure(self, config: Config) -> None:
        """Apply a changed configuration; a reload neither adds nor removes a cluster."""
        if self.membership is not None and config.cluster is not None:
            self.membership.reconfigure(
                config.cluster, self._settings(config), config.limits.max_message
            )

    async def leave(self) -> None:
        """Leave the cluster: the daemon stops."""
        if self.membership is not None:
            await self.membership.close()

    def kill(self) -> None:
        """Leave the cluster without a word."""
        if self.membership is not None:
            self.membership.kill()


def _preload() -> None:
    """Import the modules of a cluster, and NATS' client; to be called in a thread."""
    import brokerd.net.cluster.membership  # noqa: F401 - attach asks for it
    from brokerd.net.cluster.nats_connection import preload

    preload()
