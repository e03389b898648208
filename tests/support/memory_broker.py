"""A fake broker on the clients' own event loop, without sockets: each step of a
scenario is a step of the loop.

So a test can cancel a task at every step, and in the very callback that hands its
answer over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from support.fake_broker import FakeBroker, Session

from brokerd_client import aio
from brokerd_client.aio import base as aio_base

PATIENCE = 20.0
#: Bytes delivered at once, as by a read of a socket.
_PIECE = 4096


class MemoryTransport(asyncio.Transport):
    """A transport whose other end is a session of the fake broker."""

    def __init__(self, network: MemoryBroker, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._network = network
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._reading = True
        self.session = Session(network.broker)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return nothing: there is no socket."""
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: every write is taken whole."""

    def is_closing(self) -> bool:
        """Return whether the transport takes no more bytes."""
        return self._closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Hand the bytes to the session at the loop's next step."""
        if not self._closing:
            self._loop.call_soon(self._arrive, bytes(data))

    def can_write_eof(self) -> bool:
        """Return whether write_eof works."""
        return True

    def write_eof(self) -> None:
        """End the session, once all written bytes have arrived."""
        self._loop.call_soon(self._hang_up)

    def pause_reading(self) -> None:
        """Keep the session's bytes until ``resume_reading``."""
        self._reading = False

    def resume_reading(self) -> None:
        """Deliver the session's bytes that were kept."""
        self._reading = True
        self._loop.call_soon(self.pump)

    def abort(self) -> None:
        """End the connection at the loop's next step."""
        if not self._closing:
            self._closing = True
            self._network.broker.left(self.session)
            self._network.transports.discard(self)
            self._loop.call_soon(self._protocol.connection_lost, None)
            self._network.pump_all()

    close = abort

    def _arrive(self, data: bytes) -> None:
        if not self._closing:
            self.session.receive(data)
            if self.session.failed:
                self.abort()
            self._network.pump_all()

    def _hang_up(self) -> None:
        if not self._closing:
            self.abort()

    def pump(self) -> None:
        """Deliver the session's bytes at the loop's next step."""
        if self.session.out:
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if self._closing or not self._reading or not self.session.out:
            return
        data = bytes(self.session.out[:_PIECE])
        del self.session.out[:_PIECE]
        self._network.deliver(self, self._protocol, data)
        self.pump()


class MemoryBroker:
    """The fake broker, and the transports of its clients.

    Attributes:
        before: Called with a session's name before each delivery to its client.
        after: Called with a session's name after each delivery to its client.
    """

    def __init__(self, *names: str) -> None:
        self.broker = FakeBroker({name: name.encode() for name in names})
        self.transports: set[MemoryTransport] = set()
        self.before: Callable[[str], object] = lambda name: None
        self.after: Callable[[str], object] = lambda name: None

    async def dial(
        self, address: object, protocol: Callable[[], asyncio.Protocol], *more: object
    ) -> None:
        """Replace aio_connection.dial."""
        await asyncio.sleep(0)
        made = protocol()
        transport = MemoryTransport(self, made)
        self.transports.add(transport)
        made.connection_made(transport)
        transport.pump()

    def deliver(self, transport: MemoryTransport, protocol: asyncio.Protocol, data: bytes) -> None:
        """Give the bytes to a client's protocol."""
        name = transport.session.name
        self.before(name)
        protocol.data_received(data)
        self.after(name)

    def pump_all(self) -> None:
        """Deliver the bytes of every session."""
        for transport in list(self.transports):
            transport.pump()

    def act(self, action: Callable[[FakeBroker], object]) -> None:
        """Change the broker, and deliver the results."""
        action(self.broker)
        self.pump_all()

    def drop(self, name: str) -> None:
        """End the connection of a client."""
        for transport in list(self.transports):
            if transport.session.name == name:
                transport.abort()

    def join(self, name: str, **options: Any) -> aio.Opening[aio.Client]:
        """Return an opening that connects to this broker."""
        return aio.connect("/memory", name, name, **options)


def play(
    monkeypatch: Any, scenario: Callable[[MemoryBroker], Awaitable[object]], *names: str
) -> None:
    """Run a scenario with a fake broker in memory on a fresh loop, which must be left
    without a task.
    """

    async def watched() -> None:
        network = MemoryBroker(*(names or ("alice", "bob", "carol")))
        monkeypatch.setattr(aio_base, "dial", network.dial)
        async with asyncio.timeout(PATIENCE):
            await scenario(network)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())
