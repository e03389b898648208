"""The listeners: every form of address, socket files, and the errors."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.keys import key_of
from support.raw_client import login
from support.running_daemon import configuration, running_daemon

from brokerd.config.values import ListenConfig, Source
from brokerd.net.listen.listener import ListenError, listen
from brokerd_client.address import Address


@pytest.fixture
def umask_open() -> Iterator[None]:
    """A umask of 0, as careless service managers set it."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize(
    "listen",
    [
        "127.0.0.1:0",
        "[::1]:0",
        [["localhost", 0]],
        ["::1", 0],
        "@brokerd-test-" + secrets.token_hex(4),
    ],
    ids=["ipv4", "ipv6", "pair-localhost", "list", "abstract"],
)
def test_listener_accepts_clients_at_every_form_of_address(listen: Any) -> None:
    """A client logs in at every address that the daemon reports, for each form of
    address.
    """
    if listen == ["::1", 0]:
        listen = [["::1", 0]]
    with running_daemon(configuration(listen)) as broker:
        assert broker.addresses
        for address in broker.addresses:
            with login(address, key_of("alice"), b"alice") as alice:
                assert alice.ask("whoami").json["name"] == "alice"
                alice.close()
            broker.log.wait("client.disconnected", broker.addresses.index(address) + 1)


def test_listener_host_name_with_two_addresses_gets_one_port() -> None:
    """localhost with port 0 is the same port on IPv4 and IPv6."""
    found = {family for family, *_ in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with running_daemon(configuration([["localhost", 0]])) as broker:
        assert len({address.port for address in broker.addresses}) == 1
        assert broker.address.port != 0
        assert {address.family for address in broker.addresses} <= {"AF_INET", "AF_INET6"}
        assert len(broker.addresses) <= len(found)


@pytest.mark.parametrize("missing", ["address", "family"])
def test_listener_host_name_skips_addresses_that_do_not_exist(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """If localhost is also ::1 and the machine has no IPv6, the broker listens at IPv4
    only.
    """
    # A documentation address stands for ::1 on a machine without IPv6.
    unusable = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
    if missing == "family":
        unusable = (socket.AF_APPLETALK, socket.SOCK_STREAM, 6, "", ("::1", 0))  # type: ignore[assignment]
    existing = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [unusable, existing])
    with running_daemon(configuration([["localhost", 0]])) as broker:
        assert [address.family for address in broker.addresses] == ["AF_INET"]


def test_listeners_several_serve_same_clients(socket_dir: Path) -> None:
    """A message goes from a client at one address to a client at another."""
    with running_daemon(configuration([str(socket_dir / "a"), "127.0.0.1:0"])) as broker:
        one, other = broker.addresses
        with (
            login(one, key_of("alice"), b"alice") as alice,
            login(other, key_of("bob"), b"bob") as bob,
        ):
            alice.send(1, "bob", b"across")
            assert bob.recv().body == b"across"


@pytest.mark.usefixtures("umask_open")
def test_listener_socket_file_default_mode_is_0600() -> None:
    """The mode is 0600 although the umask would allow everything."""
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        path = Path(directory) / "s"
        with running_daemon(configuration(str(path))):
            assert mode(path) == 0o600


@pytest.mark.parametrize(("written", "wanted"), [("0660", 0o660), ("0666", 0o666), ("0600", 0o600)])
def test_listener_socket_file_has_configured_mode(
    socket_dir: Path, written: str, wanted: int
) -> None:
    """The mode comes from the configuration, whatever the umask takes away from other
    files.
    """
    path = socket_dir / "s"
    before = os.umask(0o077)
    try:
        with running_daemon(configuration({"address": str(path), "mode": written})):
            assert mode(path) == wanted
    finally:
        os.umask(before)


def test_listener_socket_file_leaves_umask_unchanged(socket_dir: Path) -> None:
    """Making the socket file changes nothing for the program around the daemon."""
    before = os.umask(0o027)
    try:
        with running_daemon(configuration(str(socket_dir / "s"))):
            assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_listener_socket_file_gets_configured_group(socket_dir: Path) -> None:
    """The group may be given as a number."""
    path = socket_dir / "s"
    group = os.getgid()
    with running_daemon(configuration({"address": str(path), "mode": "0660", "group": group})):
        assert path.stat().st_gid == group


def test_listener_unknown_group_is_error_and_leaves_no_file(socket_dir: Path) -> None:
    """A group that does not exist is an error that names it. No socket file is left."""
    path = socket_dir / "s"
    with (
        pytest.raises(ListenError, match="no-such-group-here"),
        running_daemon(configuration({"address": str(path), "group": "no-such-group-here"})),
    ):
        pass
    assert not path.exists()


def test_listener_socket_file_is_removed_at_stop(socket_dir: Path) -> None:
    """When the daemon has stopped its socket file is gone."""
    path = socket_dir / "s"
    with running_daemon(configuration(str(path))):
        assert path.is_socket()
    assert not path.exists()


def test_listener_stale_socket_file_is_replaced(socket_dir: Path) -> None:
    """The file of a daemon that has died does not prevent a start."""
    path = socket_dir / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with running_daemon(configuration(str(path))) as broker, broker.login("alice") as alice:
        alice.ping()


def test_listener_socket_file_in_use_is_error(socket_dir: Path) -> None:
    """A second daemon at the same path fails and says why. The first one continues to
    serve.
    """
    path = socket_dir / "s"
    with running_daemon(configuration(str(path))) as first:
        with (
            pytest.raises(ListenError, match=f"{path}: another program is listening there"),
            running_daemon(first.daemon.config),
        ):
            pass
        with first.login("alice") as alice:
            alice.ping()


def test_listener_socket_file_with_full_backlog_is_in_use(socket_dir: Path) -> None:
    """A daemon too busy to accept is not mistaken for a dead one."""
    path = socket_dir / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as queued:
        busy.bind(str(path))
        busy.listen(0)
        queued.connect(str(path))
        with (
            pytest.raises(ListenError, match="another program"),
            running_daemon(configuration(str(path))),
        ):
            pass
    assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_listener_path_of_other_file_is_error_and_file_is_kept(socket_dir: Path, kind: str) -> None:
    """A file, directory or link at the path is an error that says so, and stays."""
    path = socket_dir / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(socket_dir / "elsewhere")
    with (
        pytest.raises(ListenError, match="not a socket is there"),
        running_daemon(configuration(str(path))),
    ):
        pass
    assert os.path.lexists(path)


def test_listener_socket_file_of_another_process_survives_stop(socket_dir: Path) -> None:
    """A socket file that another process has put in its place is not removed."""
    path = socket_dir / "s"
    with socket.socket(socket.AF_UNIX) as theirs:
        with running_daemon(configuration(str(path))):
            path.unlink()
            theirs.bind(str(path))
        assert path.is_socket()


@pytest.mark.parametrize(
    ("listen", "what"),
    [
        ("{dir}/missing/s", "make the directory first"),
        ("192.0.2.1:0", "no interface of this machine"),
        ("no-such-host.invalid:6000", "can't listen at no-such-host.invalid:6000"),
    ],
    ids=["directory", "foreign", "unknown"],
)
def test_listener_bind_error_names_address_and_remedy(
    socket_dir: Path, listen: str, what: str
) -> None:
    """The error names the address and what would help."""
    where = listen.format(dir=socket_dir)
    with pytest.raises(ListenError, match=what) as caught, running_daemon(configuration(where)):
        pass
    assert where in str(caught.value)


def test_listener_socket_path_too_long_is_error(socket_dir: Path) -> None:
    """The configuration finds this first. A caller that listens without one gets the
    error too.
    """
    path = str(socket_dir / ("x" * 120))
    config = ListenConfig(Address("AF_UNIX", path=path), 0o600, None, False, Source("here", 1))
    with pytest.raises(ListenError, match="too long for a socket"):
        listen(config)


def test_listener_port_in_use_is_error(socket_dir: Path) -> None:
    """Two daemons can't have one port. The socket that the second one had already
    opened is closed again.
    """
    with running_daemon(configuration("127.0.0.1:0")) as first:
        taken = str(first.address)
        path = socket_dir / "s"
        with (
            pytest.raises(ListenError, match=f"{taken}.*another program"),
            running_daemon(configuration([str(path), taken])),
        ):
            pass
        assert not path.exists()


def test_listener_abstract_name_in_use_is_error() -> None:
    """Two daemons can't have one abstract name."""
    name = "@brokerd-test-" + secrets.token_hex(4)
    with (
        running_daemon(configuration(name)),
        pytest.raises(ListenError, match=f"{name}.*another program"),
        running_daemon(configuration(name)),
    ):
        pass


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_listener_sets_nodelay_on_accepted_connections(listen: str) -> None:
    """TCP_NODELAY is set on pending connections, and stays when they are accepted."""
    with running_daemon(configuration(listen)) as broker, broker.login("alice"):

        def options() -> list[int]:
            server = broker.daemon._server
            assert server is not None
            return [
                connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for connection in server.connections
            ]

        assert broker.call(options) == [1]


def test_listener_socket_file_with_right_group_needs_no_chown(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox may forbid chown altogether. A file that is created with the right
    group needs none.
    """
    monkeypatch.setattr(
        os, "chown", lambda *_: pytest.fail("the system was asked to change the owner")
    )
    with running_daemon(
        configuration({"address": str(socket_dir / "s"), "mode": "0660", "group": os.getgid()})
    ):
        assert (socket_dir / "s").stat().st_mode & 0o777 == 0o660
