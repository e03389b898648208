"""The monitor across reloads: switched on, moved, switched off, and left alone where
the reload is refused.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.running_daemon import Recorder, RunningDaemon
from support.scraping import get, samples

import brokerd_client
from brokerd.config.load import load
from brokerd.daemon import Daemon
from brokerd.daemon.process import loop_factory
from brokerd_client.address import Address


class FromFile:
    """A daemon that serves one directory's brokerd.yaml, and can be told to read it
    again.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.log = Recorder()
        self.loop = loop_factory()()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def write(self, more: str) -> None:
        file = self.home / "brokerd.yaml"
        file.write_text(f"listen: [{self.home / 'sock'}]\nclients:\n  alice: {{key: k}}\n{more}")
        file.chmod(0o600)

    def start(self) -> RunningDaemon:
        self.daemon = Daemon(load(self.home / "brokerd.yaml"), self.log.logger)
        self.run(self.daemon.start())
        return RunningDaemon(self.daemon, self.log, self.loop)

    def reload(self, more: str) -> list[str]:
        self.write(more)
        problems: list[str] = self.run(self.daemon.reload("test"))
        return problems

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def close(self) -> None:
        self.run(self.daemon.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def served(socket_dir: Path) -> Iterator[FromFile]:
    here = FromFile(socket_dir)
    here.write("")
    here.start()
    try:
        yield here
    finally:
        here.close()


def house_of(served: FromFile) -> RunningDaemon:
    return RunningDaemon(served.daemon, served.log, served.loop)


def is_deaf(address: Address) -> bool:
    """Return whether nobody listens there any more."""
    family = socket.AF_UNIX if address.family == "AF_UNIX" else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address.sockaddr) != 0


def test_it_is_switched_on_and_off(served: FromFile) -> None:
    """A reload opens the monitor and closes it again; a client's connection lives
    through both.
    """
    with brokerd_client.connect(
        str(served.home / "sock"), name="alice", key="k", reconnect=False
    ) as alice:
        assert served.reload("monitor: 127.0.0.1:0\n") == []
        (address,) = served.daemon.monitor_addresses
        assert get(address, "/readyz").status == 200
        assert served.reload("") == []

        assert served.daemon.monitor_addresses == []
        assert is_deaf(address)
        alice.ping()


def test_it_moves(served: FromFile) -> None:
    """It answers at the new address and not at the old one; its socket file is removed."""
    path = served.home / "monitor"
    assert served.reload(f"monitor: {path}\n") == []
    (before,) = served.daemon.monitor_addresses
    assert get(before, "/livez").status == 200

    assert served.reload("monitor: 127.0.0.1:0\n") == []

    (after,) = served.daemon.monitor_addresses
    assert after.family == "AF_INET"
    assert get(after, "/livez").status == 200
    assert is_deaf(before)
    assert not path.exists()


def test_a_reload_about_other_things_leaves_it_alone(served: FromFile) -> None:
    """Same address: same socket, and a connection that has begun to ask is answered."""
    assert served.reload("monitor: 127.0.0.1:0\n") == []
    (address,) = served.daemon.monitor_addresses
    with socket.create_connection(address.sockaddr, timeout=30) as half:
        half.sendall(b"GET /livez HT")
        assert get(address, "/livez").status == 200
        assert (
            served.reload(
                "monitor: {address: '127.0.0.1:0', per_client: true}\nlimits: {handshakes: 9}\n"
            )
            == []
        )
        half.sendall(b"TP/1.1\r\nHost: 127.0.0.1\r\n\r\n")

        assert half.recv(1000).startswith(b"HTTP/1.1 200")
    assert served.daemon.monitor_addresses == [address]
    assert "brokerd_client_connections{client=alice}" in samples(house_of(served))


def test_an_address_that_is_taken_refuses_the_whole_reload(served: FromFile) -> None:
    """The other new listener is not left open, the running monitor goes on, and the
    metrics say what happened.
    """
    assert served.reload("monitor: 127.0.0.1:0\n") == []
    (address,) = served.daemon.monitor_addresses
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        more = f"include: [more.yaml]\nmonitor: {taken}\n"
        (served.home / "more.yaml").write_text(f"listen: [{served.home / 'second'}]\n")

        problems = served.reload(more)

    assert problems == [
        f"can't listen at {taken}: Address already in use (another program listens there)"
    ]
    assert not (served.home / "second").exists()
    assert served.daemon.monitor_addresses == [address]
    found = samples(house_of(served))
    assert found["brokerd_reloads_total{result=accepted}"] == 1
    assert found["brokerd_reloads_total{result=refused}"] == 1
    assert found["brokerd_config_last_reload_successful"] == 0
    loaded_at = found["brokerd_config_loaded_timestamp_seconds"]

    assert served.reload("monitor: 127.0.0.1:0\n") == []
    found = samples(house_of(served))
    assert found["brokerd_config_last_reload_successful"] == 1
    assert found["brokerd_config_loaded_timestamp_seconds"] > loaded_at


def test_an_address_that_overlaps_its_own_is_refused_with_the_reason(served: FromFile) -> None:
    """From one address of the machine to all of them, on the same port: that takes a
    restart.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert served.reload(f"monitor: 127.0.0.1:{port}\n") == []

    problems = served.reload(f"monitor: 0.0.0.0:{port}\n")

    expected = (
        f"can't listen at 0.0.0.0:{port} while this broker listens at 127.0.0.1:{port} (restart it)"
    )
    assert problems == [expected]
    assert get(served.daemon.monitor_addresses[0], "/livez").status == 200


def test_a_clients_listener_that_is_taken_leaves_the_monitor_off(served: FromFile) -> None:
    """All or nothing, the other way round."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        (served.home / "more.yaml").write_text(f"listen: ['127.0.0.1:{other.getsockname()[1]}']\n")
        assert served.reload(f"include: [more.yaml]\nmonitor: {served.home / 'monitor'}\n") != []

    assert served.daemon.monitor_addresses == []
    assert not (served.home / "monitor").exists()


def test_a_monitor_that_cant_listen_keeps_the_broker_from_starting(socket_dir: Path) -> None:
    """As with any address: the start fails, and nothing is left open."""
    here = FromFile(socket_dir)
    with socket.create_server(("127.0.0.1", 0)) as other:
        here.write(f"monitor: 127.0.0.1:{other.getsockname()[1]}\n")
        with pytest.raises(Exception, match=r"can't listen at 127\.0\.0\.1"):
            here.start()
    here.close()

    assert not (socket_dir / "sock").exists()


def test_it_is_exposed_once_more_only_where_it_changed(served: FromFile) -> None:
    """A reload about other things does not repeat the warning."""
    exposed = "monitor: 0.0.0.0:0\n"
    assert served.reload(exposed) == []
    assert served.reload(exposed + "limits: {handshakes: 9}\n") == []

    assert len(served.log.named("monitor.exposed")) == 1


def test_reload_that_changes_the_names_takes_them_over(served: FromFile) -> None:
    """Names of ``hosts`` count at once, and the monitor stays where it is."""
    assert served.reload("monitor: {address: '127.0.0.1:0'}\n") == []
    running_daemon = house_of(served)
    before = running_daemon.daemon.monitor_addresses
    headers = {"Host": "broker.example"}
    assert get(running_daemon, "/livez", headers=headers).status == 421
    assert served.reload("monitor: {address: '127.0.0.1:0', hosts: [broker.example]}\n") == []
    assert get(running_daemon, "/livez", headers=headers).status == 200
    assert running_daemon.daemon.monitor_addresses == before
