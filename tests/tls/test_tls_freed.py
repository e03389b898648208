"""A closed TLS connection is freed at once, as any other: see tests/net/test_freed.py."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

from support.garbage import is_idle, objects, uncollected
from support.raw_client import Rejected
from support.running_daemon import TIMEOUT_S, configuration, running_daemon
from support.tls.authority import Issued
from support.tls.raw_client import TlsRaw, tls_login
from support.waiting import until


def test_tls_connection_closed_is_freed_without_garbage_collector(
    server: Issued, trusting: ssl.SSLContext
) -> None:
    """The clients close, break off in the handshake, send without TLS, and use a wrong
    key.
    """
    with running_daemon(configuration({"address": "127.0.0.1:0", "tls": server.entry()})) as broker:

        def connect_and_leave() -> None:
            tls_login(broker.address, trusting, "alice").close()
            with suppress(Rejected), TlsRaw(broker.address, trusting) as raw:
                raw.log_in(b"not the key", b"alice")
            for data in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"):
                with socket.create_connection((broker.address.host, broker.address.port)) as sock:
                    sock.sendall(data)

        connect_and_leave()
        until(lambda: is_idle(broker), "the first connections are still open")
        with uncollected():
            before = objects()
            for _ in range(3):
                connect_and_leave()
            until(lambda: is_idle(broker), "the connections are still open")
            with suppress(AssertionError):
                until(lambda: not broker.call(objects) - before, "objects are left", TIMEOUT_S / 3)
            assert not objects() - before
