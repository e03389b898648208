"""The file with the names of the clients that are online, for the next start.

It is written only with ``limits.return_grace``. It is written at most twice a second,
when a client has come or gone. It is written for the last time when a drain begins. So
it has the clients that were online before a restart, a planned one or not. It lies in
``$STATE_DIRECTORY``, which systemd sets, or in /var/lib/brokerd.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from brokerd.daemon.threads import run_in_thread

if TYPE_CHECKING:
    from brokerd.daemon.daemon import Daemon

__all__ = ["OnlineNames", "file_of", "read_names"]

#: Seconds between two looks at what has changed.
_LOOK_S: Final = 0.5
#: Seconds that the last time may take.
_LAST_S: Final = 1.0
#: Most bytes of a file that are read: those of a hundred thousand names.
_LONGEST: Final = 8 * 2**20
_DEFAULT: Final = "/var/lib/brokerd"


def file_of(config: str, environ: Mapping[str, str]) -> Path:
    """Return the path of the file for the broker with this configuration file."""
    directory = environ.get("STATE_DIRECTORY", "").partition(":")[0] or _DEFAULT
    digest = hashlib.sha256(os.path.realpath(config).encode(errors="surrogateescape"))
    return Path(directory) / f"online-{digest.hexdigest()[:8]}.json"


def read_names(path: Path) -> list[str]:
    """Return the names in the file; none if it can't be read or has another form."""
    try:
        with path.open("rb") as file:
            names = json.loads(file.read(_LONGEST))["online"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


class OnlineNames:
    """Keeps the file of one daemon up to date."""

    def __init__(self, daemon: Daemon, environ: Mapping[str, str]) -> None:
        self._daemon = daemon
        self._environ = environ
        self._written: int | None = None
        self._warned = False
        self._task: asyncio.Task[None] | None = None

    async def read(self) -> None:
        """Read the names, and make the broker wait for these clients."""
        grace = self._daemon.config.limits.return_grace
        if grace:
            path = self._path()
            names = await run_in_thread(lambda: read_names(path))
            now = asyncio.get_running_loop().time()
            self._daemon.broker.returning.begin(names, now + grace)

    def begin(self) -> None:
        """Begin to write the file."""
        self._task = asyncio.get_running_loop().create_task(self._keep_up())

    async def write_last(self) -> None:
        """Write the names of this moment, and nothing more."""
        begun = self._task is not None
        self.close()
        # Without the file, a drain begins in this turn of the event loop.
        if begun and self._daemon.config.limits.return_grace:
            # A drain does not wait for a file system that hangs.
            with contextlib.suppress(TimeoutError, RuntimeError):
                await asyncio.wait_for(self._write(), _LAST_S)

    def close(self) -> None:
        """Write nothing more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            # If no thread can be started, the next round tries again.
            with contextlib.suppress(RuntimeError):
                await self._write()

    async def _write(self) -> None:
        """Write the file if a client has come or gone since the last time."""
        broker = self._daemon.broker
        change = broker.status.presence_changes
        if not self._daemon.config.limits.return_grace or change == self._written:
            return
        loop = asyncio.get_running_loop()
        names = [client.name for client in broker.exchange.clients.values() if client.online]
        if loop.time() < broker.returning.until:
            # A second restart waits for them too.
            names += broker.returning.names()
        path = self._path()
        try:
            await run_in_thread(lambda: _replace(path, names))
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._daemon.log.warning(
                    "daemon.state_unwritten",
                    file=str(path),
                    reason=f"{error.strerror}: limits.return_grace has no effect at the next"
                    " start (set STATE_DIRECTORY to a directory that the broker can write to)",
                )
        else:
            self._written = change
            self._warned = False

    def _path(self) -> Path:
        return file_of(self._daemon.config.path, self._environ)


def _replace(path: Path, names: list[str]) -> None:
    """Replace the file as a whole. Raises OSError."""
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, json.dumps({"online": names}).encode())
    finally:
        os.close(descriptor)
    new.replace(path)
