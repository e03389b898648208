"""The monitor's switch: turns the monitor on and off, and moves it, as configured.

The HTTP server is imported when the monitor is first turned on. A daemon without a
monitor therefore starts as quickly as if there were none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brokerd.config.values import MonitorConfig
from brokerd.monitor.sources import Sources
from brokerd.net.listen.listener import Listening
from brokerd_client.address import Address

if TYPE_CHECKING:
    from brokerd.monitor.http_server import MonitorServer

__all__ = ["Switch", "preload"]


def preload(config: MonitorConfig | None) -> None:
    """Import the HTTP server if a monitor is configured.

    That takes some hundred milliseconds, so it is best done in a thread.
    """
    if config is not None:
        import brokerd.monitor.http_server  # noqa: F401 - so that it is there when it is needed


class Switch:
    """The monitor of one daemon, or none."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._server: MonitorServer | None = None

    @property
    def addresses(self) -> list[Address]:
        """Addresses that the monitor listens at, ports filled in; empty while it is
        off.
        """
        return [] if self._server is None else self._server.addresses

    @property
    def listening(self) -> list[Listening]:
        """The sockets that the monitor listens at."""
        return [] if self._server is None else self._server.listening

    def turn(self, config: MonitorConfig | None, opened: list[Listening]) -> None:
        """Turn the monitor on as configured, or off.

        opened: the sockets to listen at from now on; empty if the current ones stay.
        """
        if config is None:
            self.off()
            return
        if self._server is None:
            from brokerd.monitor.http_server import MonitorServer

            self._server = MonitorServer(self._sources)
        self._server.apply(config)
        if opened:
            self._server.move(opened)

    def off(self) -> None:
        """Turn the monitor off."""
        if self._server is not None:
            self._server.close()
            self._server = None
