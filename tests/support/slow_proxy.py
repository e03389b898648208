"""A TCP proxy with a delay, which can silently stop carrying bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["SlowProxy", "slow_proxy"]


class SlowProxy:
    """Carries bytes between its clients and one port.

    Attributes:
        url: Where clients of NATS connect.
        delay: Seconds that each piece takes, one way.
        is_cut: Whether bytes are lost; the connections stay.
    """

    def __init__(self, port: int, delay: float) -> None:
        self._port = port
        self.delay = delay
        self.is_cut = False
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving = asyncio.current_task()
        assert serving is not None
        self._tasks.add(serving)
        self._writers.append(writer)
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(there_writer)
        for source, target in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.get_running_loop().create_task(self._carry(source, target))
            self._tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                if not self.is_cut:
                    loop.call_later(self.delay, self._write, target, piece)
        loop.call_later(self.delay, target.close)

    def _write(self, target: asyncio.StreamWriter, piece: bytes) -> None:
        if not (self.is_cut or target.is_closing()):
            target.write(piece)

    async def close(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def slow_proxy(port: int, delay: float = 0.0) -> AsyncIterator[SlowProxy]:
    """Run a proxy before a port of this machine."""
    proxy = SlowProxy(port, delay)
    server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    proxy.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
