"""Streams that push as hard as they can, and the round trip."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from benchmarks import dialects
from benchmarks.workloads.stage import (
    MIB,
    Entrant,
    Result,
    Spoilt,
    Stage,
    Timing,
    Workload,
    client,
)

__all__ = ["LIMITS", "PEERS", "Configured", "Events", "RoundTrip", "SlowReader", "Stream", "pump"]

#: Bytes that are written again and again.
_BUFFER: Final = 256 * 1024
_SEED: Final = 20_000
PEERS: Final = ("brokerd", "brokerd-unix", "nats", "redis", "mosquitto", "threads")
LIMITS: Final = ("relay", "relay-unix", "direct", "direct-unix")


class Stream(Workload):
    """Senders write as fast as they can, receivers read as fast as they can.

    Each sender's buffer holds messages to all receivers, as often to one as to the
    other, in shuffled order. pauses: whether a sender waits when much is under way.
    """

    def __init__(
        self,
        key: str,
        title: str,
        payload: int,
        *,
        senders: int = 1,
        receivers: int = 1,
        systems: Sequence[str] = (*PEERS, *LIMITS),
        pauses: bool = True,
    ) -> None:
        self.key, self.title, self.pauses = key, title, pauses
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
                stage.size = len(stage.probe(sender, messages[name], [name], payload))
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
        return pump(stage, timing, times=int(self.pauses))


def pump(stage: Stage, timing: Timing, times: int = 1) -> Result:
    """Measure the members of a stage: their messages per second.

    times: how many of the usual windows may be under way; with 0 the senders never
    pause.
    """
    dialect = stage.running.dialect
    if not times:
        # It fills every queue on the way first.
        timing = replace(timing, warm_s=4 * timing.warm_s, seconds=2 * timing.seconds)
    window = times * timing.window_mib * MIB
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
            "window_ns": report["server_cpu"] / (report["bytes"] / stage.size) * 1e9,
            "least": report["least"] / stage.size,
        },
    )


class Events(Workload):
    """One sender publishes; every event goes to all subscribers."""

    unit = "deliveries/s"
    payload = b"x" * 16
    topic = "news.of.all"

    def __init__(
        self, key: str, title: str, systems: Sequence[str], *, pauses: bool = True
    ) -> None:
        self.key, self.title, self.pauses = key, title, pauses
        self.entrants = tuple(Entrant(system) for system in systems)

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(1 + (10 if timing.small else 100))]

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        sender, *subscribers = self.names(stage.entrant, timing)
        stage.connect(sender)
        for name in subscribers:
            dialect.subscribe(stage.connect(name), self.topic)
        event = dialect.event(self.topic, self.payload)
        stage.size = len(stage.probe(sender, event, subscribers, self.payload))
        # What arrives is a hundred times what is sent, so a short buffer does.
        count = 256
        file = stage.file("sender", event * count)
        descriptor = stage.connections[sender].fileno()
        stage.members = [f"s:{descriptor}:{file}:{count * stage.size * len(subscribers)}"]
        for name in subscribers:
            stage.members.append(f"r:{stage.connections[name].fileno()}:0:{count * stage.size}")

    def measure(self, stage: Stage, timing: Timing) -> Result:
        return pump(stage, timing, times=int(self.pauses))


class RoundTrip(Workload):
    """One message goes to another client, which sends one back at once; then the next."""

    key = "roundtrip"
    title = "round trip, 16 B, p50"
    unit = "µs"
    higher = False
    entrants = tuple(Entrant(system) for system in (*PEERS, *LIMITS))

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
                size = len(stage.probe(name, message, [other], payload))
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
            stage.size = len(stage.probe(sender, message, [receiver], self.payload))
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
        result = pump(stage, timing, times=4)
        pairs = self._pairs(timing)
        # All pairs are alike, so 49 of 50 get 49 fiftieths.
        others = 1.0 if stage.entrant.variant == "1 does not read" else (pairs - 1) / pairs
        return Result(result.value * others, result.more)
