"""Every workload of the benchmarks runs, in short, on the broker and on the raw relay;
a bad measurement gives no figure.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen
from typing import TypeVar
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not sys.platform.startswith("linux"):
    pytest.skip("the benchmarks read /proc and use epoll: Linux only", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from benchmarks.dialects import read_exactly  # noqa: E402 - the directory is no package that is installed
from benchmarks.goals import GOALS, REMARKS, Goal  # noqa: E402
from benchmarks.machinery import compiler, wait_for  # noqa: E402
from benchmarks.page import CHAPTER_TITLES, Run, write_page  # noqa: E402
from benchmarks.systems import SYSTEMS, Setup  # noqa: E402
from benchmarks.workloads import (  # noqa: E402
    CHAPTERS,
    WORKLOADS,
    Entrant,
    Result,
    Spoilt,
    Stage,
    Timing,
)
from benchmarks.workloads.connections import Connecting  # noqa: E402

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="the load generator needs a C compiler (cc)"
)

Figure = TypeVar("Figure")
SHORT = Timing(warm_s=0.05, seconds=0.1, small=True)
OURS = ("brokerd", "brokerd-mailbox", "relay", "brokerd-client")


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """A directory in which the load generator is compiled once."""
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        yield Path(directory)


@pytest.fixture
def stage_dir(programs: Path) -> Path:
    """The path for a stage, beside those programs; it does not exist yet."""
    return programs / os.urandom(4).hex()


def entrants(*systems: str) -> list[object]:
    """Return a parameter for every workload in which one of these systems takes part.

    Of several sizes only the largest takes part: here all of them are small. The first
    entrant of each workload is in the everyday suite.
    """
    parameters = []
    for key, workload in WORKLOADS.items():
        largest = max(each.size for each in workload.entrants)
        ours = [
            each for each in workload.entrants if each.system in systems and each.size == largest
        ]
        parameters += [
            pytest.param(
                key,
                entrant,
                id=f"{key}-{entrant.name}".replace(" ", "_"),
                marks=() if entrant is ours[0] else pytest.mark.slow,
            )
            for entrant in ours
        ]
    return parameters


def measure(key: str, entrant: Entrant, directory: Path) -> float:
    if SYSTEMS[entrant.system].find() is None:
        pytest.skip(
            f"{SYSTEMS[entrant.system].title} is not installed ({SYSTEMS[entrant.system].install})"
        )
    workload = WORKLOADS[key]

    def attempt() -> float:
        with Stage(entrant, workload.setup(entrant, SHORT, directory)) as stage:
            workload.prepare(stage, SHORT)
            value = workload.measure(stage, SHORT).value
        assert stage.running.process.status is not None, "the system still runs"
        return value

    return measured(attempt)


def measured(attempt: Callable[[], Figure]) -> Figure:
    """Return the figure of the first attempt in which the server has run.

    On a busy machine it may not run at all for as long as a short measurement takes.
    """
    for attempts_left in (4, 3, 2, 1, 0):
        try:
            return attempt()
        except Spoilt as spoilt:
            if not str(spoilt).startswith("nothing arrived") or not attempts_left:
                raise
    raise AssertionError


@pytest.mark.parametrize(("key", "entrant"), entrants(*OURS))
def test_workload_yields_figure_for_brokerd(key: str, entrant: Entrant, stage_dir: Path) -> None:
    """Each workload measures brokerd, and the relay where it can, without losing a
    message. No process is left running.
    """
    # The system's clock of processor time may stand still during a short measurement.
    assert any(measure(key, entrant, stage_dir) > 0 for _ in range(5))


@pytest.mark.slow
@pytest.mark.parametrize(("key", "entrant"), entrants(*(set(SYSTEMS) - set(OURS))))
def test_workload_yields_figure_for_peer(key: str, entrant: Entrant, stage_dir: Path) -> None:
    """Each workload measures every other system that is installed, and Unix sockets."""
    assert measure(key, entrant, stage_dir) > 0


def test_workload_with_wrong_byte_count_gives_no_figure(stage_dir: Path) -> None:
    """If the number of received bytes is not the number of sent bytes, there is no
    figure.
    """
    workload = WORKLOADS["1to1-16"]
    entrant = Entrant("direct")
    with Stage(entrant, Setup([], stage_dir)) as stage:
        workload.prepare(stage, SHORT)
        receiver = stage.members[-1].split(":")
        stage.members[-1] = ":".join([*receiver[:-1], str(int(receiver[-1]) - 1)])
        with pytest.raises(Spoilt, match="more arrived than was sent"):
            workload.measure(stage, SHORT)


def test_workload_server_that_ends_gives_no_figure(stage_dir: Path) -> None:
    """If a broker ends while it is measured, there is no figure."""
    workload = WORKLOADS["1to1-16"]
    entrant = Entrant("brokerd")
    with Stage(entrant, workload.setup(entrant, SHORT, stage_dir)) as stage:
        workload.prepare(stage, SHORT)
        stage.running.process.stop()
        with pytest.raises(Spoilt, match="has ended"):
            workload.measure(stage, SHORT)


def test_connecting_counts_clients_that_the_log_only_counts(stage_dir: Path) -> None:
    """The log does not name a client for each of its connections, if they are many."""
    workload = WORKLOADS["connect"]
    assert isinstance(workload, Connecting)
    entrant = Entrant("brokerd")
    with Stage(entrant, Setup(["c0000"], stage_dir)) as stage:
        for _ in range(60):
            stage.connect("c0000").close()
        with wait_for("the number of connections without a line", 10) as turns:
            for _ in turns:
                if workload._welcomed(stage) >= 60:
                    break
        assert workload._welcomed(stage) == 60


def test_workload_with_server_greeting_yields_figure(stage_dir: Path) -> None:
    """A greeting that arrives before the first message neither stops the sender nor
    spoils the measurement.
    """
    workload = WORKLOADS["1to1-16"]

    def attempt() -> float:
        with Stage(Entrant("direct"), Setup([], stage_dir)) as stage:
            workload.prepare(stage, SHORT)
            greeting = b"PING\r\n"
            stage.running.dialect.stray = len(greeting)
            sender, _ = stage.connections.values()
            sender.sendall(greeting)
            return workload.measure(stage, SHORT).value

    assert measured(attempt) > 0


@pytest.mark.parametrize(
    ("answers", "trouble"),
    [
        ([0, 1, 2, 3], ""),
        ([0, 2, 1, 3], "in another order"),
        ([0, 1, 1, 2], "in another order"),
        ([0, 1, 2, 3, 4], "more arrived than was sent"),
    ],
    ids=["in order", "swapped", "repeated", "one too many"],
)
def test_calls_with_wrong_answers_give_no_figure(
    answers: list[int], trouble: str, stage_dir: Path
) -> None:
    """Every answer is compared with the one that should come next."""

    def attempt() -> int:
        with Stage(Entrant("direct"), Setup([], stage_dir)) as stage:
            return count_answers(stage, answers, well=not trouble)

    if trouble:
        with pytest.raises(Spoilt, match=trouble):
            attempt()
    else:
        assert measured(attempt) > 0


def count_answers(stage: Stage, answers: list[int], *, well: bool) -> int:
    """Return the number of calls that were answered while they were counted.

    Args:
        answers: The numbers of the first answers.
        well: Whether the calls after those are answered too.
    """
    caller, answering = socket.socketpair()
    callee, delivering = socket.socketpair()
    stage.connections = {"caller": caller, "callee": callee}
    files = [stage.file(name, name.encode() + b" ########.") for name in ("call", "answer")]

    def serve() -> None:
        """Deliver four calls, and answer as told; then hold the line."""
        size = len("call 00000000.")
        delivering.sendall(read_exactly(answering, 4 * size))
        answering.sendall(b"".join(b"answer %08x." % number for number in answers))
        while well and (more := answering.recv(size)):
            delivering.sendall(more)
            answering.sendall(b"answer" + more.removeprefix(b"call"))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        arguments = ["call", 0.05, 0.1, 0, 4, caller.fileno(), *files, callee.fileno(), files[0]]
        return int(stage.load(arguments, 30, "calls.c")["count"])
    finally:
        for sock in (caller, callee):
            sock.close()
        thread.join()
        for sock in (answering, delivering):
            sock.close()


@pytest.mark.parametrize(
    ("receipts", "trouble"),
    [
        (b"receipt." * 3 + b"refused.", "something else arrived"),
        (b"receipt." * 9, "more arrived than was sent"),
    ],
    ids=["a refusal", "one too many"],
)
def test_fill_with_wrong_receipts_gives_no_figure(
    receipts: bytes, trouble: str, stage_dir: Path
) -> None:
    """Eight messages are under way, and each receipt is compared."""
    with Stage(Entrant("direct"), Setup([], stage_dir)) as stage:
        sender, server = socket.socketpair()
        with sender, server:
            filler = begin_filling(stage, sender, 20)
            assert read_exactly(server, 64) == b"message." * 8
            server.sendall(receipts)
            with pytest.raises(Spoilt, match=trouble):
                stage.report(filler, 30)


def test_fill_with_all_receipts_counts_them(stage_dir: Path) -> None:
    """The last ones are awaited when the time is over; the program leaves processors alone."""
    with Stage(Entrant("direct"), Setup([], stage_dir)) as stage:
        sender, server = socket.socketpair()
        with sender, server:
            filler = begin_filling(stage, sender, 0.1)
            assert os.sched_getscheduler(filler.pid) == os.SCHED_IDLE
            count = 0
            # It sends more as soon as a quarter of the eight is confirmed.
            while message := recv_or_end(server, filler):
                # As many bytes of receipts, from where the last ones ended.
                begun = count % 8
                server.sendall((b"receipt." * 9)[begun : begun + len(message)])
                count += len(message)
            assert stage.report(filler, 30)["count"] == count // 8 >= 8


def begin_filling(stage: Stage, sender: socket.socket, seconds: float) -> Popen[str]:
    """Start the load generator with one sender, which keeps eight messages under way."""
    stage.connections = {"sender": sender}
    files = [stage.file(name, name.encode() + b".") for name in ("message", "receipt")]
    arguments = ["fill", seconds, 8, *files, sender.fileno()]
    return stage.begin(arguments, "calls.c", is_urgent=False)


def recv_or_end(server: socket.socket, filler: Popen[str]) -> bytes:
    """Return what the load generator sends, or nothing once it has ended."""
    server.settimeout(0.01)
    while True:
        try:
            return server.recv(64)
        except TimeoutError:
            if filler.poll() is not None:
                return b""


def test_page_begins_with_what_applications_send(tmp_path: Path) -> None:
    """The page has a table and a picture of each workload, the applications' first."""
    run = Run(SHORT, 1, dict.fromkeys(SYSTEMS, "1"))
    for key, workload in WORKLOADS.items():
        run.results[key] = {
            entrant.name: [Result(2.0 + number, {"server_ns": 4.0})]
            for number, entrant in enumerate(workload.entrants)
        }

    page = write_page(run, tmp_path).read_text()

    chapters = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert chapters[0] == "Goals"
    assert chapters[-len(CHAPTERS) :] == [CHAPTER_TITLES[key] for key in CHAPTERS]
    assert chapters.index("What applications send") < chapters.index("Bulk")
    for key, workload in WORKLOADS.items():
        assert f"![{workload.title}](performance/{key}.svg)" in page
        picture = ET.parse(tmp_path / "performance" / f"{key}.svg")
        assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == len(
            workload.entrants
        )
    assert "| 1,100 | 5 | 12 | 0.417 x |" in page


def test_goal_without_peer_compares_own_figure() -> None:
    """A goal without a peer is a bound for the figure itself."""
    goal = Goal("work", "none", "key", "brokerd", "", 10, at_least=False, of="server_us", unit="µs")

    result = goal.evaluate(lambda *of: {("key", "brokerd", "server_us"): 11.0}.get(of))

    assert (result.ratio, result.passed, result.word) == (11.0, False, "**miss**, by 10%")


def test_workload_without_c_compiler_names_package_to_install(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a C compiler the error says what to install."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="C compiler"):
        Stage(Entrant("direct"), Setup([], socket_dir / "stage"))


def test_workload_remarks_all_belong_to_a_goal() -> None:
    """A remark on a missed goal is not lost because a workload got another name."""
    assert REMARKS.keys() <= {(goal.workload, goal.theirs) for goal in GOALS}
    for goal in GOALS:
        entrants = {entrant.name for entrant in WORKLOADS[goal.workload].entrants}
        assert {goal.ours, goal.theirs} - {""} <= entrants
