"""The workloads: the work of each system, and how each is measured.

A workload prepares a stage for an entrant: a system that is started and connected. It
measures the entrant once per call. A measurement that lost a message, or got one too
many, is not valid: it raises Spoilt.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from benchmarks import dialects
from benchmarks.dialects import key_of
from benchmarks.machinery import Process, compiled, wait_for
from benchmarks.python_peer import Board
from benchmarks.systems import SYSTEMS, Running

__all__ = ["WORKLOADS", "Entrant", "Result", "Spoilt", "Stage", "Timing", "Workload"]

_MIB: Final = 1024 * 1024
#: Bytes that are written again and again.
_BUFFER: Final = 256 * 1024
_PROBE_S: Final = 20.0
_SEED: Final = 20_000


class Spoilt(Exception):
    """A measurement that can't count, and why."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one measurement takes, and how hard a stream pushes.

    Attributes:
        warm_s: Before it begins.
        small: Whether counts are reduced, too.
        window_mib: What may be under way.
    """

    warm_s: float
    seconds: float
    small: bool = False
    window_mib: int = 4


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement.

    Attributes:
        value: In the workload's unit.
        more: What else was seen, by name.
    """

    value: float
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entrant:
    """One line of a workload's table.

    variant: what of the system is measured, where it is not all the same.
    """

    system: str
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.system}/{self.variant}" if self.variant else self.system

    @property
    def title(self) -> str:
        title = SYSTEMS[self.system].title
        return f"{title}, {self.variant}" if self.variant else title


class Stage:
    """An entrant, started, with everything prepared; a context manager that ends all of
    it.

    Attributes:
        directory: A temporary one, its own.
        program: The load generator.
    """

    def __init__(self, entrant: Entrant, names: Sequence[str], directory: Path) -> None:
        self.entrant = entrant
        self.directory = directory
        self.program = compiled("load.c", directory.parent)
        self.held = contextlib.ExitStack()
        self.connections: dict[str, socket.socket] = {}
        self.members: list[str] = []
        self.size = 0
        self.running: Running = SYSTEMS[entrant.system].started(names, directory)
        self.held.callback(self.running.process.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, end the system and remove its files."""
        self.held.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def connect(self, name: str) -> socket.socket:
        """Return an authenticated connection that is closed with the stage."""
        sock = self.running.connect(name)
        self.held.callback(sock.close)
        self.connections[name] = sock
        return sock

    def file(self, name: str, data: bytes) -> Path:
        """Return a file with these bytes."""
        path = self.directory / name
        path.write_bytes(data)
        return path

    def probe(self, sender: str, message: bytes, receivers: Sequence[str], payload: bytes) -> int:
        """Send one message, see that each receiver gets it, and return how long it is
        on arrival.
        """
        self.connections[sender].sendall(message)
        sizes = set()
        for name in receivers:
            sock = self.connections[name]
            sock.settimeout(_PROBE_S)
            data = b""
            # A server may have put a greeting before it; what follows the payload is a
            # line's end at most.
            while payload not in data or (data.endswith(payload) and message.endswith(b"\r\n")):
                piece = sock.recv(_MIB)
                if not piece:
                    raise Spoilt("the server closed a connection")
                data += piece
            sizes.add(len(data.removeprefix(b"PING\r\n").removesuffix(b"PING\r\n")))
        if len(sizes) != 1:
            raise Spoilt(f"receivers got messages of different sizes: {sorted(sizes)}")
        return sizes.pop()

    def load(self, arguments: Sequence[object], timeout_s: float) -> dict[str, Any]:
        """Run the load generator; return what it says, and the server's use of a
        processor meanwhile.
        """
        command = [str(self.program), *map(str, arguments)]
        descriptors = [sock.fileno() for sock in self.connections.values()]
        process = self.running.process
        if process.status is not None:
            raise Spoilt(f"the server has ended:\n{process.last_words()}")
        cpu = process.cpu_s()
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                pass_fds=descriptors,
                env={**os.environ, "LOAD_SERVER": str(process.pid)},
            )
        except subprocess.TimeoutExpired as error:
            raise Spoilt("the load generator did not end in time") from error
        if process.status is not None:
            raise Spoilt(f"the server ended:\n{process.last_words()}")
        if done.returncode:
            raise Spoilt(f"the load generator failed: {done.stderr.strip()}")
        report: dict[str, Any] = json.loads(done.stdout)
        if report["trouble"]:
            raise Spoilt(f"{report['trouble']} {report} {done.stderr.strip()[:500]}")
        report["server_cpu_whole"] = process.cpu_s() - cpu
        return report


class Workload:
    """One kind of work that all systems do.

    Attributes:
        key: The name on the command line.
        title: The name for people.
        unit: The unit of the values.
        higher: Whether more is better.
        entrants: The systems that take part.
        own_stages: Whether every measurement needs a stage of its own.
    """

    key = ""
    title = ""
    unit = "messages/s"
    higher = True
    own_stages = False
    #: Rounds after which there is nothing new to learn.
    most_rounds = 100
    entrants: Sequence[Entrant] = ()

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        """Return the clients that are configured."""
        raise NotImplementedError

    def prepare(self, stage: Stage, timing: Timing) -> None:
        """Connect, and encode what is to be sent."""

    def measure(self, stage: Stage, timing: Timing) -> Result:
        """Measure once. Raises Spoilt."""
        raise NotImplementedError


def client(number: int) -> str:
    """Return a client's name; all of the same length, so that messages are."""
    return f"c{number:04d}"


_ALL: Final = ("brokerd", "brokerd-unix", "nats", "redis", "mosquitto", "threads")
_LIMITS: Final = ("relay", "relay-unix", "direct", "direct-unix")


class Stream(Workload):
    """Senders write as fast as they can, receivers read as fast as they can.

    Each sender's buffer holds messages to all receivers, as often to one as to the
    other, in shuffled order.
    """

    def __init__(
        self,
        key: str,
        title: str,
        payload: int,
        *,
        senders: int = 1,
        receivers: int = 1,
        systems: Sequence[str] = (*_ALL, *_LIMITS),
    ) -> None:
        self.key, self.title = key, title
        self.payload, self.senders, self.receivers = payload, senders, receivers
        self.entrants = tuple(Entrant(system) for system in systems)

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(self.senders + self._receivers(timing))]

    def _receivers(self, timing: Timing) -> int:
        return min(self.receivers, 50) if timing.small else self.receivers

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        names = self.names(stage.entrant, timing)
        senders, receivers = names[: self.senders], names[self.senders :]
        for name in names:
            stage.connect(name)
        for name in receivers:
            dialect.receive(stage.connections[name], name)
        payload = b"x" * self.payload
        messages = {name: dialect.message(name, payload) for name in receivers}
        for sender in senders:
            for name in receivers:
                stage.size = stage.probe(sender, messages[name], [name], payload)
        turns = max(1, round(_BUFFER / len(receivers) / len(messages[receivers[0]])))
        order = [name for _ in range(turns) for name in receivers]
        for number, sender in enumerate(senders):
            random.Random(_SEED + number).shuffle(order)
            file = stage.file(f"sender-{number}", b"".join(messages[name] for name in order))
            descriptor = stage.connections[sender].fileno()
            stage.members.append(f"s:{descriptor}:{file}:{len(order) * stage.size}")
        for name in receivers:
            stage.members.append(f"r:{stage.connections[name].fileno()}:-1:{turns * stage.size}")

    def measure(self, stage: Stage, timing: Timing) -> Result:
        return _pump(stage, timing)


def _pump(stage: Stage, timing: Timing, times: int = 1) -> Result:
    dialect = stage.running.dialect
    window = times * timing.window_mib * _MIB
    report = stage.load(
        ["pump", timing.warm_s, timing.seconds, window, dialect.stray, *stage.members],
        timing.warm_s + timing.seconds + 40,
    )
    if report["answers"] and not (dialect.answers or dialect.stray):
        raise Spoilt(f"the senders got {report['answers']} bytes of errors")
    rate = report["bytes"] / stage.size / report["seconds"]
    return Result(
        rate,
        {
            "server_busy": report["server_cpu"] / report["seconds"],
            "load_busy": report["cpu"] / report["seconds"],
            "server_ns": report["server_cpu_whole"] / (report["arrived"] / stage.size) * 1e9,
        },
    )


class Events(Workload):
    """One sender publishes; every event goes to all subscribers."""

    key = "events"
    title = "1 event to 100 subscribers, 16 B"
    unit = "deliveries/s"
    entrants = tuple(
        Entrant(system) for system in ("brokerd", "brokerd-unix", "nats", "redis", "mosquitto")
    )
    payload = b"x" * 16
    topic = "news.of.all"

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(1 + (10 if timing.small else 100))]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        sender, *subscribers = self.names(stage.entrant, timing)
        stage.connect(sender)
        for name in subscribers:
            dialect.subscribe(stage.connect(name), self.topic)
        event = dialect.event(self.topic, self.payload)
        stage.size = stage.probe(sender, event, subscribers, self.payload)
        # What arrives is a hundred times what is sent, so a short buffer does.
        count = 256
        file = stage.file("sender", event * count)
        descriptor = stage.connections[sender].fileno()
        stage.members = [f"s:{descriptor}:{file}:{count * stage.size * len(subscribers)}"]
        for name in subscribers:
            stage.members.append(f"r:{stage.connections[name].fileno()}:0:{count * stage.size}")

    def measure(self, stage: Stage, timing: Timing) -> Result:
        return _pump(stage, timing)


class RoundTrip(Workload):
    """One message goes to another client, which sends one back at once; then the next."""

    key = "roundtrip"
    title = "round trip, 16 B, p50"
    unit = "µs"
    higher = False
    entrants = tuple(Entrant(system) for system in (*_ALL, *_LIMITS))

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        stage.members = []

    def measure(self, stage: Stage, timing: Timing) -> Result:
        dialect, payload = stage.running.dialect, b"x" * 16
        names = self.names(stage.entrant, timing)
        stage.connections.clear()
        ends: list[object] = []
        with contextlib.ExitStack() as held:
            for name in names:
                sock = held.enter_context(stage.running.connect(name))
                stage.connections[name] = sock
                dialect.receive(sock, name)
            for name, other in (names, names[::-1]):
                message = dialect.message(other, payload)
                size = stage.probe(name, message, [other], payload)
                if dialect.answers and name == names[0]:
                    # Where a publication is answered, each end gets that answer and the
                    # message, in every round. The second end has the answer to its
                    # probe when the first round begins.
                    dialects.read_until(stage.connections[name], b"\r\n")
                answer = len(b":1\r\n") if dialect.answers else 0
                ends += [stage.connections[name].fileno(), stage.file(name, message), size + answer]
            report = stage.load(
                ["pingpong", timing.warm_s, timing.seconds, dialect.stray, *ends],
                timing.warm_s + timing.seconds + 40,
            )
        stage.connections.clear()
        return Result(
            report["p50"],
            {
                "p99": report["p99"],
                "server_us": report["server_cpu"] / max(report["count"], 1) * 1e6,
            },
        )


class IdleMemory(Workload):
    """The memory of an authenticated, idle connection: the growth of the proportional
    set size.
    """

    key = "memory"
    title = "idle authenticated connection, memory"
    unit = "bytes"
    higher = False
    own_stages = True
    most_rounds = 3
    entrants = tuple(
        Entrant(system) for system in ("brokerd", "nats", "redis", "mosquitto", "threads")
    )

    def _count(self, timing: Timing) -> int:
        return 100 if timing.small else 2000

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(self._count(timing) + 20)]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        names = self.names(stage.entrant, timing)
        for name in names[:20]:
            # The first connections also pay for memory that all connections share.
            stage.connect(name)
        time.sleep(timing.warm_s)
        before = stage.running.process.memory()
        for name in names[20:]:
            stage.connect(name)
        time.sleep(timing.warm_s)
        after = stage.running.process.memory()
        return Result((after - before) / self._count(timing), {"whole_mib": after / _MIB})


class Connecting(Workload):
    """Clients at random, of a thousand, connect, authenticate and go, some at once."""

    key = "connect"
    title = "new authenticated connections, 1,000 clients configured"
    unit = "connections/s"
    parallel = 16
    entrants = (
        Entrant("brokerd", "stock handshake"),
        Entrant("brokerd", "handshake with name"),
        Entrant("nats"),
        Entrant("redis"),
        Entrant("mosquitto"),
    )

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(1000)]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        names, dialect = self.names(stage.entrant, timing), stage.running.dialect
        if isinstance(dialect, dialects.Brokerd):
            records = [(key_of(name).encode(), name.encode()) for name in names]
        else:
            assert isinstance(dialect, dialects.Nats | dialects.Redis | dialects.Mqtt)
            records = [(dialect.introduction(name), b"") for name in names]
        data = b"".join(struct.pack("=II", len(a), len(b)) + a + b for a, b in records)
        stage.file("clients", data)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        dialect = stage.running.dialect
        if isinstance(dialect, dialects.Brokerd):
            handshake = ["named" if "name" in stage.entrant.variant else "stock"]
        else:
            greeting = int(isinstance(dialect, dialects.Nats))
            reply = {dialects.Nats: 6, dialects.Redis: 5, dialects.Mqtt: 4}[type(dialect)]
            handshake = ["script", str(greeting), str(reply)]
        welcomed = self._welcomed(stage)
        report = stage.load(
            [
                "connect",
                timing.warm_s,
                timing.seconds,
                self.parallel,
                stage.running.port,
                *handshake,
                stage.directory / "clients",
            ],
            timing.warm_s + timing.seconds + 40,
        )
        if isinstance(dialect, dialects.Brokerd):
            # Its log names the clients that connected.
            with wait_for("every client that was welcome is in the log", 10) as turns:
                for _ in turns:
                    if self._welcomed(stage) - welcomed >= report["all"]:
                        break
        if not report["count"]:
            raise Spoilt("no client connected")
        return Result(
            report["count"] / report["seconds"],
            {
                "server_busy": report["server_cpu"] / report["seconds"],
                "load_busy": report["cpu"] / report["seconds"],
            },
        )

    @staticmethod
    def _welcomed(stage: Stage) -> int:
        return stage.running.process.log.read_bytes().count(b"client.connected")


class PythonToPython(Workload):
    """A Python process sends to another, each through a client library."""

    key = "python"
    title = "Python to Python, 16 B, separate processes"
    entrants = tuple(
        Entrant(system)
        for system in (
            "brokerd-client",
            "brokerd-client-unix",
            "nats-py",
            "zenoh",
            "pyzmq",
            "redis-py",
        )
    )

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        path = stage.file("board", bytes(Board.SIZE))
        board = Board(path)
        with contextlib.ExitStack() as held:
            held.callback(board.close)

            def start(role: str) -> Process:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.python_peer",
                    stage.entrant.system,
                    role,
                ]
                process = Process(
                    [*command, stage.running.address, str(path)], stage.directory / f"log-{role}"
                )
                held.callback(process.stop)
                return process

            def wait_until(event: str, of: Process, happened: Callable[[], object]) -> None:
                with wait_for(event, 20) as turns:
                    for _ in turns:
                        if happened():
                            return
                        if of.status:
                            raise Spoilt(f"{event}: it ended instead\n{of.last_words()}")

            receiver = start("receive")
            wait_until("the receiver is ready", receiver, lambda: board[Board.RECEIVER_READY])
            sender = start("send")
            wait_until("messages arrive", sender, lambda: board[Board.RECEIVED])
            time.sleep(timing.warm_s)
            t0, n0, cpu0 = time.monotonic(), board[Board.RECEIVED], stage.running.process.cpu_s()
            time.sleep(timing.seconds)
            t1, n1, cpu1 = time.monotonic(), board[Board.RECEIVED], stage.running.process.cpu_s()
            busy = {role.log.name.removeprefix("log-"): role.cpu_s() for role in (sender, receiver)}
            if n1 == n0:
                raise Spoilt("nothing arrived")
            board[Board.STOP] = 1
            wait_until("the sender stops", sender, lambda: board[Board.SENT])
            wait_until(
                "everything arrives", receiver, lambda: board[Board.RECEIVED] >= board[Board.SENT]
            )
            if board[Board.RECEIVED] != board[Board.SENT]:
                raise Spoilt(f"{board[Board.SENT]} were sent and {board[Board.RECEIVED]} arrived")
        return Result(
            (n1 - n0) / (t1 - t0),
            {
                "server_busy": (cpu1 - cpu0) / (t1 - t0),
                **{f"{role}_cpu": value for role, value in busy.items()},
            },
        )


class Configured(Stream):
    """The same stream to a few, with few and with very many clients configured: the
    processor's time per message.
    """

    unit = "ns/message"
    higher = False

    def __init__(self) -> None:
        super().__init__(
            "configured", "routing cost per message, by clients configured", 16, receivers=8
        )
        self.entrants = (Entrant("brokerd", "10 clients"), Entrant("brokerd", "100,000 clients"))

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        many = 1000 if timing.small else 100_000
        count = 10 if entrant.variant == "10 clients" else many
        named = [client(number) for number in range(9)]
        return [*named, *(f"d{number:06d}" for number in range(count - len(named)))]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        self._few.prepare(stage, timing)

    #: The clients that connect.
    _few: Final = Stream("", "", 16, receivers=8)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        result = super().measure(stage, timing)
        return Result(result.more["server_ns"], {"rate": result.value, **result.more})


class SlowReader(Workload):
    """Fifty pairs with the default queue and ``when_full``; the throughput of all but
    the first.

    In one variant the first receiver reads nothing. So its queue is full and its sender
    is held, before the measurement begins and until it has ended.
    """

    key = "slow_reader"
    title = "50 pairs of which 1 does not read, 1 KiB: the others"
    own_stages = True
    pairs = 50
    entrants = (Entrant("brokerd", "all read"), Entrant("brokerd", "1 does not read"))
    payload = b"x" * 1024

    def _pairs(self, timing: Timing) -> int:
        return 10 if timing.small else self.pairs

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(2 * self._pairs(timing))]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        pairs = self._pairs(timing)
        names = self.names(stage.entrant, timing)
        for name in names:
            stage.connect(name)
        for number in range(pairs):
            sender, receiver = names[number], names[pairs + number]
            dialect.receive(stage.connections[receiver], receiver)
            message = dialect.message(receiver, self.payload)
            stage.size = stage.probe(sender, message, [receiver], self.payload)
            count = 64
            data = message * count
            if number == 0 and stage.entrant.variant == "1 does not read":
                self._fill(stage.connections[sender], data)
                del stage.connections[sender], stage.connections[receiver]
                continue
            file = stage.file(f"sender-{number}", data)
            index = sum(member.startswith("s:") for member in stage.members)
            stage.members += [
                f"s:{stage.connections[sender].fileno()}:{file}:{count * stage.size}",
                f"r:{stage.connections[receiver].fileno()}:{index}:{count * stage.size}",
            ]

    @staticmethod
    def _fill(sock: socket.socket, data: bytes) -> None:
        """Send until the sender has been held for a while.

        Raises Spoilt if that never comes.
        """
        deadline = time.monotonic() + 20
        sock.settimeout(0.5)
        view = memoryview(data)
        while time.monotonic() < deadline:
            try:
                sent = sock.send(view)
            except TimeoutError:
                return
            view = view[sent:] if sent < len(view) else memoryview(data)
        raise Spoilt("the sender to the client that does not read was never held")

    def measure(self, stage: Stage, timing: Timing) -> Result:
        # Fifty queues want more than one.
        result = _pump(stage, timing, times=4)
        pairs = self._pairs(timing)
        # All pairs are alike, so 49 of 50 get 49 fiftieths.
        others = 1.0 if stage.entrant.variant == "1 does not read" else (pairs - 1) / pairs
        return Result(result.value * others, result.more)


WORKLOADS: Final[dict[str, Workload]] = {
    workload.key: workload
    for workload in (
        Stream("1to1-16", "1 to 1, 16 B", 16),
        Stream("1to1-1k", "1 to 1, 1 KiB", 1024),
        Stream("1to1-64k", "1 to 1, 64 KiB", 64 * 1024),
        Stream("4to1-16", "4 senders to 1, 16 B", 16, senders=4, systems=_ALL),
        Stream(
            "1to1000-16",
            "1 to 1,000 receivers in shuffled order, 16 B",
            16,
            receivers=1000,
            systems=_ALL,
        ),
        Events(),
        RoundTrip(),
        IdleMemory(),
        Connecting(),
        PythonToPython(),
        Configured(),
        SlowReader(),
    )
}
