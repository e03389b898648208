"""Sockets that a service manager hands over: which entry gets them, and that they
outlive the broker.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import Raw, login
from support.service_manager import Manager

from brokerd.config.load import build_config
from brokerd.net.listen.socket_activation import (
    ActivatedSocket,
    ActivatedSockets,
    SocketActivationError,
)
from brokerd_client.address import Address, parse

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "AF_UNIX"), reason="sockets are handed over on Linux only"
)


@contextmanager
def bound(*addresses: Any) -> Iterator[list[socket.socket]]:
    """Yield sockets that listen at these addresses: paths, ``@`` and a name, or pairs."""
    sockets: list[socket.socket] = []
    try:
        for address in addresses:
            if isinstance(address, tuple):
                sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
            else:
                sock = socket.socket(socket.AF_UNIX)
                address = "\0" + str(address)[1:] if str(address).startswith("@") else str(address)
            sockets.append(sock)
            sock.bind(address)
            sock.listen()
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


@pytest.fixture
def manager(socket_dir: Path) -> Iterator[Manager]:
    with Manager(socket_dir / "notify") as manager:
        yield manager


def log_in(broker: BrokerProcess, address: Address) -> Raw:
    broker.wait("daemon.started")
    return login(address, key_of("alice"), b"alice")


def abstract() -> str:
    return f"@brokerd-test-{os.getpid()}-{os.urandom(4).hex()}"


def test_socket_activation_name_without_sockets_is_not_missed() -> None:
    """Started by hand, the same configuration listens by itself, without a warning."""
    (entry,) = build_config([{"address": "127.0.0.1:0", "name": "main"}], {"alice": "k"}).listen
    with bound(("127.0.0.1", 0)) as sockets:
        other = ActivatedSockets(
            [ActivatedSocket(sockets[0], "other", parse(sockets[0].getsockname()))]
        )
        assert other.unmatched([entry], []) == [entry]
    assert ActivatedSockets().unmatched([entry], []) == []


def test_socket_activation_matches_sockets_by_address(socket_dir: Path, manager: Manager) -> None:
    """A path, an abstract name, IPv4 and a host name each get the socket that is bound
    there, whatever the socket's name is.
    """
    name = abstract()
    with bound(socket_dir / "brokerd.sock", name, ("127.0.0.1", 0), ("127.0.0.1", 0)) as sockets:
        ports = [sock.getsockname()[1] for sock in sockets[2:]]
        listen = [name, f"127.0.0.1:{ports[0]}", f"localhost:{ports[1]}"]
        with manager.start(socket_dir, listen=listen, sockets=sockets, names="a:b:c:d") as broker:
            addresses = [parse(str(socket_dir / "brokerd.sock")), parse(name)]
            addresses += [parse(f"127.0.0.1:{port}") for port in ports]
            for address in addresses:
                with log_in(broker, address) as alice:
                    alice.ping()
            assert sorted(map(str, broker.addresses())) == sorted(map(str, addresses))


def test_socket_activation_matches_socket_bound_elsewhere_by_name(
    socket_dir: Path, manager: Manager
) -> None:
    """An entry with a name listens at the manager's socket of that name; its own
    address stays unused.
    """
    entry = {"address": str(socket_dir / "unused.sock"), "name": "team"}
    with (
        bound(socket_dir / "elsewhere.sock") as sockets,
        manager.start(socket_dir, listen=[entry], sockets=sockets, names="team") as broker,
        log_in(broker, parse(str(socket_dir / "elsewhere.sock"))) as alice,
    ):
        alice.ping()
        assert not (socket_dir / "unused.sock").exists()
        # The entry that was handed nothing listens by itself.
        with broker.login("bob") as bob:
            bob.ping()


def test_socket_activation_matches_ipv6_address(socket_dir: Path, manager: Manager) -> None:
    """The configuration writes [::1] with brackets, the system without them."""
    try:
        sockets_of = bound(("::1", 0))
        sockets = sockets_of.__enter__()
    except OSError:
        pytest.skip("this machine has no IPv6")
    try:
        address = f"[::1]:{sockets[0].getsockname()[1]}"
        with (
            manager.start(socket_dir, listen=[address], sockets=sockets) as broker,
            log_in(broker, parse(address)) as alice,
        ):
            alice.ping()
    finally:
        sockets_of.__exit__(None, None, None)


def test_socket_activation_socket_without_entry_is_refused(
    socket_dir: Path, manager: Manager
) -> None:
    """The broker would not answer there. The error and the status say which entry to
    add.
    """
    with (
        bound(socket_dir / "stray.sock", ("127.0.0.1", 0)) as sockets,
        manager.start(socket_dir, sockets=sockets, names="stray:other") as broker,
    ):
        assert broker.exit_status() == 78
        reason = broker.events("daemon.failed")[0]["reason"]
        assert f"add `- {socket_dir}/stray.sock` to listen" in reason
        assert "`name: stray`" in reason
        assert f"`- 127.0.0.1:{sockets[1].getsockname()[1]}`" in reason
        assert "stray.sock" in manager.next()["STATUS"]


def test_socket_activation_missing_named_socket_is_warned_of(
    socket_dir: Path, manager: Manager
) -> None:
    """The entry listens by itself, and the log says what the .socket unit lacks."""
    entry = {"address": str(socket_dir / "own.sock"), "name": "team"}
    with (
        bound(socket_dir / "brokerd.sock") as sockets,
        manager.start(socket_dir, listen=[entry], sockets=sockets, names="brokerd") as broker,
        log_in(broker, parse(str(socket_dir / "own.sock"))) as alice,
    ):
        alice.ping()
        (warning,) = broker.wait("listener.not_handed_over")
        assert warning["level"] == "warning"
        assert "FileDescriptorName=team" in warning["reason"]


def test_socket_activation_sockets_outlive_broker(socket_dir: Path, manager: Manager) -> None:
    """The socket file stays when the broker stops. A connection made meanwhile waits,
    and the next broker answers it.
    """
    path = socket_dir / "brokerd.sock"
    with bound(path) as sockets:
        with manager.start(socket_dir, sockets=sockets) as first:
            first.wait("daemon.started")
            first.signal()
            assert first.exit_status() == 0
        assert path.is_socket()
        waiting = Raw(parse(str(path)))
        with waiting, manager.start(socket_dir, sockets=sockets) as second:
            second.wait("daemon.started")
            waiting.log_in(key_of("alice"), b"alice")
            waiting.ping()


def test_socket_activation_reload_keeps_sockets(socket_dir: Path, manager: Manager) -> None:
    """An entry whose socket was handed over stays through a reload, with its
    connections.
    """
    with (
        bound(socket_dir / "brokerd.sock") as sockets,
        manager.start(socket_dir, sockets=sockets) as broker,
        broker.login("alice") as alice,
    ):
        broker.signal(signal.SIGHUP)
        broker.wait("daemon.reloaded")
        alice.ping()
        with broker.login("bob") as bob:
            bob.ping()


def test_socket_activation_reload_that_removes_entry_is_refused(
    socket_dir: Path, manager: Manager
) -> None:
    """Removing an entry does not close the manager's socket, so the reload is refused
    and nothing changes.
    """
    with (
        bound(socket_dir / "team.sock") as sockets,
        manager.start(
            socket_dir, listen=[str(socket_dir / "team.sock")], sockets=sockets
        ) as broker,
    ):
        broker.wait("daemon.started")
        before = broker.config.read_text()
        broker.config.write_text(
            "\n".join(line for line in before.splitlines() if "team.sock" not in line)
        )
        broker.signal(signal.SIGHUP)
        refused = broker.wait("daemon.reload_refused")[0]
        assert "team.sock" in refused["problems"][0]
        with log_in(broker, parse(str(socket_dir / "team.sock"))) as alice:
            alice.ping()


def test_socket_activation_reload_that_swaps_sockets_is_refused(
    socket_dir: Path, manager: Manager
) -> None:
    """An address that stays can't get another of the manager's sockets while it is in
    use.
    """
    entries = [
        {"address": str(socket_dir / "a"), "name": "one"},
        {"address": str(socket_dir / "b"), "name": "two"},
    ]
    with (
        bound(socket_dir / "x.sock", socket_dir / "y.sock") as sockets,
        manager.start(socket_dir, listen=entries, sockets=sockets, names="one:two") as broker,
    ):
        broker.wait("daemon.started")
        text = broker.config.read_text()
        broker.config.write_text(
            text.replace("name: one", "name: swap")
            .replace("name: two", "name: one")
            .replace("name: swap", "name: two")
        )
        broker.signal(signal.SIGHUP)
        refused = broker.wait("daemon.reload_refused")[0]
        assert "restart the broker" in refused["problems"][0]


def test_socket_activation_socket_that_does_not_listen_is_refused(
    socket_dir: Path, manager: Manager
) -> None:
    """The error for a datagram socket names the setting of the .socket unit."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        manager.start(socket_dir, sockets=[datagrams], names="odd") as broker,
    ):
        assert broker.exit_status() == 78
        assert any("descriptor 3 (odd)" in line and "Accept=no" in line for line in broker.lines)


def test_socket_activation_for_other_process_is_ignored() -> None:
    """LISTEN_PID names the process. The variables are removed afterwards, so that no
    child takes the sockets for its own.
    """
    environ = {"LISTEN_PID": "8", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert ActivatedSockets.take(environ, 7).sockets == ()
    assert environ == {"HOME": "/"}


def test_socket_activation_invalid_count_is_refused() -> None:
    """A LISTEN_FDS that is not a number is an error."""
    with pytest.raises(SocketActivationError, match="LISTEN_FDS='many' is not a number"):
        ActivatedSockets.take({"LISTEN_PID": "7", "LISTEN_FDS": "many"}, 7)


def test_socket_activation_address_takes_precedence_over_name(socket_dir: Path) -> None:
    """A socket bound to one entry's address, with the name of another entry, belongs to
    the first.
    """
    config = build_config(
        [str(socket_dir / "a"), {"address": str(socket_dir / "b"), "name": "both"}],
        {"alice": b"key"},
    )
    with bound(socket_dir / "a", socket_dir / "c") as sockets:
        activated = [ActivatedSocket(sock, "both", parse(sock.getsockname())) for sock in sockets]
        first, second = config.listen
        assert ActivatedSockets(activated).assign(config.listen) == {
            first: activated[:1],
            second: activated[1:],
        }
