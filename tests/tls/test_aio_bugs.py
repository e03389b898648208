"""Unforeseen exceptions in the TLS of an asyncio client: the connection is lost, and
the client lives on.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.tls.authority import Issued

from brokerd.testing import running
from brokerd_client import aio
from brokerd_client.aio import base as aio_base
from brokerd_client.errors import Disconnected
from brokerd_client.tls.engine import Engine


class PanicException(BaseException):
    """The exception that pyo3 raises for a panic in Rust, not derived from Exception."""


ERRORS: list[Callable[[], BaseException]] = [
    lambda: LookupError("unforeseen"),
    lambda: PanicException("unforeseen"),
]


@pytest.mark.parametrize("make", ERRORS, ids=["LookupError", "panic"])
@pytest.mark.parametrize("method", ["feed", "read", "write", "output", "handshake"])
def test_aio_client_exception_in_tls_is_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    server: Issued,
    trusting: ssl.SSLContext,
    method: str,
    make: Callable[[], BaseException],
) -> None:
    """The exception is raised on a ready connection, and in the TLS handshake of the
    next one. The client connects again, and the log has the exception.
    """
    monkeypatch.setattr(aio_base, "jitter", lambda: 0.0)
    real: Any = getattr(Engine, method)
    pending: list[BaseException] = []

    def act(*args: Any, **options: Any) -> Any:
        # The broker uses engines too, in another thread.
        if pending and threading.current_thread() is threading.main_thread():
            raise pending.pop()
        return real(*args, **options)

    async def main(address: str, key: str) -> None:
        async with aio.connect(address, "alice", key, ssl=trusting) as alice:
            monkeypatch.setattr(Engine, method, act)
            pending.append(make())
            if method == "handshake":
                # This is the handshake of the next connection.
                assert alice._transport is not None
                alice._transport.abort()
            else:
                with pytest.raises(Disconnected):
                    await alice.ping()
            deadline = time.monotonic() + 20
            while pending or not alice.connected:
                assert time.monotonic() < deadline, "it did not connect again"
                await asyncio.sleep(0.005)
            assert await alice.ping() >= 0

    with running({"alice": {}}, tls=server.entry()) as broker:
        asyncio.run(main(broker.address, broker.key("alice")))
    assert "unforeseen" in caplog.text


@pytest.mark.timing
@pytest.mark.parametrize("make", ERRORS, ids=["LookupError", "panic"])
def test_aio_client_exception_in_first_tls_handshake_ends_connect(
    monkeypatch: pytest.MonkeyPatch,
    server: Issued,
    trusting: ssl.SSLContext,
    make: Callable[[], BaseException],
) -> None:
    """connect() raises Disconnected at once, and does not wait for its timeout."""

    def fail(*args: object, **options: object) -> Any:
        raise make()

    async def main(address: str, key: str) -> None:
        monkeypatch.setattr(Engine, "handshake", fail)
        began = time.monotonic()
        with pytest.raises(Disconnected, match="unforeseen"):
            await aio.connect(address, "alice", key, ssl=trusting, timeout=30)
        assert time.monotonic() - began < 20

    with running({"alice": {}}, tls=server.entry()) as broker:
        asyncio.run(main(broker.address, broker.key("alice")))
