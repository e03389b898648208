"""Two clients that send each other a message many times a second, in processes of their
own, and a control beside them.

``pair.py SOCKET`` prints a line of JSON each second until its standard input ends: the
median and the 99th percentile of the round trip through the broker and back, and of one
to another process without any broker, in microseconds. On a busy machine both grow.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

from support.keys import key_of
from support.raw_client import MESSAGE, Raw, login

from brokerd_client.address import parse

#: Seconds between two round trips.
PAUSE_S = 0.005


def enter(path: str, name: str) -> Raw:
    return login(parse(path), key_of(name), name.encode())


def echo(sock: socket.socket) -> None:
    while data := sock.recv(64):
        sock.sendall(data)


def answer(friend: Raw) -> None:
    try:
        while (body := friend.recv().body) != b"end":
            friend.send(MESSAGE, "good", body)
    except (EOFError, OSError):
        return


def beside(path: str) -> tuple[socket.socket, Raw]:
    """Start the two other ends, each a process; return this end of the control and of
    the pair.
    """
    near, far = socket.socketpair()
    if not os.fork():
        near.close()
        echo(far)
        os._exit(0)
    far.close()
    ready, tell = os.pipe()
    if not os.fork():
        near.close()
        with enter(path, "friend") as friend:
            os.write(tell, b".")
            answer(friend)
        os._exit(0)
    os.read(ready, 1)
    return near, enter(path, "good")


def percentiles(took: list[float]) -> tuple[float, float]:
    took.sort()
    return took[len(took) // 2] * 1e6, took[len(took) * 99 // 100] * 1e6


def main(path: str) -> None:
    control, good = beside(path)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        through: list[float] = []
        without: list[float] = []
        until = time.monotonic() + 1
        while (began := time.monotonic()) < until:
            good.send(MESSAGE, "friend", b"ping")
            assert good.recv().body == b"ping"
            between = time.monotonic()
            control.sendall(b"ping")
            assert control.recv(64) == b"ping"
            through.append(between - began)
            without.append(time.monotonic() - between)
            time.sleep(PAUSE_S)
        median, p99 = percentiles(through)
        control_median, control_p99 = percentiles(without)
        print(
            json.dumps(
                {
                    "median": median,
                    "p99": p99,
                    "control_median": control_median,
                    "control_p99": control_p99,
                }
            ),
            flush=True,
        )
    # It must not outlive this process.
    good.send(MESSAGE, "friend", b"end")


if __name__ == "__main__":
    main(sys.argv[1])
