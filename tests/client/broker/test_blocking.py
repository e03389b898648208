"""Features of the blocking client alone: threads, forks, interpreters that end, and
incomplete writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import gc
import math
import os
import pickle
import queue
import select
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_broker import FakeServer
from support.waiting import until

import brokerd_client
from brokerd.testing import running
from brokerd_client import Client, Message, aio, connect
from brokerd_client._common import rate_limit
from brokerd_client.address import parse
from brokerd_client.blocking import base
from brokerd_client.blocking.base import MOST_THREADS
from brokerd_client.blocking.poller import SelectorPoller
from brokerd_client.blocking.transport import Transport
from brokerd_client.blocking.waiters import Turn
from brokerd_client.errors import (
    AddressError,
    AuthenticationError,
    BrokerdError,
    Closed,
    Disconnected,
    InDoubt,
    InvalidName,
    RequestFailed,
    TimedOut,
    WrongProcess,
)
from brokerd_client.protocol import dialog

PATIENCE = 20.0


def join(name: str, server: FakeServer, **options: Any) -> Client:
    """Connect to the fake broker."""
    return connect(server.path, name, name, **options)


def fill_listener_queue(path: str, stack: contextlib.ExitStack) -> None:
    """Connect until the listener's queue is full."""
    while True:
        extra = stack.enter_context(socket.socket(socket.AF_UNIX))
        extra.setblocking(False)
        try:
            extra.connect(path)
        except BlockingIOError:
            return


def script(source: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter that treats every warning as an error."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(source), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_client_import_loads_no_slow_module() -> None:
    """Importing the library imports no slow module that is not needed.
    brokerd_client.aio is imported on demand.
    """
    done = script("""
        import sys, brokerd_client
        heavy = {"asyncio", "ssl", "logging", "concurrent.futures", "random", "secrets"}
        heavy.add("brokerd_client.aio.client")
        heavy &= set(sys.modules)
        assert not heavy, heavy
        assert brokerd_client.aio.client.connect and brokerd_client.connection.Listener
        try:
            brokerd_client.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        """)
    assert (done.returncode, done.stderr) == (0, "")


def test_client_public_names_exist() -> None:
    """Every name in __all__ can be imported."""
    assert all(getattr(brokerd_client, name) for name in brokerd_client.__all__)


def test_client_unclosed_interpreter_ends_at_once(server: FakeServer) -> None:
    """A script that forgets close() ends at once, without a warning, and its last
    message has been sent.
    """
    bob = join("bob", server)
    done = script(
        """
        import sys, brokerd_client
        client = brokerd_client.connect(sys.argv[1], "alice", "alice")
        client.on_request(lambda message: None)
        client.subscribe("a", callback=print)
        client.send("bob", "last words")
        """,
        server.path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert bob.recv(PATIENCE).payload == "last words"
    bob.close()


def test_client_dropped_warns_and_leaves_no_thread(server: FakeServer) -> None:
    """A client without a reference is reported as unclosed. Its threads and its
    connection end.
    """
    before = set(threading.enumerate())
    client = join("alice", server)
    client.on_request(lambda message: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del client
        until(lambda: gc.collect() >= 0 and bool(caught))
    assert "unclosed" in str(caught[0].message)
    until(lambda: "alice" not in server.broker.online)
    until(lambda: set(threading.enumerate()) <= before)


def test_client_dropped_logs_counted_undelivered(
    server: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each undelivered message of the dropped client appears in a line of the log or in
    a count.
    """
    # All of them fail within one period.
    monkeypatch.setattr(rate_limit, "_PERIOD_S", 3600.0)

    def fail_and_drop() -> None:
        client = join("alice", server)
        client.send_many([("nobody", number) for number in range(100)])
        until(lambda: client.counters["undelivered"] == 100)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fail_and_drop()
        until(lambda: gc.collect() >= 0 and "95 more messages" in caplog.text)
    until(lambda: "alice" not in server.broker.online)


def test_close_joins_every_thread(server: FakeServer) -> None:
    """After close() no thread of the client is running."""
    before = set(threading.enumerate())
    with join("alice", server) as client:
        client.on_request(lambda message: None)
        client.on_message(lambda message: None)
        assert len(set(threading.enumerate()) - before) > 2
    assert set(threading.enumerate()) <= before


def test_close_from_handler_closes_client(server: FakeServer) -> None:
    """A handler may close its own client."""
    alice, bob = join("alice", server), join("bob", server)
    alice.on_message(lambda message: alice.close())
    bob.send("alice", "stop")
    until(lambda: alice.closed and not alice._thread.is_alive())
    bob.close()


def test_connect_failed_leaves_nothing(server: FakeServer) -> None:
    """A wrong key raises an error in the caller, and no thread or socket is left."""
    before = set(threading.enumerate())
    with pytest.raises(AuthenticationError):
        connect(server.path, "alice", "wrong")
    assert set(threading.enumerate()) <= before


@pytest.mark.timing
def test_connect_to_silent_listener_times_out(tmp_path: Path) -> None:
    """If a listener accepts and sends nothing, connect() takes its timeout and no
    longer.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(TimedOut):
            connect(str(tmp_path / "s"), "alice", "k", timeout=0.2)
        assert time.monotonic() - started < PATIENCE / 2


def test_connect_to_full_unix_listener_is_repeated(tmp_path: Path) -> None:
    """A Unix listener whose queue is full has no room yet. The client waits for room
    until its timeout.
    """
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        fill_listener_queue(str(tmp_path / "s"), stack)
        with pytest.raises(TimedOut):
            connect(str(tmp_path / "s"), "alice", "k", timeout=0.2)


def test_connect_tcp_tries_every_address_then_raises() -> None:
    """A port without a listener raises Disconnected with the address."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(Disconnected, match=str(port)):
            connect(("localhost", port), "alice", "k", timeout=PATIENCE)


def test_connect_to_named_pipe_raises_outside_windows() -> None:
    """The error says where named pipes exist."""
    with pytest.raises(AddressError, match="named pipes exist on Windows only"):
        Transport(parse(r"\\.\pipe\x"))


def test_request_in_flight_at_loss_is_in_doubt(server: FakeServer) -> None:
    """A request that was sent and not answered when the connection ended is InDoubt. It
    is not repeated.
    """
    alice, bob = join("alice", server), join("bob", server)
    caught: list[Exception] = []

    def ask() -> None:
        try:
            alice.request("bob", "once", timeout=PATIENCE)
        except Disconnected as error:
            caught.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert bob.recv(PATIENCE).payload == "once"
    server.drop("alice")
    asking.join(PATIENCE)
    assert [type(error) for error in caught] == [InDoubt]
    until(lambda: alice.connected)
    with pytest.raises(TimedOut):
        bob.recv(0.1)
    alice.close()
    bob.close()


def test_send_partly_written_at_loss_is_undelivered(server: FakeServer) -> None:
    """A message that the broker can't have received whole is not in doubt.
    on_undelivered gets Disconnected for it.
    """
    alice = join("alice", server)
    reported: list[Any] = []
    alice.on_undelivered(reported.append)
    server.act(lambda broker: setattr(server, "reading", False))
    until(lambda: server.broker.online != {})
    message_id = alice.send("bob", b"x" * 5_000_000)
    with pytest.raises(TimedOut, match="not sent"):
        alice.send("bob", b"behind it", timeout=0.05)
    server.drop("alice")
    until(lambda: bool(reported))
    assert [(type(error), error.message_id) for error in reported] == [(Disconnected, message_id)]
    alice.close()


def test_send_partial_write_is_finished_before_next(server: FakeServer) -> None:
    """A send that comes while another send's bytes wait is written after them. Nothing
    is mixed or lost.
    """
    alice, bob = join("alice", server), join("bob", server)
    bodies = [bytes([number]) * 3_000_000 for number in range(6)]
    threads = [threading.Thread(target=alice.send, args=("bob", body)) for body in bodies]
    for thread in threads:
        thread.start()
    got = [bob.recv(PATIENCE).body for _ in bodies]
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(got) == bodies
    alice.close()
    bob.close()


def test_close_flushes_sent_bytes(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() right after a large send does not cut it off."""
    # Half a second may be too short on a busy machine.
    for module in (dialog, base):
        monkeypatch.setattr(module, "LINGER_S", PATIENCE)
    alice, bob = join("alice", server), join("bob", server)
    alice.send("bob", b"x" * 3_000_000)
    alice.close()
    assert len(bob.recv(PATIENCE).body) == 3_000_000
    bob.close()


def test_request_interrupted_leaves_nothing(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during a request removes the pending call."""
    alice = join("alice", server)
    join_bob = join("bob", server)

    def interrupt(*arguments: object, **options: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("brokerd_client.blocking.leader.Leader.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        alice.request("bob", 1)
    monkeypatch.undo()
    until(lambda: len(alice._dialog.pending_calls) == 0)
    alice.close()
    join_bob.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_client_in_fork_raises_and_parent_goes_on(server: FakeServer) -> None:
    """In a child process every call raises WrongProcess, and close() does nothing.

    The parent works on, and can close its connection while a child still runs.
    """
    done = script(
        """
        import os, sys, warnings, brokerd_client
        warnings.simplefilter("ignore", DeprecationWarning)
        client = brokerd_client.connect(sys.argv[1], "alice", "alice")
        subscription = client.subscribe("a")
        child = os.fork()
        if not child:
            wrong = 0
            for act in (
                lambda: client.send("alice", 1), lambda: client.recv(0),
                lambda: client.request("alice", 1), lambda: client.ping(),
                lambda: client.subscribe("a"), lambda: next(iter(client)),
                lambda: subscription.recv(0), lambda: subscription.unsubscribe(),
                lambda: client.on_message(print), lambda: client.send_many([]),
                lambda: client.publish("a", 1), lambda: client.watch_presence(),
            ):
                try:
                    act()
                except brokerd_client.WrongProcess:
                    wrong += 1
            client.close()
            os._exit(wrong)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 12
        client.send("alice", "to myself")
        assert client.recv(20).payload == "to myself"
        child = os.fork()
        if not child:
            import time
            os.close(1)
            os.close(2)
            time.sleep(60)
        print(child)
        client.close()
        """,
        server.path,
    )
    assert done.stderr == ""
    child = int(done.stdout)
    try:
        until(lambda: "alice" not in server.broker.online)
    finally:
        os.kill(child, 9)


def test_wrong_process_error_names_remedy(server: FakeServer) -> None:
    """The error says what the child process has to do."""
    client = join("alice", server)
    client._forked = True
    with pytest.raises(WrongProcess, match="connect again"):
        client.ping()
    client._forked = False
    client.close()


def test_client_iteration_ends_with_close(server: FakeServer) -> None:
    """The loop ``for message in client`` ends when another thread closes the client."""
    alice, bob = join("alice", server), join("bob", server)
    got: list[object] = []
    loop = threading.Thread(target=lambda: got.extend(message.payload for message in bob))
    loop.start()
    alice.send_many([("bob", number) for number in range(100)])
    until(lambda: len(got) == 100)
    bob.close()
    loop.join(PATIENCE)
    assert not loop.is_alive()
    assert got == list(range(100))
    alice.close()


def contexts(error: BaseException | None) -> list[type[BaseException]]:
    """Return the types of an exception and of all that it names as its context."""
    types = []
    while error is not None:
        types.append(type(error))
        error = error.__context__
    return types


def test_client_iteration_ended_by_loss_names_no_inner_error(server: FakeServer) -> None:
    """The traceback shows why the loop ended, and not that its queue was empty before."""
    bob = join("bob", server, reconnect=False)
    server.drop("bob")
    with pytest.raises(Disconnected) as caught:
        for _ in bob:
            pass
    assert IndexError not in contexts(caught.value)
    bob.close()

    async def with_asyncio() -> None:
        async with aio.connect(server.path, "alice", "alice", reconnect=False) as alice:
            server.drop("alice")
            with pytest.raises(Disconnected) as caught:
                async for _ in alice:
                    pass
            assert IndexError not in contexts(caught.value)

    asyncio.run(with_asyncio())


def test_subscription_context_exit_ends_iteration(server: FakeServer) -> None:
    """Leaving the with block ends the iteration in another thread."""
    alice = join("alice", server)
    got: list[object] = []
    with alice.subscribe("a.*") as subscription:
        loop = threading.Thread(target=lambda: got.extend(event.topic for event in subscription))
        loop.start()
        alice.publish("a.b", 1)
        until(lambda: got == ["a.b"])
    loop.join(PATIENCE)
    assert not loop.is_alive()
    assert "a.*" in repr(subscription)
    alice.close()


def test_client_repr_shows_no_key(server: FakeServer) -> None:
    """A client in a log shows its name and state."""
    client = connect(server.path, key=b"carol")
    assert "carol" in repr(client)
    assert "ready" in repr(client)
    client.close()
    assert "closed" in repr(client)


def test_inbox_full_reading_resumes_after_concurrent_recv(server: FakeServer) -> None:
    """The last message may be taken between the measurement and the check of its
    result. Reading begins again then, too.
    """

    class Slow(deque[Any]):
        def popleft(self) -> Any:
            client._meter.weigh([client._inbox.inbox], limit=client._meter.limit)
            return super().popleft()

    with join("alice", server, inbox=100) as client:
        with client._lock:
            client._inbox.inbox.items = Slow()
            client._inbox.put([object()], 1000)
        next(iter(client))
        until(lambda: not client._meter.full)


def break_writes(client: Client) -> None:
    """Make every write fail from now on, as if the peer had reset the connection."""

    def fail(data: object) -> int:
        raise BrokenPipeError(errno.EPIPE, "reset by peer")

    client._transport._send = fail  # type: ignore[method-assign]


@pytest.mark.parametrize("reconnect", [True, False])
def test_send_write_failed_is_undelivered(server: FakeServer, reconnect: bool) -> None:
    """send() returns its id, and the handler gets the failure, also if no other
    connection will be made.
    """
    alice = join("alice", server, reconnect=reconnect)
    reported: list[Any] = []
    alice.on_undelivered(reported.append)
    break_writes(alice)
    message_id = alice.send("bob", "x")
    until(lambda: bool(reported))
    assert [(type(error), error.message_id) for error in reported] == [(Disconnected, message_id)]
    alice.close()


def test_close_at_once_still_reports_failed_sends(server: FakeServer) -> None:
    """close() drops waiting messages. It does not drop failures that on_undelivered has
    not received yet.
    """
    alice, bob = join("alice", server), join("bob", server)
    reported: list[Any] = []
    got: list[object] = []
    gate = threading.Event()

    def hold_up(message: brokerd_client.Message) -> None:
        got.append(message.payload)
        gate.wait(PATIENCE)

    alice.on_message(hold_up)
    alice.on_undelivered(reported.append)
    bob.send_many([("alice", "first"), ("alice", "second")])
    until(lambda: got == ["first"])
    ids = [alice.send("nobody", number) for number in range(3)]
    until(lambda: alice.counters["undelivered"] == 3)
    closing = threading.Thread(target=alice.close)
    closing.start()
    until(lambda: alice._inbox.ended is not None)
    gate.set()
    closing.join(PATIENCE)
    until(lambda: len(reported) == 3)
    assert [error.message_id for error in reported] == ids
    assert got == ["first"]
    bob.close()


def test_keepalive_lost_peer_received_bytes_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that no call has taken yet come before the error that the peer is lost."""
    monkeypatch.setattr("brokerd_client.blocking.transport.Silence.remaining_s", lambda *given: 0.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.closing(Transport(parse(listener.getsockname()))) as channel,
    ):
        done = channel.dial()
        peer, _ = listener.accept()
        with peer:
            peer.sendall(b"the last")
            until(lambda: done or channel.connected())
            until(lambda: channel.wait(0, reading=False) == (True, False))
            assert channel.read() == b"the last"
            with pytest.raises(TimeoutError):
                channel.read()


def test_connect_unexpected_error_is_cause_of_disconnected(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """connect() raises with the error as its cause, before its timeout. The
    error is logged too.
    """

    def fail(channel: Transport) -> bool:
        raise LookupError("unforeseen")

    monkeypatch.setattr(Transport, "dial", fail)
    with pytest.raises(Disconnected, match="unforeseen") as caught:
        join("alice", server)
    assert isinstance(caught.value.__cause__, LookupError)
    assert "LookupError" in caplog.text


def test_read_unexpected_error_is_lost_connection(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, waiting calls get the loss of the connection, and a new
    connection is made.
    """
    alice, bob = join("alice", server), join("bob", server)
    read = alice._transport.read
    failures: list[Exception] = [LookupError("unforeseen")]

    def fail_once() -> bytes | None:
        if failures:
            raise failures.pop()
        return read()

    # Without the leader, whose own read can't fail like this.
    alice._transport.borrow_input = lambda: None  # type: ignore[method-assign]
    alice._transport.read = fail_once  # type: ignore[method-assign]
    with pytest.raises(InDoubt, match="unforeseen"):
        alice.ping()
    assert "LookupError" in caplog.text
    until(lambda: alice.connected)
    bob.send("alice", "x")
    assert alice.recv(PATIENCE).payload == "x"
    alice.close()
    bob.close()


class Panic(BaseException):
    """A BaseException, like those of a panic in Rust and of pytest.fail."""


def panic(message: Any) -> None:
    """Raise a Panic, as no handler should."""
    raise Panic


def test_handler_raising_base_exception_is_logged(
    server: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The requester gets RequestFailed, and every thread of a handler works on."""
    with join("alice", server) as alice, join("bob", server) as bob:
        seen: list[object] = []

        def handle(message: brokerd_client.Message) -> object:
            seen.append(message.payload)
            panic(message)
            return None

        bob.on_request(handle)
        bob.on_message(handle)
        bob.subscribe("a.>", callback=handle)
        for _ in range(6):
            with pytest.raises(RequestFailed, match="Panic"):
                alice.request("bob", "request", timeout=PATIENCE)
        alice.send_many([("bob", "message")] * 3)
        alice.publish_confirmed("a.b", "event")
        until(lambda: len(seen) == 10)
        assert "Panic" in caplog.text


@pytest.mark.parametrize("source", ["subscription", "watch"])
def test_subscription_ended_with_items_frees_inbox(server: FakeServer, source: str) -> None:
    """The items stay available in the subscription, and the inbox has room for
    messages.
    """
    with join("alice", server, inbox=1 << 12) as alice, join("bob", server) as bob:
        kept = []
        for _ in range(12):
            if source == "subscription":
                events: Any = alice.subscribe("a.>")
                for number in range(5):
                    bob.publish_confirmed("a.b", bytes([number]) * 100)
            else:
                events = alice.watch_presence()
            # The pong follows the items on the connection.
            assert alice.ping() > 0
            events.recv(PATIENCE)
            events.close()
            kept.append(events)
        bob.send("alice", "here")
        assert alice.recv(PATIENCE).payload == "here"
        until(
            lambda: (
                alice.ping() > 0
                and alice._meter.weigh([alice._inbox.inbox], limit=-1)
                and not alice._meter.held
            )
        )
        assert len(list(kept[0])) == (4 if source == "subscription" else 2)


def test_reconnect_with_full_inbox_becomes_ready(server: FakeServer) -> None:
    """The handshake and the introduction are read, whatever the inbox holds."""
    with join("alice", server, inbox=1 << 12) as alice, join("bob", server) as bob:
        bob.send_many([("alice", b"x" * 1000)] * 200)
        until(lambda: alice._meter.full)
        # The broker has forwarded all of them.
        assert bob.ping() > 0
        server.drop("alice")
        # The client does not write: only its look at the unread socket finds out.
        until(lambda: alice.counters["losses"] == 1)
        until(lambda: alice.connected)
        assert alice._meter.full
        for _ in range(200):
            alice.recv(PATIENCE)
        assert alice.ping() > 0


class Interrupted(Exception):
    """The exception that a signal handler raises."""


def threads_since(before: set[threading.Thread]) -> list[threading.Thread]:
    """Return the client threads that are not in ``before``."""
    return [
        each
        for each in threading.enumerate()
        if each not in before and each.name == "brokerd client"
    ]


@pytest.mark.parametrize(
    ("runs", "released"),
    [(True, True), (True, False), (False, False)],
    ids=["lock released", "lock held", "perhaps before the thread runs"],
)
def test_connect_interrupted_at_thread_start_raises_interruption(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, runs: bool, released: bool
) -> None:
    """``Event.wait`` may then release an unlocked lock, which is a RuntimeError."""
    before = set(threading.enumerate())
    channels: list[Transport] = []
    make = Transport.__init__

    def note(channel: Transport, *args: Any) -> None:
        make(channel, *args)
        channels.append(channel)

    def interrupt(event: Any, timeout: float | None = None) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return wait(event, timeout)
        if runs:
            wait(event, timeout)
        with event._cond:
            if released:
                event._cond.release()
            raise Interrupted("by a signal") from KeyError("its cause")

    wait = threading.Event.wait
    monkeypatch.setattr(Transport, "__init__", note)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Event, "wait", interrupt)
        with pytest.raises(Interrupted) as caught:
            join("alice", server)
    assert isinstance(caught.value.__cause__, KeyError)
    until(lambda: not threads_since(before))
    (channel,) = channels
    assert channel._waker_out.fileno() == channel._waker_in.fileno() == -1
    assert not channel.open
    with join("alice", server) as alice:
        assert alice.ping() > 0


def test_connect_thread_ended_by_interruption_closes_descriptors(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is alive at the interruption, and ends before its own work begins."""
    go_on = threading.Event()
    channels: list[Transport] = []

    def break_off(_ref: object, channel: Transport, _queues: object) -> None:
        channels.append(channel)
        go_on.wait(PATIENCE)

    start, wait_for = threading.Thread.start, threading.Thread.join

    def interrupt(thread: threading.Thread) -> None:
        start(thread)
        raise Interrupted

    def join_soon(thread: threading.Thread, timeout: float | None = None) -> None:
        go_on.set()
        wait_for(thread, timeout)

    with monkeypatch.context() as patch:
        patch.setattr("brokerd_client.blocking.base._move_bytes", break_off)
        patch.setattr(threading.Thread, "start", interrupt)
        patch.setattr(threading.Thread, "join", join_soon)
        with pytest.raises(Interrupted):
            join("alice", server)
    (channel,) = channels
    assert channel._waker_out.fileno() == channel._waker_in.fileno() == -1


@pytest.mark.parametrize("own", [True, False], ids=["handler's", "thread's"])
def test_connect_thread_not_started_raises_runtime_error(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Neither the exception handled around connect() nor the context of a handler's own
    RuntimeError replaces it.
    """

    other = threading.Thread(target=int)
    other.start()
    other.join()
    start = threading.Thread.start

    def fail(_thread: threading.Thread) -> None:
        if not own:
            # The library's own RuntimeError: threads can only be started once.
            start(other)
        try:
            raise KeyError("seen by the handler")
        except KeyError:
            raise RuntimeError("of the handler, not once")  # noqa: B904

    monkeypatch.setattr(threading.Thread, "start", fail)
    try:
        raise ValueError("handled outside")
    except ValueError:
        with pytest.raises(RuntimeError, match="once"):
            join("alice", server)


def test_inbox_full_bytes_before_end_of_connection_are_read() -> None:
    """A client that waits without reading notices the end of the connection. The bytes
    before the end are still read.
    """
    channel = Transport(parse("/not/used"))
    mine, peer = socket.socketpair()
    with peer:
        mine.setblocking(False)
        channel._socket = mine
        peer.sendall(b"last words")
        assert channel.wait(0, reading=False) == (False, False)
        assert not channel.ended
        peer.close()
        assert channel.wait(0, reading=False) == (True, False)
        assert channel.ended
        assert (channel.read(), channel.read()) == (b"last words", b"")
    channel.drop()
    assert not channel.ended
    channel.close()


def test_receive_unexpected_error_is_lost_connection(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The I/O thread works on, and the cause is in the log. The next connection works,
    even if the handshake failed.
    """
    with join("alice", server) as alice:
        for method in ("receive", "opened", "tick"):
            losses = alice.counters["losses"]
            with monkeypatch.context() as patch:
                failing = [True]
                original = getattr(alice._dialog, method)

                def fail_once(
                    *args: Any,
                    failing: list[bool] = failing,
                    original: Callable[..., Any] = original,
                    **options: Any,
                ) -> Any:
                    if failing:
                        failing.clear()
                        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
                    return original(*args, **options)

                patch.setattr(alice._dialog, method, fail_once)
                # The I/O thread reads the answer.
                patch.setattr(alice._transport, "borrow_input", lambda: None)
                if method == "opened":
                    server.drop("alice")
                with contextlib.suppress(ConnectionError):
                    alice.ping()
                until(lambda: not failing)  # noqa: B023
            until(lambda: alice.counters["losses"] > losses)  # noqa: B023
            until(lambda: alice.connected)
            assert alice.ping() > 0
        assert "UnicodeEncodeError" in caplog.text


@pytest.mark.timing
def test_connect_slow_host_lookup_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """connect() and close() do not wait for the system's look-up."""
    gate = threading.Event()
    found = socket.getaddrinfo

    def slow(host: Any, *args: Any, flags: int = 0, **options: Any) -> Any:
        if not flags & socket.AI_NUMERICHOST:
            gate.wait(PATIENCE)
        return found(host, *args, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    try:
        started = time.monotonic()
        with pytest.raises(TimedOut):
            connect("broker.invalid:6000", "alice", "k", timeout=0.1)
        assert time.monotonic() - started < PATIENCE / 2
    finally:
        gate.set()
        until(lambda: all(thread.name != "brokerd look-up" for thread in threading.enumerate()))


def test_connect_host_name_with_several_addresses_succeeds() -> None:
    """A name has several addresses, of which the last one answers."""
    with running({"alice": {}}) as broker, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def relay() -> None:
            peer, _ = listener.accept()
            with peer, socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(broker.address)
                back = threading.Thread(target=pump, args=(upstream, peer))
                back.start()
                pump(peer, upstream)
                back.join(PATIENCE)

        thread = threading.Thread(target=relay)
        thread.start()
        with connect(f"localhost:{port}", "alice", broker.key("alice"), timeout=PATIENCE) as client:
            assert client.ping() > 0
        thread.join(PATIENCE)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until the end of the source."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_connect_unknown_host_is_disconnected() -> None:
    with pytest.raises(Disconnected, match="can't connect"):
        connect("brokerd-test.invalid:6000", "alice", "k", timeout=PATIENCE)


@pytest.mark.parametrize("timeout", [math.inf, 1e10, 10**400, sys.float_info.max, None])
def test_timeout_infinite_is_accepted_everywhere(server: FakeServer, timeout: Any) -> None:
    with join("alice", server, timeout=timeout) as alice, join("bob", server) as bob:
        bob.on_request(lambda message: message.payload)
        alice.send("bob", "x", timeout=timeout)
        alice.send_confirmed("bob", "x", timeout=timeout)
        alice.send_many_confirmed([("bob", "x")], timeout=timeout)
        alice.send_many([("alice", "x")], timeout=timeout)
        alice.publish("a.b", "x", timeout=timeout)
        alice.publish_confirmed("a.b", "x", timeout=timeout)
        assert alice.recv(timeout).payload == "x"
        assert alice.request("bob", "y", timeout=timeout).payload == "y"
        assert alice.control("ping", timeout=timeout) == {}
        with alice.subscribe("a.>", timeout=timeout) as subscription:
            alice.publish("a.b", "x")
            assert subscription.recv(timeout).payload == "x"
        with alice.watch_presence(timeout=timeout) as watch:
            assert watch.recv(timeout)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (math.nan, ValueError),
        (-1, ValueError),
        (-math.inf, ValueError),
        ("5", TypeError),
        ([], TypeError),
    ],
)
def test_timeout_invalid_raises_error(
    server: FakeServer, timeout: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="a timeout is a number of seconds"):
        join("alice", server, timeout=timeout)
    with join("alice", server) as alice, alice.subscribe("a.>") as subscription:
        for act in (
            lambda: alice.send("bob", "x", timeout=timeout),
            lambda: alice.send_confirmed("bob", "x", timeout=timeout),
            lambda: alice.send_many([("bob", "x")], timeout=timeout),
            lambda: alice.send_many_confirmed([("bob", "x")], timeout=timeout),
            lambda: alice.publish("a.b", "x", timeout=timeout),
            lambda: alice.recv(timeout),
            lambda: alice.request("bob", "y", timeout=timeout),
            lambda: alice.control("ping", timeout=timeout),
            lambda: alice.subscribe("a.>", timeout=timeout),
            lambda: alice.watch_presence(timeout=timeout),
            lambda: subscription.recv(timeout),
        ):
            with pytest.raises(error, match="a timeout is a number of seconds"):
                act()
        assert alice.counters["undelivered"] == 0


@pytest.mark.parametrize("make", [pickle.dumps, copy.copy, copy.deepcopy])
def test_client_pickled_or_copied_raises_with_remedy(
    server: FakeServer, make: Callable[[Any], Any]
) -> None:
    with join("alice", server) as alice, pytest.raises(TypeError, match="connect in the child"):
        make(alice)
    with join("alice", server) as alice:
        alice.send("alice", "hello")
        message = alice.recv(PATIENCE)
        with pytest.raises(TypeError, match="pass on the message's payload"):
            pickle.dumps(message)

    async def with_asyncio() -> None:
        async with aio.connect(server.path, "bob", "bob") as bob:
            with pytest.raises(TypeError, match="connect in the child"):
                make(bob)

    asyncio.run(with_asyncio())


def ask_each_other(server: FakeServer, depth: int, at_once: int, **options: Any) -> list[Any]:
    """Return the answers to ``at_once`` requests that are nested to ``depth``."""
    with join("alice", server, **options) as alice, join("bob", server, **options) as bob:

        def answer(client: Client, other: str) -> Callable[[Any], int]:
            def handle(message: Any) -> int:
                left = message.payload
                return (
                    0
                    if left == 0
                    else 1 + int(client.request(other, left - 1, timeout=PATIENCE).payload)
                )

            return handle

        alice.on_request(answer(alice, "bob"))
        bob.on_request(answer(bob, "alice"))
        answers: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(alice.request("bob", depth, timeout=PATIENCE).payload)
            )
            for _ in range(at_once)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        until(lambda: len(alice._for_requests.threads) <= alice._for_requests.count)
        return answers


@pytest.mark.parametrize("handlers", [1, 4])
def test_handlers_with_nested_requests_get_more_threads(server: FakeServer, handlers: int) -> None:
    """Nested requests need more threads than ``handlers``. A thread that waits for an
    answer is replaced by another.
    """
    assert ask_each_other(server, 12, 5, handlers=handlers) == [12] * 5


def test_handler_threads_are_bounded(server: FakeServer) -> None:
    """At the limit of threads with waiting handlers, requests wait. No more threads are
    started.
    """
    with join("alice", server) as alice, join("bob", server) as bob:

        def handle(message: Any) -> None:
            with contextlib.suppress(TimedOut):
                bob.request("carol", 1, timeout=PATIENCE)

        with join("carol", server) as carol:
            carol.on_message(lambda message: None)
            bob.on_request(handle)
            threads = [threading.Thread(target=ask, args=(alice,)) for _ in range(80)]
            for thread in threads:
                thread.start()
            until(lambda: len(bob._for_requests.threads) == MOST_THREADS)
            time.sleep(0.05)
            assert len(bob._for_requests.threads) == MOST_THREADS
            bob.close()
            alice.close()
            for thread in threads:
                thread.join(PATIENCE)


def ask(client: Client) -> None:
    """Send a request to bob; an error is ignored."""
    with contextlib.suppress(brokerd_client.BrokerdError):
        client.request("bob", 1, timeout=PATIENCE)


def test_request_threads_are_configurable(server: FakeServer) -> None:
    with pytest.raises(ValueError, match="handlers"):
        join("alice", server, handlers=0)
    with join("alice", server, handlers=7) as alice, join("bob", server) as bob:
        busy: list[object] = []
        gate = threading.Event()

        def hold(message: Any) -> None:
            busy.append(message)
            gate.wait(PATIENCE)

        alice.on_request(hold)
        for _ in range(9):
            threading.Thread(target=ask_alice, args=(bob,)).start()
        until(lambda: len(busy) == 7)
        gate.set()
        until(lambda: len(busy) == 9)


def ask_alice(client: Client) -> None:
    """Send a request to alice; an error is ignored."""
    with contextlib.suppress(brokerd_client.BrokerdError):
        client.request("alice", 1, timeout=PATIENCE)


# Who reads


@pytest.mark.parametrize("leads", [True, False])
def test_client_waiting_thread_reads_where_it_can(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, leads: bool
) -> None:
    """Without epoll the I/O thread reads everything."""
    if not leads:
        monkeypatch.setattr("brokerd_client.blocking.transport.poller", SelectorPoller)
    elif not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    with join("alice", server) as alice, join("bob", server) as bob:
        bob.on_request(lambda message: message.body)
        reads: list[str] = []
        receive = alice._dialog.receive

        def note(*args: Any) -> Any:
            reads.append(threading.current_thread().name)
            return receive(*args)

        monkeypatch.setattr(alice._dialog, "receive", note)
        for size in (1, 1_000_000):
            assert len(alice.request("bob", bytes(size)).body) == size
        alice.send("alice", "to itself")
        assert alice.recv(PATIENCE).payload == "to itself"
        assert set(reads) <= {"brokerd client"}
        assert leads or reads


def test_client_followers_get_outcomes_from_leader(server: FakeServer) -> None:
    """A thread in recv() reads the answers for other threads, and goes on waiting."""
    with join("alice", server) as alice, join("bob", server) as bob:
        bob.on_request(lambda message: message.payload)
        got: list[object] = []
        receiver = threading.Thread(target=lambda: got.append(alice.recv(PATIENCE).payload))
        receiver.start()
        until(lambda: alice._transport.lent)
        for number in range(50):
            assert alice.request("bob", number).payload == number
        assert alice.ping() > 0
        assert got == []
        bob.send("alice", "for recv")
        receiver.join(PATIENCE)
        assert got == ["for recv"]


@pytest.mark.parametrize("size", [1, 20, 50, 90])
def test_client_reads_that_end_within_frames_lose_nothing(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The leader and the I/O thread go on with the frame that the other has begun."""
    monkeypatch.setattr("brokerd_client.blocking.transport._READ_SIZE", size)
    monkeypatch.setattr("brokerd_client.blocking.transport._READ_AHEAD_SIZE", size)
    with join("alice", server) as alice, join("bob", server) as bob:
        for count in (1, 3, 30, 30):
            bob.send_many([("alice", number) for number in range(count)])
            for number in range(count):
                assert alice.recv(PATIENCE).payload == number
            assert alice.ping() > 0


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")
def test_client_leader_keeps_begin_of_frame_for_next_read(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rule of the leader's rest does not matter here.
    monkeypatch.setattr("brokerd_client.blocking.leader._REST_S", 0)
    monkeypatch.setattr("brokerd_client.blocking.transport._READ_AHEAD_SIZE", 50)
    begun: list[bytes] = []
    with join("alice", server) as alice, join("bob", server) as bob:
        while not begun:
            bob.send_many([("alice", "0123456789")] * 30)
            for _ in range(30):
                assert alice.recv(PATIENCE).payload == "0123456789"
                begun += filter(None, [alice._transport.unread.after])
        assert alice.ping() > 0


def test_client_leader_wakes_when_another_thread_closes(server: FakeServer) -> None:
    alice = join("alice", server)
    errors: list[BaseException] = []

    def receive() -> None:
        try:
            alice.recv()
        except Closed as error:
            errors.append(error)

    receiver = threading.Thread(target=receive)
    receiver.start()
    until(lambda: alice._transport.lent)
    alice.close()
    receiver.join(PATIENCE)
    assert len(errors) == 1


def test_client_leader_that_loses_connection_waits_for_next(server: FakeServer) -> None:
    with join("alice", server) as alice, join("bob", server) as bob:
        got: list[object] = []
        receiver = threading.Thread(target=lambda: got.append(alice.recv(PATIENCE).payload))
        receiver.start()
        until(lambda: alice._transport.lent)
        server.drop("alice")
        until(lambda: alice.counters["losses"] == 1 and alice.connected)
        bob.send("alice", "after the loss")
        receiver.join(PATIENCE)
        assert got == ["after the loss"]


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="this system has no epoll")
def test_client_quick_leaders_keep_input_until_io_thread_takes_it_back(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a leader, messages arrive soon all the same, and a loss is noticed."""
    monkeypatch.setattr("brokerd_client.blocking.transport._QUICK_S", PATIENCE)
    with join("alice", server) as alice, join("bob", server) as bob:
        bob.on_request(lambda message: message.payload)
        got: queue.Queue[object] = queue.Queue()
        alice.on_message(lambda message: got.put(message.payload))
        transport = alice._transport
        kept: list[bool] = []

        def ask() -> None:
            assert alice.request("bob", len(kept)).payload == len(kept)
            kept.append(transport.kept)

        while not any(kept):
            ask()
        until(lambda: not transport.lent)
        while not kept[-1]:
            ask()
        bob.send("alice", "without a leader")
        assert got.get(timeout=PATIENCE) == "without a leader"
        ask()
        server.drop("alice")
        until(lambda: alice.counters["losses"] == 1 and alice.connected)
        ask()


@pytest.fixture
def keeping(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that has kept input, and keeps it for long."""
    if not hasattr(select, "epoll"):
        pytest.skip("this system has no epoll")
    monkeypatch.setattr("brokerd_client.blocking.transport._QUICK_S", PATIENCE)
    monkeypatch.setattr("brokerd_client.blocking.transport._KEPT_S", PATIENCE)
    with join("alice", server) as alice:
        until(lambda: alice.ping() > 0 and alice._transport.kept)
        yield alice


def test_client_requests_on_kept_input_take_the_short_way(
    server: FakeServer, keeping: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the caller nor the thread of the handler calls the general functions."""

    def general(*args: object, **options: object) -> None:
        raise AssertionError("not the short way")

    with join("bob", server) as bob:
        bob.on_request(lambda message: message.payload)
        until(lambda: keeping.request("bob", 0).payload == 0 and bob._transport.kept)
        monkeypatch.setattr(keeping, "_ask", general)
        monkeypatch.setattr(bob, "_read_ahead", general)
        for number in range(20):
            assert keeping.request("bob", number).payload == number


@pytest.mark.parametrize("taken", [False, True])
def test_client_recv_message_read_while_it_takes_kept_input_wakes_it(
    server: FakeServer, keeping: Client, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """recv returns the message, or waits again if another thread has taken it."""
    begin_take, box = keeping._begin_take, keeping._inbox

    def begin_late(turn: Turn) -> Any:
        """Begin after other threads have read a message, and have kept the input again."""
        monkeypatch.setattr(keeping, "_begin_take", begin_take)
        bob.send("alice", "early")
        with keeping._lock:
            keeping._transport.return_input()
        until(lambda: len(box.inbox.items) == 1)
        if taken:
            assert keeping.recv(PATIENCE).payload == "early"
        until(lambda: keeping.ping() > 0 and keeping._transport.kept)
        has_read.set()
        return begin_take(turn)

    has_read = threading.Event()
    got: list[object] = []
    receiver = threading.Thread(target=lambda: got.append(keeping.recv().payload))
    with join("bob", server) as bob:
        monkeypatch.setattr(keeping, "_begin_take", begin_late)
        receiver.start()
        if taken:
            # The gate of the call so far was opened; it waits at a new one.
            assert has_read.wait(PATIENCE)
            until(lambda: bool(box.waiters))
            bob.send("alice", "next")
        receiver.join(PATIENCE)
    assert got == ["next" if taken else "early"]


def test_client_request_on_kept_input_times_out(server: FakeServer, keeping: Client) -> None:
    with join("bob", server) as bob:
        with pytest.raises(TimedOut, match=r"no answer from bob to \d+ within 0\.02 s"):
            keeping.request("bob", None, timeout=0.02)
        assert not keeping._calls
        assert not keeping._dialog.pending_calls
        assert bob.recv(PATIENCE).payload is None
        bob.on_request(lambda message: message.payload)
        assert keeping.request("bob", "later").payload == "later"


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_client_request_on_kept_input_gets_any_answer(
    server: FakeServer, keeping: Client, size: int
) -> None:
    """The answer comes with a message in one read, in pieces, or as an error."""
    with join("bob", server) as bob:

        def answer(message: Message) -> None:
            if message.payload == "fail":
                message.fail("for a reason")
            else:
                bob.send("alice", "before the answer")
                message.reply(bytes(size))

        bob.on_request(answer)
        assert len(keeping.request("bob", "answer").body) == size
        assert keeping.recv(PATIENCE).payload == "before the answer"
        until(lambda: keeping.ping() > 0 and keeping._transport.kept)
        with pytest.raises(RequestFailed, match="for a reason"):
            keeping.request("bob", "fail")
        with pytest.raises(InvalidName):
            keeping.request("not a name", None)
        assert keeping.ping() > 0


def test_client_requests_of_threads_that_keep_input_are_all_answered(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokerd_client.blocking.transport._QUICK_S", PATIENCE)
    with join("alice", server) as alice, join("bob", server) as bob:
        bob.on_request(lambda message: message.payload)
        answers: dict[int, object] = {}

        def ask(first: int) -> None:
            for number in range(first, first + 200):
                answers[number] = alice.request("bob", number, timeout=PATIENCE).payload

        threads = [threading.Thread(target=ask, args=(1000 * part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert len(answers) == 800
        assert all(number == answer for number, answer in answers.items())
        assert not alice._calls


@pytest.mark.parametrize(("end", "error_type"), [("loss", InDoubt), ("close", Closed)])
def test_client_request_on_kept_input_ends_with_connection(
    server: FakeServer, keeping: Client, end: str, error_type: type[BrokerdError]
) -> None:
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            keeping.request("bob", None, timeout=PATIENCE)
        except BrokerdError as error:
            errors.append(error)

    with join("bob", server) as bob:
        asking = threading.Thread(target=ask)
        asking.start()
        bob.recv(PATIENCE)
        if end == "loss":
            server.drop("alice")
        else:
            keeping.close()
        asking.join(PATIENCE)
        assert [type(error) for error in errors] == [error_type]
        assert not keeping._calls


def test_client_leader_with_full_inbox_lets_io_thread_decide(server: FakeServer) -> None:
    """Messages fill the inbox while a thread waits for an answer: it gets the answer."""
    with join("alice", server, inbox=10_000) as alice, join("bob", server) as bob:

        def flood_and_answer(message: Message) -> None:
            for _ in range(30):
                bob.send("alice", bytes(1000))
            message.reply("answer")

        bob.on_request(flood_and_answer)
        assert alice.request("bob", None).payload == "answer"
        for _ in range(30):
            assert len(alice.recv(PATIENCE).body) == 1000
        assert alice.ping() > 0
