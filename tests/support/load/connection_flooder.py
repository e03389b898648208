"""Silent connections from one address, in a process of its own, bounded in number, rate
and time.

python connection_flooder.py HOST PORT SOURCE RATE SECONDS KIND prints how many
connections it made. KIND is what each sends: nothing, half (half an answer's frame),
wrong (a wrong answer), hello (the beginning of TLS).
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections import deque

#: Connections kept open at once: more than a broker has places by far.
KEPT = 3000
SAYS = {
    "nothing": b"",
    "half": b"\0\0\0\x28{sha256}xxxx",
    "wrong": b"\0\0\0\x28{sha256}" + b"x" * 32,
    "hello": b"\x16\x03\x01\x02\x00\x01",
}


def main(host: str, port: int, source: str, rate: float, seconds: float, kind: str) -> None:
    kept: deque[socket.socket] = deque()
    made = 0
    began = time.monotonic()
    print("ready", flush=True)
    while (elapsed := time.monotonic() - began) < seconds:
        while made < elapsed * rate:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setblocking(False)
            made += 1
            kept.append(sock)
            with contextlib.suppress(OSError):
                sock.bind((source, 0))
                sock.connect((host, port))
            if SAYS[kind] and len(kept) > 50:
                with contextlib.suppress(OSError):
                    kept[-50].send(SAYS[kind])
            if len(kept) > KEPT:
                # A reset leaves no state behind that would use the ports up.
                oldest = kept.popleft()
                oldest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                oldest.close()
        time.sleep(0.002)
    for sock in kept:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
    print(made, flush=True)


if __name__ == "__main__":
    main(
        sys.argv[1],
        int(sys.argv[2]),
        sys.argv[3],
        float(sys.argv[4]),
        float(sys.argv[5]),
        sys.argv[6],
    )
