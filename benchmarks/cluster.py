"""How fast messages cross hosts: ``python -m benchmarks.cluster``.

Two brokers and one nats-server run on this machine. Messages across hosts are compared
with nats-py to nats-py, and requests with those of plain NATS: bare sockets with bare
sockets, and the client libraries with nats-py. All ends of requests are processes of
their own. What is compared is measured in turns within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

import brokerd_client
from benchmarks.channels import MESSAGE, REPLY, REQUEST, Broker, dialed, read_frame, send, serving
from benchmarks.machinery import Process, free_port, wait_for
from brokerd_client import aio

__all__ = [
    "PAYLOAD",
    "PINGS",
    "answer_one",
    "answering",
    "main",
    "median_round_trip",
    "one_way",
    "running_host",
    "running_nats",
]

_READY_S: Final = 30.0
_HEADER: Final = struct.Struct("!BBBBQ")
PAYLOAD: Final = bytes(16)
#: Messages per turn, and per write of a sender.
_MESSAGES: Final = 200_000
_TOGETHER: Final = 1000
_NATS_MESSAGES: Final = 100_000
#: Round trips per turn, the first of which do not count.
PINGS: Final = 550
_FIRST_PINGS: Final = 50
#: The goal for requests, beside those of NATS.
_REQUEST: Final = "at most 2.5"
#: The clients of each broker, and how many connections each may have.
_CLIENTS: Final = {"alice": 1, "bob": 1, "carol": 1, "dave": 1, "erin": 1, "pool": 2}


@contextlib.contextmanager
def running_nats(directory: Path) -> Iterator[int]:
    """Run a nats-server; yield its port."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "nats-server"), "-a", "127.0.0.1", "-p", str(port)]
    process = Process(command, directory / "nats-log")
    try:
        with wait_for("nats-server is ready", _READY_S) as turns:
            for _ in turns:
                with contextlib.suppress(OSError):
                    dialed(port).close()
                    break
        yield port
    finally:
        process.stop()


@contextlib.contextmanager
def running_host(directory: Path, host: str, nats_port: int) -> Iterator[Broker]:
    """Run a broker; "" is the host of a broker without a cluster."""
    address = str(directory / f"s{host}")
    settings: dict[str, Any] = {
        "listen": [address],
        "clients": {
            name: {"key": name * 8, "connections": most} for name, most in _CLIENTS.items()
        },
        "log": {"level": "warning"},
    }
    if host:
        settings["cluster"] = {"host": host, "nats": [f"nats://127.0.0.1:{nats_port}"]}
    with serving(settings, directory / f"brokerd{host}.yaml", address) as broker:
        yield broker


def wait_until_reached(alice: socket.socket, name: str) -> None:
    """Return when alice's broker knows where a client is."""
    with wait_for("the hosts have met", _READY_S) as turns:
        for _ in turns:
            send(alice, REQUEST, "$broker", b'{"op": "clients"}', codec=2)
            listed = json.loads(read_frame(alice).split(b"$broker", 1)[1])["clients"]
            if any(each["name"] == name and each["online"] for each in listed):
                return


def one_way(alice: socket.socket, bob: socket.socket, count: int) -> float:
    """Return the messages per second from alice to bob."""
    body = _HEADER.pack(MESSAGE, 0, 0, 3, 1) + b"bob" + PAYLOAD
    block = (struct.pack("!i", len(body)) + body) * _TOGETHER
    # Its sender is named alice: two bytes more.
    left = (len(body) + 4 + 2) * count
    buffer = bytearray(1 << 20)

    def write() -> None:
        for _ in range(count // _TOGETHER):
            alice.sendall(block)

    began = time.perf_counter()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    while left:
        left -= bob.recv_into(buffer, min(left, len(buffer)))
    thread.join()
    return count / (time.perf_counter() - began)


@contextlib.contextmanager
def answering(answer: Callable[..., None], where: Any) -> Iterator[None]:
    """Answer requests in a process of its own, which is there and will be ended.

    answer: is called with ``where``, and an event that it sets when it is there.
    """
    context = multiprocessing.get_context("spawn")
    is_there = context.Event()
    process = context.Process(target=answer, args=(where, is_there))
    process.start()
    try:
        if not is_there.wait(_READY_S):
            raise TimeoutError(f"{answer.__name__} is not there within {_READY_S:g} s")
        yield
    finally:
        process.terminate()
        process.join()


def answer_requests(bob: socket.socket, is_there: Event) -> None:
    """Answer every request to bob."""
    is_there.set()
    while True:
        answer_one(bob)


def answer_one(sock: socket.socket) -> None:
    """Wait for a request, and answer it."""
    frame = read_frame(sock)
    size, number = _HEADER.unpack_from(frame)[-2:]
    send(sock, REPLY, frame[12 : 12 + size].decode(), PAYLOAD, message_id=number)


def median_round_trip(ping: Callable[[], object]) -> float:
    """Return the median of many round trips, in seconds."""
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        ping()
        times.append(time.perf_counter() - began)
    return statistics.median(times[_FIRST_PINGS:])


async def median_wait(ping: Callable[[], Awaitable[object]]) -> float:
    """Return the median of many round trips, in seconds."""
    times = []
    for _ in range(PINGS):
        began = time.perf_counter()
        await ping()
        times.append(time.perf_counter() - began)
    return statistics.median(times[_FIRST_PINGS:])


class PlainNats:
    """A connection that speaks NATS's protocol itself."""

    def __init__(self, port: int, subject: str) -> None:
        self._sock = dialed(port)
        self._file = self._sock.makefile("rb")
        self._file.readline()
        self._sock.sendall(b'CONNECT {"verbose":false}\r\nSUB %b 1\r\nPING\r\n' % subject.encode())
        while self._file.readline() != b"PONG\r\n":
            pass

    def publish(self, subject: str, reply: str = "") -> None:
        """Publish 16 bytes."""
        words = " ".join(filter(None, (subject, reply, "16")))
        self._sock.sendall(b"PUB %b\r\n%b\r\n" % (words.encode(), PAYLOAD))

    def next(self) -> str:
        """Wait for a message; return where its answer goes, or ""."""
        words = self._file.readline().split()
        while words[0] != b"MSG":
            if words[0] == b"PING":
                self._sock.sendall(b"PONG\r\n")
            words = self._file.readline().split()
        self._file.read(int(words[-1]) + 2)
        return words[3].decode() if len(words) == 5 else ""


def answer_nats(port: int, is_there: Event) -> None:
    """Answer every request with the subject q."""
    responder = PlainNats(port, "q")
    is_there.set()
    while True:
        responder.publish(responder.next())


def nats_py_publishes(port: int, count: int) -> None:
    """Publish messages with nats-py, in a process of its own."""
    import nats
    import uvloop

    async def run() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        for number in range(count):
            await client.publish("x", PAYLOAD)
            if number % _TOGETHER == 0:
                await client.flush()
        await client.drain()

    uvloop.run(run())


def nats_py_rate(port: int, count: int) -> float:
    """Return the messages per second from nats-py to nats-py."""
    import nats
    import uvloop

    async def run() -> float:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        subscription = await client.subscribe("x", pending_msgs_limit=count)
        await client.flush()
        publisher = multiprocessing.get_context("spawn").Process(
            target=nats_py_publishes, args=(port, count)
        )
        publisher.start()
        await subscription.next_msg(_READY_S)
        began = time.perf_counter()
        for _ in range(count - 1):
            await subscription.next_msg(_READY_S)
        rate = (count - 1) / (time.perf_counter() - began)
        await client.close()
        await asyncio.get_running_loop().run_in_executor(None, publisher.join)
        return rate

    return uvloop.run(run())


# Requests with the client libraries


def answer_with_library(address: str, is_there: Event) -> None:
    """Answer every request to dave."""
    import uvloop

    async def run() -> None:
        async with aio.connect(address, "dave", "dave" * 8) as client:
            client.on_request(lambda message: message.payload)
            is_there.set()
            await asyncio.Event().wait()

    uvloop.run(run())


def answer_with_nats_py(port: int, is_there: Event) -> None:
    """Answer every request with the subject p."""
    import nats
    import uvloop

    async def run() -> None:
        client = await nats.connect(f"nats://127.0.0.1:{port}")

        async def answer(message: Any) -> None:
            await message.respond(message.data)

        await client.subscribe("p", cb=answer)
        await client.flush()
        is_there.set()
        await asyncio.Event().wait()

    uvloop.run(run())


def ask_with_library(address: str) -> float:
    """Return the seconds of a request to dave."""
    import uvloop

    async def run() -> float:
        async with aio.connect(address, "carol", "carol" * 8) as client:
            return await median_wait(lambda: client.request("dave", PAYLOAD))

    return uvloop.run(run())


def ask_with_nats_py(port: int) -> float:
    """Return the seconds of a request with nats-py."""
    import nats
    import uvloop

    async def run() -> float:
        client = await nats.connect(f"nats://127.0.0.1:{port}")
        try:
            return await median_wait(lambda: client.request("p", PAYLOAD, timeout=_READY_S))
        finally:
            await client.close()

    return uvloop.run(run())


# The comparisons


def compare_messages(alice: socket.socket, bob: socket.socket, port: int, rounds: int) -> None:
    """Print the rates of messages."""
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(one_way(alice, bob, _MESSAGES))
        theirs.append(nats_py_rate(port, _NATS_MESSAGES))
    report("16 B across hosts, to nats-py", ours, theirs, "messages/s", "at least 5")


def compare_bare_requests(alice: socket.socket, bob: socket.socket, port: int, rounds: int) -> None:
    """Print the round trips of requests between bare sockets."""

    def ask() -> None:
        send(alice, REQUEST, "bob", PAYLOAD)
        read_frame(alice)

    def ask_nats() -> None:
        asker.publish("q", "r")
        asker.next()

    asker = PlainNats(port, "r")
    ours, theirs = [], []
    with answering(answer_requests, bob), answering(answer_nats, port):
        for _ in range(rounds):
            ours.append(median_round_trip(ask) * 1e6)
            theirs.append(median_round_trip(ask_nats) * 1e6)
    report("a request across hosts, to one of NATS: bare sockets", ours, theirs, "µs", _REQUEST)


def compare_library_requests(
    alice: socket.socket, here: Broker, there: Broker, port: int, rounds: int
) -> None:
    """Print the round trips of requests with the client libraries."""
    address = str(here.address)
    ours, blocking, theirs = [], [], []
    with answering(answer_with_library, str(there.address)), answering(answer_with_nats_py, port):
        wait_until_reached(alice, "dave")
        for _ in range(rounds):
            ours.append(ask_with_library(address) * 1e6)
            theirs.append(ask_with_nats_py(port) * 1e6)
            with brokerd_client.connect(address, "erin", "erin" * 8) as client:
                ask = partial(client.request, "dave", PAYLOAD)
                blocking.append(median_round_trip(ask) * 1e6)
    report("the same: asyncio's client, nats-py", ours, theirs, "µs", _REQUEST)
    report("the same: the blocking client, nats-py", blocking, theirs, "µs", _REQUEST)


def measure(directory: Path, rounds: int) -> None:
    """Print all comparisons with NATS."""
    with (
        running_nats(directory) as port,
        running_host(directory, "a", port) as here,
        running_host(directory, "b", port) as there,
    ):
        alice, bob = here.dial("alice"), there.dial("bob")
        wait_until_reached(alice, "bob")
        compare_messages(alice, bob, port, rounds)
        compare_bare_requests(alice, bob, port, rounds)
        compare_library_requests(alice, here, there, port, rounds)


def report(what: str, ours: list[float], theirs: list[float], unit: str, goal: str) -> None:
    """Print the medians of both, and of the ratios of the rounds the median and the range."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    print(
        f"{what}: {statistics.median(ours):,.0f} to {statistics.median(theirs):,.0f} {unit},"
        f" {statistics.median(ratios):.2f} x"
        f" ({min(ratios):.2f} to {max(ratios):.2f}; the goal is {goal})",
        flush=True,
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.pop("BROKERD_PURE", None)
    with tempfile.TemporaryDirectory(prefix="bd-") as name:
        measure(Path(name), arguments.rounds)


if __name__ == "__main__":
    main()
