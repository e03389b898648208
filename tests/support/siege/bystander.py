"""Two well-behaved clients, in a process of their own, so that only the broker can
delay them.

python bystander.py SOCKET SECONDS prints the time that each message took from one to
the other, a JSON list of seconds.
"""

from __future__ import annotations

import json
import sys
import time

from support.keys import key_of
from support.raw_client import MESSAGE, Raw, login

from brokerd_client.address import parse


def connect(path: str, name: str) -> Raw:
    return login(parse(path), key_of(name), name.encode())


def main(path: str, seconds: float) -> None:
    durations = []
    with connect(path, "good") as good, connect(path, "friend") as friend:
        print("ready", flush=True)
        deadline = time.monotonic() + seconds
        while (began := time.monotonic()) < deadline:
            good.send(MESSAGE, "friend", b"hello", message_id=1)
            assert friend.recv().body == b"hello"
            durations.append(time.monotonic() - began)
            time.sleep(0.002)
    print(json.dumps(durations))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
