"""How fast channels are, and what they cost: ``python -m benchmarks.channels``.

The relay of the broker is compared with relay.c, which does nothing else, in turns within
one run. On a machine with other work, compare the processor times.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.machinery import Process, compiled, free_port, raise_descriptor_limit, wait_for

__all__ = ["main"]

#: Bytes of each write, as in the contract.
WRITE: Final = 64 * 1024
MIB: Final = 1024 * 1024
MESSAGE, REQUEST, REPLY, OPEN, JOIN = 1, 2, 3, 8, 9
_HEADER: Final = struct.Struct("!BBBBQ")
_CLIENTS: Final = ("alice", "bob", "carol", "dave")
_READY_S: Final = 30.0
#: MiB per turn of a stream, and round trips per turn.
_STREAMED: Final = 64
_PINGS: Final = 200


@dataclass(slots=True)
class Broker:
    """A running broker.

    address: a path, or a port on loopback.
    """

    process: Process
    address: str | int

    def dial(self, name: str, word: bytes = b"") -> socket.socket:
        """Return an authenticated connection of that client."""
        sock = dialed(self.address)
        challenge = read_frame(sock)[len(b"#CHALLENGE#") :]
        key = name.encode() * 8
        mac = hmac.digest(key, challenge, "sha256")
        _write_frame(sock, b"{sha256}" + mac + name.encode() + word)
        read_frame(sock)
        _write_frame(sock, b"#CHALLENGE#{sha256}" + os.urandom(40))
        read_frame(sock)
        _write_frame(sock, b"#WELCOME#")
        return sock

    def listen(self, name: str) -> socket.socket:
        """Return a connection of that client that listens for channels."""
        sock = self.dial(name)
        send(sock, REQUEST, "$broker", b'{"op": "listen"}', codec=2)
        read_frame(sock)
        return sock

    def open(self, caller: str, recipient: str, listener: socket.socket) -> Pair:
        """Return the two ends of a new channel."""
        calling = self.dial(caller, b" channel")
        send(calling, OPEN, recipient, b"")
        token = _HEADER.unpack_from(read_frame(listener))[-1]
        answering = self.dial(recipient, b" channel")
        send(answering, JOIN, "", b"", message_id=token)
        for end in (calling, answering):
            read_frame(end)
        return calling, answering


Pair = tuple[socket.socket, socket.socket]


def dialed(address: str | int) -> socket.socket:
    """Return a connection to a path, or to a port on loopback."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        return sock
    sock = socket.create_connection(("127.0.0.1", address))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(
    sock: socket.socket, kind: int, to: str, payload: bytes, *, message_id: int = 1, codec: int = 0
) -> None:
    _write_frame(sock, _HEADER.pack(kind, 0, codec, len(to), message_id) + to.encode() + payload)


def _write_frame(sock: socket.socket, body: bytes) -> None:
    sock.sendall(struct.pack("!i", len(body)) + body)


def read_frame(sock: socket.socket) -> bytes:
    return _read(sock, struct.unpack("!i", _read(sock, 4))[0])


def _read(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the connection ended")
        data += piece
    return bytes(data)


@contextlib.contextmanager
def running_broker(directory: Path, *, tcp: bool, channels: int = 64) -> Iterator[Broker]:
    """Run a broker in a process of its own."""
    address: str | int = free_port() if tcp else str(directory / "s")
    listen = f"127.0.0.1:{address}" if tcp else address
    clients = {name: {"key": name * 8, "channels": 2 * channels} for name in _CLIENTS}
    settings = {"listen": [listen], "clients": clients, "limits": {"channels": channels}}
    with serving(settings, directory / "brokerd.yaml", address) as broker:
        yield broker


@contextlib.contextmanager
def serving(settings: dict[str, Any], path: Path, address: str | int) -> Iterator[Broker]:
    """Run a broker with a configuration, written to ``path``, that listens at ``address``."""
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "brokerd", "--config", str(path)]
    process = Process(command, path.with_suffix(".log"))
    try:
        with wait_for("the broker is ready", _READY_S) as turns:
            for _ in turns:
                with contextlib.suppress(OSError):
                    dialed(address).close()
                    break
        yield Broker(process, address)
    finally:
        process.stop()


@contextlib.contextmanager
def running_relay(directory: Path, *, tcp: bool) -> Iterator[tuple[Process, Callable[[], Pair]]]:
    """Run relay.c; yield its process, and what returns a new pair of ends."""
    address: str | int = free_port() if tcp else str(directory / "r")
    process = Process([str(compiled("relay.c", directory)), str(address)], directory / "relay-log")
    try:
        with wait_for("the relay is ready", _READY_S) as turns:
            for _ in turns:
                if "ready" in process.log.read_text():
                    break
        yield process, lambda: (dialed(address), dialed(address))
    finally:
        process.stop()


def stream(process: Process, ends: Pair, size: int) -> tuple[float, float]:
    """Send ``size`` bytes from one end to the other; return the seconds, and the
    processor time of the process between them.
    """
    block, writer, reader = bytes(WRITE), *ends
    buffer = bytearray(MIB)

    def write() -> None:
        for _ in range(size // WRITE):
            writer.sendall(block)

    cpu, began = process.cpu_s(), time.perf_counter()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    left = size
    while left:
        left -= reader.recv_into(buffer, min(left, len(buffer)))
    took = time.perf_counter() - began
    thread.join()
    return took, process.cpu_s() - cpu


def round_trips(ping: Callable[[], None], count: int) -> float:
    """Return the median time of a round trip, in seconds."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        ping()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_throughput(directory: Path, rounds: int) -> None:
    """Print the throughput of the broker's relay and of relay.c, in turns."""
    for tcp in (False, True):
        with (
            running_broker(directory, tcp=tcp) as broker,
            running_relay(directory, tcp=tcp) as (relay, dial),
            contextlib.ExitStack() as stack,
        ):
            listener = stack.enter_context(broker.listen("bob"))
            ours, theirs = broker.open("alice", "bob", listener), dial()
            for end in (*ours, *theirs):
                stack.enter_context(end)
            results: dict[str, list[tuple[float, float]]] = {"brokerd": [], "relay.c": []}
            for _ in range(rounds):
                results["brokerd"].append(stream(broker.process, ours, _STREAMED * MIB))
                results["relay.c"].append(stream(relay, theirs, _STREAMED * MIB))
        print(f"throughput, {'TCP' if tcp else 'Unix socket'}, 64 KiB writes")
        medians = {}
        for name, rows in results.items():
            took, cpu = (statistics.median(row[column] for row in rows) for column in (0, 1))
            medians[name] = took, cpu
            per_gib = cpu * 1024 / _STREAMED
            print(f"  {name:8} {_STREAMED / took:7.0f} MiB/s, {per_gib:.3f} s of processor per GiB")
        (took, cpu), (their_took, their_cpu) = medians["brokerd"], medians["relay.c"]
        print(
            f"  ratio    {their_took / took:.2f} x the throughput;"
            f" {their_cpu / cpu:.2f} x by processor time (goal: at least 0.5)"
        )


def measure_round_trip(directory: Path, rounds: int) -> None:
    """Print the round trip through a channel, and that of a message, in turns."""
    with running_broker(directory, tcp=False) as broker, contextlib.ExitStack() as stack:
        listener = stack.enter_context(broker.listen("bob"))
        one, other = (stack.enter_context(end) for end in broker.open("alice", "bob", listener))
        carol, dave = (stack.enter_context(broker.dial(name)) for name in ("carol", "dave"))
        frame = _HEADER.pack(MESSAGE, 0, 0, 4, 0) + b"dave" + bytes(16)

        def through_channel() -> None:
            _write_frame(one, bytes(16))
            _write_frame(other, read_frame(other))
            read_frame(one)

        def through_messages() -> None:
            _write_frame(carol, frame)
            read_frame(dave)
            send(dave, MESSAGE, "carol", bytes(16))
            read_frame(carol)

        channel, messages = [], []
        cpu_channel = cpu_messages = 0.0
        for _ in range(rounds):
            began = broker.process.cpu_s()
            channel.append(round_trips(through_channel, _PINGS))
            between = broker.process.cpu_s()
            messages.append(round_trips(through_messages, _PINGS))
            cpu_channel += between - began
            cpu_messages += broker.process.cpu_s() - between
    ours, theirs = statistics.median(channel), statistics.median(messages)
    print("round trip of 16 bytes, Unix socket")
    print(f"  channel  {ours * 1e6:6.1f} us")
    print(f"  messages {theirs * 1e6:6.1f} us")
    print(
        f"  ratio    {ours / theirs:.2f} x; {cpu_channel / cpu_messages:.2f} x by the broker's"
        " processor time (goal: at most 1.2)"
    )


def measure_memory(directory: Path, count: int) -> None:
    """Print the memory of idle channels."""
    with (
        running_broker(directory, tcp=False, channels=count) as broker,
        contextlib.ExitStack() as stack,
    ):
        listener = stack.enter_context(broker.listen("bob"))
        for _ in range(20):
            for end in broker.open("alice", "bob", listener):
                stack.enter_context(end)
        before = broker.process.memory()
        for _ in range(count - 20):
            for end in broker.open("alice", "bob", listener):
                stack.enter_context(end)
        grown = broker.process.memory() - before
    print(f"memory of {count} idle channels")
    print(f"  {grown / (count - 20) / 1024:.1f} KiB each (goal: at most 8)")


def measure_neighbours(directory: Path, rounds: int) -> None:
    """Print round trips of messages beside a saturated channel, and beside a saturated
    ordinary connection, in turns.
    """
    with running_broker(directory, tcp=False) as broker, contextlib.ExitStack() as stack:
        listener = stack.enter_context(broker.listen("bob"))
        one, other = (stack.enter_context(end) for end in broker.open("alice", "bob", listener))
        carol, dave = (stack.enter_context(broker.dial(name)) for name in ("carol", "dave"))
        alice = stack.enter_context(broker.dial("alice"))
        frame = _HEADER.pack(MESSAGE, 0, 0, 4, 0) + b"dave" + bytes(16)

        def ping() -> None:
            _write_frame(carol, frame)
            read_frame(dave)
            send(dave, MESSAGE, "carol", bytes(16))
            read_frame(carol)

        body = _HEADER.pack(MESSAGE, 0, 0, 3, 0) + b"bob" + bytes(WRITE)
        message = struct.pack("!i", len(body)) + body

        def beside(writer: socket.socket, reader: socket.socket, block: bytes) -> float:
            stop = threading.Event()
            buffer = bytearray(MIB)

            def write() -> None:
                while not stop.is_set():
                    writer.sendall(block)

            def read() -> None:
                reader.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    while True:
                        reader.recv_into(buffer)

            threads = [threading.Thread(target=run, daemon=True) for run in (write, read)]
            for thread in threads:
                thread.start()
            result = round_trips(ping, _PINGS)
            stop.set()
            for thread in threads:
                thread.join()
            return result

        channel = [0.0] * rounds
        ordinary = [0.0] * rounds
        for number in range(rounds):
            channel[number] = beside(one, other, bytes(WRITE))
            ordinary[number] = beside(alice, listener, message)
    ours, theirs = statistics.median(channel), statistics.median(ordinary)
    print("round trip of messages beside a saturated stream, Unix socket")
    print(f"  channel  {ours * 1e6:7.1f} us")
    print(f"  messages {theirs * 1e6:7.1f} us")
    print(f"  ratio    {ours / theirs:.2f} x (goal: at most 1)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.channels", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--channels", type=int, default=1000, help="idle ones (default 1000)")
    options = parser.parse_args(arguments)
    raise_descriptor_limit()
    for measure, number in (
        (measure_throughput, options.rounds),
        (measure_round_trip, options.rounds),
        (measure_neighbours, options.rounds),
        (measure_memory, options.channels),
    ):
        with tempfile.TemporaryDirectory(prefix="bd-") as directory:
            measure(Path(directory), number)
    return 0


if __name__ == "__main__":
    sys.exit(main())
