"""The daemon's part in its cluster: carries messages between the core and NATS."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from structlog.typing import FilteringBoundLogger

from brokerd.config.values import ClusterConfig
from brokerd.core.cluster.cluster import Cluster, ClusterSettings
from brokerd.net.cluster.errors import MembershipError
from brokerd.net.cluster.nats_connection import NatsConnection

__all__ = ["Membership"]

#: Seconds that a start waits for NATS, to hear of another broker with this host's name.
_START_S: Final = 1.5
#: Seconds. A message that follows another more closely leaves a turn of the loop later.
_PAUSE_S: Final = 0.0001
#: Seconds for the other hosts to agree that they send nothing, and between two looks.
_HOLD_S: Final = 1.0
_LOOK_S: Final = 0.002


class Membership:
    """One host's connection to its cluster.

    Args:
        config: The configuration's ``cluster``.
        cluster: The core's part.
        max_message: Payload bytes that clients may send; the log tells if NATS allows
            less.
        log: The daemon's log.
        wall: Returns the time of day in seconds since the epoch.
        settle: Carries out the core's decisions, and calls :meth:`publish`.
        settle_read: Does so after frames that stayed in the routing loop.
    """

    def __init__(
        self,
        config: ClusterConfig,
        cluster: Cluster,
        *,
        max_message: int,
        log: FilteringBoundLogger,
        wall: Callable[[], float],
        settle: Callable[[], None],
        settle_read: Callable[[], None],
    ) -> None:
        self.config = config
        self.cluster = cluster
        self.max_message = max_message
        self._log = log
        self._wall = wall
        self._settle = settle
        self._settle_read = settle_read
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        #: When it is due, in seconds of the event loop.
        self._timer_at = 0.0
        self._settling: asyncio.Handle | None = None
        self._publishing: asyncio.Handle | None = None
        #: When the last message left, in seconds of time.monotonic().
        self._published_at = 0.0
        #: Set when it is known whether this host joins, or that NATS is away.
        self._decided = asyncio.Event()
        self._failure = ""
        self._is_warned = False
        self._nats = self._connect(config)
        #: The connection that a reload has begun.
        self._next: NatsConnection | None = None

    def _connect(self, config: ClusterConfig) -> NatsConnection:
        def on_message(origin: str, kind: str, payload: bytes) -> None:
            if connection is self._nats:
                self.cluster.receive(origin, kind, payload, self._loop.time(), self._wall())

        def on_read() -> None:
            if connection is self._nats:
                self._on_read()

        connection = NatsConnection(
            config,
            on_connected=lambda max_payload: self._on_connected(connection, max_payload),
            on_lost=lambda reason: self._on_lost(connection, reason),
            on_message=on_message,
            on_read=on_read,
            on_error=self._on_error,
        )
        return connection

    @property
    def failure(self) -> str:
        """Why no other host can be reached, or "": NATS is away, or the name is taken."""
        return self.cluster.conflict or self._failure

    async def start(self) -> None:
        """Join the cluster, for the first time or after ``close``.

        A cluster without NATS is joined later. Raises MembershipError if another broker
        has the host's name.
        """
        self._decided.clear()
        self._nats = self._connect(self.config)
        self._nats.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                await self._decided.wait()
        if self.cluster.conflict:
            raise MembershipError(self.cluster.conflict)

    def publish(self) -> None:
        """Publish what the core has for other hosts; called after each settlement.

        A message that follows another closely leaves a turn of the event loop later. It
        takes with it what clients send during that turn.
        """
        if self._publishing is not None:
            return
        if time.monotonic() - self._published_at < _PAUSE_S:
            self._publishing = self._loop.call_soon(self._publish_now)
        else:
            self._publish_now()

    def _publish_now(self) -> None:
        """Publish what the core has for other hosts."""
        if self._publishing is not None:
            self._publishing.cancel()
            self._publishing = None
        if not self.cluster.has_outgoing:
            return
        messages = self.cluster.take_outgoing(self._loop.time())
        if messages:
            self._nats.publish(messages)
            self._published_at = time.monotonic()
        self._set_timer()
        if self.cluster.needs_settling:
            # The frames that have left make room for senders that are held.
            self._settle_soon()

    def reconfigure(
        self, config: ClusterConfig, settings: ClusterSettings, max_message: int
    ) -> None:
        """Apply a changed configuration.

        For other servers or credentials, a new connection replaces the present one as
        soon as it stands.
        """
        former, self.config = self.config, config
        self.max_message = max_message
        self.cluster.reconfigure(settings)
        self._set_timer()
        if _servers(config) != _servers(former):
            if self._next is not None:
                self._next.kill()
            self._next = self._connect(config)
            self._next.start()

    async def close(self) -> None:
        """Tell the other hosts that this one stops, and close the connection."""
        self.cluster.leave(self._loop.time(), self._wall())
        self._publish_now()
        self._stop_timers()
        if self._next is not None:
            self._next.kill()
        await self._nats.close()
        self.cluster.disconnected("this broker has left", self._loop.time(), self._wall())
        self._stop_timers()

    async def hold(self) -> None:
        """Close the connection for another process, when no host sends anything more."""
        self.cluster.hold(self._loop.time(), self._wall())
        self._publish_now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HOLD_S):
                while not self.cluster.is_held:  # noqa: ASYNC110 - a look is cheap, and rare
                    await asyncio.sleep(_LOOK_S)
        if self._next is not None:
            self._next.kill()
        await self._nats.close()
        self._stop_timers()

    def kill(self) -> None:
        """Close the connection at once."""
        self._stop_timers()
        for connection in (self._nats, self._next):
            if connection is not None:
                connection.kill()

    def _stop_timers(self) -> None:
        for handle in (self._timer, self._settling, self._publishing):
            if handle is not None:
                handle.cancel()
        self._timer = self._settling = self._publishing = None

    # Called by the connections

    def _on_connected(self, connection: NatsConnection, max_payload: int) -> None:
        if connection is self._next:
            self._nats.kill()
            self._nats, self._next = connection, None
        if self._failure:
            self._log.info("cluster.nats_found", host=self.config.host)
        self._failure = ""
        self.cluster.connected(max_payload, self._loop.time(), self._wall())
        if self.max_message > self.cluster.largest_frame and not self._is_warned:
            self._is_warned = True
            self._log.warning(
                "cluster.small_max_payload",
                max_payload=max_payload,
                reason="limits.max_message is larger; messages to other hosts must fit",
            )
        self._settle_soon()

    def _on_lost(self, connection: NatsConnection, reason: str) -> None:
        if reason != self._failure:
            self._log.warning("cluster.nats_lost", host=self.config.host, reason=reason)
        if connection is not self._nats:
            return
        self._failure = reason
        if self.cluster.is_connected or self.cluster.is_holding:
            self.cluster.disconnected(reason, self._loop.time(), self._wall())
        self._decided.set()
        self._settle_soon()

    def _on_read(self) -> None:
        """Settle after the messages of one read."""
        if self.cluster.needs_settling:
            self._settle_now()
        else:
            self._settle_read()
            self._publish_now()

    def _on_error(self, text: str) -> None:
        if "permissions violation" in text.lower():
            # The connection stays, and is of no use.
            self._failure = text
        self._log.warning("cluster.nats_error", host=self.config.host, reason=text)

    def _settle_soon(self) -> None:
        """Settle in the next turn of the event loop."""
        if self._settling is None:
            self._settling = self._loop.call_soon(self._settle_now)

    def _settle_now(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        self.cluster.needs_settling = False
        if self.cluster.has_work:
            self.cluster.run(self._loop.time())
        self._settle()
        cluster = self.cluster
        for event in cluster.events:
            getattr(self._log, event.level)(event.event, **event.fields)
        cluster.events.clear()
        if cluster.has_joined or cluster.conflict:
            self._decided.set()
        self._publish_now()
        self._set_timer()
        if cluster.has_work:
            self._settle_soon()

    # The timer

    def _set_timer(self) -> None:
        deadline = self.cluster.next_deadline
        if self._timer is not None and deadline is not None and deadline < self._timer_at:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline is not None:
            self._timer_at = deadline
            self._timer = self._loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.cluster.tick(self._loop.time(), self._wall())
        self._on_read()
        self._set_timer()


def _servers(config: ClusterConfig) -> ClusterConfig:
    """Return the part of a configuration that a connection depends on."""
    return replace(config, unanswered=0, advertise=(), digest="")
