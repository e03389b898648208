"""A client that writes raw bytes over TLS, like stock Python behind a program that adds
TLS.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

from support.keys import key_of
from support.raw_client import Raw

from brokerd_client.address import Address


class TlsRaw(Raw):
    """One connection over TLS that has sent nothing yet inside it."""

    def __init__(
        self,
        address: Address,
        context: ssl.SSLContext,
        *,
        host: str = "127.0.0.1",
        timeout_s: float = 30.0,
    ) -> None:
        super().__init__(address, timeout_s=timeout_s)
        plain: socket.socket = self.sock
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise


def tls_login(address: Address, context: ssl.SSLContext, name: str, **how: Any) -> TlsRaw:
    """Return a connection of that client, which does not bind its key to the channel.

    Raises Rejected.
    """
    raw = TlsRaw(address, context)
    try:
        raw.log_in(key_of(name), name.encode(), **how)
    except BaseException:
        raw.close()
        raise
    return raw
