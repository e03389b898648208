"""Reloads of a running daemon, one at a time and none during an upgrade.

Each reload is refused or taken over whole. The module :mod:`brokerd.daemon.reload`
prepares a configuration, and the daemon takes it over. This module decides when, and
reports the outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from brokerd.config.diff import merge
from brokerd.config.problems import ConfigError
from brokerd.daemon.mailbox_store import StoreError
from brokerd.daemon.reload import Cause, Prepared, ReloadOutcome, plan_fields, prepare
from brokerd.daemon.threads import run_in_thread
from brokerd.log.logger import AuditError
from brokerd.net.listen.listener import ListenError

if TYPE_CHECKING:
    from brokerd.daemon.daemon import Daemon

__all__ = ["Reloading"]

#: Entries of a configuration that are freed per turn of the event loop: a millisecond's
#: work.
_FREED: Final = 256


class Reloading:
    """The reloads of one daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._one = asyncio.Lock()
        self._serving = asyncio.Event()
        #: Whether a reload that a signal requested has not begun yet.
        self._waits = False
        #: Why reloads are blocked during an upgrade (the new process would miss them);
        #: "" while they are allowed.
        self._kept_still = ""

    def begin(self) -> None:
        """Run the reloads requested during the start, and later ones at once.

        Called when the daemon has started.
        """
        self._serving.set()

    def wait(self) -> bool:
        """Mark a reload as waiting to begin; return False if another waits already.

        The waiting reload reads the files as they are when it begins.
        """
        waits, self._waits = self._waits, True
        return not waits

    async def run(self, reason: str, *, dry_run: bool = False) -> ReloadOutcome:
        """Reload, or only report what a reload would do; the caller settles."""
        daemon = self._daemon
        log = daemon.log.bind(reason=reason)
        await self._serving.wait()
        if self._kept_still:
            self._waits = False
            if not dry_run:
                log.warning("daemon.reload_refused", cause="upgrade", problems=[self._kept_still])
            return ReloadOutcome(None, [self._kept_still], "upgrade")
        async with self._one:
            self._waits = False
            if dry_run:
                return await self._attempt(reason, dry_run=True)
            daemon.supervisor.reloading()
            # A program that rotates the audit file moves it away and then requests a
            # reload.
            await run_in_thread(daemon.reopen_log)
            await daemon.listen_again()
            problem = "reload failed"
            try:
                outcome = await self._attempt(reason)
                problem = outcome.problems[0] if outcome.problems else ""
            finally:
                daemon.supervisor.reloaded(problem)
            if outcome.problems:
                daemon.reloads.refuse()
                log.warning("daemon.reload_refused", cause=outcome.cause, problems=outcome.problems)
            return outcome

    async def _attempt(self, reason: str, *, dry_run: bool = False) -> ReloadOutcome:
        """Read, compare and take over, or only check; return the outcome."""
        daemon = self._daemon
        running, activated, assigned = daemon.config, daemon.activated, daemon.assigned
        keyring = daemon.server.keyring
        cause: Cause
        prepared: Prepared | None = None
        # One of the two configurations is freed after this call, and its entries must
        # not be freed all at once.
        entries: list[object] = [*running.clients.values(), *keyring.credentials()]
        try:
            ready = prepared = await run_in_thread(
                lambda: prepare(running, activated, assigned, keyring)
            )
            entries += ready.config.clients.values()
            entries += ready.keyring.credentials()
            # Last, because the outcome shows them.
            entries[:0] = ready.plan.changed.values()
            problems = []
            if dry_run:
                problems = await run_in_thread(lambda: daemon.foreseen(ready))
            else:
                prepared = await run_in_thread(
                    lambda: daemon.opened(ready), discard=Prepared.discard
                )
            await daemon.wait_for_revocations()
            if daemon.serves and not dry_run and not problems:
                await daemon.store.open(merge(running, ready.config).store)
            if daemon.serves:
                if dry_run:
                    return await daemon.preview(prepared, problems)
                return await self._take_over(prepared, reason)
            prepared.discard()
            cause, problems = (
                "draining",
                ["the broker is stopping: it accepts no new configuration (start it again)"],
            )
        except ConfigError as error:
            cause, problems = "config", str(error).splitlines()
        except ListenError as error:
            cause, problems = "listen", str(error).splitlines()
        except AuditError as error:
            cause, problems = "audit", [str(error)]
        except StoreError as error:
            ready.discard()
            cause, problems = "store", [str(error)]
        finally:
            asyncio.get_running_loop().call_soon(_let_go, entries)
        return ReloadOutcome(
            None if prepared is None else plan_fields(prepared.plan, ()), problems, cause
        )

    async def _take_over(self, prepared: Prepared, reason: str) -> ReloadOutcome:
        """Take it over in turns of the event loop, between which messages pass."""
        turns = self._daemon.taking_over(prepared, reason)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                outcome: ReloadOutcome = end.value
                return outcome
            self._daemon.server.settle()
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def undisturbed(self, reason: str) -> AsyncIterator[None]:
        """Prevent reloads inside the block.

        reason: the reason that a client gets when it requests a reload.
        """
        await self._serving.wait()
        self._kept_still = reason
        try:
            await self._daemon.wait_until_settled()
            async with self._one:
                yield
        finally:
            self._kept_still = ""


def _let_go(entries: list[object]) -> None:
    """Free some entries now, and the rest in later turns of the event loop."""
    del entries[-_FREED:]
    if entries:
        asyncio.get_running_loop().call_soon(_let_go, entries)
