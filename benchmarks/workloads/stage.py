"""The parts of every workload: its stages, its measurements, and their results."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.dialects import ID
from benchmarks.machinery import compiled
from benchmarks.systems import SYSTEMS, Running, Setup

__all__ = ["MIB", "Entrant", "Result", "Spoilt", "Stage", "Timing", "Workload", "client"]

MIB: Final = 1024 * 1024
_PROBE_S: Final = 20.0


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

    Attributes:
        variant: The part of the system that is measured, where it is not all the same.
        size: How much there is of what grows, in a workload that shows growth.
    """

    system: str
    variant: str = ""
    size: int = 0

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
        size: The size of a message on arrival.
        count: A number that the workload keeps from one measurement to the next.
    """

    def __init__(self, entrant: Entrant, setup: Setup) -> None:
        self.entrant = entrant
        self.directory = setup.directory
        compiled("load.c", setup.directory.parent)
        self.held = contextlib.ExitStack()
        self.connections: dict[str, socket.socket] = {}
        self.members: list[str] = []
        self._generators: list[subprocess.Popen[str]] = []
        self.size = self.count = 0
        self.running: Running = SYSTEMS[entrant.system].started(setup)
        self.held.callback(self.running.process.stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, end the system and remove its files."""
        for generator in self._generators:
            generator.kill()
            generator.communicate()
        self.held.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def connect(self, name: str, member: str = "") -> socket.socket:
        """Return an authenticated connection that is closed with the stage.

        member: the key in ``connections`` instead of the name, in a pool.
        """
        sock = self.running.connect(name)
        self.held.callback(sock.close)
        self.connections[member or name] = sock
        return sock

    def file(self, name: str, data: bytes) -> Path:
        """Return a file with these bytes."""
        path = self.directory / name
        path.write_bytes(data)
        return path

    def probe(self, sender: str, message: bytes, receivers: Sequence[str], payload: bytes) -> bytes:
        """Send one message, see that each receiver gets it, and return it as it
        arrives.
        """
        self.connections[sender].sendall(message)
        lines = message.endswith(b"\r\n")
        arrived = [self.arrival(self.connections[name], payload, lines) for name in receivers]
        if len(sizes := {len(data) for data in arrived}) != 1:
            raise Spoilt(f"receivers got messages of different sizes: {sorted(sizes)}")
        return arrived[0]

    @staticmethod
    def arrival(sock: socket.socket, payload: bytes, lines: bool) -> bytes:
        """Return the message with that payload, as it arrives.

        lines: whether a line's end follows the payload.
        """
        sock.settimeout(_PROBE_S)
        data = b""
        # A server may have put a greeting before it.
        while payload not in data or (data.endswith(payload) and lines):
            piece = sock.recv(MIB)
            if not piece:
                raise Spoilt("the server closed a connection")
            data += piece
        return data.removeprefix(b"PING\r\n").removesuffix(b"PING\r\n")

    def load(
        self, arguments: Sequence[object], timeout_s: float, program: str = "load.c"
    ) -> dict[str, Any]:
        """Run the load generator; return what it says, and the server's use of a
        processor meanwhile.
        """
        process = self.running.process
        if process.status is not None:
            raise Spoilt(f"the server has ended:\n{process.last_words()}")
        cpu = process.cpu_s()
        report = self.report(self.begin(arguments, program), timeout_s)
        report["server_cpu_whole"] = process.cpu_s() - cpu
        return report

    def begin(
        self, arguments: Sequence[object], program: str, *, is_urgent: bool | None = None
    ) -> subprocess.Popen[str]:
        """Start the load generator with every connection of this stage.

        is_urgent: see ``set_urgency``; None leaves it as it is.
        """
        generator = subprocess.Popen(
            [str(compiled(program, self.directory.parent)), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[sock.fileno() for sock in self.connections.values()],
            env={**os.environ, "LOAD_SERVER": str(self.running.process.pid)},
        )
        self._generators.append(generator)
        if is_urgent is not None:
            self.set_urgency(generator.pid, is_urgent=is_urgent)
        return generator

    @staticmethod
    def set_urgency(pid: int, *, is_urgent: bool) -> None:
        """Give a process a processor at once, or only one that nothing else needs.

        The first needs a privilege; without it, the process stays as it is.
        """
        if is_urgent:
            with contextlib.suppress(PermissionError):
                os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))
        else:
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))

    def report(self, generator: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
        """Wait for the load generator's end, and return what it says."""
        try:
            said, complaint = generator.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Spoilt("the load generator did not end in time") from error
        self._generators.remove(generator)
        process = self.running.process
        if process.status is not None:
            raise Spoilt(f"the server ended:\n{process.last_words()}")
        if generator.returncode:
            raise Spoilt(f"the load generator failed: {complaint.strip()}")
        report: dict[str, Any] = json.loads(said)
        if report["trouble"]:
            raise Spoilt(f"{report['trouble']} {report} {complaint.strip()[:500]}")
        return report

    @contextlib.contextmanager
    def watched(self, name: str, *, is_urgent: bool | None = None) -> Iterator[dict[str, float]]:
        """Measure the round trips of a client's messages to itself inside the block.

        That client has nothing to do with what happens. The figures, in milliseconds,
        are in the dictionary after the block.

        is_urgent: see ``set_urgency``; None leaves it as it is.
        """
        dialect, payload = self.running.dialect, ID + b"x" * 8
        if name not in self.connections:
            dialect.receive(self.connect(name), name)
        message = dialect.message(name, payload)
        answer = self.probe(name, message, [name], payload)
        files = (self.file("watch", message), self.file("watched", answer))
        descriptor = self.connections[name].fileno()
        watch = self.begin(
            ["watch", dialect.stray, descriptor, *files], "calls.c", is_urgent=is_urgent
        )
        figures: dict[str, float] = {}
        time.sleep(0.1)
        yield figures
        time.sleep(0.1)
        figures.update(self.report(watch, 40))


class Workload:
    """One kind of work that all systems do.

    Attributes:
        key: The name on the command line.
        title: The name for people.
        unit: The unit of the values.
        higher: Whether more is better.
        entrants: The systems that take part.
        own_stages: Whether every measurement needs a stage of its own.
        shows_growth: Whether the page compares each size with the first one.
    """

    key = ""
    title = ""
    unit = "messages/s"
    higher = True
    own_stages = False
    shows_growth = False
    #: Rounds after which there is nothing new to learn.
    most_rounds = 100
    entrants: Sequence[Entrant] = ()
    #: Further figures that the page shows, and their titles.
    also: Sequence[tuple[str, str]] = ()

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        """Return the clients that are configured."""
        raise NotImplementedError

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        """Return what the system is started with."""
        return Setup(self.names(entrant, timing), directory)

    def prepare(self, stage: Stage, timing: Timing) -> None:
        """Connect, and encode what is to be sent."""

    def measure(self, stage: Stage, timing: Timing) -> Result:
        """Measure once. Raises Spoilt."""
        raise NotImplementedError


def client(number: int) -> str:
    """Return a client's name; all of the same length, so that messages are."""
    return f"c{number:04d}"
