"""Client libraries, each measured in processes of its own."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machinery import Process, wait_for
from benchmarks.python_peer import Board
from benchmarks.systems import Setup
from benchmarks.workloads.stage import (
    Entrant,
    Result,
    Spoilt,
    Stage,
    Timing,
    Workload,
    client,
)

__all__ = ["PythonCalls", "PythonToPython"]


class PythonToPython(Workload):
    """A Python process sends to another, each through a client library."""

    program = "python_peer"
    also = (("all_us", "µs of processor time for each, all processes"),)

    def __init__(
        self,
        key: str,
        title: str,
        entrants: Sequence[Entrant],
        unit: str = "messages/s",
    ) -> None:
        self.key, self.title, self.entrants, self.unit = key, title, entrants, unit

    def names(self, entrant: Entrant, timing: Timing) -> list[str]:
        return [client(0), client(1)]

    def manner(self, entrant: Entrant) -> list[str]:
        """Return the first arguments of both processes."""
        return [entrant.system]

    def setup(self, entrant: Entrant, timing: Timing, directory: Path) -> Setup:
        return Setup(self.names(entrant, timing), directory, md5=sys.version_info < (3, 12))

    def measure(self, stage: Stage, timing: Timing) -> Result:
        path = stage.file("board", bytes(Board.SIZE))
        board = Board(path)
        with contextlib.ExitStack() as held:
            held.callback(board.close)

            def start(role: str) -> Process:
                command = [sys.executable, "-m", f"benchmarks.{self.program}"]
                command += [*self.manner(stage.entrant), role, stage.running.address, str(path)]
                process = Process(command, stage.directory / f"log-{role}")
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
            processes = {"server": stage.running.process, "sender": sender, "receiver": receiver}
            t0, n0 = time.monotonic(), board[Board.RECEIVED]
            before = {role: process.cpu_s() for role, process in processes.items()}
            time.sleep(timing.seconds)
            t1, n1 = time.monotonic(), board[Board.RECEIVED]
            used = {role: process.cpu_s() - before[role] for role, process in processes.items()}
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
                "server_busy": used["server"] / (t1 - t0),
                "all_us": sum(used.values()) / (n1 - n0) * 1e6,
                **{f"{role}_us": cpu_s / (n1 - n0) * 1e6 for role, cpu_s in used.items()},
            },
        )


class PythonCalls(PythonToPython):
    """The same with calls, some of which are under way at once."""

    program = "python_caller"

    def __init__(
        self, key: str, title: str, entrants: Sequence[Entrant], under_way: int = 1
    ) -> None:
        super().__init__(key, title, entrants, "calls/s")
        self.under_way = under_way

    def manner(self, entrant: Entrant) -> list[str]:
        return [entrant.name, str(self.under_way)]
