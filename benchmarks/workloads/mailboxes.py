"""Messages that are stored on disk before their receipt, and what takes them from there."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.dialects import read_exactly
from benchmarks.stored import BOX, RECEIPT_SIZE, StoredDialect
from benchmarks.systems import STORED
from benchmarks.workloads.stage import Entrant, Result, Spoilt, Stage, Timing, Workload, client

__all__ = ["Drained", "LiveBeside", "OneAtATime", "StoredStream"]

_PAYLOAD: Final = b"x" * 128
_SENDERS: Final = 4
_READ: Final = 1 << 18
#: Messages one at a time, and then as many calls of fdatasync, which brokerd's polls for the
#: next message would slow down if they followed each message.
_BLOCK: Final = 50
#: Live round trips: most of them come after brokerd has begun to poll.
_LIVE_TRIPS: Final = 1000
#: Longest wait for any answer, in seconds.
_ANSWER_S: Final = 120.0
_SYSTEMS: Final = ("brokerd-mailbox", "jetstream-synced", "jetstream", "redis-synced")


def cpu_of_family(pid: int) -> float:
    """Return the processor time of a process and its children, in seconds."""
    used = time.clock_gettime(~pid << 3 | 2)
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        used += sum(cpu_of_family(int(child)) for child in children.read_text().split())
    return used


class _Sender:
    """One connection that keeps some messages under way."""

    def __init__(self, sock: socket.socket, message: bytes, dialect: StoredDialect) -> None:
        self.sock = sock
        self.under_way = self.confirmed = 0
        self._message = message
        self._dialect = dialect
        self._data = b""
        self._unsent = memoryview(b"")

    def send(self, count: int) -> None:
        """Send that many messages more."""
        self.under_way += count
        self._unsent = memoryview(bytes(self._unsent) + self._message * count)
        self.write()

    def write(self) -> bool:
        """Write what waits; return whether all is written."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            return False
        return True

    def read(self) -> int:
        """Read receipts; return how many there were."""
        data = self.sock.recv(_READ)
        if not data:
            raise EOFError("the server closed the connection")
        count, self._data = self._dialect.receipts(self._data + data)
        self.under_way -= count
        self.confirmed += count
        return count


class _Stored(Workload):
    """Work with one mailbox."""

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [BOX, *(client(number) for number in range(_SENDERS + 1))]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = STORED[stage.entrant.system]
        for name in self.names(stage.entrant, timing)[1 : _SENDERS + 1]:
            dialect.get_ready(stage.connect(name), name)

    @staticmethod
    def senders(stage: Stage, count: int) -> list[_Sender]:
        """Return some of the senders."""
        dialect = STORED[stage.entrant.system]
        names = [name for name in stage.connections if name != BOX][:count]
        senders = []
        for name in names:
            sock = stage.connections[name]
            sock.setblocking(False)
            senders.append(_Sender(sock, dialect.message(name, _PAYLOAD), dialect))
        return senders

    @staticmethod
    def store(senders: Sequence[_Sender], window: int, seconds: float, most: int) -> int:
        """Store messages for some seconds, or that many; return how many are stored."""
        share = window // len(senders)
        sent = 0
        end = time.perf_counter() + seconds
        with selectors.DefaultSelector() as selector:
            for sender in senders:
                selector.register(sender.sock, selectors.EVENT_READ, sender)
                sender.send(share)
                sent += share
            while any(sender.under_way for sender in senders):
                ready = selector.select(_ANSWER_S)
                if not ready:
                    raise Spoilt("no receipt within 120 s")
                for key, _ in ready:
                    sender = key.data
                    written = sender.write()
                    with contextlib.suppress(BlockingIOError):
                        sender.read()
                    more = share - sender.under_way
                    # A few at a time would be many writes.
                    if more * 4 >= share and sent < most and time.perf_counter() < end:
                        sender.send(more)
                        sent += more
                        written = sender.write()
                    events = selectors.EVENT_READ | (0 if written else selectors.EVENT_WRITE)
                    selector.modify(sender.sock, events, sender)
        return sum(sender.confirmed for sender in senders)


class StoredStream(_Stored):
    """Several senders keep many messages under way."""

    def __init__(self, window: int) -> None:
        self.key = f"stored-{window}"
        self.title = f"stored on disk before the receipt, 128 B, {window:,} under way"
        self.window = window
        self.entrants = tuple(Entrant(system) for system in _SYSTEMS)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        pid = stage.running.process.pid
        self.store(self.senders(stage, _SENDERS), self.window, timing.warm_s, 1 << 60)
        cpu, began = cpu_of_family(pid), time.perf_counter()
        count = self.store(self.senders(stage, _SENDERS), self.window, timing.seconds, 1 << 60)
        took, cpu = time.perf_counter() - began, cpu_of_family(pid) - cpu
        return Result(count / took, {"server_ns": cpu / count * 1e9})


class OneAtATime(_Stored):
    """One sender waits for each receipt; beside it, what that has to take at least."""

    key = "stored-1"
    title = "stored on disk before the receipt, 128 B, one at a time"
    unit = "µs"
    higher = False
    also = (("least", "one fdatasync and one live round trip, µs"),)
    entrants = tuple(Entrant(system) for system in _SYSTEMS)

    def measure(self, stage: Stage, timing: Timing) -> Result:
        (sender,) = self.senders(stage, 1)
        sender.sock.setblocking(True)
        sender.sock.settimeout(_ANSWER_S)
        times: list[float] = []
        synced: list[float] = []
        end = time.perf_counter() + timing.warm_s + timing.seconds
        descriptor = os.open(stage.directory / "synced", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            while time.perf_counter() < end:
                for _ in range(_BLOCK):
                    began = time.perf_counter()
                    sender.send(1)
                    while not sender.read():
                        pass
                    times.append(time.perf_counter() - began)
                for _ in range(_BLOCK):
                    began = time.perf_counter()
                    os.write(descriptor, _PAYLOAD)
                    os.fdatasync(descriptor)
                    synced.append(time.perf_counter() - began)
        finally:
            os.close(descriptor)
        least = statistics.median(synced) + self._live(stage)
        value = statistics.median(times) * 1e6
        return Result(value, {"least": least * 1e6, "times_least": value / least / 1e6})

    def _live(self, stage: Stage) -> float:
        """Return the median of a client's round trips to itself, in seconds."""
        name = client(_SENDERS)
        dialect = stage.running.dialect
        if name not in stage.connections:
            dialect.receive(stage.connect(name), name)
        sock, message = stage.connections[name], dialect.message(name, _PAYLOAD)
        size = len(stage.probe(name, message, [name], _PAYLOAD))
        times = []
        for _ in range(_LIVE_TRIPS):
            began, got = time.perf_counter(), 0
            sock.sendall(message)
            while got < size:
                got += len(sock.recv(_READ))
            times.append(time.perf_counter() - began)
        return statistics.median(times)


class Drained(_Stored):
    """A consumer acknowledges each of many stored messages, with 1,000 of them held."""

    key = "drained"
    title = "stored messages delivered and acknowledged, 128 B, window 1,000"
    entrants = (Entrant("brokerd-mailbox"), Entrant("jetstream"))
    window = 1000

    def measure(self, stage: Stage, timing: Timing) -> Result:
        count = 2_000 if timing.small else 100_000
        stored = self.store(self.senders(stage, _SENDERS), 10_000, _ANSWER_S, count)
        pid = stage.running.process.pid
        with stage.running.connect(BOX) as sock:
            sock.settimeout(_ANSWER_S)
            cpu, began = cpu_of_family(pid), time.perf_counter()
            consumer = STORED[stage.entrant.system].consumer(sock, self.window, _PAYLOAD)
            while consumer.received < stored:
                consumer.take()
            took, cpu = time.perf_counter() - began, cpu_of_family(pid) - cpu
            if consumer.received != stored:
                raise Spoilt(f"{consumer.received} messages were delivered, and {stored} stored")
            # The last acknowledgements are read before the connection ends.
            time.sleep(0.2)
        return Result(stored / took, {"server_ns": cpu / stored * 1e9})


class LiveBeside(_Stored):
    """A live message's round trip, without and beside senders that fill a mailbox.

    The same senders also send to a client instead. That shows what their load costs
    without the disk and the store process.

    The senders and the client that measures stand for clients on other machines. They get
    and take the processors of this one accordingly: see ``Stage.set_urgency``.
    """

    key = "live-beside-stored"
    title = "round trip of a live message beside a mailbox, p99"
    unit = "µs"
    higher = False
    also = (("p50", "p50, µs"), ("p90", "p90, µs"), ("beside", "messages/s beside it"))
    entrants = tuple(
        Entrant("brokerd-mailbox", variant)
        for variant in ("idle", "saturated", "saturated with live messages")
    )
    window = 10_000
    #: Receives the live messages.
    recipient = client(_SENDERS + 1)

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [*super().names(entrant, timing), self.recipient]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        seconds = timing.warm_s + timing.seconds
        variant = stage.entrant.variant
        beside = 0.0
        with stage.watched(client(_SENDERS), is_urgent=True) as seen:
            if variant == "idle":
                time.sleep(seconds)
            elif variant == "saturated":
                beside = self._fill(stage, seconds, BOX)
            else:
                with self._received(stage):
                    beside = self._fill(stage, seconds, self.recipient)
        more = {name: seen[name] * 1000 for name in ("p50", "p90", "longest")}
        return Result(seen["p99"] * 1000, {**more, "beside": beside})

    def _fill(self, stage: Stage, seconds: float, recipient: str) -> float:
        """Send to a recipient at full speed; return the messages per second."""
        assert len(recipient) == len(BOX), "a receipt is known by its length"
        names = [client(number) for number in range(_SENDERS)]
        message = STORED[stage.entrant.system].message(names[0], _PAYLOAD)
        message = message.replace(BOX.encode(), recipient.encode(), 1)
        receipt = self._receipt(stage.connections[names[0]], message)
        files = (stage.file("fill", message), stage.file("filled", receipt))
        descriptors = [stage.connections[name].fileno() for name in names]
        filler = stage.begin(
            ["fill", seconds, self.window, *files, *descriptors], "calls.c", is_urgent=False
        )
        report = stage.report(filler, seconds + _ANSWER_S)
        return float(report["count"] / report["seconds"])

    def _receipt(self, sock: socket.socket, message: bytes) -> bytes:
        """Return the receipt of one message, as it arrives."""
        sock.setblocking(True)
        sock.settimeout(_ANSWER_S)
        sock.sendall(message)
        return read_exactly(sock, RECEIPT_SIZE)

    @contextlib.contextmanager
    def _received(self, stage: Stage) -> Iterator[None]:
        """Receive the live messages in a process of its own."""
        sock = stage.running.connect(self.recipient)
        sock.setblocking(True)
        with sock, subprocess.Popen(["cat"], stdin=sock, stdout=subprocess.DEVNULL) as process:
            stage.set_urgency(process.pid, is_urgent=False)
            try:
                yield
            finally:
                process.kill()
