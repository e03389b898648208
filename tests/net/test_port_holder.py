"""The error of an address that is taken names the process that listens there."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest
from support.running_daemon import configuration

from brokerd.net.listen import port_holder
from brokerd.net.listen.listener import ListenError, listen
from brokerd.net.listen.port_holder import holder_of, holder_of_peer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")

OWN = f"{Path('/proc/self/comm').read_text().strip()}, process {os.getpid()}"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_holder_of_own_socket_is_this_process(host: str) -> None:
    """Both kinds of TCP are looked up; a port at which no process listens has no holder."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        assert holder_of(port) == OWN
    assert holder_of(port) == ""


def test_listen_error_of_taken_port_names_holder() -> None:
    """The person who reads it knows what to stop."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"another program listens there: {OWN}"):
            listen(configuration([address]).listen[0])


def test_listen_error_of_taken_socket_file_names_holder(socket_dir: Path) -> None:
    """The same for a Unix socket."""
    path = str(socket_dir / "taken")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        with pytest.raises(ListenError, match=f"another program is listening there: {OWN}"):
            listen(configuration(path).listen[0])


def test_port_holder_that_can_not_be_seen_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another user's process, and a system without /proc, give no name."""
    monkeypatch.setattr(port_holder, "_PROC", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert holder_of(server.getsockname()[1]) == ""
    one, other = socket.socketpair()
    with one, other:
        assert holder_of_peer(one) == ""
