"""Where the broker listens: every form of address, socket files, and what is said when
it can't.
"""

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
    """A umask that takes nothing away, as careless service managers set it."""
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
def test_listens_at_every_form_of_address(listen: Any) -> None:
    """Whatever form an address has, a client gets in at every address the daemon says
    it listens at.
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


def test_a_name_with_two_addresses_gets_one_port() -> None:
    """localhost with port 0 is the same port on IPv4 and IPv6."""
    found = {family for family, *_ in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with running_daemon(configuration([["localhost", 0]])) as broker:
        assert len({address.port for address in broker.addresses}) == 1
        assert broker.address.port != 0
        assert {address.family for address in broker.addresses} <= {"AF_INET", "AF_INET6"}
        assert len(broker.addresses) <= len(found)


@pytest.mark.parametrize("missing", ["address", "family"])
def test_a_name_listens_at_those_of_its_addresses_that_exist(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Where localhost is ::1 too but the machine has no IPv6, IPv4 alone is served."""
    # A documentation address stands for the ::1 of a machine on which IPv6 is switched
    # off.
    gone = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
    if missing == "family":
        gone = (socket.AF_APPLETALK, socket.SOCK_STREAM, 6, "", ("::1", 0))  # type: ignore[assignment]
    here = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [gone, here])
    with running_daemon(configuration([["localhost", 0]])) as broker:
        assert [address.family for address in broker.addresses] == ["AF_INET"]


def test_several_listeners_serve_the_same_clients(socket_dir: Path) -> None:
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
def test_a_socket_file_is_its_owners_alone() -> None:
    """The socket file has mode 0600 although the umask would allow everything."""
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        path = Path(directory) / "s"
        with running_daemon(configuration(str(path))):
            assert mode(path) == 0o600


@pytest.mark.parametrize(("written", "wanted"), [("0660", 0o660), ("0666", 0o666), ("0600", 0o600)])
def test_a_socket_file_has_the_configured_mode(socket_dir: Path, written: str, wanted: int) -> None:
    """The mode is the one in the configuration, whatever the umask takes away from
    other files.
    """
    path = socket_dir / "s"
    before = os.umask(0o077)
    try:
        with running_daemon(configuration({"address": str(path), "mode": written})):
            assert mode(path) == wanted
    finally:
        os.umask(before)


def test_the_umask_is_left_as_it_was(socket_dir: Path) -> None:
    """Making the socket file changes nothing for the program around the daemon."""
    before = os.umask(0o027)
    try:
        with running_daemon(configuration(str(socket_dir / "s"))):
            assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_socket_file_gets_its_group(socket_dir: Path) -> None:
    """The group may be given as a number."""
    path = socket_dir / "s"
    group = os.getgid()
    with running_daemon(configuration({"address": str(path), "mode": "0660", "group": group})):
        assert path.stat().st_gid == group


def test_an_unknown_group_is_named_and_leaves_no_file(socket_dir: Path) -> None:
    """A group that does not exist is an error that names it; no socket file stays
    behind.
    """
    path = socket_dir / "s"
    with (
        pytest.raises(ListenError, match="no-such-group-here"),
        running_daemon(configuration({"address": str(path), "group": "no-such-group-here"})),
    ):
        pass
    assert not path.exists()


def test_the_socket_file_goes_with_the_daemon(socket_dir: Path) -> None:
    """When the daemon has stopped its socket file is gone."""
    path = socket_dir / "s"
    with running_daemon(configuration(str(path))):
        assert path.is_socket()
    assert not path.exists()


def test_a_stale_socket_file_is_taken_over(socket_dir: Path) -> None:
    """A file that a dead daemon left behind is no obstacle."""
    path = socket_dir / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with running_daemon(configuration(str(path))) as broker, broker.login("alice") as alice:
        alice.ping()


def test_a_live_socket_file_is_left_to_its_daemon(socket_dir: Path) -> None:
    """A second daemon at the same path fails and says why; the first one goes on."""
    path = socket_dir / "s"
    with running_daemon(configuration(str(path))) as first:
        with (
            pytest.raises(ListenError, match=f"{path}: another program is listening there"),
            running_daemon(first.daemon.config),
        ):
            pass
        with first.login("alice") as alice:
            alice.ping()


def test_a_full_backlog_is_alive(socket_dir: Path) -> None:
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
def test_what_is_no_socket_is_never_removed(socket_dir: Path, kind: str) -> None:
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


def test_anothers_socket_file_is_not_removed_at_the_end(socket_dir: Path) -> None:
    """A socket file that somebody else put in our place survives our stop."""
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
def test_says_why_it_cannot_listen(socket_dir: Path, listen: str, what: str) -> None:
    """The error names the address and what would help."""
    where = listen.format(dir=socket_dir)
    with pytest.raises(ListenError, match=what) as caught, running_daemon(configuration(where)):
        pass
    assert where in str(caught.value)


def test_a_path_too_long_for_a_socket_is_called_so(socket_dir: Path) -> None:
    """The configuration catches this first; whoever listens without one hears it too."""
    path = str(socket_dir / ("x" * 120))
    config = ListenConfig(Address("AF_UNIX", path=path), 0o600, None, False, Source("here", 1))
    with pytest.raises(ListenError, match="too long for a socket"):
        listen(config)


def test_a_taken_port_is_named(socket_dir: Path) -> None:
    """Two daemons can't have one port; and what the second one had opened already is
    closed again.
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


def test_a_taken_abstract_name_is_an_error() -> None:
    """Two daemons can't have one abstract name."""
    name = "@brokerd-test-" + secrets.token_hex(4)
    with (
        running_daemon(configuration(name)),
        pytest.raises(ListenError, match=f"{name}.*another program"),
        running_daemon(configuration(name)),
    ):
        pass


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_the_brokers_side_has_no_delay(listen: str) -> None:
    """TCP_NODELAY is set on pending connections already, and stays when they are
    let in.
    """
    with running_daemon(configuration(listen)) as broker, broker.login("alice"):

        def options() -> list[int]:
            server = broker.daemon._server
            assert server is not None
            return [
                connection.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for connection in server.connections
            ]

        assert broker.call(options) == [1]


def test_a_group_it_has_already_is_not_asked_for(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox may forbid chown altogether: a file whose group is right as it is made
    needs none.
    """
    monkeypatch.setattr(
        os, "chown", lambda *_: pytest.fail("the system was asked to change the owner")
    )
    with running_daemon(
        configuration({"address": str(socket_dir / "s"), "mode": "0660", "group": os.getgid()})
    ):
        assert (socket_dir / "s").stat().st_mode & 0o777 == 0o660
