"""Servers of other protocols: their first bytes, and the protocol's name in the
client's error.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: (first bytes, the protocol's name in the error)
SPEECHES: Final = [
    (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "HTTP"),
    (b"<html><body>400</body></html>", "HTTP"),
    (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
    (b"\x15\x03\x01\x00\x02\x02\x46", "TLS"),
    (b"\x15\x03\x03\x00\x02\x02\x0a", "TLS"),
    (b"-ERR unknown command\r\n", "Redis"),
    (b"-DENIED Redis is running in protected mode\r\n", "Redis"),
    (b"220 mail.example.com ESMTP\r\n", "SMTP"),
    (b"* OK IMAP4rev1 ready\r\n", "IMAP"),
]


@contextmanager
def speaking(speech: bytes, piece: int = 1) -> Iterator[tuple[str, int]]:
    """Listen, send ``speech`` to every client, in pieces of ``piece`` bytes, and wait
    for its end.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    sock.settimeout(20)
                    try:
                        for position in range(0, len(speech), piece):
                            sock.sendall(speech[position : position + piece])
                        while sock.recv(4096):
                            pass
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            host, port = listener.getsockname()
            yield host, port
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)
            assert not thread.is_alive()
