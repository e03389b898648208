"""Reloading the configuration of a running daemon, completely or not at all."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.reloadable_daemon import ALICE, BOB, ReloadableDaemon, is_disconnected

import brokerd_client
from brokerd.core.broker import Broker
from brokerd.core.revocation import Revocation
from brokerd.daemon import daemon as daemons
from brokerd_client.errors import (
    AuthenticationError,
    Denied,
    Disconnected,
    InvalidKey,
    NoSuchClient,
)


@pytest.fixture
def served(socket_dir: Path) -> Iterator[ReloadableDaemon]:
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write(ALICE + BOB)
    reloadable.start()
    try:
        yield reloadable
    finally:
        reloadable.close()


def test_reload_added_client_can_connect_and_receive(served: ReloadableDaemon) -> None:
    """A new name works at once, also for clients connected before."""
    with served.connect("alice", "alices-first-key") as alice:
        with pytest.raises(NoSuchClient):
            alice.send_confirmed("carol", "hello")
        served.write(ALICE + BOB + "  carol: {key: carols-key}\n")
        assert served.reload() == []
        with served.connect("carol", "carols-key") as carol:
            alice.send_confirmed("carol", "hello")
            assert carol.recv(timeout=30).payload == "hello"


def test_reload_unchanged_client_keeps_connection(served: ReloadableDaemon) -> None:
    """Moving an entry to other lines is not a change."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write("\n\n" + BOB + "  carol: {key: carols-key}\n" + ALICE)
        assert served.reload() == []
        assert not is_disconnected(bob)


def test_reload_removed_client_is_disconnected(served: ReloadableDaemon) -> None:
    """Its name is unknown from then on, and the log gives the reason."""
    with (
        served.connect("alice", "alices-first-key") as alice,
        served.connect("bob", "bobs-first-key") as bob,
    ):
        served.write(ALICE)
        assert served.reload() == []
        assert is_disconnected(bob)
        with pytest.raises(NoSuchClient):
            alice.send_confirmed("bob", "hello")
        assert "removed" in served.log.wait("client.disconnected")[0].fields["reason"]
    with pytest.raises(AuthenticationError):
        served.connect("bob", "bobs-first-key")


def test_reload_disconnected_client_gets_key_removed(
    served: ReloadableDaemon,
) -> None:
    with (
        served.connect("alice", "alices-first-key") as alice,
        served.connect("bob", "bobs-first-key") as bob,
    ):
        served.write("  bob: {key: bobs-second-key}\n")
        assert served.reload() == []
        for client in (alice, bob):
            assert is_disconnected(client)
            with pytest.raises(Disconnected, match=r"\(key_removed\)"):
                client.ping()


def test_reload_client_whose_key_was_removed_is_disconnected(served: ReloadableDaemon) -> None:
    """The old key is rejected afterwards, and the new one is accepted."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(ALICE + "  bob: {key: bobs-second-key}\n")
        assert served.reload() == []
        assert is_disconnected(bob)
    with pytest.raises(AuthenticationError):
        served.connect("bob", "bobs-first-key")
    served.connect("bob", "bobs-second-key").close()


def test_reload_client_with_second_key_added_keeps_connection(served: ReloadableDaemon) -> None:
    """While the old key is still listed, a connection that used it stays."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(ALICE + "  bob: {keys: [{key: bobs-second-key}, {key: bobs-first-key}]}\n")
        assert served.reload() == []
        assert not is_disconnected(bob)


def test_reload_changed_policy_applies_to_open_connections(served: ReloadableDaemon) -> None:
    """A sender that was allowed before, and whose route is cached, is denied
    afterwards.
    """
    with (
        served.connect("alice", "alices-first-key") as alice,
        served.connect("bob", "bobs-first-key") as bob,
    ):
        for _ in range(3):
            alice.send("bob", "hello")
        alice.send_confirmed("bob", "hello")
        served.write("  alice: {key: alices-first-key, send_to: []}\n" + BOB)
        assert served.reload() == []
        with pytest.raises(Denied):
            alice.send_confirmed("bob", "hello")
        assert not is_disconnected(bob)


def test_reload_forbidden_subscription_ends(served: ReloadableDaemon) -> None:
    """The subscriber stays connected and gets no more events of it."""
    with (
        served.connect("alice", "alices-first-key") as alice,
        served.connect("bob", "bobs-first-key") as bob,
    ):
        subscription = bob.subscribe("news.>")
        alice.publish_confirmed("news.a", "first")
        assert next(iter(subscription)).payload == "first"
        served.write(ALICE + "  bob: {key: bobs-first-key, subscribe: []}\n")
        assert served.reload() == []
        alice.publish_confirmed("news.a", "second")
        bob.ping()
        assert served.daemon.stats()["subscriptions"] == 0


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("  alice: {key: alices-first-key, conections: 2}\n", "did you mean 'connections'"),
        ("  alice: {key_file: keys/missing}\n", "there is no file"),
        ("  alice: [\n", "brokerd.yaml:"),
    ],
)
def test_reload_invalid_file_changes_nothing(
    served: ReloadableDaemon, broken: str, says: str
) -> None:
    """The error gives the reason. The running configuration stays whole, connections
    included.
    """
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(broken)
        assert says in "\n".join(served.reload())
        assert served.log.wait("daemon.reload_refused")[0].fields["problems"]
        assert not is_disconnected(bob)
    served.connect("alice", "alices-first-key").close()


def test_reload_missing_include_directory_changes_nothing(served: ReloadableDaemon) -> None:
    """The clients of that directory stay connected until it is back."""
    (served.home / "d").mkdir(mode=0o700)
    (served.home / "d" / "carol.yaml").touch(mode=0o600)
    (served.home / "d" / "carol.yaml").write_text("clients: {carol: {key: carols-key}}\n")
    served.write(ALICE + BOB + "include: ['d/*.yaml']\n")
    assert served.reload() == []
    with served.connect("carol", "carols-key") as carol:
        (served.home / "d").rename(served.home / "elsewhere")
        (problem,) = served.reload()
        assert "there is no directory" in problem
        assert not is_disconnected(carol)
        (served.home / "elsewhere").rename(served.home / "d")
        assert served.reload() == []
        assert not is_disconnected(carol)


@pytest.mark.skipif(os.name != "posix", reason="no socket files there")
@pytest.mark.parametrize("how", ["removed", "stale"])
def test_reload_missing_socket_file_is_bound_again(served: ReloadableDaemon, how: str) -> None:
    """A cleaner of /tmp has removed it. Open connections stay, new ones are accepted,
    and the log says so.
    """
    path = served.home / "sock"
    with served.connect("alice", "alices-first-key") as alice:
        path.unlink()
        if how == "stale":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
        assert served.reload() == []
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with served.connect("bob", "bobs-first-key") as bob:
            alice.send_confirmed("bob", "hello")
            assert bob.recv(timeout=30).payload == "hello"
        (restored,) = served.log.named("listener.restored")
        assert restored.fields["listener"] == str(path)
        assert served.reload() == []
        assert len(served.log.named("listener.restored")) == 1


@pytest.mark.skipif(os.name != "posix", reason="no socket files there")
def test_reload_socket_file_of_another_broker_is_kept(served: ReloadableDaemon) -> None:
    """The log says once that clients do not reach this broker there. The rest of the
    reload takes effect.
    """
    path = served.home / "sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        theirs.listen()
        served.write(ALICE)
        for _ in range(2):
            assert served.reload() == []
        (lost,) = served.log.named("listener.lost")
        assert "another program is listening there" in lost.fields["reason"]
        assert path.is_socket()
    path.unlink()
    assert served.reload() == []
    assert served.log.named("listener.restored")
    served.connect("alice", "alices-first-key").close()


@pytest.mark.skipif(os.name != "posix", reason="no socket files there")
def test_listener_socket_file_removed_is_bound_again_by_timer(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every few seconds the broker checks whether it can be reached there. So does its
    monitor.
    """
    monkeypatch.setattr(daemons, "LOOK_S", 0.05)
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write(ALICE + f"monitor: {socket_dir}/page\n")
    reloadable.start()
    try:
        for name in ("sock", "page"):
            (socket_dir / name).unlink()
        reloadable.log.wait("listener.restored", 2)
        reloadable.connect("alice", "alices-first-key").close()
        with socket.socket(socket.AF_UNIX) as page:
            page.connect(str(socket_dir / "page"))
    finally:
        reloadable.close()
    assert {path.name for path in socket_dir.iterdir()} == {"brokerd.yaml"}


def test_reload_and_start_warn_of_odd_keys(socket_dir: Path) -> None:
    """One event has the count and the first warnings. No event contains a key."""
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write(
        "".join(f"  c{number}: {{key: ' {number} a canary'}}\n" for number in range(30))
    )
    reloadable.start()
    try:
        reloadable.write(ALICE + "  bob: {key: 'bobs key '}\n")
        assert reloadable.reload() == []
        first, second = reloadable.log.named("key.odd")
        assert (first.level, first.fields["count"], len(first.fields["warnings"])) == (
            "warning",
            30,
            20,
        )
        assert second.fields["count"] == 1
        assert "a key of client 'bob' ends with white space" in second.fields["warnings"][0]
        assert "canary" not in str(reloadable.log.events)
        reloadable.write(ALICE)
        assert reloadable.reload() == []
        assert len(reloadable.log.named("key.odd")) == 2
    finally:
        reloadable.close()


def test_reload_address_that_cannot_be_bound_changes_nothing(served: ReloadableDaemon) -> None:
    """A new client in the same file is not added either: all or nothing."""
    (served.home / "plain").write_text("no socket")
    served.write(ALICE + BOB + "  carol: {key: carols-key}\n", listen=f", {served.home / 'plain'}")
    assert "a file that is not a socket" in served.reload()[0]
    with pytest.raises(AuthenticationError):
        served.connect("carol", "carols-key")
    served.connect("alice", "alices-first-key").close()


def test_reload_opens_closes_and_changes_listeners(served: ReloadableDaemon) -> None:
    """A new address is served, and a removed one is gone with its file. One that stays
    never stops.
    """
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(ALICE + BOB, listen=f", {{address: {served.home / 'second'}, mode: '0660'}}")
        assert served.reload() == []
        assert stat.S_IMODE((served.home / "second").stat().st_mode) == 0o660
        served.connect("alice", "alices-first-key", at="second").close()
        served.write(ALICE + BOB, listen=f", {{address: {served.home / 'second'}, mode: '0600'}}")
        assert served.reload() == []
        assert stat.S_IMODE((served.home / "second").stat().st_mode) == 0o600
        served.write(ALICE + BOB)
        assert served.reload() == []
        assert not (served.home / "second").exists()
        assert not is_disconnected(bob)


def test_reload_publishes_reloaded_event(served: ReloadableDaemon) -> None:
    """``$broker.reloaded`` is published when the whole configuration is in effect."""
    with served.connect("bob", "bobs-first-key") as bob:
        subscription = bob.subscribe("$broker.reloaded")
        assert served.reload() == []
        assert next(iter(subscription)).topic == "$broker.reloaded"


def test_reload_operation_returns_problems_of_refused_file(served: ReloadableDaemon) -> None:
    """The reply to the administrator has the lines of the refused file."""
    served.write("  alice: {key: alices-first-key, admin: true}\n" + BOB)
    assert served.reload() == []
    with served.connect("alice", "alices-first-key") as alice:
        answer = alice.control("reload")
        assert (answer["reloaded"], answer["problems"]) == (True, [])
        served.write("  alice: {key: alices-first-key, admin: maybe}\n" + BOB)
        answer = alice.control("reload")
        assert not answer["reloaded"]
        assert "brokerd.yaml:3:" in answer["problems"][0]


def test_handshake_peer_uid_without_key_needs_name_only(
    served: ReloadableDaemon,
) -> None:
    """With peer_uid and without a key, the name is enough on a Unix socket. Elsewhere a
    key is needed.
    """
    served.write(ALICE + BOB + f"  ops: {{peer_uid: [{os.getuid()}]}}\n")
    assert served.reload() == []
    with brokerd_client.connect(str(served.home / "sock"), name="ops") as ops:
        assert ops.name == "ops"
    with pytest.raises(InvalidKey, match="peer_uid"):
        brokerd_client.connect("127.0.0.1:9", name="ops")


def test_reload_finishes_pending_revocation_of_previous_one(
    served: ReloadableDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the broker had no time for it yet, the next reload completes it first. No
    forbidden subscription returns.
    """
    left: list[int] = []
    finish = Revocation.finish
    monkeypatch.setattr(Broker, "run_deferred", lambda self, count: None)
    monkeypatch.setattr(
        Revocation, "finish", lambda self, session: left.append(len(self)) or finish(self, session)
    )
    with served.connect("bob", "bobs-first-key") as bob:
        for number in range(300):
            bob.subscribe(f"t.{number}")
        served.write('  bob: {key: bobs-first-key, subscribe: ["t.7"]}\n')
        assert served.reload() == []
        assert served.call(
            lambda: (len(served.daemon.broker.revocation), len(served.daemon.broker.topics))
        ) == (1, 300)

        served.write('  bob: {key: bobs-first-key, subscribe: ["t.*"]}\n')
        assert served.reload() == []

        assert left == [0, 0]
        assert served.call(lambda: len(served.daemon.broker.topics)) == 1
