"""The store of the mailboxes: opened with the daemon or by a reload, closed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from brokerd.store.connection import StoreConnection, StoreSettings
from brokerd.store.directory import Refused
from brokerd.store.messages import VERSION
from brokerd_client._common.processors import has_spare_processor

if TYPE_CHECKING:
    import socket

    from structlog.typing import FilteringBoundLogger

    from brokerd.config.values import StoreConfig
    from brokerd.core.broker import Broker

__all__ = ["MailboxStore", "StoreError"]

#: Seconds for the store to write what it has received when the daemon stops.
_CLOSE_S: Final = 10.0


class StoreError(Exception):
    """The store can't be opened; the text says why, and what to do."""


class MailboxStore:
    """The store process of one daemon, if there is one.

    settle: carries out the core's decisions after an answer of the store.
    """

    def __init__(
        self, broker: Broker, log: FilteringBoundLogger, settle: Callable[[], None]
    ) -> None:
        self._broker = broker
        self._log = log
        self._settle = settle
        self._connection: StoreConnection | None = None
        self._is_failure_logged = False
        self._answered = asyncio.Event()

    @property
    def failure(self) -> str:
        """Why nothing is stored any more, or ""."""
        return self._broker.mailboxes.commits.failure or (
            "" if self._connection is None else self._connection.failure
        )

    @property
    def is_open(self) -> bool:
        """Whether there is a store process."""
        return self._connection is not None

    async def open(self, config: StoreConfig | None) -> None:
        """Start the store process, or apply changed settings. Raises StoreError."""
        if config is None:
            return
        settings = StoreSettings(Path(config.path), config.min_free, config.dedup)
        mailboxes = self._broker.mailboxes
        if self._connection is not None:
            if settings != self._connection.settings:
                self._connection.configure(settings)
            mailboxes.dedup = config.dedup
            return
        connection = self._connection_of(settings)
        try:
            contents = await connection.open()
        except (Refused, OSError) as error:
            raise StoreError(f"store {config.path}: {error}") from error
        self._connection = connection
        mailboxes.opened(connection, contents, config.dedup)
        connection.serve(mailboxes)

    def _connection_of(self, settings: StoreSettings) -> StoreConnection:
        return StoreConnection(settings, self._on_settled, may_poll=has_spare_processor())

    # Upgrades

    async def quiet(self) -> None:
        """Return when nothing is on its way to the store; its senders wait until ``resume``."""
        mailboxes = self._broker.mailboxes
        mailboxes.pause()
        self._settle()
        while not (mailboxes.is_quiet or self.failure):
            self._answered.clear()
            await self._answered.wait()

    def resume(self) -> None:
        """Accept messages again: the upgrade has failed."""
        self._broker.mailboxes.resume()
        self._settle()

    def for_new_process(self) -> tuple[dict[str, Any], socket.socket] | None:
        """Return the facts of the store process and its socket, which both processes use."""
        return None if self._connection is None else self._connection.shared()

    def take_over(
        self, facts: dict[str, Any], sock: socket.socket, config: StoreConfig | None
    ) -> None:
        """Continue with the store process of the former process, in its directory."""
        settings = StoreSettings(Path(facts["path"]), facts["min_free"], facts["dedup"])
        if config is not None:
            settings = settings._replace(min_free=config.min_free, dedup=config.dedup)
        connection = self._connection = self._connection_of(settings)
        connection.serve(self._broker.mailboxes)
        connection.attach(facts["pid"], sock, facts["version"])
        self._broker.mailboxes.dedup = settings.dedup
        self._broker.mailboxes.attached(connection)

    async def renew_if_older(self, facts: dict[str, Any]) -> None:
        """Replace a store process of another version."""
        if self._connection is None or facts["version"] == VERSION:
            return
        try:
            await self._connection.renew()
        except (Refused, OSError):
            self._on_settled()

    def _on_settled(self) -> None:
        self._answered.set()
        if self.failure and not self._is_failure_logged:
            self._is_failure_logged = True
            self._broker.mailboxes.fail(self.failure)
            self._log.error("mailbox.store_failed", reason=self.failure)
        self._settle()

    async def close(self) -> None:
        """Write what was given to the store, and end its process."""
        connection, self._connection = self._connection, None
        if connection is not None and not await connection.close(_CLOSE_S):
            self._log.warning("mailbox.store_slow", reason=f"not closed within {_CLOSE_S:g} s")

    def kill(self) -> None:
        """Leave the store process at once; it writes what it has received."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.kill()
