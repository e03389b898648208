"""Reloads of a running daemon: one at a time, each refused or taken over whole, and none during an upgrade.

The module :mod:`brokerd.daemon.reload` prepares a configuration, and the daemon takes it over. This module
decides when, and tells the outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Generator
from typing import Final, Protocol

from brokerd.config.model import Config
from brokerd.config.problems import ConfigError
from brokerd.config.values import ListenConfig
from brokerd.daemon.reload import Cause, Prepared, ReloadOutcome, plan_fields, prepare
from brokerd.daemon.systemd import Supervisor
from brokerd.daemon.threads import run_in_thread
from brokerd.log.api import Log
from brokerd.log.logger import AuditError
from brokerd.net.listen.listener import ListenError
from brokerd.net.listen.socket_activation import ActivatedSocket, ActivatedSockets

__all__ = ["Reloadable", "Reloading"]

#: Entries of a configuration that are freed in one turn of the event loop: a millisecond's work.
_FREED: Final = 256


class Reloadable(Protocol):
    """A daemon, as far as it is reloaded.

    reloads: how reloads ended; those that were ``refused`` are counted here. reload_refused: whether the last one was.
    """

    config: Config
    log: Log
    supervisor: Supervisor
    reloads: Counter[str]
    reload_refused: bool

    @property
    def activated(self) -> ActivatedSockets:
        """What the service manager handed over."""

    @property
    def assigned(self) -> dict[ListenConfig, list[ActivatedSocket]]:
        """Which entries of the configuration have which of those."""

    @property
    def serves(self) -> bool:
        """Whether it has started, and neither drains nor has stopped."""

    def reopen_log(self) -> None:
        """Begin anew a file of the log that was moved away."""

    def foreseen(self, prepared: Prepared) -> list[str]:
        """Return why it can't be taken over, as far as that can be seen without trying; called aside."""

    async def preview(self, prepared: Prepared, problems: list[str]) -> ReloadOutcome:
        """Return what would come of taking it over. problems: as ``foreseen`` returns them."""

    def opened(self, prepared: Prepared) -> Prepared:
        """Return it with its sockets and files opened; called aside. Raises ListenError or AuditError."""

    async def listen_again(self) -> None:
        """Listen again where a socket's file is gone."""

    def taking_over(self, prepared: Prepared, reason: str) -> Generator[None, None, ReloadOutcome]:
        """Take it over in turns. Raises ListenError or AuditError; then nothing has changed."""

    async def wait_for_revocations(self) -> None:
        """Return when everything that the last reload forbade has ended."""

    async def wait_until_settled(self) -> None:
        """Return when nothing that was asked is without an answer."""


class Reloading:
    """The reloads of one daemon."""

    def __init__(self, daemon: Reloadable) -> None:
        self._daemon = daemon
        self._one = asyncio.Lock()
        self._begun = asyncio.Event()
        #: Whether a reload that a signal asked for has not begun yet.
        self._waits = False
        #: Why nothing may change now that another process would not know of; "" while it may.
        self._kept_still = ""

    def begin(self) -> None:
        """The daemon has started: what was asked until now is done, and what is asked from now on at once."""
        self._begun.set()

    def wait(self) -> bool:
        """Have one reload wait to begin; return False where one does already, which reads all that is there by then."""
        waits, self._waits = self._waits, True
        return not waits

    async def run(self, reason: str, *, dry_run: bool = False) -> ReloadOutcome:
        """Reload, or say what would come of it; the caller settles."""
        daemon = self._daemon
        await self._begun.wait()
        if self._kept_still:
            self._waits = False
            if not dry_run:
                daemon.log.warning("daemon.reload_refused", reason=reason, cause="upgrade", problems=[self._kept_still])
            return ReloadOutcome(None, [self._kept_still], "upgrade")
        async with self._one:
            self._waits = False
            if dry_run:
                return await self._attempt(reason, dry_run=True)
            daemon.supervisor.reloading()
            # Whoever moved the audit file away to begin a new one asks for a reload too.
            await run_in_thread(daemon.reopen_log)
            await daemon.listen_again()
            problem = "it failed"
            try:
                outcome = await self._attempt(reason)
                problem = outcome.problems[0] if outcome.problems else ""
            finally:
                daemon.supervisor.reloaded(problem)
            if outcome.problems:
                daemon.reloads["refused"] += 1
                daemon.reload_refused = True
                daemon.log.warning(
                    "daemon.reload_refused", reason=reason, cause=outcome.cause, problems=outcome.problems
                )
            return outcome

    async def _attempt(self, reason: str, *, dry_run: bool = False) -> ReloadOutcome:
        """Read, compare and take over, or only look; return how it went."""
        daemon = self._daemon
        running, activated, assigned = daemon.config, daemon.activated, daemon.assigned
        cause: Cause
        prepared: Prepared | None = None
        # Of the two configurations one ends with this call, and its entries are not to be freed all at once.
        entries: list[object] = list(running.clients.values())
        try:
            ready = prepared = await run_in_thread(lambda: prepare(running, activated, assigned))
            entries += ready.config.clients.values()
            problems = []
            if dry_run:
                problems = await run_in_thread(lambda: daemon.foreseen(ready))
            else:
                prepared = await run_in_thread(lambda: daemon.opened(ready), discard=Prepared.discard)
            await daemon.wait_for_revocations()
            if daemon.serves:
                if dry_run:
                    return await daemon.preview(prepared, problems)
                return await self._take_over(prepared, reason)
            prepared.discard()
            cause, problems = "draining", ["the broker stops: it takes over nothing more (start it again)"]
        except ConfigError as error:
            cause, problems = "config", str(error).splitlines()
        except ListenError as error:
            cause, problems = "listen", str(error).splitlines()
        except AuditError as error:
            cause, problems = "audit", [str(error)]
        finally:
            asyncio.get_running_loop().call_soon(_let_go, entries)
        return ReloadOutcome(None if prepared is None else plan_fields(prepared.plan, ()), problems, cause)

    async def _take_over(self, prepared: Prepared, reason: str) -> ReloadOutcome:
        """Take it over in turns of the event loop, between which messages pass."""
        turns = self._daemon.taking_over(prepared, reason)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                outcome: ReloadOutcome = end.value
                return outcome
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def undisturbed(self, why: str) -> AsyncIterator[None]:
        """Have no reload begin inside, and none go on. why: what whoever asks for one is told."""
        await self._begun.wait()
        self._kept_still = why
        try:
            await self._daemon.wait_until_settled()
            async with self._one:
                yield
        finally:
            self._kept_still = ""


def _let_go(entries: list[object]) -> None:
    """Hold no more on to some entries, and to the others in later turns of the event loop."""
    del entries[-_FREED:]
    if entries:
        asyncio.get_running_loop().call_soon(_let_go, entries)
