"""A broker with a thread for each connection, over the standard library's
``multiprocessing.connection``.

The work of an afternoon, for comparison: ``python thread_broker.py PORT``, with the key
on standard input. A connection's first frame is its name; then the frames are
brokerd's. A message to an unknown name is lost.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import threading
from multiprocessing.connection import Connection, Listener

HEADER = struct.Struct("!BBBBQ")


def serve(conn: Connection, clients: dict[bytes, tuple[Connection, threading.Lock]]) -> None:
    """Carry what one connection sends to whom it is for."""
    name = conn.recv_bytes()
    clients[name] = (conn, threading.Lock())
    conn.send_bytes(b"ok")
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = conn.recv_bytes()
            kind, flags, codec, size, message_id = HEADER.unpack_from(message)
            recipient = clients.get(message[12 : 12 + size])
            if recipient is not None:
                to, lock = recipient
                with lock:
                    to.send_bytes(
                        HEADER.pack(kind, flags, codec, len(name), message_id)
                        + name
                        + message[12 + size :]
                    )
    conn.close()


def main() -> None:
    key = sys.stdin.buffer.readline().strip()
    clients: dict[bytes, tuple[Connection, threading.Lock]] = {}
    listener = Listener(("127.0.0.1", int(sys.argv[1])), backlog=1024, authkey=key)
    while True:
        # Who connects and does not know the key, or goes away, is none of the others'
        # business.
        with contextlib.suppress(Exception):
            conn = listener.accept()
            threading.Thread(target=serve, args=(conn, clients), daemon=True).start()


if __name__ == "__main__":
    main()
