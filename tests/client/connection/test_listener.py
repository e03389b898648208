"""Listener: addresses, files, waiting, closing, and the two orders of its parameters."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.threads import Aside

from brokerd_client.connection import AuthenticationError, Client, Closed, Listener, TimedOut
from brokerd_client.connection import listening_sockets as doors

TIMEOUT_S = 30
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="abstract names and the mode of an unbound socket: Linux"
)


@pytest.fixture
def umask() -> Iterator[None]:
    """Put the umask back afterwards."""
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def meet(listener: Listener, **arguments: Any) -> None:
    """Connect to the listener with a Client, and pass one message each way."""
    accepted: list[Any] = []
    thread = threading.Thread(target=lambda: accepted.append(listener.accept(TIMEOUT_S)))
    thread.start()
    with Client(listener.address, timeout=TIMEOUT_S, **arguments) as dialer:
        thread.join()
        with accepted[0] as connection:
            dialer.send("there")
            assert connection.recv() == "there"
            connection.send("and back")
            assert dialer.recv() == "and back"


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_listener_without_address_chooses_one(family: str) -> None:
    """A listener with a family and no address finds a free one, and says which."""
    with Listener(family=family) as listener:
        if family == "AF_INET":
            assert listener.address[0] == "127.0.0.1"
            assert listener.address[1] > 0
        else:
            assert Path(listener.address).is_socket()
        meet(listener)


def test_listener_address_and_last_accepted_are_read_only() -> None:
    """Neither property can be set, and the last peer's address is None before there was
    one.
    """
    with Listener() as listener:
        assert listener.last_accepted is None
        with pytest.raises(AttributeError):
            listener.address = "elsewhere"  # type: ignore[misc]
        with pytest.raises(AttributeError):
            listener.last_accepted = "somebody"  # type: ignore[misc]


def test_listener_last_accepted_is_the_peer_s_address() -> None:
    """Over TCP the last peer's address is its own; over a Unix socket it has none, so
    None.
    """
    with (
        Listener(("localhost", 0)) as listener,
        Client(listener.address) as dialer,
        listener.accept(TIMEOUT_S),
        socket.socket(fileno=os.dup(dialer.fileno())) as sock,
    ):
        assert listener.last_accepted == sock.getsockname()
    with (
        Listener(family="AF_UNIX") as listener,
        Client(listener.address),
        listener.accept(TIMEOUT_S),
    ):
        assert listener.last_accepted is None


def test_listener_ipv6_accepts_connections() -> None:
    """A listener on ::1 is reached by its address, and by a name when the family says
    AF_INET6.
    """
    try:
        listener = Listener(("::1", 0), authkey="k")
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    with listener:
        assert listener.address[0] == "::1"
        meet(listener, authkey="k")
        with Client(("::1", listener.address[1]), "AF_INET6"), pytest.raises(TimedOut):
            listener.accept(0.01)


@on_linux
@pytest.mark.parametrize("name", ["\0brokerd-test-{}", b"\0brokerd-test-{}"])
def test_listener_abstract_name_may_be_text_or_bytes(name: Any) -> None:
    """An abstract Unix name works as text and as bytes, and leaves no file."""
    pid = str(os.getpid())
    address = (
        name.replace("{}", pid) if isinstance(name, str) else name.replace(b"{}", pid.encode())
    )
    with Listener(address, authkey="k") as listener:
        meet(listener, authkey="k")


@pytest.mark.parametrize("address", [r"\\.\pipe\brokerd", r"\\server\pipe\brokerd"])
@pytest.mark.skipif(sys.platform == "win32", reason="there they are served")
def test_address_with_two_backslashes_is_a_named_pipe(address: str) -> None:
    """Outside Windows an address of a named pipe is refused as such, not taken for a
    path.
    """
    with pytest.raises(ValueError, match="AF_PIPE"):
        Listener(address)
    with pytest.raises(ValueError, match="AF_PIPE"):
        Client(address)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177, 0o777])
def test_socket_file_is_its_owner_s_only(mask: int, umask: None, socket_dir: Path) -> None:
    """Whatever the umask, only the owner can read and write the socket file."""
    os.umask(mask)
    with Listener(str(socket_dir / "s")):
        assert stat.S_IMODE((socket_dir / "s").stat().st_mode) == 0o600


@on_linux
def test_socket_file_is_never_more_open(
    umask: None, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has the right mode as soon as bind() has made it: no process can connect
    before a chmod.
    """
    modes = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(stat.S_IMODE(Path(address).stat().st_mode))

    os.umask(0)
    monkeypatch.setattr(doors.socket, "socket", Watched)
    with Listener(str(socket_dir / "s")):
        assert modes == [0o600]


def test_socket_file_is_removed_by_close(socket_dir: Path) -> None:
    """close() removes the socket file; calling it again does nothing."""
    listener = Listener(str(socket_dir / "s"))
    listener.close()
    assert not (socket_dir / "s").exists()
    listener.close()


def test_socket_file_is_removed_by_garbage_collection(socket_dir: Path) -> None:
    """A listener without references is closed, its file is removed, and no warning is
    given.
    """
    listener = Listener(str(socket_dir / "s"), authkey="k")
    descriptor = listener._server._socket.fileno()
    del listener
    gc.collect()
    assert not (socket_dir / "s").exists()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_socket_file_is_removed_by_the_end_of_the_process(socket_dir: Path) -> None:
    """A process that ends without close() leaves no socket file behind."""
    script = (
        "import sys; from brokerd_client.connection import Listener; listener ="
        " Listener(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(socket_dir / "s")],
        timeout=TIMEOUT_S,
        check=True,
    )
    assert not (socket_dir / "s").exists()


def test_socket_file_relative_is_removed_from_another_directory(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a relative path is removed even after the process went to another
    directory.
    """
    monkeypatch.chdir(socket_dir)
    listener = Listener("s")
    monkeypatch.chdir("/")
    listener.close()
    assert not (socket_dir / "s").exists()


def test_socket_file_of_another_listener_is_not_removed(socket_dir: Path) -> None:
    """A listener whose file was replaced by another's does not remove that one."""
    path = socket_dir / "s"
    first = Listener(str(path))
    path.unlink()
    with Listener(str(path)) as second:
        first.close()
        assert path.exists()
        meet(second)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_listener_closed_in_a_fork_goes_on_in_the_parent(socket_dir: Path) -> None:
    """A forked child that closes its copy leaves the parent's listener, and the file,
    as they were.
    """
    with Listener(str(socket_dir / "s"), authkey="k") as listener:
        child = multiprocessing.get_context("fork").Process(target=listener.close)
        child.start()
        child.join(TIMEOUT_S)
        assert child.exitcode == 0
        meet(listener, authkey="k")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_listener_in_a_fork_accepts() -> None:
    """Processes forked after listening accept too, and the parent's half-finished
    handshakes are not theirs.
    """
    with Listener(authkey="k") as listener, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(listener.address)
        with pytest.raises(TimedOut):
            listener.accept(0.01)  # the silent peer's handshake has begun here

        child = multiprocessing.get_context("fork").Process(
            target=lambda: listener.accept(TIMEOUT_S).send("hello")
        )
        child.start()
        with Client(listener.address, authkey="k", timeout=TIMEOUT_S) as dialer:
            assert dialer.recv() == "hello"
        child.join(TIMEOUT_S)
        assert child.exitcode == 0


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_listener_address_in_use_raises_oserror(family: str) -> None:
    """A second listener on the same address is refused by the system, and the first one
    lives on.
    """
    with Listener(family=family) as listener:
        with pytest.raises(OSError, match="in use"):
            Listener(listener.address)
        meet(listener)


def test_connection_over_tcp_sends_small_messages_at_once() -> None:
    """TCP_NODELAY is set on both ends."""
    with (
        Listener(("localhost", 0)) as listener,
        Client(listener.address) as dialer,
        listener.accept(TIMEOUT_S) as accepted,
    ):
        for end in (dialer, accepted):
            with socket.socket(fileno=os.dup(end.fileno())) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.timing
@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("timeout", [0, 0.02])
def test_accept_without_peer_times_out(key: str | None, timeout: float) -> None:
    """accept(timeout=) without a peer raises TimedOut, a TimeoutError, and the listener
    goes on.
    """
    with Listener(authkey=key) as listener:
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            listener.accept(timeout=timeout)
        assert timeout <= time.monotonic() - start < TIMEOUT_S
        meet(listener, authkey=key)


def test_accept_without_waiting_makes_progress() -> None:
    """accept(0) called again and again finishes a handshake: what was begun is not
    thrown away.
    """
    with Listener(authkey="k") as listener:
        thread = threading.Thread(
            target=lambda: Client(listener.address, authkey="k", timeout=TIMEOUT_S).close()
        )
        thread.start()
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                listener.accept(0).close()
                break
            except TimedOut:
                pass
        else:
            pytest.fail("nobody was accepted")
        thread.join()


@pytest.mark.parametrize("key", [None, "k"])
def test_close_ends_every_accept(key: str | None, aside: Any) -> None:
    """close() in one thread ends accept() in the others, with an OSError, and later
    ones at once.
    """
    listener = Listener(authkey=key)
    waiting = [aside(listener.accept) for _ in range(3)]
    with pytest.raises(TimedOut):
        listener.accept(0.02)
    listener.close()
    for future in waiting:
        assert isinstance(future.exception(TIMEOUT_S), Closed)
    with pytest.raises(OSError, match="listener is closed"):
        listener.accept()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer signals")
def test_close_in_a_signal_handler_ends_accept() -> None:
    """A handler that closes the listener ends the accept() that it interrupted."""
    listener = Listener(authkey="k")
    previous = signal.signal(signal.SIGALRM, lambda *_: listener.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(Closed):
            listener.accept(TIMEOUT_S)
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_accept_in_several_threads_accepts_every_peer(aside: Any) -> None:
    """Each of several threads in accept() gets a connection of its own."""
    with Listener(authkey="k") as listener:
        waiting = [aside(listener.accept, TIMEOUT_S) for _ in range(5)]
        dialers = [Client(listener.address, authkey="k", timeout=TIMEOUT_S) for _ in range(5)]
        accepted = [future.result(TIMEOUT_S) for future in waiting]
        for number, dialer in enumerate(dialers):
            dialer.send(number)
        assert sorted(connection.recv() for connection in accepted) == [0, 1, 2, 3, 4]
        for end in (*dialers, *accepted):
            end.close()


def test_listener_default_backlog_holds_a_crowd() -> None:
    """A hundred clients without a key connect before the first is accepted."""
    with Listener(family="AF_UNIX") as listener:
        dialers = [Client(listener.address, timeout=TIMEOUT_S) for _ in range(100)]
        for dialer in dialers:
            listener.accept(TIMEOUT_S).close()
            dialer.close()


def key_of(listener: Listener) -> bytes | None:
    with listener:
        return listener._key


def test_listener_accepts_both_orders_of_parameters() -> None:
    """The fourth parameter is the old `authenticate` or the standard library's
    `authkey`, told apart by type.
    """
    own = bytes(multiprocessing.current_process().authkey)
    assert key_of(Listener(None, "AF_UNIX", 1)) is None
    assert key_of(Listener(None, "AF_UNIX", 1, None)) is None
    assert key_of(Listener(None, "AF_UNIX", 1, False)) is None
    assert key_of(Listener(None, "AF_UNIX", 1, True)) == own
    assert key_of(Listener(None, "AF_UNIX", 1, True, "kéy")) == "kéy".encode()
    assert key_of(Listener(None, "AF_UNIX", 1, False, b"key")) == b"key"
    assert key_of(Listener(None, "AF_UNIX", 1, b"key")) == b"key"
    assert key_of(Listener(None, "AF_UNIX", 1, "key")) == b"key"
    assert key_of(Listener(authenticate=True)) == own


def test_client_third_parameter_serves_both_orders() -> None:
    """Client's third parameter is `authenticate` or the key, and its fourth the key, as
    for Listener.
    """
    with Listener(None, "AF_UNIX", 5, True) as listener:
        meet(listener, authenticate=True)
    for arguments in [("key",), (b"key",), (True, "key"), (False, b"key")]:
        with Listener(authkey=b"key") as listener:
            thread = threading.Thread(
                target=lambda listener=listener: listener.accept(TIMEOUT_S).close()
            )
            thread.start()
            Client(listener.address, None, *arguments, timeout=TIMEOUT_S).close()
            thread.join()


@pytest.mark.parametrize("arguments", [{"authkey": b""}, {"authkey": ""}, {"authenticate": b""}])
def test_listener_empty_key_authenticates(arguments: dict[str, Any], aside: Aside) -> None:
    """An empty key meets an empty key; a peer with another key is rejected, and a peer
    without one too.
    """
    with Listener(**arguments) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        with (
            Client(listener.address, timeout=TIMEOUT_S, **arguments) as client,
            accepted.result() as server,
        ):
            client.send(1)
            assert server.recv() == 1
        accepted = aside(listener.accept, TIMEOUT_S)
        with pytest.raises(AuthenticationError):
            Client(listener.address, authkey=b"key", timeout=TIMEOUT_S)
        with pytest.raises(AuthenticationError):
            accepted.result()


@pytest.mark.parametrize(
    "arguments", [{"authkey": 5}, {"authenticate": 1.5}, {"authenticate": b"a", "authkey": b"b"}]
)
def test_key_of_another_type_raises_typeerror(arguments: dict[str, Any], socket_dir: Path) -> None:
    """A key of another type, or two keys, is a TypeError, before anything is opened."""
    for function in (Listener, Client):
        with pytest.raises(TypeError):
            function(str(socket_dir / "s"), **arguments)
    assert list(socket_dir.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [{"handshake_timeout": 0}, {"max_handshakes": 0}, {"on_error": "shout"}]
)
def test_listener_option_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    """Options that would accept no peer, or that mean nothing, are ValueErrors."""
    with pytest.raises(ValueError, match=r"above 0|on_error"):
        Listener(**arguments)


@pytest.mark.parametrize("address", [5, b"/tmp/path", ["localhost", 0]])
def test_address_not_valid_raises_valueerror(address: Any) -> None:
    """An address of an unknown form is a ValueError, as in the standard library."""
    with pytest.raises(ValueError, match="unrecognized"):
        Listener(address)
    with pytest.raises(ValueError, match="unrecognized"):
        Client(address)


def test_address_unknown_family_raises_valueerror() -> None:
    """A family that does not exist is a ValueError that names those that do."""
    with pytest.raises(ValueError, match="AF_INET6"):
        Listener(family="AF_APPLETALK")


# Time, and calls from a signal handler that interrupts accept().


@pytest.mark.parametrize("timeout", [math.inf, 1e10, 1e300])
def test_accept_and_client_timeout_beyond_the_system_s_limit_waits(
    tmp_path: Path, aside: Aside, timeout: float
) -> None:
    """Infinity and other times beyond what the system can count are times like any
    other.
    """
    for address in (str(tmp_path / "here"), ("localhost", 0)):
        with Listener(address, authkey=b"key", handshake_timeout=math.inf) as listener:
            accepted = aside(listener.accept, timeout)
            with (
                Client(listener.address, authkey=b"key", timeout=timeout) as client,
                accepted.result(30) as server,
            ):
                client.send(1)
                assert server.recv() == 1


def test_timeout_not_a_number_is_refused(tmp_path: Path) -> None:
    """NaN is a mistake of the caller; a negative time does not wait."""
    with Listener(str(tmp_path / "here"), authkey=b"key") as listener:
        with pytest.raises(ValueError, match="not a number"):
            listener.accept(math.nan)
        with pytest.raises(ValueError, match="not a number"):
            Client(listener.address, authkey=b"key", timeout=math.nan)
        with pytest.raises(TimedOut):
            listener.accept(-1)
        with pytest.raises(TimedOut):
            Client(listener.address, authkey=b"key", timeout=-1)
    with pytest.raises(ValueError, match="above 0"):
        Listener(handshake_timeout=math.nan)


@pytest.mark.parametrize("act", ["close", "accept"])
def test_listener_in_a_signal_handler_inside_accept_never_waits(tmp_path: Path, act: str) -> None:
    """close() ends the interrupted accept with Closed; a nested accept raises, and the
    interrupted one goes on.
    """
    raised: list[BaseException] = []

    def handle(number: int, frame: Any) -> None:
        try:
            getattr(listener, act)()
        except RuntimeError as error:
            raised.append(error)

    previous = signal.signal(signal.SIGALRM, handle)
    try:
        with Listener(str(tmp_path / "here"), authkey=b"key") as listener:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Closed if act == "close" else TimedOut):
                listener.accept(0.3)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert len(raised) == (act == "accept")
