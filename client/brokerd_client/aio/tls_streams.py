"""The protocol of a stream over TLS: a StreamProtocol whose bytes go through an Engine.

It does not use asyncio's own TLS, whose transports can't end the sending side without
closing.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

from brokerd_client.aio.streams import StreamProtocol
from brokerd_client.aio.tls_transport import Encrypting, write_output
from brokerd_client.errors import TlsError
from brokerd_client.tls.engine import Engine, explain

__all__ = ["TlsStreamProtocol"]


class TlsStreamProtocol(StreamProtocol):
    """The streams of a connection over TLS, which the reader and writer do not see."""

    def __init__(self, context: ssl.SSLContext, hostname: str) -> None:
        super().__init__()
        self._engine = Engine(context, hostname=hostname)
        self._raw: asyncio.Transport | None = None
        #: Done when TLS is ready or has failed.
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._error: TlsError | None = None

    async def opened(self) -> None:
        """Wait until TLS is ready. Raises TlsError, OSError."""
        await self._ready

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio.Protocol: connected; TLS begins."""
        self._raw = cast("asyncio.Transport", transport)
        super().connection_made(Encrypting(self._engine, self._raw))
        self._advance(b"")

    def data_received(self, data: bytes) -> None:
        """asyncio.Protocol: bytes of TLS have arrived."""
        self._advance(data)

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
                self.bindings = engine.bindings
                self._ready.set_result(None)
            received = engine.read()
            # TLS may have bytes to send in answer.
            write_output(engine, raw)
            if received:
                super().data_received(received)
            if engine.ended:
                super().eof_received()
        except TlsError as error:
            # The peer may have to be sent a TLS alert.
            write_output(engine, raw)
            self._error = error
            raw.close()

    def eof_received(self) -> bool:
        """asyncio.Protocol: the end of the bytes, with or without TLS's closing alert.

        Returns False: the broker has closed, and nothing can be sent any more either.
        """
        super().eof_received()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio.Protocol: the connection is closed or lost."""
        error = self._error or error
        if not self._ready.done():
            self._ready.set_exception(error or explain(ssl.SSLEOFError(), listener=False))
        super().connection_lost(error)
