"""A relay for TCP between clients and a broker, which ends both of its connections
after a given number of bytes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from typing import Self

__all__ = ["CuttingRelay"]

_RESET = struct.pack("ii", 1, 0)
#: Far less than any timeout or keepalive.
_END_S = 3.0


class CuttingRelay:
    """Relays one connection after the other.

    Attributes:
        up: Bytes that still pass from the client to the broker, None for all.
        down: Bytes that still pass from the broker to the client, None for all.
        passed: Bytes of the latest connection that have passed, up and down.
        cuts: Number of connections that were cut.

    Args:
        gently: The relay closes its side of both connections, as if the other end had
            closed, and waits for them to close. Otherwise it resets both.
    """

    def __init__(self, broker: tuple[str, int], *, gently: bool = False) -> None:
        self._gently = gently
        self._broker = broker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._over = False
        self.up: int | None = None
        self.down: int | None = None
        self.passed = [0, 0]
        self.cuts = 0
        self._changed = threading.Condition()
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over = True
        with (
            contextlib.suppress(OSError),
            socket.create_connection(self._listener.getsockname(), timeout=5),
        ):
            pass
        self._acceptor.join(30)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        self._listener.close()

    def cut_after(self, *, up: int | None = None, down: int | None = None) -> None:
        """Cut the connection when ``up`` or ``down`` more bytes have passed; with 0,
        before the next byte passes.
        """
        self.up, self.down = up, down

    def wait_for_cuts(self, count: int) -> None:
        """Wait until ``count`` connections have been cut in all."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.cuts >= count, 30), (
                f"{self.cuts} of {count} cuts"
            )

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._over:
                client.close()
                return
            broker = socket.create_connection(self._broker, timeout=30)
            for sock in (client, broker):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.passed = [0, 0]
            thread = threading.Thread(target=self._relay, args=(client, broker), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket, broker: socket.socket) -> None:
        with client, broker:
            try:
                while not self._over and not self._pass_on(client, broker):
                    pass
            except OSError:
                return

    def _pass_on(self, client: socket.socket, broker: socket.socket) -> bool:
        """Relay what has arrived; return whether the connection has ended."""
        for sock in select.select([client, broker], [], [], 0.2)[0]:
            other = broker if sock is client else client
            data = sock.recv(65536)
            left = self.up if sock is client else self.down
            if left is not None and len(data) >= left:
                other.sendall(data[:left])
                self._end(client, broker)
                return True
            if not data:
                return True
            # Counted first: the recipient of the bytes may ask at once.
            self.passed[sock is broker] += len(data)
            other.sendall(data)
            if left is not None and sock is client:
                self.up = left - len(data)
            elif left is not None:
                self.down = left - len(data)
        return False

    def _end(self, *socks: socket.socket) -> None:
        for sock in socks:
            if self._gently:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.close()
        if self._gently:
            for sock in socks:
                sock.settimeout(_END_S)
                # If the end does not come in time, this raises TimeoutError, and no cut is
                # counted.
                with contextlib.suppress(ConnectionError):
                    while sock.recv(65536):
                        pass
        self.up = self.down = None
        with self._changed:
            self.cuts += 1
            self._changed.notify_all()
