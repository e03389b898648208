"""Daemon: starts, reloads, drains and stops a broker inside any asyncio program.

The process around it, with its signals and exit statuses, is
:mod:`brokerd.daemon.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable, Container, Coroutine, Generator, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Self

from structlog.typing import FilteringBoundLogger

from brokerd import __version__
from brokerd.config.diff import merge
from brokerd.config.key_validity import ending
from brokerd.config.model import Config
from brokerd.config.values import ListenConfig
from brokerd.core import WHY_SOURCES, routing
from brokerd.core.broker import AdminCommand, Broker, CoreLimits
from brokerd.core.session import Session
from brokerd.daemon import garbage
from brokerd.daemon.admin import AdminCommands
from brokerd.daemon.cluster_host import ClusterHost, MembershipError
from brokerd.daemon.key_expiry import KeyExpiryMonitor, uses_of
from brokerd.daemon.mailbox_store import MailboxStore, StoreError
from brokerd.daemon.online_names import OnlineNames
from brokerd.daemon.reload import (
    Cause,
    Prepared,
    ReloadOutcome,
    blockers,
    compare_running,
    json_pieces,
    logged,
    plan_fields,
)
from brokerd.daemon.reloader import Reloading
from brokerd.daemon.startup_warnings import warn_of_keys, warn_of_plain, warn_of_surroundings
from brokerd.daemon.systemd import Supervisor
from brokerd.daemon.threads import run_in_thread
from brokerd.log.logger import DaemonLog
from brokerd.monitor.sources import ReloadCounts, Sources
from brokerd.monitor.toggle import Switch, preload
from brokerd.net.bound_loggers import listener_logger
from brokerd.net.handshake.keyring import Keyring
from brokerd.net.handshake.peer_uid import unseen
from brokerd.net.listen.listener import ListenError, Listening, Resolved, listen
from brokerd.net.listen.socket_activation import ActivatedSocket, ActivatedSockets, listen_for
from brokerd.net.server import Server
from brokerd_client.address import Address
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.upgrade.new_process import UpgradeTarget

__all__ = ["Daemon", "Stopped"]

#: Seconds between two checks of the listening sockets' files: a cleaner of temporary
#: directories may remove them.
LOOK_S: Final = 10.0
#: Subscriptions checked against new rules in one turn of the event loop while a reload
#: waits: some milliseconds' work.
_REVIEWED: Final = 64
#: Unauthorized connections that a reload begins to close in one turn of the event loop:
#: half a millisecond's work.
_DISCONNECTED: Final = 256
#: Most names of orphaned mailboxes in a log event.
_SHOWN: Final = 20


class Stopped(Exception):
    """The daemon was told to stop while it started."""


class Daemon:
    """One broker in the running event loop.

    Attributes:
        config: The configuration in use.
        log: Where log events go.
        supervisor: The service manager, which is told the daemon's state.
        activated: Sockets that the service manager opened for the daemon.

        reloads: The results of the reloads.
    """

    def __init__(
        self,
        config: Config,
        log: FilteringBoundLogger | None = None,
        *,
        supervisor: Supervisor | None = None,
        activated: ActivatedSockets | None = None,
    ) -> None:
        self.config = config
        self.supervisor = supervisor or Supervisor()
        self._activated = activated or ActivatedSockets()
        self._assigned: dict[ListenConfig, list[ActivatedSocket]] = {}
        self._own_log: DaemonLog | None = None
        if log is None:
            self._own_log = DaemonLog(config.log)
            log = self._own_log.logger
        self.log: FilteringBoundLogger = log
        self.broker = Broker(
            config.clients.values(),
            limits=_core_limits(config),
            version=__version__,
            routing=routing.NAME,
            now_wall=time.time(),
        )
        self.store = MailboxStore(self.broker, self.log, self._settle)
        self.cluster_host = ClusterHost(self.broker, self.log, self._settle)
        self.reloads = ReloadCounts(self.broker.status.started_at)
        self._server: Server | None = None
        self._monitor = Switch(
            Sources(
                broker=self.broker,
                log=self.log,
                reloads=self.reloads,
                config=lambda: self.config,
                server=lambda: self.server,
                not_ready=lambda: self.not_ready,
                cluster_failure=lambda: self.cluster_host.failure,
                key_expiries=self.key_expiries,
                lost_lines=lambda: 0 if self._own_log is None else self._own_log.lost,
            )
        )
        self._stopping: asyncio.Task[None] | None = None
        self.reloading = Reloading(self)
        self._key_expiry_monitor: KeyExpiryMonitor | None = None
        #: Replaces the process; None where the daemon is only a part of one.
        self.on_upgrade: Callable[[str, AdminCommand | None], None] | None = None
        self._background: set[asyncio.Task[object]] = set()
        self.stopped = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._online_names = OnlineNames(self, os.environ)
        #: Addresses where clients can no longer connect, and for which the log already
        #: says so.
        self._lost: set[Address] = set()

    @property
    def addresses(self) -> list[Address]:
        """Addresses that the daemon listens at, with ports chosen by the system filled
        in.
        """
        return (
            []
            if self._server is None
            else [listening.address for listening in self._server.listening]
        )

    @property
    def monitor_addresses(self) -> list[Address]:
        """Addresses that the monitor listens at, in the same form; empty without a
        monitor.
        """
        return self._monitor.addresses

    @property
    def server(self) -> Server:
        """The server; it exists once the daemon has started."""
        assert self._server is not None
        return self._server

    @property
    def own_log(self) -> DaemonLog | None:
        """The daemon's own log; None where the program gave another log."""
        return self._own_log

    @property
    def activated(self) -> ActivatedSockets:
        """The sockets that the service manager handed over."""
        return self._activated

    @property
    def assigned(self) -> dict[ListenConfig, list[ActivatedSocket]]:
        """The sockets from the service manager, by the ``listen`` entry that uses them."""
        return self._assigned

    @property
    def serves(self) -> bool:
        """Whether the daemon has started, and neither drains nor has stopped."""
        return self._server is not None and not self.stopping

    @property
    def stopping(self) -> bool:
        """Whether the daemon drains or has stopped."""
        return self._stopping is not None or self.stopped.is_set()

    @property
    def monitor_listening(self) -> list[Listening]:
        """The sockets of the monitor."""
        return self._monitor.listening

    @property
    def not_ready(self) -> str:
        """The reason why no new client should be sent here, or ""."""
        if self._stopping is not None or self.broker.status.draining:
            return "the broker is draining"
        if self.store.failure:
            return f"the store of the mailboxes has failed: {self.store.failure}"
        return "" if self.addresses else "the broker is starting"

    async def start(self, old_process: UpgradeTarget | None = None) -> None:
        """Listen at every configured address.

        Raises ListenError, StoreError, MembershipError or Stopped; the daemon then listens
        at no address.
        old_process: a serving process that this one replaces.
        """
        began = time.perf_counter()
        config = self.config
        with garbage.undisturbed():
            keyring = Keyring(config.clients.values(), config.limits.identify_by_key)
        if config.monitor is not None:
            await run_in_thread(lambda: preload(config.monitor))
        await self.cluster_host.prepare(config)
        # In a thread: a name service or a file system may not answer, and a signal must
        # still end the start.
        self._assigned = assigned = await run_in_thread(
            lambda: self._activated.assign(config.listen)
        )
        if old_process is None:
            # An upgrade disconnects no client.
            await self._online_names.read()
        offered = () if old_process is None else old_process.offered
        former = [] if old_process is None else old_process.monitored
        stays = config.monitor is not None and any(
            listening.config.address == config.monitor.address for listening in former
        )
        entries = [entry for entry in config.listen if entry.address not in offered]
        monitor = [] if config.monitor is None or stays else [config.monitor.listen]
        opened, monitored = await run_in_thread(
            lambda: _open(entries, monitor, assigned), discard=_close_all
        )
        try:
            if not self.stopping and (old_process is None or not old_process.has_store):
                await self.store.open(config.store)
        except StoreError:
            _close_all((opened, monitored))
            raise
        self._server = Server(self.broker, keyring, config.limits, self.log, wall=time.time)
        self._server.on_admin_command = AdminCommands(self).execute
        self.cluster_host.attach(config, self._server)
        try:
            if not self.stopping and old_process is None:
                await self.cluster_host.join()
            if self.stopping:
                raise Stopped
        except (MembershipError, Stopped):
            self._server = None
            self.cluster_host.kill()
            self.store.kill()
            _close_all((opened, monitored))
            raise
        # These take milliseconds per ten thousand clients. After an upgrade's pause has
        # begun, nothing may.
        expiring, users_unseen = ending(config.clients.values()), unseen(config.clients)
        upgrade_fields: dict[str, Any] = {}
        if old_process is None:
            self._server.start(opened)
        else:
            try:
                upgrade_fields = old_process.take_over(self._server, config.listen, opened)
            except BaseException:
                for listening in (*opened, *monitored):
                    listening.close()
                raise
            if old_process.boot_id:
                self.cluster_host.boot_id = old_process.boot_id
                self.cluster_host.reconfigure(config)
            self.in_background(self.cluster_host.join_again())
            self.reloads.results.update(old_process.reloads)
            if old_process.store is not None:
                facts, sock = old_process.store
                self.store.take_over(facts, sock, config.store)
                self.in_background(self.store.renew_if_older(facts))
                self._settle()
        if stays:
            monitored = former
        else:
            for listening in former:
                listening.close()
        self._monitor.turn(config.monitor, monitored)
        later = asyncio.get_running_loop().call_later
        self._key_expiry_monitor = KeyExpiryMonitor(
            self.log, lambda: datetime.now(UTC), later, self._server.credentials
        )
        self.log.info(
            "daemon.started" if old_process is None else "daemon.upgraded",
            version=__version__,
            routing=routing.NAME,
            **_why_python(),
            python=".".join(map(str, sys.version_info[:3])),
            loop=type(asyncio.get_running_loop()).__module__,
            listeners=[str(address) for address in self.addresses],
            clients=len(config.clients),
            config=config.path,
            ready_ms=round((time.perf_counter() - began) * 1000, 1),
            **upgrade_fields,
        )
        if WHY_SOURCES:
            self.log.warning("daemon.slow_routing", reason=WHY_SOURCES)
        self._warn({entry.address for entry in config.listen}, users_unseen)
        self._key_expiry_monitor.watch(config, expiring)
        if old_process is None:
            self.supervisor.ready(self._status)
        else:
            # The service manager ignores this process until the old process has
            # announced it.
            old_process.when_gone(lambda: self.supervisor.ready(self._status))
        self._looking = asyncio.get_running_loop().create_task(self._look_after_files())
        self._online_names.begin()
        self.reloading.begin()

    def _status(self) -> str:
        """Return the broker's state as a line for people."""
        assert self._server is not None
        connections, handshakes = len(self._server.connections), self._server.handshakes
        messages = self.broker.status.totals["messages_in"] + sum(
            connection.session.messages_in for connection in self._server.connections
        )
        return f"{connections} connections, {handshakes} handshakes under way, {messages} messages"

    def _warn(self, among: Container[Address], users_unseen: dict[str, list[int]]) -> None:
        """Log where the surroundings differ from what the configuration expects.

        Args:
            among: The addresses of the entries that are new in it.
            users_unseen: The clients with users that this process can't see.
        """
        config = self.config
        warn_of_surroundings(self.log, config.listen, users_unseen, self._activated, self._assigned)
        warn_of_plain(self.log, self.server.listening, among)
        warn_of_keys(self.log, config.warnings)

    def _settle(self) -> None:
        if self._server is not None:
            self._server.settle()

    def size(self) -> int:
        """Return the number of connections and subscriptions, which own most objects."""
        return len(self.server.connections) + len(self.broker.topics)

    def in_background(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine as a background task; ``wait_until_settled`` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def reload(self, reason: str) -> list[str]:
        """Read the configuration again and take it over whole, or not at all.

        Returns the problems, a line each; an empty list means that everything was taken
        over. A client whose entry did not change keeps its connections. A client is
        disconnected if it is gone, or if the key that it used is gone.
        """
        outcome = await self.reloading.run(reason)
        self._settle()
        return outcome.problems

    def reload_soon(self, reason: str) -> None:
        """Begin to reload once the daemon has started; the result is in the log.

        A reload that already waits to begin serves this request too.
        """
        if self.reloading.wait():
            self.in_background(self.reload(reason))

    def apply(self, config: Config, reason: str) -> None:
        """Take over another configuration.

        Raises ListenError or AuditError; nothing has changed then.
        """
        self.take_over(
            self.opened(
                compare_running(
                    self.config, config, self._activated, self._assigned, self.server.keyring
                )
            ),
            reason,
        )
        self._settle()

    def foreseen(self, prepared: Prepared) -> list[str]:
        """Return why the configuration can't be taken over, as far as a check without
        trying shows.

        To be called in a thread.
        """
        problems = blockers(prepared)
        if self._own_log is not None:
            problems += self._own_log.precheck(prepared.config.log)
        return problems

    def opened(self, prepared: Prepared) -> Prepared:
        """Return ``prepared`` with its new sockets and audit file opened; to be called
        in a thread.

        Raises ListenError or AuditError; nothing is open then.
        """
        if prepared.blocked:
            raise ListenError("\n".join(prepared.blocked))
        plan = prepared.plan
        opened = _open(plan.opened, plan.monitor_opened, prepared.assigned, prepared.resolved)
        try:
            audit = (
                None if self._own_log is None else self._own_log.opened_audit(prepared.config.log)
            )
        except BaseException:
            _close_all(opened)
            raise
        return replace(prepared, opened=opened, audit=audit)

    async def preview(self, prepared: Prepared, problems: list[str]) -> ReloadOutcome:
        """Return the outcome that a reload would have.

        problems: as ``foreseen`` returns them.
        """
        leaving: list[tuple[Session, str]] = []
        for batch in self.server.unauthorized_in_batches(prepared.keyring):
            leaving += batch
            await asyncio.sleep(0)
        plan = plan_fields(prepared.plan, leaving)
        plan_json: list[bytes] = []
        for piece in json_pieces(plan):
            plan_json.append(piece)
            await asyncio.sleep(0)
        cause: Cause = "listen" if problems else ""
        return ReloadOutcome(plan, problems, cause, prepared.warnings, plan_json)

    def take_over(self, prepared: Prepared, reason: str) -> ReloadOutcome:
        """Take over the configuration at once; see ``taking_over``."""
        turns = self.taking_over(prepared, reason)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                outcome: ReloadOutcome = end.value
                return outcome

    def taking_over(self, prepared: Prepared, reason: str) -> Generator[None, None, ReloadOutcome]:
        """Take over the configuration in turns; the caller settles after each one.

        The first turn does all that can fail, and a failure leaves no trace. prepared:
        with what it needs ``opened``. New addresses are open before old ones are
        closed. Raises ListenError before the first turn ends; nothing has changed then.
        """
        server, plan = self.server, prepared.plan
        opened, monitored = prepared.opened
        try:
            server.alter(entry for entry, _ in plan.altered)
        except ListenError:
            prepared.discard()
            raise
        former = self.config.clients
        config = self.config = merge(self.config, prepared.config)
        self._assigned = prepared.assigned
        if self._own_log is not None:
            self._own_log.take_over(config.log, prepared.audit)
        changed_names = (*plan.added, *plan.changed)
        for _ in self.broker.reconfiguring(
            config.clients, _core_limits(config), time.time(), changed_names, plan.removed
        ):
            # The new objects replace about as many old ones, so the collector does not
            # notice how many they are. If it ran, it would walk all of them.
            garbage.set_apart()
            yield
        # The group of clients before this was one turn's work.
        yield
        server.reconfigure(prepared.keyring, config.limits)
        self.cluster_host.reconfigure(config)
        if self.stopping:
            _close_all((opened, monitored))
        else:
            server.start(opened)
            server.stop_listening_at({entry.address for entry in plan.closed})
            if plan.monitor:
                self._monitor.turn(config.monitor, monitored)
        leaving: list[tuple[Session, str]] = []
        for batch in server.unauthorized_in_batches():
            leaving += batch
            yield
        self.reloads.accept(time.time())
        garbage.set_apart()
        fields = plan_fields(plan, leaving)
        yield
        self.log.info(
            "daemon.reloaded",
            reason=reason,
            listeners=[str(address) for address in self.addresses],
            **logged(fields),
        )
        if plan.orphaned:
            self.log.warning(
                "mailbox.orphaned",
                names=list(plan.orphaned[:_SHOWN]),
                count=len(plan.orphaned),
                reason="their messages stay in the store until they are purged (brokerctl mailbox)",
            )
        yield
        self._warn(
            {entry.address for entry in (*plan.opened, *(altered for altered, _ in plan.altered))},
            prepared.users_unseen,
        )
        if self._key_expiry_monitor is not None and not self.stopping:
            self._key_expiry_monitor.watch(config, prepared.ending)
        # Encoded here, so that nothing has to be done between the answer and the rest.
        plan_json: list[bytes] = []
        for piece in json_pieces(fields):
            plan_json.append(piece)
            yield
        last: list[tuple[Session, str]] = []
        while leaving:
            # Taken out, so that the ended sessions are not freed all at once.
            batch = leaving[-_DISCONNECTED:]
            del leaving[-_DISCONNECTED:]
            for session, fault in batch:
                if former[session.client.name].admin:
                    last.append((session, fault))
                else:
                    self.broker.replies.close(session, fault, code=ErrorCode.KEY_REMOVED)
            yield
        # An administrator that must be disconnected gets its answer before its connection
        # closes.
        for session, fault in last:
            self.broker.replies.close(session, fault, code=ErrorCode.KEY_REMOVED)
        return ReloadOutcome(fields, warnings=prepared.warnings, plan_json=plan_json)

    async def _look_after_files(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            # If no thread can be started, the next round tries again.
            with contextlib.suppress(RuntimeError):
                await self.listen_again()

    async def listen_again(self) -> None:
        """Listen again where a socket's file is gone or was replaced; existing
        connections stay.
        """
        listening = [*self.server.listening, *self._monitor.listening]
        lost = await run_in_thread(lambda: [item for item in listening if item.is_lost()])
        for former in lost:
            await self._listen_again(former)

    async def _listen_again(self, former: Listening) -> None:
        config, address = former.config, former.address
        log = listener_logger(self.log, address)
        try:
            opened = await run_in_thread(
                lambda: listen(config), discard=lambda opened: _close_all((opened,))
            )
        except ListenError as error:
            if address not in self._lost:
                self._lost.add(address)
                log.error("listener.lost", reason=str(error))
            return
        of_server = any(listening is former for listening in self.server.listening)
        of_monitor = any(listening is former for listening in self._monitor.listening)
        if not self.serves or not (of_server or of_monitor) or former.config is not config:
            # A reload or the shutdown was faster.
            _close_all((opened,))
            return
        if of_server:
            self.server.listen_instead(former, *opened)
        else:
            self._monitor.turn(self.config.monitor, opened)
        self._lost.discard(address)
        log.warning("listener.restored", reason="socket file was removed or replaced")

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def wait_for_revocations(self) -> None:
        """Return when every subscription that the last reload forbade has ended.

        Another reload before that would end them all at once.
        """
        while self.broker.revocation:
            self.broker.revocation.run_deferred(_REVIEWED)
            await asyncio.sleep(0)

    async def wait_until_settled(self) -> None:
        """Return when every request has its answer and every decision is carried out."""
        self.server.settle()
        while self._background:
            await asyncio.wait(self._background)
            self.server.settle()

    def stop_soon(self, reason: str) -> bool:
        """Begin to drain; return False if the drain had begun already."""
        if self._stopping is not None:
            return False
        self.log.info(
            "daemon.stopping", reason=reason, drain_timeout_s=self.config.limits.drain_timeout
        )
        self.supervisor.stopping(self.config.limits.drain_timeout)
        self._stopping = asyncio.get_running_loop().create_task(self.stop())
        return True

    async def stop(self) -> None:
        """Drain: accept no client and no new message, write what waits, close.

        Bytes that can't be written within ``limits.drain_timeout`` are cut off.
        """
        try:
            self._stop_looking()
            if self._key_expiry_monitor is not None:
                self._key_expiry_monitor.close()
            await self._online_names.write_last()
            if self._server is not None:
                drained = await self._server.drain(self.config.limits.drain_timeout)
                self.log.info(
                    "daemon.stopped",
                    **drained._asdict(),
                    messages=self.broker.status.totals["messages_in"],
                )
            await self.cluster_host.leave()
            await self.store.close()
        finally:
            self._monitor.off()
            self.supervisor.close()
            self.stopped.set()

    def cut_off(self, name: str) -> None:
        """Close a client's connections at once, without writing the bytes that wait for
        them.
        """
        client = self.broker.exchange.resolve(name)
        for session in [] if client is None else list(client.sessions.values()):
            # Closing one session may close another, which is notified of it.
            if session.open:
                session.connection.lost("cut off")

    def stats(self) -> dict[str, Any]:
        """Return the answer to the `$broker` operation ``stats``."""
        return self.broker.operations.stats()

    def key_uses(self) -> Iterator[dict[str, Any]]:
        """Yield each client's keys with their ids, times and uses.

        The `$broker` operation ``keys`` answers with these entries.
        """
        return uses_of(self.config, self.server.keyring, self.server.credentials, datetime.now(UTC))

    def key_expiries(self) -> dict[str, datetime]:
        """Return, by client, the time from which its keys can no longer authenticate
        it.

        Only clients whose keys have an end are included.
        """
        return {} if self._key_expiry_monitor is None else self._key_expiry_monitor.expiries()

    def kill(self) -> None:
        """Close everything at once."""
        self._stop_looking()
        self._online_names.close()
        if self._key_expiry_monitor is not None:
            self._key_expiry_monitor.close()
        if self._server is not None:
            self._server.cut_off()
        self.cluster_host.kill()
        self.store.kill()
        self._monitor.off()
        self.supervisor.close()
        self.stopped.set()

    def reopen_log(self) -> None:
        """Open a new file where a file of the log was moved away."""
        if self._own_log is not None:
            self._own_log.reopen()

    def flush_log(self) -> None:
        """Write all log lines so far, if that can be done soon."""
        if self._own_log is not None:
            self._own_log.flush()

    def close_log(self) -> None:
        """Write the waiting log lines, if that can be done soon, and close the log."""
        if self._own_log is not None:
            self._own_log.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._stopping is None:
            await self.stop()
        await self.stopped.wait()
        self.close_log()


def _why_python() -> dict[str, str]:
    """Return a field with the reason why the slower routing loop runs, where it does."""
    return {"because": WHY_SOURCES} if WHY_SOURCES else {}


def _core_limits(config: Config) -> CoreLimits:
    limits = config.limits
    return CoreLimits(limits.max_message, limits.wait_timeout, limits.channels, limits.open_timeout)


def _close_all(groups: Iterable[Iterable[Listening]]) -> None:
    for group in groups:
        for listening in group:
            listening.close()


def _open(
    clients: Iterable[ListenConfig],
    monitor: Iterable[ListenConfig],
    assigned: dict[ListenConfig, list[ActivatedSocket]],
    resolved: Resolved | None = None,
) -> tuple[list[Listening], list[Listening]]:
    """Return the listening sockets for clients and for the monitor, as ``listen_for``
    does.
    """
    opened = listen_for(clients, assigned, resolved)
    try:
        return opened, listen_for(monitor, {}, resolved)
    except ListenError:
        for listening in opened:
            listening.close()
        raise
