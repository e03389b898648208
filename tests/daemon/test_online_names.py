"""The file with the names of online clients, which the next start reads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.raw_client import packed
from support.running_daemon import Recorder, configuration

from brokerd.daemon.daemon import Daemon
from brokerd.daemon.online_names import file_of, read_names

TIMEOUT_S = 30.0


def test_online_names_file_lies_in_state_directory(tmp_path: Path) -> None:
    """Each configuration file has its own; systemd may name several directories."""
    environ = {"STATE_DIRECTORY": f"{tmp_path}:/other"}

    first, second = file_of("/etc/a.yaml", environ), file_of("/etc/b.yaml", environ)

    assert first.parent == second.parent == tmp_path
    assert first != second
    assert file_of("/etc/a.yaml", {}).parent == Path("/var/lib/brokerd")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"online": 5}', "[" * 100_000, "\x00"])
def test_online_names_of_broken_file_are_none(tmp_path: Path, text: str) -> None:
    """A file that can't be read is no reason not to start."""
    path = tmp_path / "x.json"
    assert read_names(path) == []
    path.write_text(text)
    assert read_names(path) == []
    path.write_text('{"online": ["a", 5, "b"]}')
    assert read_names(path) == ["a", "b"]


def wait_for_names(directory: Path, *names: str) -> None:
    """Wait until the file has exactly these names."""
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end:
        for path in directory.glob("online-*.json"):
            if sorted(json.loads(path.read_text())["online"]) == sorted(names):
                return
        time.sleep(0.02)
    raise AssertionError(list(directory.iterdir()))


@pytest.mark.parametrize(
    "ended_by", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_restart_holds_messages_for_client_that_was_online(
    socket_dir: Path, tmp_path: Path, ended_by: int
) -> None:
    """After a kill and after a drain, bob gets what alice sends before bob is back; carol,
    who was offline before, is offline.
    """
    environ = {"STATE_DIRECTORY": str(tmp_path)}
    limits = {"return_grace": "60s"}
    with BrokerProcess(
        socket_dir, ("alice", "bob", "carol"), limits=limits, environ=environ
    ) as broker:
        broker.wait("daemon.started")
        alice, bob = broker.login("alice"), broker.login("bob")
        wait_for_names(tmp_path, "alice", "bob")
        broker.signal(ended_by)
        broker.exit_status()
        alice.close()
        bob.close()
    with BrokerProcess(
        socket_dir, ("alice", "bob", "carol"), limits=limits, environ=environ
    ) as broker:
        broker.wait("daemon.started")
        with broker.login("alice") as alice:
            alice.write(packed(1, "carol", b"x", message_id=1))
            assert alice.recv().code == "offline"
            alice.write(packed(1, "bob", b"hello", message_id=2))
            with broker.login("bob") as bob:
                assert bob.recv().body == b"hello"


def test_online_names_unwritable_directory_is_warned_of(socket_dir: Path, tmp_path: Path) -> None:
    """The log names the file once, and the broker serves."""
    nowhere = tmp_path / "none"
    with BrokerProcess(
        socket_dir,
        ["alice"],
        limits={"return_grace": "60s"},
        environ={"STATE_DIRECTORY": str(nowhere)},
    ) as broker:
        broker.wait("daemon.started")
        with broker.login("alice"):
            (event,) = broker.wait("daemon.state_unwritten")
            assert event["file"].startswith(os.fspath(nowhere))
            assert "STATE_DIRECTORY" in event["reason"]


def test_online_names_without_grace_are_not_written(socket_dir: Path, tmp_path: Path) -> None:
    """It is off unless set."""
    with BrokerProcess(socket_dir, ["alice"], environ={"STATE_DIRECTORY": str(tmp_path)}) as broker:
        broker.wait("daemon.started")
        with broker.login("alice") as alice:
            alice.ping()
        broker.signal()
        broker.exit_status()
    assert list(tmp_path.iterdir()) == []


def test_online_names_are_not_kept_after_kill() -> None:
    """A daemon that is killed leaves no task behind."""

    async def scenario() -> set[str]:
        daemon = Daemon(configuration(["127.0.0.1:0"]), Recorder().logger)
        await daemon.start()
        before = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}
        daemon.kill()
        await asyncio.sleep(0)
        after = {task.get_coro().__qualname__ for task in asyncio.all_tasks()}
        assert "OnlineNames._keep_up" in before
        return after

    assert "OnlineNames._keep_up" not in asyncio.run(scenario())
