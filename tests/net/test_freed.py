"""Objects that are no longer used are freed at once. The garbage collector would free
them only after thousands of them.
"""

from __future__ import annotations

import gc
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

import pytest
from support.channels import asked, channel, listening
from support.garbage import is_idle, objects, uncollected
from support.keys import key_of
from support.raw_client import (
    ERROR,
    EVENT,
    MESSAGE,
    REQUEST,
    WANT_RECEIPT,
    Rejected,
    login,
    packed,
    prefixed,
)
from support.running_daemon import TIMEOUT_S, RunningDaemon, configuration, running_daemon
from support.waiting import until

from brokerd.config.load import load
from brokerd.daemon import reload
from brokerd.daemon.reload import prepare
from brokerd.net.handshake.keyring import Keyring
from brokerd.net.listen.socket_activation import ActivatedSockets


def leave(broker: RunningDaemon) -> None:
    broker.login("alice").close()


def reset(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice:
        alice.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def break_off(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice:
        alice.write(packed(MESSAGE, "bob", bytes(300_000))[:200_000])


def talk_nonsense(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice:
        alice.write(prefixed(b"\xff" * 40))
        alice.read_to_end()


def subscribe(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice, broker.login("bob") as bob:
        bob.ask("subscribe", topic="news.>")
        alice.ask("subscribe", topic="*.new")
        alice.send(EVENT, "", b"one", between=b"\x08news.new")
        assert bob.recv().kind == EVENT
        assert alice.recv().kind == EVENT


def leave_messages_behind(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice:
        with broker.login("bob"):
            for number in range(500):
                alice.send(MESSAGE, "bob", bytes(40_000), message_id=number, flags=WANT_RECEIPT)
                if alice.recv().kind == ERROR:
                    break
            else:
                pytest.fail("never full")
        assert alice.recv().kind == ERROR


def leave_requests_behind(broker: RunningDaemon) -> None:
    with broker.login("alice") as alice:
        with broker.login("bob") as bob:
            bob.send(REQUEST, "alice", b"?", message_id=4)
            alice.send(REQUEST, "bob", b"?", message_id=5)
            assert bob.recv().kind == REQUEST
            assert alice.recv().kind == REQUEST
        assert alice.recv().code == "abandoned"


def be_replaced(broker: RunningDaemon) -> None:
    with broker.login("carol") as first, broker.login("carol"):
        first.read_to_end()


def stay_undecided(broker: RunningDaemon) -> None:
    with broker.login("carol") as first:
        login(broker.address, key_of("carol")).close()
        with login(broker.address, key_of("carol")) as second:
            second.ping()
            first.read_to_end()


def open_channels(broker: RunningDaemon) -> None:
    with listening(broker, "bob") as bob, broker.login("alice") as alice:
        with channel(broker, "alice", "bob", bob) as (one, other):
            one.write(bytes(300_000))
            other.read(300_000)
        with channel(broker, "alice", "bob", bob) as (one, other):
            one.close()
            other.read_to_end()
        with asked(broker, "alice", "bob"):
            bob.recv()
        with asked(broker, "alice", "nobody") as refused:
            refused.read_to_end()
        alice.ping()


def know_no_key(broker: RunningDaemon) -> None:
    with suppress(Rejected), broker.raw() as raw:
        raw.log_in(b"not the key", b"alice")


def say_nothing(broker: RunningDaemon) -> None:
    with broker.raw() as raw:
        raw.read(4)


WAYS = (
    leave,
    reset,
    break_off,
    talk_nonsense,
    subscribe,
    leave_messages_behind,
    leave_requests_behind,
    be_replaced,
    stay_undecided,
    open_channels,
    know_no_key,
    say_nothing,
)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_connection_closed_is_freed_without_garbage_collector(
    listen: str, socket_dir: Path
) -> None:
    """After each kind of end there are no more objects than before, without the help of
    the garbage collector.
    """
    address = str(socket_dir / "s") if listen == "unix" else listen
    clients = {
        "alice": {"queue": "1MiB"},
        "bob": {"queue": "1MiB"},
        "carol": {"when_connected": "replace"},
    }
    with running_daemon(configuration(address, clients, limits={"wait_timeout": "50ms"})) as broker:
        for way in WAYS:
            way(broker)
        until(lambda: is_idle(broker), "the first connections are still open")
        # The cache of topics keeps what it has, however few connections there are.
        forget = broker.daemon.server.broker.topics.forget
        with uncollected():
            broker.call(forget)
            before = broker.call(objects)
            for way in 3 * WAYS:
                way(broker)
            until(lambda: is_idle(broker), "the connections are still open")
            broker.call(forget)
            # Counted between two steps of the event loop, which makes objects for a moment.
            # The last session is remembered for a second.
            deadline = monotonic() + TIMEOUT_S
            while (left := broker.call(objects) - before) and monotonic() < deadline:
                sleep(0.05)
            assert not left


def written(directory: Path) -> Path:
    """Return the path of a new configuration file."""
    path = directory / "brokerd.yaml"
    path.write_text(
        f"listen: [127.0.0.1:0]\nclients: {{alice: {{key: {key_of('alice').decode()}}}}}\n"
    )
    path.chmod(0o600)
    return path


def test_reload_prepared_is_freed_without_garbage_collector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the configuration again leaves no reference cycles behind, even if a
    directory of sys.path does not exist.
    """
    monkeypatch.setattr(sys, "path", ["", *sys.path, str(tmp_path / "not-there.zip")])
    running = load(written(tmp_path))
    prepare(running, ActivatedSockets(), {}, Keyring(running.clients.values()))
    with uncollected():
        for _ in range(5):
            prepare(running, ActivatedSockets(), {}, Keyring(running.clients.values()))
        assert gc.collect() == 0


@pytest.mark.parametrize(("version", "reported"), [("0.0.0", True), (reload.__version__, False)])
def test_reload_reports_another_installed_version(
    version: str, reported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan names it as a reason to restart: only a new process would run that
    version.
    """
    monkeypatch.setattr(reload, "__version__", version)
    running = load(written(tmp_path))
    restart = prepare(
        running, ActivatedSockets(), {}, Keyring(running.clients.values())
    ).plan.restart
    assert any("is installed, and 0.0.0 runs" in line for line in restart) is reported
