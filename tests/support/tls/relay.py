"""An attacker in the middle: TLS with the client on one side, with the broker on the
other, and every byte relayed.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from support.tls.authority import Issued

from brokerd_client.address import Address

if TYPE_CHECKING:
    from typing import Self

TIMEOUT_S = 20.0


class Relay:
    """Listens for one client and relays its frames.

    Args:
        shown: The certificate that it shows to the client, None for no TLS on that
            side.
        trusting: The TLS context for the broker, None for no TLS on that side.
        alter: Changes the broker's challenge.
        answer: Changes the client's answer.
    """

    def __init__(
        self,
        to: Address,
        shown: Issued | None,
        trusting: ssl.SSLContext | None,
        alter: Callable[[bytes], bytes] = lambda body: body,
        answer: Callable[[bytes], bytes] = lambda body: body,
    ) -> None:
        self._to = to
        self._context: ssl.SSLContext | None = None
        if shown is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(shown.certificate, shown.key)
        self._trusting = trusting
        self._alter = alter
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT_S)
        self._thread = threading.Thread(target=self._serve, name="relay")
        #: Frames passed on from the broker to the client.
        self.frames: list[bytes] = []

    @property
    def address(self) -> str:
        port = self._listener.getsockname()[1]
        return f"tls://127.0.0.1:{port}" if self._context else f"127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.close()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            client, _ = self._listener.accept()
            # Without this, a second try of the client would wait here for its whole timeout.
            self._listener.close()
            client.settimeout(TIMEOUT_S)
            with (
                client,
                socket.create_connection((self._to.host, self._to.port), TIMEOUT_S) as broker,
            ):
                near = (
                    self._context.wrap_socket(client, server_side=True) if self._context else client
                )
                far = (
                    self._trusting.wrap_socket(broker, server_hostname="127.0.0.1")
                    if self._trusting
                    else broker
                )
                with near, far:
                    # The handshake takes turns: broker, client, broker; client, broker,
                    # client.
                    for source, target, change in (
                        (far, near, self._alter),
                        (near, far, self._answer),
                        (far, near, bytes),
                        (near, far, bytes),
                        (far, near, bytes),
                        (near, far, bytes),
                    ):
                        body = change(read_frame(source))
                        if source is far:
                            self.frames.append(body)
                        target.sendall(len(body).to_bytes(4, "big") + body)
        except (OSError, EOFError):
            pass


def read_frame(sock: socket.socket) -> bytes:
    return _exactly(sock, int.from_bytes(_exactly(sock, 4), "big"))


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
