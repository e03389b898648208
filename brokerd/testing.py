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
connect to it as usual. ``running(config="brokerd.yaml")`` runs a broker with the rules
and quotas of a file. docs/testing.md describes all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from brokerd.config.isolation import Isolation
from brokerd.config.load import load_isolated
from brokerd.config.model import Config
from brokerd.config.problems import ConfigError
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
        addresses: All addresses, in the order of the ``listen`` entries.
        monitor_address: Where the monitor answers over HTTP; "" without a monitor.

    Args:
        clients: The section ``clients`` of a configuration file. A client without a key
            gets a random one. With ``config``, these clients are added to those of the
            file, or replace them.
        config: A configuration of your own: the path of a file, its text, or its values
            as a mapping. Its addresses become free ones of this machine. A client keeps
            its ``key``, and the key in a ``key_file`` that exists. Every other client
            gets a random key; ``peer_uid`` is left out.
        limits: The section ``limits``. With ``config``, they replace single limits.
        tls: The part ``tls`` of a ``listen`` entry. The broker then listens on 127.0.0.1
            with TLS, and clients connect with ``ssl=``. With ``config``, it replaces the
            ``tls`` of each entry that has one.
        log: The logger; by default nothing is logged.

    Raises:
        ConfigError: The configuration is not valid.
    """

    def __init__(
        self,
        clients: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        tls: Mapping[str, Any] | None = None,
        log: FilteringBoundLogger | None = None,
    ) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="brokerd-"))
        self._source = config
        self._isolation = Isolation(self._dir, tls=tls, limits=limits)
        self._log = log or quiet_log()
        self._opened: list[Client] = []
        self._daemon: Daemon | None = None
        for name, entry in (clients or {}).items():
            self._enter(name, entry)
        try:
            self.addresses = [str(entry.address) for entry in self._config().listen]
        except ConfigError:
            self._dir.rmdir()
            raise
        self.address = self.addresses[0]
        self.monitor_address = ""
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
                present key stays, and a new client gets a random one. The options of an
                earlier entry do not stay.

        Raises:
            ConfigError: An option is not valid.
        """
        self._enter(name, entry)
        if self._daemon is not None:
            daemon, config = self._daemon, self._config()
            self._call(lambda: daemon.apply(config, "brokerd.testing"))

    def key(self, name: str) -> bytes:
        """Return the key of a client.

        Args:
            name: The client's name. An unknown name is added as a client.

        Raises:
            ValueError: The broker has a configuration of your own, without this client.
        """
        config = self._present_config()
        if name not in config.clients:
            if self._source is not None:
                raise ValueError(
                    f"the configuration has no client {name!r}: give one of"
                    f" {', '.join(sorted(config.clients))}, or call add({name!r})"
                )
            self.add(name)
            config = self._present_config()
        return config.clients[name].keys[0].value

    def environ(self, name: str) -> dict[str, str]:
        """Return the environment variables with which a program connects as a client.

        They are BROKERD_ADDRESS, BROKERD_NAME and BROKERD_KEY_FILE, which
        ``brokerd_client.connect()`` and ``brokerctl`` read.

        Args:
            name: The client's name, as for :meth:`key`.
        """
        file = self._dir / f"{name}.key"
        key = self.key(name)
        file.touch(mode=0o600)
        # One newline is cut when the file is read.
        file.write_bytes(key + b"\n")
        return {
            "BROKERD_ADDRESS": self.address,
            "BROKERD_NAME": name,
            "BROKERD_KEY_FILE": str(file),
        }

    def connect(self, name: str, **options: Any) -> Client:
        """Return a connected client of the library; :meth:`close` closes it too.

        Args:
            name: The client's name, as for :meth:`key`.
            options: The options of ``brokerd_client.connect``; by default the first
                address, and the client's key.

        Raises:
            OSError: The client can't connect, as for ``brokerd_client.connect``.
        """
        import brokerd_client

        given = {"address": self.address, "key": self.key(name), **options}
        client = brokerd_client.connect(name=name, **given)
        self._opened.append(client)
        return client

    async def connect_async(self, name: str, **options: Any) -> AsyncClient:
        """Return a connected asyncio client; the caller closes it.

        Args:
            name: The client's name, as for :meth:`key`.
            options: The options of ``brokerd_client.aio.connect``, as for
                :meth:`connect`.

        Raises:
            OSError: The client can't connect, as for ``brokerd_client.aio.connect``.
        """
        from brokerd_client import aio

        given = {"address": self.address, "key": self.key(name), **options}
        return await aio.connect(name=name, **given)

    # Start and end of the broker

    def start(self) -> None:
        """Start the broker, also after :meth:`stop` or :meth:`kill`, at the same
        address.

        Raises:
            ListenError: The broker can't listen at the address.
        """
        assert self._daemon is None, "it runs already"
        daemon = self._on_loop(self._make_daemon())
        self._daemon = daemon
        self.addresses = [str(address) for address in daemon.addresses]
        self.address = self.addresses[0]
        self.monitor_address = next(map(str, daemon.monitor_addresses), "")
        # From here on, every configuration contains the ports that the system has
        # chosen.
        self._isolation.addresses = self.addresses
        self._isolation.monitor = self.monitor_address
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
        present = self._isolation.clients.get(name, {}).get("key")
        key = {} if has_key else {"key": present or self._isolation.key(name)}
        self._isolation.clients[name] = {**entry, **key}

    def _config(self) -> Config:
        return load_isolated({} if self._source is None else self._source, self._isolation)

    def _present_config(self) -> Config:
        return self._config() if self._daemon is None else self._daemon.config

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
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    tls: Mapping[str, Any] | None = None,
) -> Iterator[RunningBroker]:
    """Run a broker in a with statement.

    Args:
        clients: As for :class:`RunningBroker`.
        config: As for :class:`RunningBroker`.
        limits: As for :class:`RunningBroker`.
        tls: As for :class:`RunningBroker`.

    Yields:
        The running broker. It is closed at the end of the with statement.
    """
    with RunningBroker(clients, config=config, limits=limits, tls=tls) as running_broker:
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
