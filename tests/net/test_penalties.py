"""The failures that penalties remember per origin, and pending peers that continue to
send, seen from inside.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

import pytest
from support.raw_client import Rejected, login, prefixed
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd.net.handshake import key_search
from brokerd.net.handshake import penalties as failures_module
from brokerd.net.handshake.handshakes import PendingHandshakes
from brokerd.net.handshake.keyring import Keyring
from brokerd_client.wire.handshake import LIMIT


def failures(broker: RunningDaemon) -> list[tuple[str, int]]:
    """Return each origin with remembered failures, and their number."""
    return [
        (origin, count)
        for origin, count, _ in broker.call(
            lambda: broker.daemon.server.pending_handshakes.failures.ages(0.0)
        )
    ]


def fail(broker: RunningDaemon, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Rejected):
            login(broker.address, b"wrong")


def test_penalties_accepted_client_clears_failures_of_origin() -> None:
    """A login with the right key clears the earlier failures of the same address."""
    with running_daemon(configuration("127.0.0.1:0")) as broker:
        fail(broker, 3)
        assert failures(broker) == [("127.0.0.1", 3)]
        broker.login("alice").close()
        assert failures(broker) == []


def test_penalties_old_failures_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose failures are long ago gets its answer without delay."""
    monkeypatch.setattr(failures_module, "_FORGET_AFTER", -1.0)
    monkeypatch.setattr(failures_module, "_FREE_FAILURES", 2)
    with running_daemon(configuration("127.0.0.1:0")) as broker:
        fail(broker, 4)
        assert failures(broker) == [("127.0.0.1", 1)]


def test_penalties_remembered_origins_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many addresses an attacker has, only the latest are kept."""
    monkeypatch.setattr(failures_module, "_REMEMBERED", 3)
    penalties = failures_module.Failures()
    for number in range(10):
        penalties.count(f"192.0.2.{number}", float(number))
    assert penalties.ages(9.0) == [(f"192.0.2.{number}", 1, 9.0 - number) for number in (7, 8, 9)]


def test_pending_connection_is_not_read_during_key_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some bytes are read. Then the broker no longer watches that socket until the
    search is over.
    """
    looks = 0
    on_readable = PendingHandshakes._on_readable

    def count(self: PendingHandshakes, pending: Any) -> None:
        nonlocal looks
        looks += 1
        on_readable(self, pending)

    with monkeypatch.context() as patched:
        patched.setattr(PendingHandshakes, "_on_readable", count)
        # There are more keys than one slice tries, and the next slice has to wait.
        patched.setattr(PendingHandshakes, "_search_on", lambda self: None)
        patched.setattr(key_search, "SLICE", 32)
        clients = dict.fromkeys(f"c{number}" for number in range(100))
        with running_daemon(configuration("127.0.0.1:0", clients)) as broker, broker.raw() as peer:
            peer.write(prefixed(peer.answer(b"wrong")) + bytes(20_000))
            (pending,) = broker.call(broker.daemon.server.pending_handshakes.pending_connections)
            deadline = monotonic() + 30
            while broker.call(lambda: pending.reader.buffered) <= 2 * LIMIT:
                assert monotonic() < deadline
            before = broker.call(lambda: looks)
            for _ in range(20):
                broker.call(lambda: None)
            assert broker.call(lambda: looks) <= before + 1
            assert broker.call(lambda: pending.reader.buffered) <= 4 * LIMIT


def test_keyring_after_reload_keeps_order_of_tries() -> None:
    """The next keyring, too, tries used keys first, the latest first."""
    clients = configuration("127.0.0.1:0", "alice bob carol").clients.values()
    former, ring = Keyring(clients), Keyring(clients)
    for used_at, name in enumerate(("carol", "bob")):
        (credential,) = former.named(name)
        former.let_in(credential, float(used_at))
    ring.adopt_uses(former)
    tried = [ring.owner(prepared).client.name for prepared in ring.candidates(0, 3)]
    assert tried == ["bob", "carol", "alice"]


def test_keyring_second_adoption_copies_only_later_uses() -> None:
    """A reload copies the uses in a thread, and those since then when it takes over."""
    clients = configuration("127.0.0.1:0", "alice bob carol dave").clients.values()
    former, ring = Keyring(clients), Keyring(clients)

    def use(used_at: float, name: str) -> None:
        (credential,) = former.named(name)
        former.let_in(credential, used_at)

    use(1.0, "carol")
    use(2.0, "bob")
    ring.adopt_uses(former)
    use(3.0, "dave")
    use(4.0, "carol")
    ring.adopt_uses(former)

    assert ring.uses() == [
        (name, former.named(name)[0].key.key_id, used_at)
        for name, used_at in (("carol", 4.0), ("dave", 3.0), ("bob", 2.0))
    ]
    assert ring.uses(former.moments()) == []
