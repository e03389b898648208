"""One connection of an asyncio client over TLS: a Connection whose bytes go through an Engine.

Not asyncio's own TLS: its transports can't say that nothing more comes without closing, and do not tell how much
has left this process.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast

from brokerd_client.address import Address
from brokerd_client.aio.transport import Hearer, Resolver, Transport, dial
from brokerd_client.errors import Disconnected, TlsError
from brokerd_client.tls.engine import Engine, explained

__all__ = ["TlsTransport", "dial_tls"]


class TlsTransport(Transport):
    """One connection: its client is told of it when TLS is ready.

    opened: done when it is, or can't be.
    """

    def __init__(self, client: Hearer, context: ssl.SSLContext, hostname: str) -> None:
        super().__init__(client)
        self._engine = Engine(context, hostname=hostname)
        self._raw: asyncio.Transport | None = None
        self._bindings: dict[str, bytes] = {}
        self._error: TlsError | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def bindings(self) -> dict[str, bytes]:
        """What the key is to be bound to."""
        return self._bindings

    def _made(self) -> None:
        self._raw = self.transport
        self.prepare()
        self._go_on(b"")

    def _received(self, data: bytes) -> None:
        if self._error is None:
            self._go_on(data)

    def _on_bug(self, error: BaseException) -> None:
        self._opened(Disconnected(f"TLS failed in a way that is not foreseen: {type(error).__name__}"))
        super()._on_bug(error)

    def _go_on(self, data: bytes) -> None:
        raw, engine = self._raw, self._engine
        assert raw is not None
        try:
            if data:
                engine.feed(data)
            if not engine.ready:
                ready = engine.handshake()
                _pass_on(engine, raw)
                if not ready:
                    return
                self._bindings = engine.bindings
                self.transport = cast("asyncio.Transport", _Encrypting(engine, raw))
                self._opened(None)
                self._client._on_open(self)
            self._deliver()
        except TlsError as error:
            self._fail(error)

    def _deliver(self) -> None:
        engine, transport = self._engine, self.transport
        data = engine.read()
        # TLS may have something to answer.
        transport.write(b"")
        if data:
            self._client._on_data(self, data)
        if engine.more:
            # What came before an error; this raises it.
            engine.read()
        if engine.ended:
            transport.abort()

    def _fail(self, error: TlsError) -> None:
        self._error = error
        assert self._raw is not None
        # The peer may be owed the word of what was wrong.
        _pass_on(self._engine, self._raw)
        if self._raw.get_write_buffer_size():
            # It takes nothing: to close would be to wait for it.
            self._raw.abort()
        self._raw.close()
        self._opened(error)

    def _opened(self, error: Exception | None) -> None:
        if not self.opened.done():
            if error is None:
                self.opened.set_result(None)
            else:
                self.opened.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio.Protocol: the connection is gone."""
        self._opened(error or explained(ssl.SSLEOFError(), listener=False))
        super().connection_lost(self._error or error)


class _Encrypting:
    """What a client uses of a transport, over TLS."""

    def __init__(self, engine: Engine, raw: asyncio.Transport) -> None:
        self._engine = engine
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        """The rest is the transport's own."""
        return getattr(self._raw, name)

    def write(self, data: bytes) -> None:
        """As a transport's."""
        try:
            self._engine.write(data)
        except TlsError:
            # It has failed, or the peer has; whoever writes hears of it as of any connection that is gone.
            self._raw.abort()
        _pass_on(self._engine, self._raw)

    def can_write_eof(self) -> bool:
        """As a transport's."""
        return True

    def write_eof(self) -> None:
        """Say goodbye, as TLS does: nothing more is written here."""
        self._engine.finish()
        _pass_on(self._engine, self._raw)


def _pass_on(engine: Engine, raw: asyncio.Transport) -> None:
    output = engine.output()
    if output:
        raw.write(output)


async def dial_tls(address: Address, context: ssl.SSLContext, client: Hearer, resolver: Resolver) -> None:
    """Connect to the address and have TLS ready. Raises OSError, TlsError among them."""
    made: list[TlsTransport] = []

    def make() -> TlsTransport:
        made.append(TlsTransport(client, context, address.host))
        return made[-1]

    try:
        await dial(address, make, resolver)
        await made[-1].opened
    except BaseException:
        for connection in made:
            if connection._raw is not None and connection._error is None:
                connection._raw.abort()
            connection.opened.cancel()
        raise
