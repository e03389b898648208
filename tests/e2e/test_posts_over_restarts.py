"""Posts from both faces while the broker is killed and restarted: each message is stored
exactly once, in the order of its sender.

The accounts are kept by the senders, outside of the broker.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.client_faces import Asyncio, Blocking, Face
from support.keys import key_of
from support.waiting import until

from brokerd.testing import RunningBroker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")

#: Threads that post from each client; asyncio runs them as tasks of one loop.
SENDERS = 3


class Sender:
    """One sequence of posts: each waits for the one before."""

    def __init__(self, client: Any, name: str) -> None:
        self.count = 0
        self.error: BaseException | None = None
        self._client = client
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._client.post("bob", [self._name, self.count])
                self.count += 1
        except BaseException as error:  # noqa: BLE001 - the test shows it
            self.error = error

    def stop(self) -> None:
        """Let the last post finish."""
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert self.error is None


def post_over_restarts(
    connect: Callable[[Face, str], Any], restart: Callable[[int], object], restarts: int
) -> None:
    """Post from both faces over restarts, and compare what is stored with the accounts."""
    faces: list[Face] = [Blocking(), Asyncio()]
    senders: dict[str, Sender] = {}
    dialogs: list[Any] = []
    try:
        for face, name in zip(faces, ("alice", "carol"), strict=True):
            client = connect(face, name)
            dialogs.append((client._inner if isinstance(face, Asyncio) else client)._dialog)
            for number in range(SENDERS):
                senders[f"{name}{number}"] = Sender(client, f"{name}{number}")
        for number in range(restarts):
            before = {name: sender.count for name, sender in senders.items()}
            for dialog in dialogs:
                # As after a connection of ten seconds: reconnect soon.
                dialog._attempt = 0
            restart(number)
            until(
                lambda before=before: all(  # type: ignore[misc]
                    sender.count > before[name] or sender.error is not None
                    for name, sender in senders.items()
                )
            )
        for sender in senders.values():
            sender.stop()
        stored: dict[str, list[int]] = {name: [] for name in senders}
        bob = connect(faces[0], "bob")
        for _ in range(sum(sender.count for sender in senders.values())):
            message = bob.recv(20)
            name, number = message.payload
            stored[name].append(number)
            message.done()
        bob.ping()
        mailbox = bob.control("mailboxes")["mailboxes"][0]
        assert (mailbox["ready"], mailbox["held"], mailbox["delayed"]) == (0, 0, 0)
        assert stored == {name: list(range(sender.count)) for name, sender in senders.items()}
    finally:
        for face in faces:
            face.close()


def test_posts_over_five_restarts_are_stored_once_in_order() -> None:
    """The broker is killed in the middle of its work, or drained."""
    with RunningBroker({"alice": {}, "carol": {}, "bob": {"mailbox": True}}) as broker:

        def restart(number: int) -> None:
            broker.stop() if number % 2 else broker.kill()
            broker.start()

        def connect(face: Face, name: str) -> Any:
            return face.connect(broker.address, name, broker.key(name))

        post_over_restarts(connect, restart, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_posts_over_200_restarts_are_stored_once_in_order(tmp_path: Path) -> None:
    """The broker's process gets SIGKILL, or every fifth time SIGTERM."""
    clients = {"alice": {}, "carol": {}, "bob": {"mailbox": True}}
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    broker = BrokerProcess(tmp_path, clients, store=str(store))
    broker.wait("daemon.started")

    def restart(number: int) -> None:
        nonlocal broker
        broker.signal(signal.SIGKILL if number % 5 else signal.SIGTERM)
        broker.exit_status()
        broker = BrokerProcess(tmp_path, clients, store=str(store))
        broker.wait("daemon.started")

    def connect(face: Face, name: str) -> Any:
        return face.connect(str(broker.socket), name, key_of(name))

    try:
        post_over_restarts(connect, restart, 200)
    finally:
        broker.__exit__()
