"""A process full of strangers at a broker's door; run by test_strangers.py.

    python strangers.py SOCKET EACH AGAIN

EACH connections that say nothing, EACH that send random bytes and EACH that answer with
a wrong key are held open. Whoever is turned away comes again at once if AGAIN is 1. It
prints ``here`` when all have come, and how many came in all at the end of its input.
"""

from __future__ import annotations

import os
import resource
import selectors
import socket
import struct
import sys

ANSWER = struct.pack("!i", 40) + b"{sha256}" + b"w" * 32


def main(path: str, each: int, again: bool) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    selector = selectors.DefaultSelector()
    came = 0

    def come(kind: str) -> None:
        nonlocal came
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
        came += 1

    for _ in range(each):
        for kind in ("silent", "random", "wrong"):
            come(kind)
    print("here", flush=True)
    selector.register(sys.stdin, selectors.EVENT_READ, "over")
    while True:
        for key, _ in selector.select():
            if key.data == "over":
                print(came, flush=True)
                return
            assert isinstance(key.fileobj, socket.socket)
            try:
                gone = key.fileobj.recv(4096) == b""
            except BlockingIOError:
                gone = False
            except OSError:
                gone = True
            if gone:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                if again:
                    come(key.data)


main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
