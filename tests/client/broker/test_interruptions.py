"""Exceptions raised in the middle of a blocking call, by signal handlers and by
PyThreadState_SetAsyncExc.
"""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import random
import select
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trustme
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client import BrokerdError, Client, Closed, Message, WouldDeadlock
from brokerd_client.blocking import leader, transport
from brokerd_client.blocking.transport import Transport
from brokerd_client.message import Delivery

PATIENCE = 20.0
RETURN = dis.opmap["RETURN_VALUE"]
LIBRARY = str(Path(brokerd_client.__file__).parent)
#: An exception raised while an iterator or a client is dropped reaches no caller; a new
#: socket may be dropped, too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Interruption(BaseException):
    """The exception that interrupts a call."""


def is_return(frame: FrameType) -> bool:
    """Return whether a call is about to return the object that it opened.

    An exception then comes too late to close that object.
    """
    return (
        frame.f_code.co_name in ("subscribe", "watch_presence")
        and frame.f_code.co_code[frame.f_lasti] == RETURN
    )


def interrupted(
    call: Callable[[], object],
    position: int,
    interrupt: Callable[[], object],
    functions: Container[str] | None = None,
) -> bool:
    """Run the call, and ``interrupt`` before the library's instruction of this number.

    Return whether ``interrupt`` ran. Only the instructions of ``functions`` are counted,
    if they are given, without those that return.
    """
    count = 0
    done = False

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count, done
        if LIBRARY not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if functions is not None:
            code = frame.f_code
            if code.co_name not in functions or code.co_code[frame.f_lasti] == RETURN:
                return trace
        if event == "opcode" and not is_return(frame):
            if count == position:
                # An exception raised here ends the tracing.
                done = True
                count += 1
                interrupt()
                return trace
            count += 1
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return done


def interrupt() -> None:
    """Raise an Interruption."""
    raise Interruption


def positions(call: Callable[[], object], step: int, offset: int = 0) -> Iterator[int]:
    """Interrupt the call at every ``step``-th of its instructions, and yield the number
    of each.
    """
    # Some versions of Python trace the instructions of a function only after its first
    # call.
    interrupted(call, sys.maxsize, interrupt)
    position = offset
    while True:
        try:
            if not interrupted(call, position, interrupt):
                return
        except Interruption:
            pass
        yield position
        position += step


@pytest.fixture(params=["plain"])
def broker(request: pytest.FixtureRequest) -> Iterator[RunningBroker]:
    """A broker with queues that have room for everything."""
    with served(tls=request.param == "tls") as server:
        yield server


@contextlib.contextmanager
def served(*, tls: bool = False) -> Iterator[RunningBroker]:
    """Run a broker, on request with TLS."""
    clients = {name: {"queue": "64 MiB", "when_full": "wait"} for name in ("alice", "bob")}
    if not tls:
        with running(clients) as server:
            yield server
        return
    ca = trustme.CA()
    certificate = ca.issue_cert("127.0.0.1")
    context = ssl.create_default_context()
    ca.configure_trust(context)
    with certificate.private_key_and_cert_chain_pem.tempfile() as path:
        entry = {"certificate": path, "key": path}
        with running(clients, tls=entry) as server:
            server.client_context = context  # type: ignore[attr-defined]
            yield server


class Reader:
    """Receives all of bob's messages in a thread, and answers requests."""

    def __init__(self, bob: Client) -> None:
        self.got: list[bytes] = []
        self._bob = bob
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for message in self._bob:
            self.got.append(message.body)
            if message.kind.name == "REQUEST":
                message.reply(b"answer")

    def close(self) -> None:
        """Close bob's client and join the thread."""
        self._bob.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def pair(server: RunningBroker) -> Iterator[tuple[Client, Reader]]:
    """Connect alice and bob. Undelivered messages of alice are not logged."""
    options = {"ssl": server.client_context} if hasattr(server, "client_context") else {}
    alice, reader = server.connect("alice", **options), Reader(server.connect("bob", **options))
    alice.on_undelivered(lambda error: None)
    try:
        yield alice, reader
        assert alice._thread.is_alive()
    finally:
        alice.close()
        reader.close()


def body(number: int, size: int) -> bytes:
    """Return a payload that repeats its number, so that damage is visible."""
    return (b"%08d" % number) * max(1, size // 8)


def check_intact(got: list[bytes], size: int) -> list[int]:
    """Check that each payload is whole and that their numbers ascend; return them."""
    numbers = [int(each[:8]) for each in got]
    assert all(each == body(number, size) for each, number in zip(got, numbers, strict=True))
    assert numbers == sorted(set(numbers))
    return numbers


def check_send(
    server: RunningBroker, send: Callable[[Client, bytes], object], size: int, step: int
) -> None:
    """Interrupt a sending call at many of its instructions.

    The client has to work after each interruption.
    """
    with pair(server) as (alice, reader):
        numbers = iter(range(10**8))
        marks: set[int] = set()

        def call() -> None:
            send(alice, body(next(numbers), size))

        for _ in positions(call, step):
            mark = next(numbers)
            alice.send_confirmed("bob", body(mark, size), timeout=PATIENCE)
            marks.add(mark)
        assert alice.control("ping", timeout=PATIENCE) == {}
        alice.request("bob", body(next(numbers), size), timeout=PATIENCE)
        until(lambda: marks <= {int(each[:8]) for each in reader.got})
        check_intact(reader.got, size)
        assert marks, "no call was interrupted"


SENDS: dict[str, Callable[[Client, bytes], object]] = {
    "send": lambda client, data: client.send("bob", data),
    "receipt": lambda client, data: client.send_confirmed("bob", data, timeout=PATIENCE),
    "request": lambda client, data: client.request("bob", data, timeout=PATIENCE),
    "send_many": lambda client, data: client.send_many([("bob", data)]),
}


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("size", [8, 400_000])
def test_client_send_interrupted_at_some_instructions_corrupts_nothing(
    broker: RunningBroker, send: str, size: int
) -> None:
    check_send(broker, SENDS[send], size, 11)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["plain", "tls"], indirect=True)
@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("size", [8, 400_000])
def test_client_send_interrupted_at_every_instruction_corrupts_nothing(
    broker: RunningBroker, send: str, size: int
) -> None:
    check_send(broker, SENDS[send], size, 1)


def exercise(client: Client, message: Message) -> dict[str, Callable[[], object]]:
    """Return calls that do more than send."""

    subscriptions: list[Any] = []

    def finish() -> None:
        # close() cannot handle an exception before its own first instruction.
        for subscription in subscriptions:
            subscription.close()
        subscriptions.clear()

    def subscribe() -> None:
        finish()
        subscriptions.append(client.subscribe("a.>", timeout=PATIENCE))
        client.publish_confirmed("a.b", 1, timeout=PATIENCE)
        subscriptions[0].recv(PATIENCE)
        finish()

    def watch() -> None:
        finish()
        subscriptions.append(client.watch_presence(timeout=PATIENCE))
        subscriptions[0].recv(PATIENCE)
        finish()

    def iterate() -> None:
        client.send("alice", b"to itself")
        next(iter(client))

    def receive() -> None:
        client.send("alice", b"to itself")
        client.recv(PATIENCE)

    def receive_without_limit() -> None:
        # A message that an earlier call has left may come first.
        client.send("alice", b"to itself")
        client.recv()

    def answer() -> None:
        with contextlib.suppress(Exception):
            message.reply(b"once")

    return {
        "subscribe": subscribe,
        "watch": watch,
        "iterate": iterate,
        "receive": receive,
        "receive_without_limit": receive_without_limit,
        "reply": answer,
        "publish": lambda: client.publish("a.b", 1),
        "control": lambda: client.control("ping", timeout=PATIENCE),
        "request": lambda: client.request("bob", b"question", timeout=PATIENCE),
        "register": lambda: client.on_request(lambda message: None),
    }


def check_exercise(server: RunningBroker, name: str, step: int, *, keeps: bool = False) -> None:
    """Interrupt the call at many of its instructions.

    The client works afterwards, and keeps no state of the call.

    Args:
        server: The broker.
        name: The name of the call.
        step: The number of instructions from one interruption to the next.
        keeps: Whether each call begins with kept input.
    """
    with pair(server) as (alice, _):
        request = Message(2, 1, "bob", 0, b"", alice)

        def ready() -> bool:
            assert alice.control("ping", timeout=PATIENCE) == {}
            return alice._transport.kept or not keeps

        for _ in positions(exercise(alice, request)[name], step):
            until(ready)
        until(lambda: len(alice._dialog.subscriptions) == 0)
        until(lambda: len(alice._dialog.pending_calls) == 0)
        until(lambda: len(alice._queues) == 3)
        assert not alice._calls

        def empty() -> bool:
            alice.control("ping", timeout=PATIENCE)
            with alice._lock:
                alice._inbox.inbox.clear()
                alice._meter.weigh([box.inbox for box in alice._queues], limit=-1)
            return alice._meter.held == 0

        until(empty)


EXERCISES = (
    "subscribe",
    "watch",
    "iterate",
    "receive",
    "reply",
    "publish",
    "control",
    "request",
    "register",
)


@pytest.mark.parametrize("name", EXERCISES)
def test_client_call_interrupted_at_some_instructions_leaves_nothing(
    broker: RunningBroker, name: str
) -> None:
    check_exercise(broker, name, 23)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXERCISES)
def test_client_call_interrupted_at_every_instruction_leaves_nothing(
    broker: RunningBroker, name: str
) -> None:
    check_exercise(broker, name, 1)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")
@pytest.mark.parametrize("name", ["receive_without_limit", "request"])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_client_call_with_kept_input_interrupted_leaves_nothing(
    broker: RunningBroker, name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread sends and reads by itself, in the short way."""
    monkeypatch.setattr(transport, "_QUICK_S", PATIENCE)
    monkeypatch.setattr(transport, "_QUICK_TIMES", 0)
    monkeypatch.setattr(transport, "_KEPT_S", PATIENCE)
    monkeypatch.setattr(leader, "_REST_S", 0)
    check_exercise(broker, name, step, keeps=True)


@pytest.mark.parametrize("name", ["receive", "control", "request"])
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_client_call_that_keeps_input_interrupted_leaves_nothing(
    broker: RunningBroker, name: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls count as if they followed each other quickly."""
    monkeypatch.setattr(transport, "_QUICK_S", PATIENCE)
    monkeypatch.setattr(transport, "_QUICK_TIMES", 0)
    check_exercise(broker, name, step)


def check_close(server: RunningBroker, step: int, offset: int) -> None:
    """Interrupt close() at many of its instructions; a second close() ends the rest."""
    position = offset
    while True:
        before = set(threading.enumerate())
        client = server.connect("alice")
        client.on_message(lambda message: None)
        ended = False
        with contextlib.suppress(Interruption):
            ended = not interrupted(client.close, position, interrupt)
        client.close()
        until(lambda: set(threading.enumerate()) <= before)  # noqa: B023
        with pytest.raises(Closed):
            client.send("bob", b"")
        if ended:
            return
        position += step


def test_client_close_interrupted_at_some_instructions_is_repeatable(broker: RunningBroker) -> None:
    check_close(broker, 41, 5)


@pytest.mark.slow
def test_client_close_interrupted_at_every_instruction_is_repeatable(broker: RunningBroker) -> None:
    check_close(broker, 1, 0)


def check_send_with_timer(server: RunningBroker, size: int, count: int) -> None:
    """Send while a timer's signal raises ``count`` times.

    Bob gets whole messages in order, and alice can send afterwards.
    """

    def alarm(number: int, frame: object) -> None:
        raise Interruption

    before = signal.signal(signal.SIGALRM, alarm)
    numbers = iter(range(10**9))
    try:
        with pair(server) as (alice, reader):
            jitter = random.Random(1)
            for _ in range(count):
                try:
                    signal.setitimer(signal.ITIMER_REAL, jitter.uniform(1e-4, 3e-3))
                    while True:
                        alice.send("bob", body(next(numbers), size))
                except Interruption:
                    pass
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            assert alice.control("ping", timeout=PATIENCE) == {}
            last = next(numbers)
            alice.request("bob", body(last, size), timeout=PATIENCE)
            check_intact(reader.got, size)
            assert int(reader.got[-1][:8]) == last
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [8, 400_000])
def test_client_send_with_raising_timer_corrupts_nothing(broker: RunningBroker, size: int) -> None:
    check_send_with_timer(broker, size, 60)


@pytest.mark.slow
@pytest.mark.parametrize("broker", ["plain", "tls"], indirect=True)
@pytest.mark.parametrize("size", [8, 400_000])
def test_client_send_with_long_raising_timer_corrupts_nothing(
    broker: RunningBroker, size: int
) -> None:
    check_send_with_timer(broker, size, 3000)


@contextlib.contextmanager
def alarms(seed: int) -> Iterator[Callable[[], None]]:
    """Give a function that has an Interruption raised within 3 ms."""

    def alarm(number: int, frame: object) -> None:
        raise Interruption

    jitter = random.Random(seed)
    before = signal.signal(signal.SIGALRM, alarm)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, jitter.uniform(1e-4, 3e-3)) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


#: Before 3.11 an exception may strike when recv() has the message already: docs/client.md.
keeps_message = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="this Python may lose it in recv()"
)


def check_recv_with_timer(
    server: RunningBroker, count: int, timeout: float | None = PATIENCE
) -> None:
    """Receive ``count`` messages while a timer's signal raises: each arrives once.

    The connection stays, and so do the answers for other threads.
    """
    alice, bob = server.connect("alice"), server.connect("bob")
    stopped = threading.Event()
    answers: list[bytes] = []

    def ask() -> None:
        # Most answers are read by the thread that receives.
        while not stopped.is_set():
            answers.append(alice.request("bob", b"question", timeout=PATIENCE).body)

    def feed() -> None:
        for number in range(count):
            bob.send("alice", body(number, 8))
            if not number % 7:
                stopped.wait(0.0005)

    bob.on_request(lambda message: b"answer")
    threads = [threading.Thread(target=ask), threading.Thread(target=feed)]
    got: list[Message] = []
    try:
        with alarms(2) as set_alarm:
            for thread in threads:
                thread.start()
            while len(got) < count:
                try:
                    set_alarm()
                    # No instruction lies between the end of recv and the list.
                    got.extend(iter(functools.partial(alice.recv, timeout), None))
                except Interruption:
                    pass
        check_intact([message.body for message in got], 8)
        assert alice.counters["losses"] == 0
        assert set(answers) == {b"answer"}
    finally:
        stopped.set()
        for thread in threads:
            thread.join(PATIENCE)
        alice.close()
        bob.close()


@keeps_message
def test_client_recv_with_raising_timer_loses_nothing(broker: RunningBroker) -> None:
    check_recv_with_timer(broker, 2000)


@keeps_message
def test_client_recv_on_kept_input_with_raising_timer_loses_nothing(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_QUICK_S", PATIENCE)
    monkeypatch.setattr(transport, "_QUICK_TIMES", 0)
    check_recv_with_timer(broker, 2000, timeout=None)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")
def test_client_recv_on_kept_input_interrupted_at_every_instruction_loses_nothing(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "_QUICK_S", PATIENCE)
    monkeypatch.setattr(transport, "_QUICK_TIMES", 0)
    monkeypatch.setattr(transport, "_KEPT_S", PATIENCE)
    monkeypatch.setattr(leader, "_REST_S", 0)
    got: list[Message] = []
    functions = ("_read", "_begin_take", "_take_lone", "_read_lone", "hand_over", "leave")
    with pair(broker) as (alice, _):
        until(lambda: alice.ping() > 0 and alice._transport.kept)
        alice.send("alice", b"first")
        # See positions(). This call runs the same functions as those that follow.
        interrupted(alice.recv, sys.maxsize, interrupt, functions)
        position, missed = 0, 0
        # A wake-up that was meant for an earlier call makes a call shorter, and Python
        # 3.13 does not trace each function in each call: a single miss is not the end.
        while missed < 10:
            until(lambda: alice.ping() > 0 and alice._transport.kept)
            alice.send("alice", body(position, 8))
            ran = True
            try:
                ran = interrupted(lambda: got.append(alice.recv()), position, interrupt, functions)
            except Interruption:
                got.append(alice.recv(PATIENCE))
            assert got.pop().body == body(position, 8)
            position += ran
            missed = 0 if ran else missed + 1
        assert position > 100
        assert not alice._inbox.inbox.items


@pytest.mark.slow
@keeps_message
def test_client_recv_with_long_raising_timer_loses_nothing(broker: RunningBroker) -> None:
    check_recv_with_timer(broker, 300_000)


def test_client_request_with_raising_timer_keeps_connection(broker: RunningBroker) -> None:
    """A request that is interrupted leaves nothing, and its connection stays."""
    with pair(broker) as (alice, _):
        with alarms(3) as set_alarm:
            for _ in range(60):
                with contextlib.suppress(Interruption):
                    set_alarm()
                    while True:
                        alice.request("bob", b"question", timeout=PATIENCE)
        assert alice.request("bob", b"question", timeout=PATIENCE).body == b"answer"
        until(lambda: len(alice._dialog.pending_calls) == 0)
        until(lambda: not alice._calls)
        # Python 3.9 may raise when the system has taken bytes, before the client knows it.
        assert alice.counters["losses"] == 0 or sys.version_info < (3, 10)
        # It may be kept for some milliseconds.
        until(lambda: not alice._transport.lent)


def test_client_request_from_signal_handler_of_waiting_thread_is_answered(
    broker: RunningBroker,
) -> None:
    """The handler reads in place of the thread that it interrupts, which then goes on."""
    with pair(broker) as (alice, _):
        answers: list[bytes] = []

        def ask(number: int, frame: object) -> None:
            answers.append(alice.request("bob", b"question", timeout=PATIENCE).body)
            alice.send("alice", b"wake up")

        before = signal.signal(signal.SIGALRM, ask)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert alice.recv(PATIENCE).body == b"wake up"
        finally:
            signal.signal(signal.SIGALRM, before)
        assert answers == [b"answer"]


def from_handler(
    client: Client, position: int, act: Callable[[], object]
) -> tuple[bool, list[object]]:
    """Call ``act`` at an instruction of a send, as a signal handler would.

    Return whether it was called, and its result or error.
    """
    results: list[object] = []
    if position == 0:
        # See positions().
        interrupted(
            lambda: client.send("alice", b"to itself", timeout=PATIENCE), sys.maxsize, interrupt
        )

    def handle() -> None:
        try:
            results.append(act())
        except BrokerdError as error:
            results.append(error)

    return interrupted(
        lambda: client.send("bob", b"interrupted", timeout=PATIENCE), position, handle
    ), results


def delivered_to(client: Client) -> Message:
    """Return a message from the mailbox of a client, as if it had just been delivered."""
    message = Message(1, 1, "bob", 0, b"", client)
    message._delivery = Delivery(1, 1, client._dialog.mailbox.connection)
    return message


def test_client_call_from_signal_handler_never_hangs(broker: RunningBroker) -> None:
    """Plain sends work at whatever instruction the signal comes. Calls that wait work,
    or raise WouldDeadlock.
    """
    with pair(broker) as (alice, reader):
        calls: dict[str, Callable[[], object]] = {
            "send": lambda: alice.send("bob", b"send"),
            "send_many": lambda: alice.send_many([("bob", b"many")]),
            "publish": lambda: alice.publish("a.b", b""),
            "reply": lambda: Message(2, 1, "bob", 0, b"", alice).reply(b""),
            "request": lambda: alice.request("bob", b"request", timeout=PATIENCE),
            "receipt": lambda: alice.send_confirmed("bob", b"receipt", timeout=PATIENCE),
            "post": lambda: alice.post("bob", b"post", timeout=PATIENCE),
            "done": lambda: delivered_to(alice).done(),
            "recv": lambda: alice.recv(0.001),
            "ping": lambda: alice.ping(),
            "subscribe": lambda: alice.subscribe("x.y", timeout=PATIENCE).close(),
            "watch": lambda: alice.watch_presence(timeout=PATIENCE).close(),
            "register": lambda: alice.on_request(lambda message: None),
        }
        deadlocks: set[str] = set()
        expected: list[bytes] = []
        for name, act in calls.items():
            step = 3 if name == "send" else 17
            position = 0
            while True:
                ran, results = from_handler(alice, position, act)
                expected.append(b"interrupted")
                if not ran:
                    break
                if isinstance(results[0], WouldDeadlock):
                    deadlocks.add(name)
                elif name in ("send", "send_many", "request", "receipt"):
                    expected.append({"send_many": b"many"}.get(name, name.encode()))
                position += step
        assert alice.control("ping", timeout=PATIENCE) == {}
        until(lambda: len(reader.got) >= len(expected))
        assert sorted(reader.got) == sorted(expected)
        assert "request" in deadlocks
        assert not deadlocks & {"send", "send_many", "publish", "reply", "done"}


def test_client_send_from_signal_handler_arrives_before_next_send(broker: RunningBroker) -> None:
    with pair(broker) as (alice, reader):
        position = 0
        while True:
            before = len(reader.got)
            ran, _ = from_handler(alice, position, lambda: alice.send("bob", b"handler"))
            if not ran:
                break
            alice.send("bob", b"next")
            until(lambda: len(reader.got) == before + 3)  # noqa: B023
            assert sorted(reader.got[before:-1]) == [b"handler", b"interrupted"]
            assert reader.got[-1] == b"next"
            position += 5


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_client_close_from_signal_handler_ends_client(broker: RunningBroker, step: int) -> None:
    """The signal comes during a send, at many of its instructions."""
    position = 0
    ran = True
    while ran:
        client = broker.connect("alice")
        with contextlib.suppress(Closed):
            ran, _ = from_handler(client, position, client.close)
        until(lambda: client.closed or not ran)  # noqa: B023
        client.close()
        assert not client._thread.is_alive()
        position += step


def test_client_close_by_signal_ends_waiting_recv(broker: RunningBroker) -> None:
    client = broker.connect("alice")
    before = signal.signal(signal.SIGALRM, lambda number, frame: client.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Closed):
            client.recv(PATIENCE)
    finally:
        signal.signal(signal.SIGALRM, before)


def throw(thread: threading.Thread, error: type[BaseException]) -> None:
    """Raise an exception in another thread, at its next instruction."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident), ctypes.py_object(error)
    )


# An error may strike while the one before it is logged, and leave a source file open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("error", [Interruption, SystemExit, KeyboardInterrupt, ValueError])
def test_io_thread_raising_survives_and_reconnects(
    broker: RunningBroker, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with pair(broker) as (alice, reader):
        for number in range(4):
            throw(alice._thread, error)
            # A thread that waits for an answer does not need the I/O thread.
            alice._transport.wake()
            with contextlib.suppress(ConnectionError):
                alice.request("bob", body(number, 8), timeout=PATIENCE)
        assert alice.control("ping", timeout=PATIENCE) == {}
        until(lambda: alice.counters["losses"] > 0)
        assert error.__name__ in caplog.text
        check_intact(reader.got, 8)


def test_io_thread_interrupted_at_any_instruction_loses_no_call(broker: RunningBroker) -> None:
    """Each call has its outcome, whichever instruction of the I/O thread is
    interrupted.
    """
    import brokerd_client.blocking.base as link

    turn = link._turn
    position = 0
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if LIBRARY not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == position:
                raise Interruption
        return trace

    def traced(*args: Any) -> bool:
        # Only alice's: Python 3.12 may crash where two threads are traced at a time.
        if position == 0 or threading.current_thread() is not alice._thread:
            return turn(*args)
        sys.settrace(trace)
        try:
            return turn(*args)
        finally:
            sys.settrace(None)

    with pytest.MonkeyPatch.context() as patch, pair(broker) as (alice, _):
        patch.setattr(link, "_turn", traced)
        # The I/O thread reads every answer.
        patch.setattr(Transport, "borrow_input", lambda self: None)
        position = 10**9
        alice.control("ping", timeout=PATIENCE)
        for instruction in range(1, 2500, 61):
            count = 0
            position = instruction
            with contextlib.suppress(ConnectionError):
                alice.control("ping", timeout=PATIENCE)
        position = 0
        # The last exception may end the connection only now.
        with contextlib.suppress(ConnectionError):
            alice.control("ping", timeout=PATIENCE)
        assert alice.control("ping", timeout=PATIENCE) == {}
        assert alice.counters["losses"] > 5


def test_handler_threads_interrupted_between_messages_survive(broker: RunningBroker) -> None:
    with pair(broker) as (alice, _):
        alice.on_message(lambda message: got.append(message.body))
        alice.on_request(lambda message: b"answer")
        got: list[bytes] = []
        bob = broker.connect("carol")
        threads = [*alice._for_messages.threads, *alice._for_requests.threads]
        for thread in threads:
            throw(thread, Interruption)
        for number in range(10):
            bob.send("alice", body(number, 8))
        until(lambda: len(got) >= 9)
        assert bob.request("alice", b"", timeout=PATIENCE).body == b"answer"
        assert all(thread.is_alive() for thread in threads)
        bob.close()
