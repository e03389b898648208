"""A daemon in a thread that reads its configuration from a file, and can reload it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from support.keys import key_of
from support.raw_client import Raw, login
from support.running_daemon import Recorder

import brokerd_client
from brokerd.config.load import load
from brokerd.daemon import Daemon
from brokerd.daemon.process import loop_factory
from brokerd_client.address import Address
from brokerd_client.errors import Disconnected


class ReloadableDaemon:
    """A daemon that serves one directory's brokerd.yaml, and can reload it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = Recorder()
        self._loop = loop_factory()()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def write(self, clients: str, listen: str = "") -> None:
        file = self.home / "brokerd.yaml"
        file.write_text(f"listen: [{self.home / 'sock'}{listen}]\nclients:\n{clients}")
        file.chmod(0o600)

    def start(self) -> None:
        self.daemon = Daemon(load(self.home / "brokerd.yaml"), self.log.logger)
        self._run(self.daemon.start())

    def reload(self) -> list[str]:
        problems: list[str] = self._run(self.daemon.reload("test"))
        return problems

    def call(self, function: Any) -> Any:
        """Return the function's result, called in the broker's thread."""

        async def run() -> Any:
            return function()

        return self._run(run())

    def stop_soon(self) -> None:
        self.call(lambda: self.daemon.stop_soon("test"))

    @property
    def address(self) -> Address:
        """The first address that it listens at."""
        return self.daemon.addresses[0]

    def raw(self) -> Raw:
        """Return a connection that has sent nothing yet."""
        return Raw(self.address)

    def login(self, name: str) -> Raw:
        """Return a connection of that client, whose key is ``NAME's key``."""
        return login(self.address, key_of(name), name.encode())

    def connect(self, name: str, key: str, at: str = "sock") -> Any:
        return brokerd_client.connect(str(self.home / at), name=name, key=key, reconnect=False)

    def close(self) -> None:
        self._run(self.daemon.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


ALICE = "  alice: {key: alices-first-key}\n"
BOB = "  bob: {key: bobs-first-key}\n"


def is_disconnected(client: Any) -> bool:
    """Return whether the broker has ended the connection; a ping is enough to see it."""
    try:
        client.ping()
    except Disconnected:
        return True
    return False
