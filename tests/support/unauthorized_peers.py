"""A process with many unauthorized peers of a broker; run by
test_unauthorized_peers.py.

python unauthorized_peers.py SOCKET EACH AGAIN

EACH connections that send nothing, EACH that send random bytes and EACH that answer
with a wrong key are held open. If AGAIN is 1, a closed connection is made again at
once. The process prints ``ready`` when all are connected, and the number of all
connections at the end of its input.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import struct
import sys

ANSWER = struct.pack("!i", 40) + b"{sha256}" + b"w" * 32


def main(path: str, each: int, reconnect: bool) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    selector = selectors.DefaultSelector()
    connections = 0

    def connect(kind: str) -> None:
        nonlocal connections
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.setblocking(False)
        try:
            if kind == "random":
                sock.send(os.urandom(200))
            elif kind == "wrong":
                sock.send(ANSWER)
        except OSError:
            pass
        selector.register(sock, selectors.EVENT_READ, kind)
        connections += 1

    for _ in range(each):
        for kind in ("silent", "random", "wrong"):
            connect(kind)
    print("ready", flush=True)
    selector.register(sys.stdin, selectors.EVENT_READ, "over")
    while True:
        for key, _ in selector.select():
            if key.data == "over":
                print(connections, flush=True)
                return
            assert isinstance(key.fileobj, socket.socket)
            try:
                closed = key.fileobj.recv(4096) == b""
            except BlockingIOError:
                closed = False
            except OSError:
                closed = True
            if closed:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if reconnect:
                    connect(key.data)


main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
