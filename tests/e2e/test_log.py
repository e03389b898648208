"""The log of a whole daemon: it is not read, is moved away, changes its levels, and
gets hostile bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import yaml
from support.broker_process import TIMEOUT_S, BrokerProcess
from support.keys import key_of
from support.raw_client import EVENT, MESSAGE, REQUEST, Raw, Rejected, login, packed
from support.waiting import until

#: What ends lines, moves cursors, turns text around, or looks like a field.
HOSTILE = (
    'x\n{"event": "daemon.killed"}\r\x1b[2J\x1b[31m\x00\x7f\x85\u2028\u202e level=error'
    " name=root\t\"'"
)


def brokerctl(
    broker: BrokerProcess, name: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run brokerctl as a client."""
    key = broker.directory / f"{name}.key"
    access = ["--address", str(broker.socket), "--name", name, "--key-file", str(key)]
    command = [sys.executable, "-c", "from brokerd.ctl import main; main()", *arguments, *access]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def configure(broker: BrokerProcess, **sections: Any) -> None:
    """Change sections of the configuration file."""
    whole = yaml.safe_load(broker.config.read_text()) | sections
    broker.config.write_text(yaml.safe_dump(whole))


def lines_of(path: Path, count: int = 0) -> list[dict[str, Any]]:
    """Return the lines of a log, of which at least ``count`` come in time.

    Each file has a thread of its own, so that a line may come after the answer to the
    command that it tells of.
    """
    until(
        lambda: path.exists() and path.read_text().count("\n") >= count,
        f"{path.name} has fewer than {count} lines",
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timing
def test_log_full_pipe_blocks_no_client(socket_dir: Path) -> None:
    """Standard error is a full pipe: clients connect, send and leave, and the broker
    stops in time.
    """
    reading, writing = os.pipe()
    with contextlib.suppress(BlockingIOError):
        os.set_blocking(writing, False)
        while True:
            os.write(writing, bytes(1 << 16))
    os.set_blocking(writing, True)
    with BrokerProcess(socket_dir, stderr=writing, log={"level": "debug"}) as broker:
        os.close(writing)
        while not broker.socket.exists():
            assert broker.popen.poll() is None
        for _ in range(50):
            alice = connect_in_time(broker, "alice")
            with alice:
                alice.send(MESSAGE, "bob", b"nobody there")
                assert alice.recv().code == "offline"
        began = monotonic()
        broker.signal()
        assert broker.exit_status() == 0
        assert monotonic() - began < 20
    os.close(reading)


def connect_in_time(broker: BrokerProcess, name: str) -> Raw:
    deadline = monotonic() + TIMEOUT_S
    while True:
        try:
            return login(broker.address, key_of(name), name.encode())
        except (ConnectionRefusedError, Rejected):
            assert monotonic() < deadline


def test_log_is_written_completely_before_exit(socket_dir: Path) -> None:
    """The last events before the exit are all there, in order."""
    with BrokerProcess(socket_dir, ["alice"]) as broker:
        for _ in range(20):
            broker.login("alice").close()
        broker.signal()
        assert broker.exit_status() == 0
    events = [json.loads(line)["event"] for line in broker.lines]
    assert events[0] == "daemon.started"
    assert events[-1] == "daemon.stopped"
    assert events.count("client.connected") == events.count("client.disconnected") == 20
    timestamps = [json.loads(line)["timestamp"] for line in broker.lines]
    assert timestamps == sorted(timestamps)


def test_log_level_changed_at_runtime_applies_until_reload(socket_dir: Path) -> None:
    """An administrator changes it for a time, or until the next reload. The answer
    shows the change, and the audit shows the administrator.
    """
    clients = {"alice": None, "root": {"admin": True}}
    with (
        BrokerProcess(socket_dir, clients, log={"audit": "audit.log"}) as broker,
        broker.login("alice") as alice,
    ):

        def refused() -> int:
            alice.send(MESSAGE, "root", b"hello")
            alice.recv()
            alice.ask("ping")
            return len(broker.events("message.refused"))

        assert refused() == 0
        changed = brokerctl(
            broker, "root", "log-level", "message", "debug", "--for", "10m", "--json"
        )
        assert changed.returncode == 0, changed.stderr
        shown = json.loads(changed.stdout)["levels"]
        assert (shown["message"]["level"], shown["message"]["changed"]) == ("debug", True)
        assert 590 < shown["message"]["seconds"] <= 600
        refused()
        broker.wait("message.refused")
        table = brokerctl(broker, "root", "log-level")
        assert "message\tdebug\tfor" in table.stdout
        assert "client\tinfo\t" in table.stdout
        for wrong in (
            ("message",),
            ("message", "loud"),
            ("cliant", "debug"),
            ("client", "debug", "--for", "soon"),
        ):
            failed = brokerctl(broker, "root", "log-level", *wrong)
            assert failed.returncode in (1, 2), failed
            assert "give" in failed.stderr
        assert brokerctl(broker, "alice", "log-level").returncode != 0
        broker.signal(signal.SIGHUP)
        broker.wait("daemon.reloaded")
        assert "message\tinfo\t\n" in brokerctl(broker, "root", "log-level").stdout
        broker.signal()
        assert broker.exit_status() == 0
        changes = [
            line
            for line in lines_of(socket_dir / "audit.log")
            if line["event"] == "log.level_changed"
        ]
        assert [(line["area"], line["to"], line["for_s"], line["by"]) for line in changes] == [
            ("message", "debug", 600.0, "root")
        ]


def test_audit_file_moved_away_is_reopened_at_reload(socket_dir: Path) -> None:
    """A SIGHUP opens a new file, even if the configuration is refused. A path that
    can't be opened refuses the reload.
    """
    with BrokerProcess(
        socket_dir, {"alice": None, "root": {"admin": True}}, log={"audit": "audit.log"}
    ) as broker:
        audit = socket_dir / "audit.log"
        broker.login("alice").close()
        broker.wait("client.disconnected")
        audit.rename(socket_dir / "audit.1")
        configure(broker, limits={"max_mesage": 1})
        broker.signal(signal.SIGHUP)
        broker.wait("daemon.reload_refused")
        assert brokerctl(broker, "root", "disconnect", "alice").returncode == 1
        events = [line["event"] for line in lines_of(socket_dir / "audit.1", 3)]
        assert events == ["daemon.started", "client.connected", "client.disconnected"]
        first, connected, admin_event = lines_of(audit, 3)[:3]
        assert first["event"] == "daemon.reload_refused"
        assert (connected["name"], len(connected["key"])) == ("root", 8)
        assert {key: admin_event[key] for key in ("event", "name", "op", "to")} == {
            "event": "admin.asked",
            "name": "root",
            "op": "disconnect",
            "to": "alice",
        }
        assert audit.stat().st_mode & 0o777 == 0o600
        configure(broker, limits={}, log={"audit": "none/audit.log"})
        failed = brokerctl(broker, "root", "reload", "--dry-run")
        assert failed.returncode != 0
        assert "audit" in failed.stdout + failed.stderr
        failed = brokerctl(broker, "root", "reload")
        assert failed.returncode != 0
        assert "none/audit.log can't be opened" in failed.stderr
        assert broker.wait("daemon.reload_refused", 2)[1]["cause"] == "audit"
        broker.signal()
        assert broker.exit_status() == 0
        assert lines_of(audit)[-1]["event"] == "daemon.stopped"


def test_audit_file_not_openable_prevents_start(socket_dir: Path) -> None:
    """The broker serves nothing without the audit that its configuration asks for."""
    with BrokerProcess(socket_dir, log={"audit": "none/audit.log"}) as broker:
        assert broker.exit_status() == 1
        assert "none/audit.log can't be opened: No such file or directory" in "".join(broker.lines)
        assert not broker.socket.exists()


def test_audit_on_full_disk_stops_no_client(socket_dir: Path) -> None:
    """The broker goes on without the lines that it can't write."""
    with BrokerProcess(socket_dir, log={"audit": "/dev/full"}) as broker:
        for _ in range(3):
            with broker.login("alice") as alice:
                alice.ask("ping")
        broker.signal()
        assert broker.exit_status() == 0


def attack(broker: BrokerProcess) -> None:
    """Send hostile bytes in every place from which a client's bytes can reach the log."""
    hostile = HOSTILE.encode()
    for name in (hostile[:60], b"\xff\xfe\n\x1b[31m", b"alice\n"):
        with contextlib.suppress(Rejected, ConnectionError, EOFError):
            login(broker.address, b"wrong, a canary", name)
    for junk in (b"GET /\n\x1b[2J HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x20" + hostile[:32]):
        with contextlib.closing(Raw(broker.address)) as raw:
            raw.read_body()
            raw.write(junk)
            raw.is_closed()
    with broker.login("alice") as alice, broker.login("root") as root:
        # Refused topics, operations, subscriptions and arguments.
        topic = hostile[:100]
        alice.send(
            EVENT, "", bytes([len(topic)]) + topic + b"a body, a canary", message_id=1, flags=1
        )
        alice.recv()
        questions: list[dict[str, Any]] = [
            {"op": HOSTILE},
            {"op": "subscribe", "topic": HOSTILE},
            {"op": "subscribe", "topic": "a.b", "group": HOSTILE},
            {"op": "subscribe", "topic": HOSTILE.replace(" ", "").replace("\n", "\u2028")},
            {"op": "drain", "why": HOSTILE},
        ]
        admins: list[dict[str, Any]] = [
            {"op": "disconnect", "address": HOSTILE},
            {"op": "can", "sender": HOSTILE, "verb": HOSTILE, "target": HOSTILE},
            {"op": "log_level", "area": HOSTILE, "level": "debug"},
            {"op": "log_level", "area": "client", "level": HOSTILE},
            {"op": "log_level", "area": "client", "level": "debug", "for": HOSTILE},
        ]
        for client, requests in ((alice, questions), (root, [*questions[:4], *admins])):
            for question in requests:
                client.send(REQUEST, "$broker", json.dumps(question).encode(), codec=2)
                client.recv()
    for name in (hostile[:40], "zoë\u2028".encode(), b"$\x1b[31m", b"nobody", b"$nobody"):
        with broker.login("alice") as alice:
            # The name of a recipient: refused, or malformed and the end of the
            # connection.
            alice.write(
                packed(MESSAGE, "N" * len(name), b"a body, a canary").replace(
                    b"N" * len(name), name
                )
            )
            with contextlib.suppress(EOFError, ConnectionError):
                alice.recv()


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_log_hostile_bytes_of_client_forge_no_line(socket_dir: Path, log_format: str) -> None:
    """Wherever a client's hostile bytes reach the log, each event is one printable
    line. No line holds a key.
    """
    clients = {
        "alice": {"publish": ["ok"], "subscribe": ["ok"], "send_to": ["root"]},
        "root": {"admin": True},
    }
    log = {"level": "debug", "format": log_format, "audit": "audit.log"}
    with BrokerProcess(socket_dir, clients, log=log) as broker:
        while not broker.socket.exists():
            assert broker.popen.poll() is None
        connect_in_time(broker, "alice").close()
        attack_when_started(broker)
        broker.signal()
        assert broker.exit_status() == 0
    lines = [*broker.lines, *(socket_dir / "audit.log").read_text().splitlines(keepends=True)]
    assert len(lines) > 50
    for line in lines:
        assert line.endswith("\n")
        assert line[:-1].isprintable(), line
        assert "canary" not in line
    whole = "".join(lines)
    assert "31m" in whole, "what was hostile is shown, escaped"
    for line in broker.lines:
        if log_format == "json":
            assert json.loads(line)["event"] != "daemon.killed"
        else:
            assert line.partition("[")[0].endswith("Z ")
    for line in lines_of(socket_dir / "audit.log"):
        assert line["event"] not in ("daemon.killed", "daemon.bug")
    for name in clients:
        assert key_of(name).hex() not in whole


def attack_when_started(broker: BrokerProcess) -> None:
    """Attack without waiting for events, because the log need not be JSON."""
    wait, broker.wait = broker.wait, lambda *_: []  # type: ignore[method-assign]
    try:
        attack(broker)
    finally:
        broker.wait = wait  # type: ignore[method-assign]
