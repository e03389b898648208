"""The monitor's switch: on, off, and moved, as the configuration says.

What answers is imported when it is first switched on, and not before: a daemon without a monitor starts as quickly
as if there were none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brokerd.config.values import MonitorConfig
from brokerd.monitor.collect import Watched
from brokerd.net.listen.listener import Listening
from brokerd_client.address import Address

if TYPE_CHECKING:
    from brokerd.monitor.http_server import Site

__all__ = ["Switch", "preload"]


def preload(config: MonitorConfig | None) -> None:
    """Import what the monitor needs, if there is to be one: some hundred milliseconds, best spent in a thread."""
    if config is not None:
        import brokerd.monitor.http_server  # noqa: F401 - so that it is there when it is needed


class Switch:
    """The monitor of one daemon, or none."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._site: Site | None = None

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, ports chosen by the system filled in; empty while it is off."""
        return [] if self._site is None else self._site.addresses

    @property
    def listening(self) -> list[Listening]:
        """The sockets it listens at."""
        return [] if self._site is None else self._site.listening

    def turn(self, config: MonitorConfig | None, opened: list[Listening]) -> None:
        """Have the monitor as configured, or none. opened: where it is to listen from now on; empty if it does."""
        if config is None:
            self.off()
            return
        if self._site is None:
            from brokerd.monitor.http_server import Site

            self._site = Site(self._watched)
        self._site.apply(config)
        if opened:
            self._site.move(opened)

    def off(self) -> None:
        """Answer nobody any more."""
        if self._site is not None:
            self._site.close()
            self._site = None
