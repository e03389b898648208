"""A real broker for tests: in this process, on a temporary socket, with clients on
demand.

With pytest, import the fixture (or name this module in ``pytest_plugins``)::

    from brokerd.testing import broker


    def test_bob_gets_it(broker):
        alice, bob = broker.connect("alice"), broker.connect("bob")
        alice.send("bob", "hello")
        assert bob.recv(timeout=5).payload == "hello"

Without pytest, :func:`running` is a context manager that gives the same object. Nothing
is mocked: the broker runs in a thread with an event loop of its own, and clients
connect to it as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from brokerd.config.load import build_config
from brokerd.config.model import Config
from brokerd.daemon.daemon import Daemon
from brokerd.daemon.process import loop_factory
from brokerd.log.logger import quiet_log

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from brokerd_client import Client
    from brokerd_client.aio.client import Client as AsyncClient

__all__ = ["RunningBroker", "broker", "running"]

_Result = TypeVar("_Result")


class RunningBroker:
    """A broker in a thread of this process.

    Attributes:
        address: Where the broker listens, in the form of ``brokerd_client.connect``. It
            stays the same across kill and start.

    Args:
        clients: The section ``clients`` of a configuration file. A client without a key
            gets a random one.
        limits: The section ``limits``.
        tls: The part ``tls`` of a ``listen`` entry. The broker then listens on 127.0.0.1
            with TLS, and clients connect with ``ssl=``.
        log: The logger; by default nothing is logged.
    """

    def __init__(
        self,
        clients: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        limits: Mapping[str, Any] | None = None,
        tls: Mapping[str, Any] | None = None,
        log: FilteringBoundLogger | None = None,
    ) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="brokerd-"))
        self._entries: dict[str, Mapping[str, Any]] = {}
        self._limits = dict(limits or {})
        self._log = log or quiet_log()
        self._opened: list[Client] = []
        self._daemon: Daemon | None = None
        self._tls = tls
        on_tcp = tls is not None or sys.platform == "win32"
        self.address: str = "127.0.0.1:0" if on_tcp else str(self._dir / "sock")
        for name, entry in (clients or {}).items():
            self._enter(name, entry)
        self._loop = loop_factory()()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="brokerd.testing", daemon=True
        )
        self._thread.start()

    # Clients

    def add(self, name: str, **entry: Any) -> None:
        """Add or change a client, also while the broker runs.

        Args:
            name: The client's name.
            entry: The options under its name in a configuration file. Without a key, a
                present key stays, and a new client gets a random one.
        """
        self._enter(name, entry)
        if self._daemon is not None:
            daemon, config = self._daemon, self._config()
            self._call(lambda: daemon.apply(config, "brokerd.testing"))

    def key(self, name: str) -> bytes:
        """Return the key of a client.

        Args:
            name: The client's name. An unknown name is added as a client.
        """
        if name not in self._entries:
            self.add(name)
        key = self._entries[name]["key"]
        return key.encode() if isinstance(key, str) else bytes(key)

    def connect(self, name: str, **options: Any) -> Client:
        """Return a connected client of the library; :meth:`close` closes it too.

        Args:
            name: The client's name. An unknown name is added as a client.
            options: The options of ``brokerd_client.connect``.

        Raises:
            OSError: The client can't connect, as for ``brokerd_client.connect``.
        """
        import brokerd_client

        client = brokerd_client.connect(self.address, name=name, key=self.key(name), **options)
        self._opened.append(client)
        return client

    async def connect_async(self, name: str, **options: Any) -> AsyncClient:
        """Return a connected asyncio client; the caller closes it.

        Args:
            name: The client's name. An unknown name is added as a client.
            options: The options of ``brokerd_client.aio.connect``.

        Raises:
            OSError: The client can't connect, as for ``brokerd_client.aio.connect``.
        """
        from brokerd_client import aio

        return await aio.connect(self.address, name=name, key=self.key(name), **options)

    # Start and end of the broker

    def start(self) -> None:
        """Start the broker, also after :meth:`stop` or :meth:`kill`, at the same
        address.

        Raises:
            ConfigError: The configuration is not valid.
            ListenError: The broker can't listen at the address.
        """
        assert self._daemon is None, "it runs already"
        daemon = self._on_loop(self._make_daemon())
        self._daemon = daemon
        self.address = str(daemon.addresses[0])
        # From here on, every configuration contains the port that the system has
        # chosen.
        daemon.config = self._config()

    def stop(self) -> None:
        """Drain and stop the broker."""
        if self._daemon is not None:
            daemon, self._daemon = self._daemon, None
            self._on_loop(daemon.stop())

    def kill(self) -> None:
        """End the broker without notifying its clients, as a crash would."""
        if self._daemon is not None:
            daemon, self._daemon = self._daemon, None
            self._call(daemon.kill)

    def disconnect(self, name: str) -> None:
        """Close the connections of one client, as a broken network would.

        Args:
            name: The client's name.
        """
        daemon = self._running()
        self._call(lambda: daemon.cut_off(name))

    def stats(self) -> dict[str, Any]:
        """Return the figures that ``brokerctl stats`` shows."""
        daemon = self._running()
        return self._call(daemon.stats)

    def close(self) -> None:
        """Close the clients made by :meth:`connect`, stop the broker and remove its
        directory.
        """
        for client in self._opened:
            client.close()
        self._opened.clear()
        self.stop()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        shutil.rmtree(self._dir, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # In the broker's thread

    def _enter(self, name: str, entry: Mapping[str, Any]) -> None:
        has_key = {"key", "key_file", "key_env", "key_credential", "keys"} & entry.keys()
        present_key = self._entries.get(name, {}).get("key")
        key = {} if has_key else {"key": present_key or secrets.token_bytes(32)}
        self._entries[name] = {**entry, **key}

    def _config(self) -> Config:
        listen: dict[str, Any] = {"address": self.address.removeprefix("tls://")}
        if self._tls is not None:
            listen["tls"] = dict(self._tls)
        return build_config(listen, self._entries, limits=self._limits or None)

    async def _make_daemon(self) -> Daemon:
        daemon = Daemon(self._config(), self._log)
        await daemon.start()
        return daemon

    def _running(self) -> Daemon:
        assert self._daemon is not None, "the broker is not running"
        return self._daemon

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _call(self, function: Callable[[], _Result]) -> _Result:
        done: Future[_Result] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except BaseException as error:  # noqa: BLE001 - any error must reach the caller
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return done.result(60)


@contextlib.contextmanager
def running(
    clients: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    limits: Mapping[str, Any] | None = None,
    tls: Mapping[str, Any] | None = None,
) -> Iterator[RunningBroker]:
    """Run a broker in a with statement.

    Args:
        clients: As for :class:`RunningBroker`.
        limits: As for :class:`RunningBroker`.
        tls: As for :class:`RunningBroker`.

    Yields:
        The running broker. It is closed at the end of the with statement.
    """
    with RunningBroker(clients, limits=limits, tls=tls) as running_broker:
        yield running_broker


try:
    import pytest
except ImportError:  # the fixture exists only where pytest is installed
    pass
else:

    @pytest.fixture
    def broker() -> Iterator[RunningBroker]:
        """A real broker on a temporary socket; clients are created on demand."""
        with RunningBroker() as running_broker:
            yield running_broker
