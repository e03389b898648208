"""The monitor across reloads: switched on, moved, switched off, and unchanged if the
reload is refused.
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


class ReloadableDaemon:
    """A daemon with one directory's brokerd.yaml, which it can reload."""

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
def served(socket_dir: Path) -> Iterator[ReloadableDaemon]:
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write("")
    reloadable.start()
    try:
        yield reloadable
    finally:
        reloadable.close()


def running_daemon_of(served: ReloadableDaemon) -> RunningDaemon:
    return RunningDaemon(served.daemon, served.log, served.loop)


def is_closed(address: Address) -> bool:
    """Return whether no socket listens at the address."""
    family = socket.AF_UNIX if address.family == "AF_UNIX" else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address.sockaddr) != 0


def test_monitor_reload_opens_and_closes_it(served: ReloadableDaemon) -> None:
    """A client's connection stays open through both reloads."""
    with brokerd_client.connect(
        str(served.home / "sock"), name="alice", key="k", reconnect=False
    ) as alice:
        assert served.reload("monitor: 127.0.0.1:0\n") == []
        (address,) = served.daemon.monitor_addresses
        assert get(address, "/readyz").status == 200
        assert served.reload("") == []

        assert served.daemon.monitor_addresses == []
        assert is_closed(address)
        alice.ping()


def test_monitor_reload_with_new_address_moves_it(served: ReloadableDaemon) -> None:
    """It answers at the new address and not at the old one; its socket file is removed."""
    path = served.home / "monitor"
    assert served.reload(f"monitor: {path}\n") == []
    (before,) = served.daemon.monitor_addresses
    assert get(before, "/livez").status == 200

    assert served.reload("monitor: 127.0.0.1:0\n") == []

    (after,) = served.daemon.monitor_addresses
    assert after.family == "AF_INET"
    assert get(after, "/livez").status == 200
    assert is_closed(before)
    assert not path.exists()


def test_monitor_reload_with_same_address_keeps_its_connections(served: ReloadableDaemon) -> None:
    """Its socket stays the same, and a request that had begun to arrive is answered."""
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
    assert "brokerd_client_connections{client=alice}" in samples(running_daemon_of(served))


def test_monitor_reload_with_address_in_use_is_refused(served: ReloadableDaemon) -> None:
    """The other new listener is closed, the running monitor stays, and the metrics show
    the refusal.
    """
    assert served.reload("monitor: 127.0.0.1:0\n") == []
    (address,) = served.daemon.monitor_addresses
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        more = f"include: [more.yaml]\nmonitor: {taken}\n"
        (served.home / "more.yaml").write_text(f"listen: [{served.home / 'second'}]\n")

        problems = served.reload(more)

    (problem,) = problems
    assert problem.startswith(
        f"can't listen at {taken}: Address already in use (another program listens there"
    )
    assert not (served.home / "second").exists()
    assert served.daemon.monitor_addresses == [address]
    values = samples(running_daemon_of(served))
    assert values["brokerd_reloads_total{result=accepted}"] == 1
    assert values["brokerd_reloads_total{result=refused}"] == 1
    assert values["brokerd_config_last_reload_successful"] == 0
    loaded_at = values["brokerd_config_loaded_timestamp_seconds"]

    assert served.reload("monitor: 127.0.0.1:0\n") == []
    values = samples(running_daemon_of(served))
    assert values["brokerd_config_last_reload_successful"] == 1
    assert values["brokerd_config_loaded_timestamp_seconds"] > loaded_at


def test_monitor_reload_with_overlapping_address_is_refused(served: ReloadableDaemon) -> None:
    """A change from one address of the host to all of them, on the same port, takes a
    restart.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert served.reload(f"monitor: 127.0.0.1:{port}\n") == []

    problems = served.reload(f"monitor: {{address: 0.0.0.0:{port}, page: false}}\n")

    expected = (
        f"can't listen at 0.0.0.0:{port} while this broker listens at 127.0.0.1:{port} (restart it)"
    )
    assert problems == [expected]
    assert get(served.daemon.monitor_addresses[0], "/livez").status == 200


def test_monitor_reload_with_client_listener_in_use_leaves_it_off(served: ReloadableDaemon) -> None:
    """All or nothing also holds the other way round."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        (served.home / "more.yaml").write_text(f"listen: ['127.0.0.1:{other.getsockname()[1]}']\n")
        assert served.reload(f"include: [more.yaml]\nmonitor: {served.home / 'monitor'}\n") != []

    assert served.daemon.monitor_addresses == []
    assert not (served.home / "monitor").exists()


def test_monitor_address_in_use_prevents_start(socket_dir: Path) -> None:
    """As with any address, the start fails, and no socket stays open."""
    reloadable = ReloadableDaemon(socket_dir)
    with socket.create_server(("127.0.0.1", 0)) as other:
        reloadable.write(f"monitor: 127.0.0.1:{other.getsockname()[1]}\n")
        with pytest.raises(Exception, match=r"can't listen at 127\.0\.0\.1"):
            reloadable.start()
    reloadable.close()

    assert not (socket_dir / "sock").exists()


def test_monitor_exposed_warning_is_not_repeated_by_other_reloads(served: ReloadableDaemon) -> None:
    """A reload about other things does not repeat the warning."""
    exposed = "monitor: {address: 0.0.0.0:0, page: false}\n"
    assert served.reload(exposed) == []
    assert served.reload(exposed + "limits: {handshakes: 9}\n") == []

    assert len(served.log.named("monitor.exposed")) == 1


def test_monitor_reload_with_new_hosts_accepts_them_at_once(served: ReloadableDaemon) -> None:
    """The monitor keeps its sockets."""
    assert served.reload("monitor: {address: '127.0.0.1:0'}\n") == []
    running_daemon = running_daemon_of(served)
    before = running_daemon.daemon.monitor_addresses
    headers = {"Host": "broker.example"}
    assert get(running_daemon, "/livez", headers=headers).status == 421
    assert served.reload("monitor: {address: '127.0.0.1:0', hosts: [broker.example]}\n") == []
    assert get(running_daemon, "/livez", headers=headers).status == 200
    assert running_daemon.daemon.monitor_addresses == before
