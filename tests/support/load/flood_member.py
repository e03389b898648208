"""One end of a flood, as a process: it sends numbered messages as fast as it can, or
checks every number.

``flood_member.py send|receive ADDRESS NAME KEY OTHER``. A line on standard input ends
it. The sender then prints how many messages it sent. The receiver reads that number,
and prints how many have arrived when all have, each once and in order.
"""

from __future__ import annotations

import select
import struct
import sys
from itertools import count

from support.raw_client import MESSAGE, login

from brokerd_client.address import parse

BATCH = 500


def send(address: str, name: str, key: str, other: str) -> None:
    """Send whole batches until a line arrives on standard input."""
    raw = login(parse(address), key.encode(), name.encode())
    to = other.encode()
    pack = struct.Struct(f"!iBBBBQ{len(to)}sQ").pack
    size = 12 + len(to) + 8
    print("ready", flush=True)
    sent = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        raw.write(
            b"".join(
                [pack(size, MESSAGE, 0, 0, len(to), 0, to, sent + each) for each in range(BATCH)]
            )
        )
        sent += BATCH
    raw.ping()
    print(sent, flush=True)


def receive(address: str, name: str, key: str, other: str) -> None:
    """Check every frame; end when as many have arrived as were sent."""
    raw = login(parse(address), key.encode(), name.encode())
    who = other.encode()
    frame = struct.Struct(f"!iBBBBQ{len(who)}sQ")
    head = (12 + len(who) + 8, MESSAGE, 0, 0, len(who), 0, who)
    print("ready", flush=True)
    expected = count()
    wanted: int | None = None
    received = 0
    rest = b""
    while received != wanted:
        if wanted is None and select.select([sys.stdin], [], [], 0)[0]:
            wanted = int(sys.stdin.readline())
            continue
        if not select.select([raw.sock, sys.stdin], [], [], 30)[0]:
            raise SystemExit(f"only {received} of {wanted} came")
        if not select.select([raw.sock], [], [], 0)[0]:
            continue
        piece = raw.sock.recv(1 << 20)
        if not piece:
            raise SystemExit(f"the broker closed the connection after {received}")
        data = rest + piece
        whole = len(data) // frame.size * frame.size
        for *got_head, number in frame.iter_unpack(data[:whole]):
            if tuple(got_head) != head or number != next(expected):
                raise SystemExit(f"after {received} came {got_head}, {number}")
            received += 1
        rest = data[whole:]
    print(received, flush=True)


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]](*sys.argv[2:])
