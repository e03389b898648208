"""Idle connections whose sockets another process has already, while the old process
still serves them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.core.snapshot import Facts
from brokerd.net import handover
from brokerd.net.handover import Passing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no process hands over sockets there")


def listed(broker: RunningDaemon, passing: Passing) -> tuple[list[Facts], list[int]]:
    """Return all copied facts, and the descriptors."""
    found = broker.call(lambda: list(passing.blocks()))
    return [facts for facts, _ in found], [each for _, descriptors in found for each in descriptors]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition is still false after 30 s"
        time.sleep(0.003)


@contextlib.contextmanager
def closed_at_end(descriptors: list[int]) -> object:
    try:
        yield
    finally:
        for each in descriptors:
            os.close(each)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_handover_passed_connection_closed_by_old_process_ends_for_client(
    socket_dir: Path, listen: str
) -> None:
    """The other process still has the descriptor."""
    with running_daemon(
        configuration(str(socket_dir / "s") if listen == "unix" else listen)
    ) as broker:
        server = broker.daemon.server
        passing = broker.call(lambda: Passing(server))
        with broker.login("bob") as bob:
            _, descriptors = listed(broker, passing)
            assert len(descriptors) == 1
            with closed_at_end(descriptors):
                (connection,) = server.connections
                number = connection.session.number
                broker.call(lambda: connection.lost("the test says so"))
                assert bob.sock.recv(1) == b""
                facts, more = listed(broker, passing)
        assert (facts[0], more) == ({"gone": [number]}, [])


def test_handover_passed_connection_is_captured_without_socket(socket_dir: Path) -> None:
    with running_daemon(configuration(str(socket_dir / "s"))) as broker:
        server = broker.daemon.server
        passing = broker.call(lambda: Passing(server))
        with broker.login("alice") as alice, broker.login("bob") as bob:
            facts, descriptors = listed(broker, passing)
            assert [len(each["idle"]) for each in facts if "idle" in each] == [2]
            with closed_at_end(descriptors):
                assert [each for each in listed(broker, passing)[0] if "idle" in each] == []
                bob.ping()
                taken, sockets = broker.call(lambda: handover.capture(server, passing))
                # Nothing but the counters of bob's session has changed.
                assert (taken.facts["links"], len(taken.facts["core"]["counts"])) == ([], 1)
                assert sockets == [each.sock.fileno() for each in server.listening]
                assert taken.facts["keys"] == []
                bob.ping()
                alice.ping()
                # Now a part of a frame waits here that the other process does not have.
                session = broker.daemon.broker.exchange.find("bob")
                assert session is not None
                bob.write(b"\x00")
                wait_until(lambda: bool(session.connection.pending_input))
                taken, sockets = broker.call(lambda: handover.capture(server, passing))
                assert [each["passed"] for each in taken.facts["links"]] == [True]
                assert sockets == [each.sock.fileno() for each in server.listening]


def test_handover_without_free_descriptors_captures_connections_later(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(descriptor: int) -> int:
        raise OSError(24, "Too many open files")

    with running_daemon(configuration(str(socket_dir / "s"))) as broker:
        passing = broker.call(lambda: Passing(broker.daemon.server))
        with broker.login("alice") as alice:
            monkeypatch.setattr(handover.os, "dup", none_left)
            facts, descriptors = listed(broker, passing)
            copied = [list(each) for each in facts]
            assert (copied, descriptors) == ([["started_at", "clients"], ["keys"]], [])
            assert listed(broker, passing) == ([{"keys": []}], [])
            taken, sockets = broker.call(lambda: handover.capture(broker.daemon.server, passing))
            assert len(sockets) == 2
            assert not taken.facts["links"][0]["passed"]
            alice.ping()


def test_handover_key_uses_are_reported_once(socket_dir: Path) -> None:
    with running_daemon(configuration(str(socket_dir / "s"))) as broker:
        passing = broker.call(lambda: Passing(broker.daemon.server))
        for names in (["alice", "bob"], [], ["bob"], ["carol", "alice"]):
            for name in names:
                broker.login(name).close()
            uses = broker.call(passing.uses)
            assert [name for name, _, _ in uses] == names[::-1]
