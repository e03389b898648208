"""Outboxes of many recipients that are written in later turns of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.raw_client import JSON, MESSAGE, REQUEST, Raw, packed
from support.running_daemon import configuration, running_daemon

from brokerd.net import deferred_writes
from brokerd.net.deferred_writes import DeferredWrites

#: Recipients of one read that are many.
MANY = 32
#: Bytes that are worth a write of their own.
PLENTY = 64 * 1024


@pytest.fixture(autouse=True)
def _many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defer writes beside the Python routing loop too."""
    monkeypatch.setattr(deferred_writes, "_MANY", MANY)


class Net:
    """A broker whose sessions are names for outboxes, and the turns of its event loop."""

    def __init__(self) -> None:
        self.scheduled: list[Callable[[], None]] = []
        self.broker = SimpleNamespace(touched=[], status=SimpleNamespace(changes=None))
        self.written: list[Any] = []
        loop = cast("asyncio.AbstractEventLoop", self)
        self.writes = DeferredWrites(loop, cast("Any", self.broker), self.write)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.scheduled.append(callback)

    def write(self) -> None:
        """Write the touched outboxes."""
        while self.broker.touched:
            session = self.broker.touched.pop()
            session.outbox.touched, session.outbox.waiting = False, 0
            self.written.append(session)

    def read(self, sessions: list[Any], size: int = 100) -> None:
        """Route ``size`` bytes to each session, and settle."""
        for session in sessions:
            session.outbox.waiting += size
            if not session.outbox.touched:
                session.outbox.touched = True
                self.broker.touched.append(session)
        self.writes.defer()
        self.write()

    def take_turn(self) -> list[Any]:
        """Return the sessions written in the next turn of the loop."""
        self.written = []
        callbacks, self.scheduled = self.scheduled, []
        for callback in callbacks:
            callback()
        return self.written


def recipients(count: int) -> list[Any]:
    """Return sessions with empty outboxes."""
    return [SimpleNamespace(outbox=SimpleNamespace(waiting=0, touched=False)) for _ in range(count)]


def test_deferred_writes_of_few_recipients_are_made_at_once() -> None:
    net, few = Net(), recipients(MANY - 1)
    net.read(few)
    assert len(net.written) == len(few)
    assert not net.scheduled


def test_deferred_writes_of_many_recipients_are_made_in_turns() -> None:
    """In order; each outbox is written once, though more reads have filled it meanwhile."""
    net, many = Net(), recipients(1000)
    net.read(many)
    assert not net.written
    first = net.take_turn()
    assert 4 <= len(first) <= 1000 // 32
    assert set(map(id, first)) == set(map(id, many[: len(first)]))
    net.read(many)
    assert net.written is first
    rest: list[Any] = []
    while net.scheduled:
        rest += net.take_turn()
    assert len(rest) == 1000
    assert set(map(id, rest)) == set(map(id, many))
    # Those of the first turn have got more since, so they are among the last.
    assert set(map(id, first)) <= set(map(id, rest[-2 * len(first) :]))


def test_deferred_writes_of_other_recipients_are_not_awaited() -> None:
    """A small read of another sender is settled at once."""
    net, many, (other,) = Net(), recipients(1000), recipients(1)
    net.read(many)
    net.broker.touched.append(other)
    net.write()
    assert net.written == [other]


def test_deferred_writes_end_with_much_to_write() -> None:
    """Bytes that fill an outbox are written before the next read."""
    net, many = Net(), recipients(100)
    net.read(many, PLENTY)
    assert len(net.written) == 100
    net.read(many)
    net.take_turn()
    net.read(many, PLENTY)
    assert not net.take_turn()
    assert not net.scheduled
    assert all(not session.outbox.waiting for session in many)


def test_deferred_writes_taken_back_are_made_at_once() -> None:
    net, many = Net(), recipients(100)
    net.read(many)
    net.writes.take_back()
    net.write()
    assert len(net.written) == 100
    assert not net.take_turn()


def test_deferred_writes_with_changes_noted_are_made_at_once() -> None:
    """What an upgrade has copied of an outbox is noted as changed at the write."""
    net, many = Net(), recipients(100)
    net.broker.status.changes = object()
    net.read(many)
    assert len(net.written) == 100


@pytest.mark.parametrize("more", [{}, {"queue": "1KiB"}, {"queue": "1KiB", "when_full": "refuse"}])
def test_deferred_writes_of_a_pool_keep_each_member_in_order(more: dict[str, Any]) -> None:
    """Nothing is refused or held because an outbox waits for its turn."""
    count = 6400
    clients = {"ann": None, "pool": {"connections": 2 * MANY, **more}}
    with contextlib.ExitStack() as held:
        broker = held.enter_context(running_daemon(configuration("127.0.0.1:0", clients)))
        pool = [held.enter_context(broker.login("pool")) for _ in range(2 * MANY)]
        ann = held.enter_context(broker.login("ann"))
        ann.write(b"".join(packed(MESSAGE, "pool", message_id=number) for number in range(count)))
        ann.ping()
        arrived = [ids_until_pong(member) for member in pool]
    assert all(ids == sorted(ids) for ids in arrived)
    assert sorted(itertools.chain(*arrived)) == list(range(count))


def ids_until_pong(member: Raw) -> list[int]:
    """Return the ids of the messages that a client gets before the answer to its ping."""
    member.send(REQUEST, "$broker", b'{"op": "ping"}', codec=JSON)
    frames = iter(member.recv, None)
    return [frame.id for frame in itertools.takewhile(lambda each: each.kind == MESSAGE, frames)]
