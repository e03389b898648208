"""The pipe through which bulk data of channels goes, and relaying without it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.channels import channel
from support.running_daemon import configuration, running_daemon

from brokerd.net.relay.pipe import Pipe, SharedPipe

linux = pytest.mark.skipif(not hasattr(os, "splice"), reason="splice is Linux's")
MIB = 1024 * 1024


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    shared = SharedPipe()
    opened = shared.get()
    assert opened is not None
    assert shared.get() is opened
    yield opened
    shared.close()


@linux
def test_pipe_moves_bytes_and_returns_those_not_taken(pipe: Pipe) -> None:
    """The rest comes out in order, the pipe is empty then, and 0 is the end."""
    source, sender = socket.socketpair()
    target, receiver = socket.socketpair()
    for sock in (source, sender, target, receiver):
        sock.setblocking(False)
    with source, sender, target, receiver:
        with pytest.raises(BlockingIOError):
            pipe.move(source.fileno(), target.fileno(), MIB)
        sender.send(b"12345")
        assert pipe.move(source.fileno(), target.fileno(), 3) == (3, b"")
        assert pipe.move(source.fileno(), target.fileno(), MIB) == (2, b"")
        assert receiver.recv(10) == b"12345"
        receiver.close()
        sender.send(b"lost")
        assert pipe.move(source.fileno(), target.fileno(), MIB) == (4, b"lost")
        sender.close()
        assert pipe.move(source.fileno(), target.fileno(), MIB) == (0, b"")


@linux
def test_pipe_to_full_socket_returns_the_rest(pipe: Pipe) -> None:
    source, sender = socket.socketpair()
    target, receiver = socket.socketpair()
    target.setblocking(False)
    with source, sender, target, receiver:
        filled = 0
        try:
            while True:
                filled += target.send(bytes(65536))
        except BlockingIOError:
            pass
        data = os.urandom(50_000)
        sender.sendall(data)
        size, rest = pipe.move(source.fileno(), target.fileno(), MIB)
        assert size == len(data)
        assert data.endswith(rest)
        assert rest


@pytest.mark.parametrize("lacking", ["splice", "pipe2"])
def test_relay_without_pipe_copies(
    lacking: str, socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system has no splice, or no descriptor is left."""

    def fails(flags: int) -> None:
        raise OSError

    if lacking == "splice":
        monkeypatch.delattr(os, "splice", raising=False)
    else:
        monkeypatch.setattr(os, "pipe2", fails, raising=False)
    data = os.urandom(MIB) * 3
    config = configuration(str(socket_dir / "s"), "alice bob")
    with running_daemon(config) as broker, channel(broker, "alice", "bob") as (alice, bob):
        thread = threading.Thread(target=alice.write, args=(data,), daemon=True)
        thread.start()
        assert bob.read(len(data)) == data
        thread.join(30)
