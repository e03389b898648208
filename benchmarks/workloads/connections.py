"""The cost of a connection: its memory, and the time to make it."""

from __future__ import annotations

import re
import struct
import time
from typing import Final

from benchmarks import dialects
from benchmarks.dialects import key_of
from benchmarks.machinery import wait_for
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

__all__ = ["Connecting", "IdleMemory"]

#: Of a client that connects again and again, brokerd's log has 50 lines in a second, and
#: then a line with the number of the rest.
_CONNECTED: Final = re.compile(rb'"client\.connected(?:_more", "count": (\d+)|")')


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
        return Result((after - before) / self._count(timing), {"whole_mib": after / MIB})


class Connecting(Workload):
    """Clients at random, of a thousand, connect, authenticate and go, some at once."""

    key = "connect"
    title = "new authenticated connections, 1,000 clients configured"
    unit = "connections/s"
    also = (("server_us", "server's µs for each"),)
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
        if isinstance(dialect, dialects.Brokerd) and "error" not in stage.entrant.variant:
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
                "server_us": report["server_cpu"] / report["count"] * 1e6,
                "load_busy": report["cpu"] / report["seconds"],
            },
        )

    @staticmethod
    def _welcomed(stage: Stage) -> int:
        """Return how many clients the log names, and how many it only counts."""
        return sum(
            int(counted or 1)
            for counted in _CONNECTED.findall(stage.running.process.log.read_bytes())
        )
