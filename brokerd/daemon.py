"""The daemon: its parts put together, started, reloaded, drained and stopped, inside any asyncio program.

The process around it, with its signals and exit statuses, is :mod:`brokerd.process`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, Self

from brokerd import __version__
from brokerd.config.load import ConfigError, load
from brokerd.config.model import Config
from brokerd.config.plan import Plan, compare
from brokerd.config.values import ListenConfig
from brokerd.core import routing
from brokerd.core.broker import Broker, Order
from brokerd.core.broker import Limits as CoreLimits
from brokerd.core.service import reply_to, stats
from brokerd.logs import make_log
from brokerd.net.handed import Handed, HandedSocket, listen_at
from brokerd.net.keyring import Keyring
from brokerd.net.listening import ListenError, Listening, listen
from brokerd.net.server import Log, Server
from brokerd.supervise import Supervisor
from brokerd_client.address import Address

__all__ = ["Daemon"]


class Daemon:
    """One broker in the running event loop.

    config: what it serves. log: where its events go. supervisor: the service manager that is told how it fares.
    handed: the sockets that the service manager listens at for it.
    """

    def __init__(
        self,
        config: Config,
        log: Log | None = None,
        *,
        supervisor: Supervisor | None = None,
        handed: Handed | None = None,
    ) -> None:
        self.config = config
        self.supervisor = supervisor or Supervisor()
        self._handed = handed or Handed()
        self._allotted: dict[ListenConfig, list[HandedSocket]] = {}
        self._own_log = log is None
        self.log: Log = log or make_log(config.log.level, config.log.format)
        self.broker = Broker(
            config.clients.values(),
            limits=_core_limits(config),
            version=__version__,
            routing=routing.NAME,
            now_wall=time.time(),
        )
        self._server: Server | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()
        self._background: set[asyncio.Task[object]] = set()
        self.stopped = asyncio.Event()

    @property
    def addresses(self) -> list[Address]:
        """Where it listens, ports chosen by the system filled in."""
        return [] if self._server is None else [listening.address for listening in self._server.listening]

    async def start(self) -> None:
        """Listen at every configured address. Raises ListenError; then it listens at none."""
        began = time.perf_counter()
        config = self.config
        keyring = Keyring(config.clients.values(), config.limits.identify_by_key)
        self._allotted = self._handed.allot(config.listen)
        opened = _listen_at(config.listen, self._allotted)
        self._server = Server(self.broker, keyring, config.limits, self.log, wall=time.time)
        self._server.on_order = self._on_order
        self._server.start(opened)
        self.log.info(
            "daemon.started",
            version=__version__,
            routing=routing.NAME,
            **_why_python(),
            python=".".join(map(str, sys.version_info[:3])),
            loop=type(asyncio.get_running_loop()).__module__,
            listeners=[str(address) for address in self.addresses],
            clients=len(config.clients),
            config=config.path,
            ready_ms=round((time.perf_counter() - began) * 1000, 1),
        )
        self._warn_of_unmet()
        self.supervisor.ready(self._status)

    def _status(self) -> str:
        """Return how the broker fares, in a line for people."""
        assert self._server is not None
        connections, handshakes = len(self._server.links), self._server.handshakes
        messages = self.broker.totals["messages_in"] + sum(link.session.messages_in for link in self._server.links)
        return f"{connections} connections, {handshakes} handshakes under way, {messages} messages"

    def _warn_of_unmet(self) -> None:
        """Tell of entries whose socket the service manager does not hand over; they listen by themselves."""
        for entry in self._handed.unmet(self.config.listen, self._allotted):
            self.log.warning(
                "listener.not_handed_over",
                listener=str(entry.address),
                name=entry.name,
                reason=f"the service manager hands over no socket called {entry.name} nor one at this address "
                f"(give the .socket unit FileDescriptorName={entry.name}, or take the name out)",
            )

    def _on_order(self, order: Order) -> None:
        asker = order.source.client.name
        if order.op == "drain":
            reply_to(self.broker, order.source, order.id, {"draining": True})
            self.stop_soon(f"asked for by {asker}")
        else:
            self._in_background(self._reload_for(order, f"asked for by {asker}"))

    async def _reload_for(self, order: Order, reason: str) -> None:
        problems = await self.reload(reason)
        reply_to(self.broker, order.source, order.id, {"reloaded": not problems, "problems": problems})
        assert self._server is not None
        self._server.settle()

    def reload_soon(self, reason: str) -> None:
        """Begin to reload; how it went is in the log."""
        self._in_background(self.reload(reason))

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def reload(self, reason: str) -> list[str]:
        """Read the configuration again and take it over whole, or not at all.

        Returns what is wrong, a line each; with an empty list everything was taken over. A client whose
        entry did not change keeps its connections; one that is gone, or whose key in use is gone, is disconnected.
        """
        async with self._reloading:
            problems: list[str] = []
            self.supervisor.reloading()
            try:
                # In a thread: with many clients it takes a while, and messages are to go on.
                self.apply(await asyncio.to_thread(load, Path(self.config.path)), reason)
            except (ConfigError, ListenError) as error:
                problems = str(error).splitlines()
                self.log.warning("daemon.reload_refused", reason=reason, problems=problems)
            finally:
                self.supervisor.reloaded(problems[0] if problems else "")
            return problems

    def apply(self, config: Config, reason: str) -> None:
        """Take over another configuration. Raises ListenError; then nothing has changed."""
        plan = compare(self.config, config)
        allotted = self._handed.allot(config.listen)
        self._refuse_swaps(plan, allotted)
        self._take_over(config, plan, _listen_at(plan.opened, allotted))
        self._allotted = allotted
        self._warn_of_unmet()
        self.log.info(
            "daemon.reloaded",
            reason=reason,
            added=list(plan.added),
            changed=list(plan.changed),
            removed=list(plan.removed),
            listeners=[str(address) for address in self.addresses],
        )

    def _refuse_swaps(self, plan: Plan, allotted: dict[ListenConfig, list[HandedSocket]]) -> None:
        """Raise ListenError if an address that stays would be listened at by other sockets than before."""
        before = {entry.address: sockets for entry, sockets in self._allotted.items()}
        for entry in plan.altered:
            if allotted.get(entry, []) != before.get(entry.address, []):
                raise ListenError(
                    f"{entry.address}: with name: {entry.name} another socket of the service manager's would be "
                    "listened at (restart the broker for that)"
                )

    def _take_over(self, config: Config, plan: Plan, opened: list[Listening]) -> None:
        server = self._server
        assert server is not None
        self.config = config
        keyring = Keyring(config.clients.values(), config.limits.identify_by_key)
        keyring.adopt_order(server.keyring)
        if plan.log and self._own_log:
            self.log = make_log(config.log.level, config.log.format)
            server.log_to(self.log)
        gone = self.broker.reconfigure(config.clients, _core_limits(config), time.time())
        server.reconfigure(keyring, config.limits, plan.altered)
        server.start(opened)
        server.stop_listening_at({entry.address for entry in plan.closed})
        server.disconnect(gone, "its name was removed from the configuration")
        server.disconnect(
            [link.session for link in server.links if not keyring.holds(link.credential)],
            "the key it uses was removed from the configuration",
        )

    def stop_soon(self, reason: str) -> bool:
        """Begin to drain; return False if that had begun already."""
        if self._stopping is not None:
            return False
        self.log.info("daemon.stopping", reason=reason, drain_timeout_s=self.config.limits.drain_timeout)
        self.supervisor.stopping(self.config.limits.drain_timeout)
        self._stopping = asyncio.get_running_loop().create_task(self.stop())
        return True

    async def stop(self) -> None:
        """Drain: accept nobody, take no new message, write what waits, close.

        What can't be written within ``limits.drain_timeout`` is cut off.
        """
        try:
            if self._server is not None:
                cut_off = await self._server.drain(self.config.limits.drain_timeout)
                self.log.info("daemon.stopped", cut_off=cut_off, messages=self.broker.totals["messages_in"])
        finally:
            self.supervisor.close()
            self.stopped.set()

    def cut_off(self, name: str) -> None:
        """Close a client's connections at once, whatever waits for them."""
        client = self.broker.exchange.resolve(name)
        for session in [] if client is None else list(client.sessions.values()):
            session.link.lost("cut off")

    def stats(self) -> dict[str, Any]:
        """Return what the `$broker` operation ``stats`` answers."""
        return stats(self.broker)

    def kill(self) -> None:
        """Close everything at once."""
        if self._server is not None:
            self._server.cut_off()
        self.supervisor.close()
        self.stopped.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._stopping is None:
            await self.stop()
        await self.stopped.wait()


def _why_python() -> dict[str, str]:
    """Return a field that says why the slower routing loop runs, where it does."""
    if routing.NAME != "python":
        return {}
    forced = os.environ.get("BROKERD_PURE") == "1"
    return {"because": "BROKERD_PURE=1" if forced else "brokerd was installed without a working C compiler"}


def _core_limits(config: Config) -> CoreLimits:
    return CoreLimits(config.limits.max_message, config.limits.wait_timeout)


def _listen_at(entries: Iterable[ListenConfig], allotted: dict[ListenConfig, list[HandedSocket]]) -> list[Listening]:
    """Return the listening sockets of all entries. Raises ListenError; then none is left open."""
    opened: list[Listening] = []
    try:
        for entry in entries:
            opened += listen_at(entry, allotted[entry]) if entry in allotted else listen(entry)
    except ListenError:
        for listening in opened:
            listening.close()
        raise
    return opened
