"""Reloading the configuration of a running daemon: all of it, or nothing."""

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
    here = ReloadableDaemon(socket_dir)
    here.write(ALICE + BOB)
    here.start()
    try:
        yield here
    finally:
        here.close()


def test_a_client_that_is_added_can_connect_and_be_reached(served: ReloadableDaemon) -> None:
    """A new name works at once, for those who were there before too."""
    with served.connect("alice", "alices-first-key") as alice:
        with pytest.raises(NoSuchClient):
            alice.send_confirmed("carol", "hello")
        served.write(ALICE + BOB + "  carol: {key: carols-key}\n")
        assert served.reload() == []
        with served.connect("carol", "carols-key") as carol:
            alice.send_confirmed("carol", "hello")
            assert carol.recv(timeout=5).payload == "hello"


def test_a_client_whose_entry_did_not_change_keeps_its_connection(served: ReloadableDaemon) -> None:
    """Moving an entry to other lines is no change."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write("\n\n" + BOB + "  carol: {key: carols-key}\n" + ALICE)
        assert served.reload() == []
        assert not is_disconnected(bob)


def test_a_client_that_was_removed_is_disconnected(served: ReloadableDaemon) -> None:
    """Its name is unknown from then on, and the log says why it went."""
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


def test_client_that_is_disconnected_by_a_reload_is_told_key_removed(
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


def test_a_client_whose_key_in_use_is_gone_is_disconnected(served: ReloadableDaemon) -> None:
    """The old key opens nothing more, the new one does."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(ALICE + "  bob: {key: bobs-second-key}\n")
        assert served.reload() == []
        assert is_disconnected(bob)
    with pytest.raises(AuthenticationError):
        served.connect("bob", "bobs-first-key")
    served.connect("bob", "bobs-second-key").close()


def test_a_key_is_rotated_without_losing_a_connection(served: ReloadableDaemon) -> None:
    """While the old key is still listed, whoever used it stays."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(ALICE + "  bob: {keys: [{key: bobs-second-key}, {key: bobs-first-key}]}\n")
        assert served.reload() == []
        assert not is_disconnected(bob)


def test_changed_rules_hold_for_connections_that_stay(served: ReloadableDaemon) -> None:
    """Who was allowed before, and has its route cached, is denied afterwards."""
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


def test_a_subscription_that_is_not_allowed_any_more_ends(served: ReloadableDaemon) -> None:
    """The subscriber stays connected and gets nothing more of it."""
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
def test_a_bad_file_changes_nothing_and_says_why(
    served: ReloadableDaemon, broken: str, says: str
) -> None:
    """The running configuration stays whole, connections included."""
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(broken)
        assert says in "\n".join(served.reload())
        assert served.log.wait("daemon.reload_refused")[0].fields["problems"]
        assert not is_disconnected(bob)
    served.connect("alice", "alices-first-key").close()


def test_a_reload_whose_include_directory_is_gone_changes_nothing(served: ReloadableDaemon) -> None:
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
def test_a_reload_listens_again_where_a_socket_file_is_gone(
    served: ReloadableDaemon, how: str
) -> None:
    """A cleaner of /tmp took it: connections made before stay, new ones come in, and
    the log tells.
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
            assert bob.recv(timeout=5).payload == "hello"
        (restored,) = served.log.named("listener.restored")
        assert restored.fields["listener"] == str(path)
        assert served.reload() == []
        assert len(served.log.named("listener.restored")) == 1


@pytest.mark.skipif(os.name != "posix", reason="no socket files there")
def test_a_reload_leaves_another_brokers_socket_file_alone(served: ReloadableDaemon) -> None:
    """The log says once that nobody reaches this broker there, and the file stays; what
    the reload is for happens.
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
def test_a_socket_file_that_is_gone_comes_back_by_itself(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every some seconds the broker looks whether it can be reached; its monitor, too."""
    monkeypatch.setattr(daemons, "LOOK_S", 0.05)
    here = ReloadableDaemon(socket_dir)
    here.write(ALICE + f"monitor: {socket_dir}/page\n")
    here.start()
    try:
        for name in ("sock", "page"):
            (socket_dir / name).unlink()
        here.log.wait("listener.restored", 2)
        here.connect("alice", "alices-first-key").close()
        with socket.socket(socket.AF_UNIX) as page:
            page.connect(str(socket_dir / "page"))
    finally:
        here.close()
    assert {path.name for path in socket_dir.iterdir()} == {"brokerd.yaml"}


def test_odd_keys_are_warned_of_at_the_start_and_at_a_reload(socket_dir: Path) -> None:
    """One event has the count and the first warnings, none has a key."""
    here = ReloadableDaemon(socket_dir)
    here.write("".join(f"  c{number}: {{key: ' {number} a canary'}}\n" for number in range(30)))
    here.start()
    try:
        here.write(ALICE + "  bob: {key: 'bobs key '}\n")
        assert here.reload() == []
        first, second = here.log.named("key.odd")
        assert (first.level, first.fields["count"], len(first.fields["warnings"])) == (
            "warning",
            30,
            20,
        )
        assert second.fields["count"] == 1
        assert "a key of client 'bob' ends with white space" in second.fields["warnings"][0]
        assert "canary" not in str(here.log.events)
        here.write(ALICE)
        assert here.reload() == []
        assert len(here.log.named("key.odd")) == 2
    finally:
        here.close()


def test_an_address_that_cannot_be_bound_changes_nothing(served: ReloadableDaemon) -> None:
    """A new client in the same file is not there either: all or nothing."""
    (served.home / "plain").write_text("no socket")
    served.write(ALICE + BOB + "  carol: {key: carols-key}\n", listen=f", {served.home / 'plain'}")
    assert "a file that is not a socket" in served.reload()[0]
    with pytest.raises(AuthenticationError):
        served.connect("carol", "carols-key")
    served.connect("alice", "alices-first-key").close()


def test_listeners_open_close_and_change(served: ReloadableDaemon) -> None:
    """A new address is served, a removed one is gone with its file, and one that stays
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


def test_subscribers_hear_of_a_reload(served: ReloadableDaemon) -> None:
    """``$broker.reloaded`` is published when everything is taken over."""
    with served.connect("bob", "bobs-first-key") as bob:
        heard = bob.subscribe("$broker.reloaded")
        assert served.reload() == []
        assert next(iter(heard)).topic == "$broker.reloaded"


def test_an_administrator_reloads_and_hears_what_is_wrong(served: ReloadableDaemon) -> None:
    """The operation answers with the lines of the refused file."""
    served.write("  alice: {key: alices-first-key, admin: true}\n" + BOB)
    assert served.reload() == []
    with served.connect("alice", "alices-first-key") as alice:
        answer = alice.control("reload")
        assert (answer["reloaded"], answer["problems"]) == (True, [])
        served.write("  alice: {key: alices-first-key, admin: maybe}\n" + BOB)
        answer = alice.control("reload")
        assert not answer["reloaded"]
        assert "brokerd.yaml:3:" in answer["problems"][0]


def test_a_client_that_its_user_vouches_for_connects_with_its_name_alone(
    served: ReloadableDaemon,
) -> None:
    """With peer_uid and no key nothing else is needed on a Unix socket; elsewhere a key
    is.
    """
    served.write(ALICE + BOB + f"  ops: {{peer_uid: [{os.getuid()}]}}\n")
    assert served.reload() == []
    with brokerd_client.connect(str(served.home / "sock"), name="ops") as ops:
        assert ops.name == "ops"
    with pytest.raises(InvalidKey, match="peer_uid"):
        brokerd_client.connect("127.0.0.1:9", name="ops")


def test_a_reload_waits_until_what_the_last_one_forbade_has_ended(
    served: ReloadableDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the broker had no time for it yet, the next reload finds nothing left to
    do, and nothing is there again.
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
