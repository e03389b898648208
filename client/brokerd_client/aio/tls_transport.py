"""The transport of an asyncio client over TLS: a Transport whose bytes go through an
Engine.

It does not use asyncio's own TLS. Those transports can't end the sending side without
closing, and do not report how many bytes have left this process.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

from brokerd_client.address import Address
from brokerd_client.aio.transport import Resolver, Transport, dial
from brokerd_client.errors import Disconnected, TlsError
from brokerd_client.tls.engine import Engine, explain

if TYPE_CHECKING:
    from brokerd_client.aio.base import BaseClient

__all__ = ["Encrypting", "TlsTransport", "dial_tls", "write_output"]


class TlsTransport(Transport):
    """A connection over TLS, reported to its client when TLS is ready.

    The future ``opened`` is done when TLS is ready or has failed.
    """

    def __init__(self, client: BaseClient, context: ssl.SSLContext, hostname: str) -> None:
        super().__init__(client)
        self._engine = Engine(context, hostname=hostname)
        self._raw: asyncio.Transport | None = None
        self._bindings: dict[str, bytes] = {}
        self._error: TlsError | None = None
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def bindings(self) -> dict[str, bytes]:
        """The channel bindings of the key."""
        return self._bindings

    def _made(self) -> None:
        self._raw = self.asyncio_transport
        self.prepare()
        self._advance(b"")

    def _received(self, data: bytes) -> None:
        if self._error is None:
            self._advance(data)

    def _on_bug(self, error: BaseException) -> None:
        self._opened(Disconnected(f"TLS failed with an unexpected error: {type(error).__name__}"))
        super()._on_bug(error)

    def _advance(self, data: bytes) -> None:
        raw, engine = self._raw, self._engine
        assert raw is not None
        try:
            if data:
                engine.feed(data)
            if not engine.ready:
                ready = engine.handshake()
                write_output(engine, raw)
                if not ready:
                    return
                self._bindings = engine.bindings
                self.asyncio_transport = Encrypting(engine, raw)
                self._opened(None)
                self._client._on_open(self)
            self._deliver()
        except TlsError as error:
            self._fail(error)

    def _deliver(self) -> None:
        engine, transport = self._engine, self.asyncio_transport
        data = engine.read()
        # TLS may have bytes to send in answer.
        transport.write(b"")
        if data:
            self._client._on_data(self, data)
        if engine.more:
            # The bytes before an error are delivered; this call raises the error.
            engine.read()
        if engine.ended:
            transport.abort()

    def _fail(self, error: TlsError) -> None:
        self._error = error
        assert self._raw is not None
        # The peer may have to be sent a TLS alert.
        write_output(self._engine, self._raw)
        if self._raw.get_write_buffer_size():
            # The peer is not reading: a close would wait for it.
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
        """asyncio.BufferedProtocol: the connection is closed or lost."""
        self._opened(error or explain(ssl.SSLEOFError(), listener=False))
        super().connection_lost(self._error or error)


class Encrypting(asyncio.Transport):
    """The part of an asyncio transport that a client uses, over TLS."""

    def __init__(self, engine: Engine, raw: asyncio.Transport) -> None:
        super().__init__()
        self._engine = engine
        self._raw = raw

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return a fact about the transport below."""
        return self._raw.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Return whether the transport below is closing or closed."""
        return self._raw.is_closing()

    def close(self) -> None:
        """Close the transport below when its bytes are written, TLS's closing alert too."""
        self.write_eof()
        self._raw.close()

    def abort(self) -> None:
        """Close the transport below at once."""
        self._raw.abort()

    def pause_reading(self) -> None:
        """Stop reading from the transport below."""
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        """Continue to read from the transport below."""
        self._raw.resume_reading()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and write bytes, as a transport does."""
        try:
            self._engine.write(data)
        except TlsError:
            # TLS or the peer has failed; the writer learns of it as of any lost
            # connection.
            self._raw.abort()
        write_output(self._engine, self._raw)

    def can_write_eof(self) -> bool:
        """Return True: TLS can end its sending side."""
        return True

    def write_eof(self) -> None:
        """Send the closing alert of TLS and end the sending side."""
        self._engine.finish()
        write_output(self._engine, self._raw)


def write_output(engine: Engine, raw: asyncio.Transport) -> None:
    """Write the bytes that the engine has for the wire."""
    output = engine.output()
    if output:
        raw.write(output)


async def dial_tls(
    address: Address, context: ssl.SSLContext, client: BaseClient, resolver: Resolver
) -> None:
    """Connect to the address and make TLS ready. Raises OSError, also as TlsError."""
    transports: list[TlsTransport] = []

    def make() -> TlsTransport:
        transports.append(TlsTransport(client, context, address.host))
        return transports[-1]

    try:
        await dial(address, make, resolver)
        await transports[-1].opened
    except BaseException:
        for connection in transports:
            if connection._raw is not None and connection._error is None:
                connection._raw.abort()
            connection.opened.cancel()
        raise
