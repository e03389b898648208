"""The process from outside: its log, its exit status, and the faults that it survives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
from pathlib import Path
from time import monotonic

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import MESSAGE, RECEIPT, WANT_RECEIPT, Raw, Rejected, login, prefixed

from brokerd import __version__


def queue_for(sender: Raw, to: str, count: int) -> None:
    for number in range(count):
        sender.send(MESSAGE, to, bytes(100_000), message_id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_by_signal_delivers_queue(socket_dir: Path, number: int) -> None:
    """Queued messages reach a client that reads late. The exit status is 0, and no
    socket file is left.
    """
    with (
        BrokerProcess(socket_dir) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        queue_for(alice, "bob", 50)
        broker.signal(number)
        broker.wait("daemon.stopping")
        while broker.socket.exists():
            assert broker.popen.poll() is None
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            Raw(broker.address)
        assert [bob.recv().id for _ in range(50)] == list(range(50))
        assert bob.is_closed("shutting_down")
        assert alice.is_closed("shutting_down")
        assert broker.exit_status() == 0
        assert not broker.socket.exists()
        assert broker.events("daemon.stopping")[0]["reason"] == signal.Signals(number).name
        assert broker.events("daemon.stopped")[0]["cut_off"] == 0


@pytest.mark.timing
def test_drain_with_idle_clients_ends_at_once(socket_dir: Path) -> None:
    """Clients without queued messages do not delay the stop."""
    with (
        BrokerProcess(socket_dir, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
    ):
        began = monotonic()
        broker.signal()
        assert broker.exit_status() == 0
        assert monotonic() - began < 30
        assert alice.is_closed("shutting_down")


@pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")
def test_stop_signals_after_drain_keep_exit_status(socket_dir: Path) -> None:
    """A signal that arrives while the interpreter exits does not turn a drain into a
    failure.
    """
    with BrokerProcess(socket_dir) as broker:
        broker.wait("daemon.started")
        broker.signal()
        broker.wait("daemon.stopped")
        while broker.popen.poll() is None:
            for number in (
                signal.SIGTERM,
                signal.SIGINT,
                signal.SIGHUP,
                signal.SIGUSR1,
                signal.SIGUSR2,
            ):
                broker.signal(number)
        assert broker.exit_status() == 0
        assert not broker.events("daemon.killed")


@pytest.mark.timing
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_drain_second_signal_ends_broker_at_once(socket_dir: Path, second: int) -> None:
    """The broker no longer waits for a client that does not read, and the exit status
    is 1.
    """
    with (
        BrokerProcess(socket_dir, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        queue_for(alice, "bob", 50)
        broker.signal()
        broker.wait("daemon.stopping")
        began = monotonic()
        broker.signal(second)
        assert broker.exit_status() == 1
        assert monotonic() - began < 30
        assert not broker.socket.exists()
        assert broker.events("daemon.killed")


@pytest.mark.timing
@pytest.mark.slow
def test_drain_default_with_stuck_consumer_ends_before_10_s(socket_dir: Path) -> None:
    """The default leaves room before the SIGKILL that container runtimes send 10
    seconds after SIGTERM.
    """
    with BrokerProcess(socket_dir) as broker, broker.login("alice") as alice, broker.login("bob"):
        queue_for(alice, "bob", 50)
        began = monotonic()
        broker.signal()
        assert broker.exit_status() == 0
        assert 8 <= monotonic() - began < 10
        assert broker.events("daemon.stopped")[0]["cut_off"] == 1


@pytest.mark.timing
def test_drain_timeout_cuts_off_client_that_does_not_read(socket_dir: Path) -> None:
    """A client that never reads is cut off and counted; the exit status is still 0."""
    with (
        BrokerProcess(socket_dir, limits={"drain_timeout": "300ms"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        queue_for(alice, "bob", 50)
        began = monotonic()
        broker.signal()
        assert broker.exit_status() == 0
        assert monotonic() - began < 0.3 + 20
        stopped = broker.events("daemon.stopped")[0]
        assert (stopped["cut_off"], stopped["lost"]) == (1, 0)
        assert alice.recv().code == "offline"


def test_daemon_start_after_sigkill_replaces_socket_file(socket_dir: Path) -> None:
    """After SIGKILL the socket file stays; the next daemon takes it over."""
    with BrokerProcess(socket_dir) as first:
        first.wait("daemon.started")
        first.popen.kill()
        assert first.exit_status() == -signal.SIGKILL
    assert (socket_dir / "brokerd.sock").is_socket()
    with BrokerProcess(socket_dir) as second, second.login("alice") as alice:
        alice.ping()


def test_daemon_second_at_same_path_fails(socket_dir: Path) -> None:
    """The error names the socket and the program that listens there. The exit status is
    1, and the first daemon goes on.
    """
    with BrokerProcess(socket_dir) as first, first.login("alice") as alice:
        with BrokerProcess(socket_dir) as second:
            assert second.exit_status() == 1
            failed = second.events("daemon.failed")[0]
            assert str(first.socket) in failed["reason"]
            assert "another program is listening" in failed["reason"]
        alice.ping()
        assert first.socket.is_socket()


def test_log_is_one_json_object_per_line(socket_dir: Path) -> None:
    """Start, connect, refuse, disconnect and stop are events with fields. No line holds
    a key or a payload.
    """
    with BrokerProcess(socket_dir, listen=["127.0.0.1:0"]) as broker:
        unix, tcp = broker.addresses()
        alice = broker.login("alice")
        for address, name, key in (
            (unix, b"", b"wrong key, a canary"),
            (tcp, b"bob", b"another wrong key, a canary"),
        ):
            with pytest.raises(Rejected):
                login(address, key, name)
        with broker.login("alice", tcp) as second:
            assert second.is_closed("name_taken")
        alice.send(MESSAGE, "alice", b"a body, a canary")
        alice.recv()
        alice.write(prefixed(b"malformed, a canary"))
        alice.recv()
        alice.close()
        broker.wait("client.disconnected")
        broker.signal()
        assert broker.exit_status() == 0
        lines = [json.loads(line) for line in broker.lines]
        # The malformed frame is refused, and may be counted before or after its client is
        # disconnected.
        events = [line for line in lines if line["event"] != "message.refusals"]
        assert len(lines) == len(events) + 1
        assert [event["event"] for event in events] == [
            "daemon.started",
            "client.connected",
            *["client.refused"] * 3,
            "client.disconnected",
            "daemon.stopping",
            "daemon.stopped",
        ]
        assert all(
            re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", event["timestamp"]) for event in events
        )
        started, connected, unknown, wrong, twice, disconnected, _, _ = events
        assert started["version"] == __version__
        assert started["routing"] in ("python", "compiled")
        assert started["listeners"] == [str(unix), str(tcp)]
        assert (connected["name"], connected["peer"]) == ("alice", f"unix uid={os.getuid()}")
        assert (unknown["reason"], unknown["peer"], unknown["level"]) == (
            "unknown key",
            connected["peer"],
            "warning",
        )
        assert wrong["peer"].startswith("127.0.0.1:")
        assert (twice["name"], "connected already" in twice["reason"]) == ("alice", True)
        assert (disconnected["name"], disconnected["reason"]) == ("alice", "malformed")
        everything = "".join(broker.lines)
        assert "canary" not in everything
        for key in (key_of("alice"), key_of("bob")):
            assert key.hex() not in everything


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_log_level_hides_less_important_events(socket_dir: Path, level: str) -> None:
    """No event below log.level is written, and no key at any level."""
    with BrokerProcess(socket_dir, log={"level": level}) as broker:
        while not broker.socket.exists():
            assert broker.popen.poll() is None
        while True:
            try:
                login(broker.address, b"wrong key, a canary")
            except Rejected:
                break
            except ConnectionRefusedError:
                continue
        login(broker.address, key_of("alice")).close()
        broker.signal()
        assert broker.exit_status() == 0
        levels = {json.loads(line)["level"] for line in broker.lines}
        order = ["debug", "info", "warning", "error"]
        assert all(order.index(each) >= order.index(level) for each in levels)
        assert ("warning" in levels) == (level != "error")
        assert "canary" not in "".join(broker.lines)


def test_log_closed_pipe_stops_no_client(socket_dir: Path) -> None:
    """When the other end of standard error is closed, clients still connect, send and
    leave.
    """
    reading, writing = os.pipe()
    with BrokerProcess(socket_dir, listen=[], stderr=writing) as broker:
        os.close(writing)
        with os.fdopen(reading) as log:
            assert "daemon.started" in log.readline()
        for _ in range(5):
            with (
                login(broker.address, key_of("alice"), b"alice") as alice,
                login(broker.address, key_of("bob"), b"bob") as bob,
            ):
                alice.send(MESSAGE, "bob", b"still")
                assert bob.recv().body == b"still"
        broker.signal()
        assert broker.exit_status() == 0


def test_log_on_full_disk_stops_no_client(socket_dir: Path) -> None:
    """When a line of the log can't be written, the broker goes on."""
    full = os.open("/dev/full", os.O_WRONLY)
    with BrokerProcess(socket_dir, stderr=full) as broker:
        os.close(full)
        while not broker.socket.exists():
            assert broker.popen.poll() is None
        for _ in range(5):
            while True:
                try:
                    alice = login(broker.address, key_of("alice"), b"alice")
                    break
                except ConnectionRefusedError:
                    continue
            with alice:
                alice.ping()
        broker.signal()
        assert broker.exit_status() == 0


def test_daemon_invalid_configuration_exits_with_78(socket_dir: Path) -> None:
    """It listens nowhere, and the error names the file."""
    with BrokerProcess(socket_dir, limits={"max_mesage": 1}) as broker:
        assert broker.exit_status() == 78
        assert str(broker.config) in "".join(broker.lines)
        assert not broker.socket.exists()


def soft_limit_of_files(number: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def test_daemon_soft_limit_of_open_files_is_raised(socket_dir: Path) -> None:
    """A shell's low soft limit is raised to the hard one: connections above it are
    served.
    """
    names = [f"c{number}" for number in range(100)]
    with BrokerProcess(socket_dir, names, preexec=lambda: soft_limit_of_files(64)) as broker:
        with contextlib.ExitStack() as stack:
            for member in [stack.enter_context(broker.login(name)) for name in names]:
                member.ping()
        assert not broker.events("listener.paused")


def test_listener_without_free_descriptors_pauses_and_resumes(socket_dir: Path) -> None:
    """Above the hard limit connections wait in the kernel's queue, until other
    connections close.
    """

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    names = [f"c{number}" for number in range(60)]
    with BrokerProcess(socket_dir, names, preexec=few, limits={"handshakes": 100}) as broker:
        broker.wait("daemon.started")
        waiting = [Raw(broker.address) for _ in range(50)]
        broker.wait("listener.paused")
        for each in waiting:
            each.close()
        with broker.login("c59") as late:
            late.ping()
