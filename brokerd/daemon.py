"""The daemon: its parts put together, started, drained and stopped; and its signals.

:class:`Daemon` is the broker inside any asyncio program; :func:`run` is the process around it.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from brokerd import __version__
from brokerd.config.model import Config
from brokerd.core import routing
from brokerd.core.broker import Broker, Order
from brokerd.core.broker import Limits as CoreLimits
from brokerd.core.service import reply_to
from brokerd.logs import make_log
from brokerd.net.keyring import Keyring
from brokerd.net.listening import ListenError, Listening, listen
from brokerd.net.server import Log, Server
from brokerd_client.address import Address
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["EX_CONFIG", "EX_FAILED", "Daemon", "loop_factory", "run"]

#: Exit status for a configuration that can't be used, from sysexits.h.
EX_CONFIG: Final = 78
EX_FAILED: Final = 1


class Daemon:
    """One broker in the running event loop.

    config: what it serves. log: where its events go.
    """

    def __init__(self, config: Config, log: Log | None = None) -> None:
        self.config = config
        self.log: Log = log or make_log(config.log.level, config.log.format)
        self.broker = Broker(
            config.clients.values(),
            limits=CoreLimits(config.limits.max_message, config.limits.wait_timeout),
            version=__version__,
            routing=routing.NAME,
            now_wall=time.time(),
        )
        self._server: Server | None = None
        self._stopping: asyncio.Task[None] | None = None
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
        opened: list[Listening] = []
        try:
            for entry in config.listen:
                opened += listen(entry)
        except ListenError:
            for listening in opened:
                listening.close()
            raise
        self._server = Server(self.broker, keyring, config.limits, self.log, wall=time.time)
        self._server.on_order = self._on_order
        self._server.start(opened)
        self.log.info(
            "daemon.started",
            version=__version__,
            routing=routing.NAME,
            python=".".join(map(str, sys.version_info[:3])),
            loop=type(asyncio.get_running_loop()).__module__,
            listeners=[str(address) for address in self.addresses],
            clients=len(config.clients),
            config=config.path,
            ready_ms=round((time.perf_counter() - began) * 1000, 1),
        )

    def _on_order(self, order: Order) -> None:
        if order.op == "drain":
            reply_to(self.broker, order.source, order.id, {"draining": True})
            self.stop_soon("drain was asked for by " + order.source.client.name)
        else:
            message = f"{order.op} is not served by this version"
            self.broker.refuse(order.source, order.id, ErrorCode.UNSUPPORTED, message)

    def stop_soon(self, reason: str) -> bool:
        """Begin to drain; return False if that had begun already."""
        if self._stopping is not None:
            return False
        self.log.info("daemon.stopping", reason=reason, drain_timeout_s=self.config.limits.drain_timeout)
        self._stopping = asyncio.get_running_loop().create_task(self.stop())
        return True

    async def stop(self) -> None:
        """Drain: accept nobody, take no new message, write what waits, close.

        What can't be written within ``limits.drain_timeout`` is cut off.
        """
        if self._server is not None:
            cut_off = await self._server.drain(self.config.limits.drain_timeout)
            self.log.info("daemon.stopped", cut_off=cut_off, messages=self.broker.totals["messages_in"])
        self.stopped.set()

    def kill(self) -> None:
        """Close everything at once."""
        if self._server is not None:
            self._server.cut_off()
        self.stopped.set()

    async def __aenter__(self) -> Daemon:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._stopping is None:
            await self.stop()
        await self.stopped.wait()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the daemon's event loop: uvloop where it exists, else asyncio's.

    On Windows it is the selector loop: the daemon reads and writes its sockets itself.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop
    return uvloop.new_event_loop


def run(config_path: Path) -> int:
    """Run the broker until it is told to stop; return the process's exit status.

    0 after a drain, 78 for a configuration that can't be used, 1 when it can't listen or was told
    twice to stop.
    """
    from brokerd.config.load import ConfigError, load

    try:
        config = load(config_path)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - one line for each mistake, for people
        return EX_CONFIG
    log = make_log(config.log.level, config.log.format)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_serve(config, log))


async def _serve(config: Config, log: Any) -> int:
    daemon = Daemon(config, log)
    status = 0

    def on_signal(name: str) -> None:
        nonlocal status
        if not daemon.stop_soon(name):
            log.warning("daemon.killed", reason=f"{name} once more")
            status = EX_FAILED
            daemon.kill()

    _on_signals(on_signal)
    try:
        await daemon.start()
    except ListenError as error:
        log.error("daemon.failed", reason=str(error))
        return EX_FAILED
    await daemon.stopped.wait()
    return status


def _on_signals(on_signal: Callable[[str], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        name = number.name
        try:
            loop.add_signal_handler(number, on_signal, name)
        except NotImplementedError:
            # Windows: the handler runs in the main thread between two steps of the loop.
            signal.signal(number, lambda *_, name=name: loop.call_soon_threadsafe(on_signal, name))
