"""The messages that applications send: to pools, with answers, receipts and extensions."""

from __future__ import annotations

import random
import selectors
from pathlib import Path
from typing import Final

from benchmarks.dialects import ID
from benchmarks.systems import Setup
from benchmarks.workloads.bulk import Stream, pump
from benchmarks.workloads.stage import Entrant, Result, Spoilt, Stage, Timing, Workload, client

__all__ = ["Extended", "Pool", "Receipts", "Requests"]

_PAYLOAD: Final = b"x" * 16
_PAIR: Final = (Entrant("brokerd"), Entrant("nats"))


class Pool(Workload):
    """One sender writes as fast as it can to a name that many connections share.

    Each message goes to one of them. brokerd takes the least loaded; nats-server's queue
    group takes any.
    """

    entrants = _PAIR

    def __init__(self, members: int) -> None:
        self.key = f"pool-{members}"
        self.title = f"1 to a pool of {members}, 16 B"
        self._members = members

    def members(self, entrant: Entrant, timing: Timing) -> int:
        """Return the number of connections that share the name."""
        return self._members

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        names = self.names(entrant, timing)
        return Setup(names, directory, pools={names[1]: self.members(entrant, timing)})

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        sender, pool = self.names(stage.entrant, timing)
        sock = stage.connect(sender)
        count = self.members(stage.entrant, timing)
        members = [stage.connect(pool, f"{pool} {number}") for number in range(count)]
        for member in members:
            dialect.join(member, pool)
        message = dialect.message(pool, _PAYLOAD)
        sock.sendall(message)
        with selectors.DefaultSelector() as selector:
            for member in members:
                selector.register(member, selectors.EVENT_READ, member)
            (chosen, _), *_ = selector.select(20)
        stage.size = len(stage.arrival(chosen.data, _PAYLOAD, message.endswith(b"\r\n")))
        count = 4096
        file = stage.file("sender", message * count)
        stage.members = [f"s:{sock.fileno()}:{file}:{count * stage.size}"]
        stage.members += [f"p:{member.fileno()}:-1:0" for member in members]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        result = pump(stage, timing)
        enough = result.value * timing.seconds > 100 * len(stage.members)
        if enough and not result.more["least"]:
            raise Spoilt("a member of the pool got nothing")
        return result


class Extended(Stream):
    """A stream of messages each of which carries a trace context of its own."""

    def __init__(self) -> None:
        super().__init__(
            "extension",
            "1 to 1, 16 B and a traceparent of its own",
            16,
            systems=("brokerd", "nats"),
        )

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        sender, receiver = self.names(stage.entrant, timing)
        stage.connect(sender)
        dialect.receive(stage.connect(receiver), receiver)
        count, chance = 4096, random.Random(1)
        # As the W3C's Trace Context has it: trace and parent differ, version and flags
        # do not.
        messages = [
            dialect.extended(
                receiver,
                _PAYLOAD,
                f"00-{chance.getrandbits(128):032x}-{chance.getrandbits(64):016x}-01",
            )
            for _ in range(count)
        ]
        stage.size = len(stage.probe(sender, messages[0], [receiver], _PAYLOAD))
        file = stage.file("sender", b"".join(messages))
        size = count * stage.size
        stage.members = [
            f"s:{stage.connections[sender].fileno()}:{file}:{size}",
            f"r:{stage.connections[receiver].fileno()}:0:{size}",
        ]


class _Calls(Workload):
    """A caller with some calls under way, and a callee.

    Every call carries its number. What arrives is compared, to the last byte, with what
    should arrive next.
    """

    #: The number stands in the payload, too.
    payload = ID + b"x" * 8
    entrants = _PAIR
    under_way = 1

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]

    def measure(self, stage: Stage, timing: Timing) -> Result:
        report = stage.load(
            [
                "call",
                timing.warm_s,
                timing.seconds,
                stage.running.dialect.stray,
                self.under_way,
                *stage.members,
            ],
            timing.warm_s + timing.seconds + 40,
            "calls.c",
        )
        return Result(
            report["count"] / report["seconds"],
            {
                "server_busy": report["server_cpu"] / report["seconds"],
                "load_busy": report["cpu"] / report["seconds"],
                "server_ns": report["server_cpu"] / report["count"] * 1e9,
            },
        )


class Requests(_Calls):
    """Requests, each of which is answered by the other client."""

    unit = "requests/s"

    def __init__(self, under_way: int) -> None:
        self.key = f"requests-{under_way}"
        self.title = f"request and reply, 16 B, {under_way} under way"
        self.under_way = under_way

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        caller, callee = self.names(stage.entrant, timing)
        dialect.await_replies(stage.connect(caller), caller)
        dialect.receive(stage.connect(callee), callee)
        request = dialect.request(caller, callee, self.payload)
        reply = dialect.reply(caller, self.payload)
        delivered = stage.probe(caller, request, [callee], self.payload)
        answer = stage.probe(callee, reply, [caller], self.payload)
        stage.members = [
            str(stage.connections[caller].fileno()),
            str(stage.file("request", request)),
            str(stage.file("answer", answer)),
            str(stage.connections[callee].fileno()),
            str(stage.file("delivered", delivered)),
            str(stage.file("reply", reply)),
        ]


class Receipts(_Calls):
    """Messages that the server confirms to their sender; nats-server says +OK."""

    def __init__(self, under_way: int) -> None:
        self.key = f"receipts-{under_way}"
        self.title = f"messages with a receipt, 16 B, {under_way:,} under way"
        self.under_way = under_way

    def prepare(self, stage: Stage, timing: Timing) -> None:
        dialect = stage.running.dialect
        caller, callee = self.names(stage.entrant, timing)
        dialect.await_receipts(stage.connect(caller), caller)
        dialect.receive(stage.connect(callee), callee)
        message = dialect.confirmed(callee, self.payload)
        delivered = stage.probe(caller, message, [callee], self.payload)
        receipt = dialect.read_receipt(stage.connections[caller])
        stage.members = [
            str(stage.connections[caller].fileno()),
            str(stage.file("message", message)),
            str(stage.file("receipt", receipt)),
            str(stage.connections[callee].fileno()),
            str(stage.file("delivered", delivered)),
        ]
