"""A peer that is nothing but an interpreter's own multiprocessing.connection.

Runs on Python 2.7 and 3.6+.

Commands come as lines of JSON on standard input, answers go as lines of JSON to
standard output.
"""

import json
import signal
import sys
from multiprocessing.connection import Client, Listener


def say(answer):
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def talk(connection):
    """Send one message of each kind, and return the one that comes back."""
    connection.send_bytes(b"")
    connection.send_bytes(b"x" * 100000)
    connection.send([2.25, None, 17])
    answer = connection.recv_bytes()
    connection.close()
    return answer.decode("ascii")


def run(command):
    address = command["address"]
    address = tuple(address) if isinstance(address, list) else address
    if sys.version_info[0] == 2:  # noqa: UP036 - this script runs there
        address = tuple(map(plain, address)) if isinstance(address, tuple) else plain(address)
    key = command["key"].encode("ascii")
    if command["do"] == "dial":
        return talk(Client(address, authkey=key))
    listener = Listener(address, authkey=key)
    try:
        say({"address": listener.address})
        return talk(listener.accept())
    finally:
        listener.close()


def plain(value):
    """Return the type that Python 2 accepts as an address: its str, not unicode."""
    return value if isinstance(value, int) else value.encode("ascii")


for line in iter(sys.stdin.readline, ""):
    signal.alarm(30)  # a peer that hangs is not to outlive its test
    try:
        say({"heard": run(json.loads(line))})
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
        say({"error": type(error).__name__})
    signal.alarm(0)
