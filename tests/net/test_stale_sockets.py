"""Stale socket files of a dead broker: of several brokers that start over one file,
exactly one listens.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import socket
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from brokerd.config.values import ListenConfig, Source
from brokerd.net.listen import listener as listening
from brokerd.net.listen.listener import ListenError, Listening, listen
from brokerd_client.address import Address


def at(path: Path) -> ListenConfig:
    return ListenConfig(Address("AF_UNIX", path=str(path)), 0o600, None, False, Source("here", 1))


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def is_reached(path: Path, winner: Listening) -> bool:
    """Return whether a client that connects to the path reaches this socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        accepted, _ = winner.sock.accept()
        accepted.close()
    return True


def race(path: Path, starters: int) -> tuple[list[Listening], list[str]]:
    """Start brokers at once over one stale file, and return the listening sockets and
    the errors.
    """
    leave_stale(path)
    barrier = threading.Barrier(starters)
    won: list[Listening] = []
    errors: list[str] = []

    def start() -> None:
        barrier.wait()
        try:
            won.extend(listen(at(path)))
        except ListenError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, errors


@pytest.mark.parametrize("starters", [2, 4])
def test_listener_race_over_stale_file_has_one_winner(socket_dir: Path, starters: int) -> None:
    """Clients reach the winner, the other starters get an error, and no file is left."""
    path = socket_dir / "s"
    for _ in range(60):
        won, errors = race(path, starters)
        try:
            assert len(won) == 1
            assert len(errors) == starters - 1
            assert all("another program is listening there" in each for each in errors)
            assert is_reached(path, won[0])
        finally:
            for each in won:
                each.close()
        assert list(socket_dir.iterdir()) == []


def _start(path: Path, conversation: Connection) -> None:
    """Try to listen on each command, send the result, and close on the next command."""
    while conversation.recv():
        try:
            opened = listen(at(path))
        except ListenError as error:
            conversation.send(str(error))
        else:
            conversation.send("")
        conversation.recv()
        for each in opened if "opened" in locals() else ():
            each.close()
        opened = []
        conversation.send("closed")


@pytest.mark.slow
def test_listener_race_of_processes_has_one_winner(socket_dir: Path) -> None:
    """Processes exclude each other as threads do: two of them race 500 times over one
    stale file.
    """
    path = socket_dir / "s"
    fork: Any = multiprocessing.get_context("fork")
    pairs = [fork.Pipe() for _ in range(2)]
    processes = [
        fork.Process(target=_start, args=(path, theirs), daemon=True) for _, theirs in pairs
    ]
    for process in processes:
        process.start()
    ours = [mine for mine, _ in pairs]
    for _ in range(500):
        leave_stale(path)
        for each in ours:
            each.send(True)
        answers = [each.recv() for each in ours]
        assert answers.count("") == 1, answers
        for each in ours:
            each.send(None)
        assert [each.recv() for each in ours] == ["closed"] * 2
        path.unlink(missing_ok=True)
    for each in ours:
        each.send(False)
    for process in processes:
        process.join(30)


def test_listener_close_raced_by_start_keeps_file_of_new_broker(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that starts between the check of the file and its removal finds the old
    one still listening.
    """
    path = socket_dir / "s"
    (ending,) = listen(at(path))
    errors: list[str] = []
    look = listening._inode

    def look_and_start(path: Path) -> tuple[int, int]:
        found = look(path)
        try:
            listen(at(path))
        except ListenError as error:
            errors.append(str(error))
        return found

    with monkeypatch.context() as patched:
        patched.setattr(listening, "_inode", look_and_start)
        ending.close()
    (reason,) = errors
    assert "another program is listening there" in reason
    assert list(socket_dir.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_listener_in_locked_directory_waits_for_lock(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that stays, such as a cleaner's, delays a start only for a limited time."""
    monkeypatch.setattr(listening, "_LOCK_S", 0.2)
    path = socket_dir / "s"
    handle = os.open(socket_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        won: list[Listening] = []
        thread = threading.Thread(target=lambda: won.extend(listen(at(path))))
        began = monotonic()
        thread.start()
        thread.join()
        assert monotonic() - began >= 0.2
        assert is_reached(path, won[0])
        won[0].close()
    finally:
        os.close(handle)


@pytest.mark.parametrize("function", ["open", "flock"])
def test_listener_in_directory_without_locks_is_opened(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """A directory that only admits new files, or a file system without locks, does not
    prevent a start.
    """

    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "planted")

    with monkeypatch.context() as patched:
        patched.setattr(os if function == "open" else fcntl, function, fails)
        (opened,) = listen(at(socket_dir / "s"))
    assert is_reached(socket_dir / "s", opened)
    opened.close()
