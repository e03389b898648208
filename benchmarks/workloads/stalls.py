"""Stalls: the longest round trip of a client that has nothing to do with what happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from benchmarks import dialects
from benchmarks.dialects import ID, NAME
from benchmarks.machinery import wait_for
from benchmarks.systems import Setup
from benchmarks.workloads.bulk import pump
from benchmarks.workloads.growth import Growth
from benchmarks.workloads.stage import MIB, Entrant, Result, Spoilt, Stage, Timing, Workload, client

__all__ = ["ClientList", "Ending", "LargeMessages", "Polite", "Reload"]

_WATCH = client(0)
_READ_S = 60.0


class _Stall(Growth):
    """An event that may hold the broker up: the longest round trip meanwhile."""

    unit = "ms"
    also = (("longest_cpu", "the server's processor time in one ping, ms"),)

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [_WATCH, *(f"d{number:06d}" for number in range(self.size(entrant, timing)))]

    def get_ready(self, stage: Stage, timing: Timing) -> None:
        """Do what belongs to a measurement, but comes before the event."""

    def happen(self, stage: Stage, timing: Timing) -> None:
        """Cause the event, and return when it is over."""
        raise NotImplementedError

    def measure(self, stage: Stage, timing: Timing) -> Result:
        self.get_ready(stage, timing)
        cpu = stage.running.process.cpu_s()
        with stage.watched(_WATCH) as seen:
            self.happen(stage, timing)
        cpu = stage.running.process.cpu_s() - cpu
        return Result(
            seen["longest"],
            {"longest_cpu": seen["longest_cpu"], "p50": seen["p50"], "server_ms": cpu * 1000},
        )


class Reload(_Stall):
    """A reload, by the number of clients configured.

    One client is changed, or all of them are.
    """

    def __init__(self, key: str, title: str, sizes: Sequence[int], *, changed: str) -> None:
        super().__init__(key, title, "clients", sizes, ("brokerd",))
        self._changed = changed

    def happen(self, stage: Stage, timing: Timing) -> None:
        config, log = stage.directory / "brokerd.yaml", stage.running.process.log
        stage.count += 1
        queue = f"queue: {8 + stage.count}MiB, allow_md5"
        old = f"queue: {7 + stage.count}MiB, allow_md5" if stage.count > 1 else "allow_md5"
        text = config.read_text()
        # The first client stays as it is: it watches.
        head, first, rest = text.partition("d000000:")
        config.write_text(
            head + first + rest.replace(old, queue, -1 if self._changed == "all" else 1)
        )
        done = log.read_bytes().count(b"daemon.reloaded")
        os.kill(stage.running.process.pid, signal.SIGHUP)
        with wait_for("the broker has reloaded", _READ_S) as turns:
            for _ in turns:
                if log.read_bytes().count(b"daemon.reloaded") > done:
                    return
                if b"daemon.reload_refused" in log.read_bytes():
                    raise Spoilt(f"the reload was refused: {stage.running.process.last_words()}")


class ClientList(_Stall):
    """The operation ``clients`` of one client, by the number of clients configured."""

    def happen(self, stage: Stage, timing: Timing) -> None:
        name = self.names(stage.entrant, timing)[1]
        sock = stage.connections.get(name) or stage.connect(name)
        dialect = stage.running.dialect
        assert isinstance(dialect, dialects.Brokerd)
        sock.settimeout(_READ_S)
        sock.sendall(dialect.operation("clients"))
        dialect.read_reply(sock)


class Ending(_Stall):
    """Connections that all end at once, because their process does."""

    def get_ready(self, stage: Stage, timing: Timing) -> None:
        names = self.names(stage.entrant, timing)[1:]
        with contextlib.ExitStack() as held:
            descriptors = [
                held.enter_context(stage.running.connect(name)).fileno() for name in names
            ]
            # This process alone has them, once they are closed here.
            self._holder = subprocess.Popen(["sleep", "60"], pass_fds=descriptors)

    def happen(self, stage: Stage, timing: Timing) -> None:
        log, count = stage.running.process.log, self.size(stage.entrant, timing)
        stage.count += count
        self._holder.kill()
        self._holder.wait()
        with wait_for("every end is in the log", _READ_S) as turns:
            for _ in turns:
                if log.read_bytes().count(b"client.disconnected") >= stage.count:
                    return


class LargeMessages(Workload):
    """A stream of large messages: what it moves, and what it does to another client."""

    key = "large"
    title = "1 to 1, large messages, two under way"
    unit = "GiB/s"
    also = (("longest", "longest ping, ms"),)
    most_rounds = 3
    entrants = tuple(
        Entrant(system, f"{size} MiB", size)
        for system in ("brokerd", "nats")
        for size in (4, 16, 64)
    )

    def _bytes(self, entrant: Entrant, timing: Timing) -> int:
        return MIB if timing.small else entrant.size * MIB

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(number) for number in range(3)]

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        size = self._bytes(entrant, timing)
        return Setup(self.names(entrant, timing), directory, max_message=size)

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        _, sender, receiver = self.names(stage.entrant, timing)
        stage.connect(sender)
        dialect.receive(stage.connect(receiver), receiver)
        payload = b"x" * 16
        small = dialect.message(receiver, payload)
        large = dialect.message(receiver, b"x" * self._bytes(stage.entrant, timing))
        # What surrounds a payload grows alike on both ways, by the digits of its size.
        arrived = stage.probe(sender, small, [receiver], payload)
        stage.size = len(arrived) + len(large) - len(small)
        file = stage.file("sender", large)
        stage.members = [
            f"s:{stage.connections[sender].fileno()}:{file}:{stage.size}",
            f"r:{stage.connections[receiver].fileno()}:0:{stage.size}",
        ]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        two = 2 * self._bytes(stage.entrant, timing) // MIB
        with stage.watched(_WATCH) as seen:
            # One message takes a while.
            seconds = timing.seconds if timing.small else max(timing.seconds, 1.0)
            result = pump(stage, replace(timing, seconds=seconds, window_mib=two))
        return Result(
            result.value * stage.size / MIB / 1024,
            {
                **result.more,
                "longest": seen["longest"],
                "longest_cpu": seen["longest_cpu"],
            },
        )


class Polite(Workload):
    """A hundred clients with one request at a time, beside one that floods the server."""

    key = "polite"
    title = "100 polite request clients, p50"
    unit = "ms"
    higher = False
    most_rounds = 3
    entrants = (
        *(
            Entrant(system, variant)
            for variant in (
                "alone",
                "beside bulk",
                "beside a pool's",
                "beside a large pool's",
                "beside receipts",
                "beside subscriptions",
            )
            for system in ("brokerd", "nats")
        ),
        Entrant("brokerd", "beside refusals"),
        Entrant("brokerd", "beside client lists"),
    )
    _callee, _flood, _target, _pool = "c0001", "f0000", "f0001", "p0000"
    _POOLS: ClassVar[dict[str, int]] = {"beside a pool's": 4, "beside a large pool's": 1000}
    _FIGURES = ("p99", "longest", "p50_cpu", "longest_cpu")

    def _callers(self, timing: Timing) -> list[str]:
        return [f"q{number:04d}" for number in range(10 if timing.small else 100)]

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [self._callee, self._flood, self._target, self._pool, *self._callers(timing)]

    def _members(self, entrant: Entrant, timing: Timing) -> int:
        members = self._POOLS.get(entrant.variant, 1)
        return min(members, 50) if timing.small else members

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        pools = {self._pool: self._members(entrant, timing)}
        return Setup(self.names(entrant, timing), directory, pools=pools)

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect, callers = stage.running.dialect, self._callers(timing)
        dialect.receive(stage.connect(self._callee), self._callee)
        for name in callers:
            dialect.await_replies(stage.connect(name), name)
        payload = ID + b"x" * 8
        request = dialect.request(callers[0], self._callee, payload)
        reply = dialect.reply(callers[0], payload)
        delivered = stage.probe(callers[0], request, [self._callee], payload)
        answer = stage.probe(self._callee, reply, [callers[0]], payload)
        stage.members = [
            str(stage.connections[self._callee].fileno()),
            *(
                str(stage.file(name, data.replace(callers[0].encode(), NAME)))
                for name, data in (
                    ("call", request),
                    ("delivered", delivered),
                    ("reply", reply),
                    ("answer", answer),
                )
            ),
            *(f"{stage.connections[name].fileno()}:{name}" for name in callers),
        ]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        arguments = ["polite", timing.warm_s, timing.seconds, stage.running.dialect.stray]
        longest = timing.warm_s + timing.seconds + 40
        kept = dict(stage.connections)
        with contextlib.ExitStack() as held:
            flood = self._begin_flood(stage, timing, held)
            report = stage.load([*arguments, *stage.members], longest, "calls.c")
            if flood:
                # It ends a little later than what is measured.
                report["flood"] = stage.report(flood, longest)["sent"] / MIB
                if not report["flood"]:
                    raise Spoilt("the client beside them sent nothing")
        stage.connections = kept
        return Result(
            report["p50"],
            {name: report[name] for name in (*self._FIGURES, "flood") if name in report},
        )

    def _begin_flood(
        self, stage: Stage, timing: Timing, held: contextlib.ExitStack
    ) -> subprocess.Popen[str] | None:
        """Start the flood, with connections of its own; what it is depends on the
        entrant.
        """
        dialect, payload = stage.running.dialect, b"x" * 16

        def connect(name: str, key: str) -> socket.socket:
            sock = held.enter_context(stage.running.connect(name))
            stage.connections[key] = sock
            return sock

        match stage.entrant.variant:
            case "alone":
                return None
            case "beside bulk":
                dialect.receive(connect(self._target, "target"), self._target)
                data = dialect.message(self._target, payload)
            case "beside a pool's" | "beside a large pool's":
                for number in range(self._members(stage.entrant, timing)):
                    dialect.join(connect(self._pool, f"member {number}"), self._pool)
                data = dialect.message(self._pool, payload)
            case "beside receipts":
                dialect.receive(connect(self._target, "target"), self._target)
                data = dialect.confirmed(self._target, payload)
            case "beside subscriptions":
                data = b"".join(dialect.change(f"other.{number}") for number in range(100))
            case "beside refusals":
                data = dialect.message("nobody", payload)
            case _:
                assert isinstance(dialect, dialects.Brokerd)
                data = dialect.operation("clients")
        sock = connect(self._flood, "flood")
        if stage.entrant.variant == "beside receipts":
            dialect.await_receipts(sock, self._flood)
        kept = [
            sock,
            *(
                stage.connections[key]
                for key in stage.connections
                if key.startswith(("target", "member"))
            ),
        ]
        file = stage.file("flood", data * max(1, 65536 // len(data)))
        seconds = timing.warm_s + timing.seconds + 0.2
        return stage.begin(["flood", seconds, file, *(each.fileno() for each in kept)], "calls.c")
