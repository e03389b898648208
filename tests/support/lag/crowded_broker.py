"""A broker with 10,000 clients configured, and up to 10,000 connected, in a thread
whose callbacks are measured.

Most of the connected clients have no socket. Each has a Connection, whose socket is a
stand-in that takes all bytes written and never has any to be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from support.keys import key_of
from support.lag.meter import Meter, metered
from support.raw_client import Raw, login
from support.running_daemon import Recorder

from brokerd.config.load import load_text
from brokerd.config.model import Config
from brokerd.config.values import WhenFull
from brokerd.core.session import Session
from brokerd.daemon import Daemon, garbage
from brokerd.net.connection.connection import Connection
from brokerd_client.address import Address

__all__ = [
    "CLIENTS",
    "CONNECTED",
    "OWN",
    "QUEUES",
    "Crowded",
    "FakeSocket",
    "crowded",
    "large_config",
    "large_text",
    "queue_of",
]

T = TypeVar("T")


def queue_of(when_full: WhenFull, pool: bool) -> str:
    """Return the name of the client with this kind of queue."""
    return f"{'pool' if pool else 'one'}-{when_full}"


CLIENTS = 10_000
TIMEOUT_S = 60.0
#: Ordinary clients that are connected, without a socket each.
CONNECTED = 8000
QUEUES = [(when_full, pool) for when_full in WhenFull for pool in (False, True)]
#: Clients that a test logs in itself, with a socket, and their entries.
ROLES = {
    "ops": "admin: true",
    "sender": "",
    "subscriber": "subscribe: ['>', '$broker.>']",
    "crowd": "connections: 3000",
    **{
        queue_of(when_full, pool): f"when_full: {when_full}, connections: {4 if pool else 1}"
        for when_full, pool in QUEUES
    },
}
#: Sockets with small buffers; a file would need a place.
LISTEN, OWN = f"@brokerd-lag-{os.getpid()}", f"@brokerd-lag-{os.getpid()}-own"
_FDS = itertools.count(1_000_000)


def large_text(
    listen: str = LISTEN, extra: str = "", entry: str = "", limits: str = "", until: str = ""
) -> str:
    """Return a configuration file with 10,000 clients.

    Args:
        extra: Further sections.
        entry: The text of each client's entry.
        until: The time at which all keys expire.
    """
    names = [*ROLES, *(f"c{number}" for number in range(CLIENTS - len(ROLES)))]
    lines = [f'listen: ["{listen}"]', f"limits: {{{limits}}}", extra, "clients:"]
    for name in names:
        key = f'key: "{key_of(name).decode()}"'
        keys = f"keys: [{{{key}, not_after: {until}}}]" if until else key
        lines.append(f"  {name}: {{{keys}, {ROLES.get(name) or entry}}}")
    return "\n".join(lines) + "\n"


@functools.cache
def large_config(listen: str = LISTEN) -> Config:
    return load_text(large_text(listen))


class FakeSocket:
    """Replaces a connection's socket.

    Args:
        writable: Whether it takes written bytes.
    """

    family = socket.AF_UNIX
    type = socket.SOCK_STREAM
    proto = 0

    def __init__(self, writable: bool = True) -> None:
        self.writable = writable

    def fileno(self) -> int:
        return -1

    def send(self, data: Any) -> int:
        if not self.writable:
            raise BlockingIOError
        return len(data)

    def sendmsg(self, pieces: Any) -> int:
        if not self.writable:
            raise BlockingIOError
        return sum(map(len, pieces))

    def recv_into(self, space: Any) -> int:
        raise BlockingIOError

    def getsockopt(self, *what: int) -> bytes:
        return struct.pack("3i", 1, 0, 0)

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...


class _FakeSocketConnection(Connection):
    """A connection without a descriptor, which asks the event loop for nothing."""

    __slots__ = ("handed_over",)

    def open(self, session: Session, early: bytes) -> None:
        self.session = session

    def resume(self) -> None: ...

    def lost(self, why: str, *, written: bool = False) -> None:
        # There is nothing to wait for until it has arrived.
        super().lost(why)

    def write(self) -> None:
        if self.sock.writable:  # type: ignore[attr-defined]
            super().write()
        else:
            # As a socket that takes nothing.
            self.session.outbox.blocked = self.writing = True


class Crowded:
    """The broker, as the tests use it."""

    def __init__(
        self, daemon: Daemon, log: Recorder, meter: Meter, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.daemon = daemon
        self.log = log
        self.meter = meter
        self.loop = loop
        self.ended = threading.Event()

    @property
    def address(self) -> Address:
        return self.daemon.addresses[0]

    def login(self, name: str, **how: Any) -> Raw:
        return login(self.address, key_of(name), name.encode(), **how)

    def call(self, function: Callable[[], T]) -> T:
        """Call the function in the broker's thread, without measuring it; return its
        result.
        """
        return self._run(function, measured=False)

    def timed(self, function: Callable[[], T]) -> T:
        """Call the function in the broker's thread as a measured callback; return its
        result.
        """
        return self._run(function, measured=True)

    def _run(self, function: Callable[[], T], *, measured: bool) -> T:
        done: Future[T] = Future()

        def act() -> None:
            try:
                done.set_result(function())
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                done.set_exception(error)

        act.measured = measured  # type: ignore[attr-defined]
        self.loop.call_soon_threadsafe(act)
        return done.result(TIMEOUT_S)

    def connect_without_socket(self, name: str, *, writable: bool = True) -> Session:
        """Connect a client without a socket; in the broker's thread."""
        server, broker = self.daemon.server, self.daemon.broker
        (credential, *_) = server.keyring.named(name)
        connection = _FakeSocketConnection(server.context, FakeSocket(writable), credential)  # type: ignore[arg-type]
        connection.fd = next(_FDS)
        session = broker.attach(
            name, f"{connection.fd:x}", peer="unix uid=0", now_wall=0.0, connection=connection
        )
        server.connections.add(connection)
        connection.open(session, b"")
        return session

    def fill(self, count: int, *, writable: bool = True) -> list[Session]:
        """Connect ``count`` ordinary clients."""
        return self.call(
            lambda: self._settled(
                [
                    self.connect_without_socket(f"c{number}", writable=writable)
                    for number in range(count)
                ]
            )
        )

    def empty(self, sessions: list[Session]) -> None:
        """Disconnect these clients."""

        def lose() -> None:
            for session in sessions:
                session.connection.lost("the test says so")

        self.call(lose)
        self.idle()

    def _settled(self, result: T) -> T:
        self.daemon.server.settle()
        return result

    def session(self, address: str) -> Session:
        """Return the connection with this address."""
        found = self.call(lambda: self.daemon.broker.exchange.find(address))
        assert found is not None, address
        return found

    def idle(self, within_s: float = TIMEOUT_S) -> None:
        """Wait until the broker has no deferred work."""
        server, broker = self.daemon.server, self.daemon.broker

        def busy() -> bool:
            return (
                broker.has_deferred_work
                or bool(broker.touched)
                or server.context.settlement.is_closing
            )

        self.until(lambda: not busy(), within_s)

    def until(self, condition: Callable[[], bool], within_s: float = TIMEOUT_S) -> None:
        """Wait until a condition, evaluated in the broker's thread, is true."""
        deadline = time.monotonic() + within_s
        while not self.call(condition):
            assert time.monotonic() < deadline, "the condition never became true"
            time.sleep(0.003)

    def loop_ends(self) -> None:
        """Wait until the broker has stopped."""
        assert self.ended.wait(TIMEOUT_S), "the broker did not stop"

    def wait_until_routed(self, session: Session) -> None:
        """Wait until all bytes that a client has written are routed, or it is held or
        disconnected.
        """
        connection = session.connection

        def taken() -> bool:
            if connection.closed or session.closing or session.held_by is not None:
                return True
            try:
                unread = bool(connection.sock.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                unread = False
            return not (
                unread or connection.waits or connection.pending_input or connection.large_frame
            )

        self.until(taken)


@contextlib.contextmanager
def crowded(config: Config) -> Iterator[Crowded]:
    """Run a broker in a thread, with its callbacks measured, until the block ends."""
    started: list[Crowded | BaseException] = []
    ready = threading.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        log = Recorder()
        daemon = Daemon(config, log.logger)
        meter = Meter(loop)
        with metered(meter):
            try:
                await daemon.start()
                garbage.set_apart()
                started.append(Crowded(daemon, log, meter, loop))
            except BaseException as error:
                started.append(error)
                raise
            finally:
                ready.set()
            await daemon.stopped.wait()
        for each in started:
            if isinstance(each, Crowded):
                each.ended.set()

    def run() -> None:
        # As in the broker's own process; the garbage collector must not visit the objects
        # of the tests.
        gc.collect()
        with garbage.tended(), asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.run(main())

    thread = threading.Thread(target=run, name="broker")
    thread.start()
    try:
        assert ready.wait(TIMEOUT_S)
        (running,) = started
        if isinstance(running, BaseException):
            raise running
        try:
            yield running
        finally:
            with contextlib.suppress(RuntimeError):
                running.loop.call_soon_threadsafe(running.daemon.kill)
    finally:
        thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the broker did not stop"
