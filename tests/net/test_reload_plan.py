"""What a reload reports and does step by step: the plan before and after, and what can
fail.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.raw_client import WELCOME, Raw, prefixed
from support.reloadable_daemon import BOB, ReloadableDaemon, is_disconnected
from support.running_daemon import TIMEOUT_S

import brokerd_client
from brokerd.config.load import load
from brokerd.daemon.reload import ReloadOutcome, json_pieces, logged
from brokerd_client.address import Address
from brokerd_client.errors import AuthenticationError, Disconnected, TimedOut

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc says what is open")
OPS = "  ops: {key: the-key-of-ops, admin: true}\n"


@pytest.fixture
def served(socket_dir: Path) -> Iterator[ReloadableDaemon]:
    reloadable = ReloadableDaemon(socket_dir)
    reloadable.write(OPS + BOB)
    reloadable.start()
    try:
        yield reloadable
    finally:
        reloadable.close()


@pytest.fixture
def ops(served: ReloadableDaemon) -> Iterator[Any]:
    with served.connect("ops", "the-key-of-ops") as client:
        yield client


def test_reload_dry_run_returns_plan_and_changes_nothing(
    served: ReloadableDaemon, ops: Any
) -> None:
    """The plan has the added, removed and changed clients, the connections to end and
    the addresses.
    """
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(
            "  ops: {key: the-key-of-ops, admin: true, queue: 1MiB}\n  carol: {key: c}\n",
            listen=f", {served.home / 'second'}",
        )
        answer = ops.control("reload", dry_run=True)

        assert (answer["reloaded"], answer["dry_run"], answer["problems"], answer["cause"]) == (
            False,
            True,
            [],
            "",
        )
        assert Path(answer["config"]) == served.home / "brokerd.yaml"
        plan = answer["plan"]
        assert (plan["added"], plan["removed"]) == (["carol"], ["bob"])
        assert plan["changed"] == {"ops": ["queue: 8MiB -> 1MiB"]}
        assert plan["opened"] == [str(served.home / "second")]
        (leaving,) = plan["disconnected"]
        assert leaving["address"] == "bob"
        assert leaving["reason"] == "name removed from the configuration"
        assert not (served.home / "second").exists()
        assert not is_disconnected(bob)
        assert served.log.named("daemon.reloaded") == []

        done = ops.control("reload")
        assert done["plan"] == plan
        (logged,) = served.log.wait("daemon.reloaded")
        assert plan.items() <= logged.fields.items()
        assert is_disconnected(bob)
        assert (served.home / "second").exists()


@pytest.mark.parametrize("count", [0, 1, 500, 512, 513, 2000])
def test_reload_plan_is_encoded_in_pieces(count: int) -> None:
    """The pieces are the JSON of the whole plan, and none has more than 512 entries."""
    names = [f"c{number}" for number in range(count)]
    plan: dict[str, Any] = {
        "added": names,
        "changed": {name: ["queue: 1MiB -> 2MiB"] for name in names},
        "restart": [],
        "altered": {"@x": ["mode: 0600 -> 0660"]},
    }

    pieces = list(json_pieces(plan))

    assert json.loads(b"".join(pieces)) == plan
    assert max(piece.count(b"c") for piece in pieces) <= 2 * 512
    reply = ReloadOutcome(plan, plan_json=pieces).as_reply("b.yaml", dry_run=True)
    assert json.loads(b"".join(reply))["plan"] == plan
    assert json.loads(b"".join(ReloadOutcome(None).as_reply("b", dry_run=True)))["plan"] is None


def test_reload_plan_in_log_is_shortened() -> None:
    """A list of very many clients ends in their number; the reply to a client is whole."""
    names = [f"c{number}" for number in range(1002)]
    plan = {
        "added": names,
        "removed": names[:1000],
        "changed": {name: ["queue: 1MiB -> 2MiB"] for name in names},
        "restart": [],
    }

    fields = logged(plan)

    assert fields["added"] == [*names[:1000], "and 2 more"]
    assert fields["removed"] == names[:1000]
    assert [*fields["changed"]] == fields["added"]
    assert fields["restart"] == []


def test_reload_dry_run_of_invalid_file_returns_every_problem(
    served: ReloadableDaemon, ops: Any
) -> None:
    """The reply has the kind of problem. No refusal is logged, since no change was to
    be made.
    """
    served.write("  ops: {key: k, admin: maybe}\n  bob: {kye: b}\n")

    answer = ops.control("reload", dry_run=True)

    assert (answer["reloaded"], answer["cause"], answer["plan"]) == (False, "config", None)
    assert len(answer["problems"]) == 2
    assert served.log.named("daemon.reload_refused") == []


@pytest.mark.parametrize(
    ("address", "says"),
    [("plain", "a file that is not a socket"), ("missing/sock", "make the directory first")],
)
def test_reload_dry_run_reports_obstacle_to_socket_file(
    served: ReloadableDaemon, ops: Any, address: str, says: str
) -> None:
    """An obstacle that can be seen without binding is a problem in the dry run already."""
    (served.home / "plain").write_text("no socket")
    served.write(OPS + BOB, listen=f", {served.home / address}")

    foreseen, refused = ops.control("reload", dry_run=True), ops.control("reload")

    assert foreseen["cause"] == refused["cause"] == "listen"
    assert says in foreseen["problems"][0]
    assert says in refused["problems"][0]


def test_reload_dry_run_binds_no_address(served: ReloadableDaemon, ops: Any) -> None:
    """A port that another program uses is a problem only in the real run. The reply
    names the address both times.
    """
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        served.write(OPS + BOB + "  carol: {key: c}\n", listen=f", '{address}'")

        assert ops.control("reload", dry_run=True)["plan"]["opened"] == [address]
        answer = ops.control("reload")

    assert (answer["reloaded"], answer["cause"]) == (False, "listen")
    assert f"can't listen at {address}" in answer["problems"][0]
    assert served.log.wait("daemon.reload_refused")[0].fields["cause"] == "listen"
    assert "carol" not in served.daemon.config.clients


def test_reload_wildcard_over_open_address_is_refused(served: ReloadableDaemon, ops: Any) -> None:
    """New addresses are opened before old ones are closed. Where that is impossible,
    both runs say so.
    """
    with socket.create_server(("127.1.2.3", 0)) as free:
        port = free.getsockname()[1]
    served.write(OPS + BOB, listen=f", '127.1.2.3:{port}'")
    assert served.reload() == []
    served.write(OPS + BOB + "  carol: {key: c}\n", listen=f", '0.0.0.0:{port}'")

    foreseen, refused = ops.control("reload", dry_run=True), ops.control("reload")

    assert foreseen["problems"] == refused["problems"]
    assert (
        f"0.0.0.0:{port} while this broker listens at 127.1.2.3:{port} (restart it)"
        in refused["problems"][0]
    )
    assert "carol" not in served.daemon.config.clients


def test_reload_that_disconnects_its_administrator_is_answered_first(
    served: ReloadableDaemon, ops: Any
) -> None:
    """The reply is written before the connection ends, and says that it will."""
    served.write("  ops: {key: another-key, admin: true}\n" + BOB)

    answer = ops.control("reload")

    assert answer["reloaded"]
    (leaving,) = answer["plan"]["disconnected"]
    assert (leaving["address"], leaving["reason"]) == (
        "ops",
        "key removed from the configuration",
    )
    assert is_disconnected(ops)


def test_reload_client_with_forbidden_peer_uid_is_disconnected(served: ReloadableDaemon) -> None:
    """A changed peer_uid holds for open connections too."""
    uid = os.getuid()
    served.write(OPS + f"  bob: {{key: bobs-first-key, peer_uid: [{uid}]}}\n")
    assert served.reload() == []
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(OPS + f"  bob: {{key: bobs-first-key, peer_uid: [{uid}, {uid + 1}]}}\n")
        assert served.reload() == []
        assert not is_disconnected(bob)
        served.write(OPS + f"  bob: {{key: bobs-first-key, peer_uid: [{uid + 1}]}}\n")
        assert served.reload() == []
        assert is_disconnected(bob)
        assert "peer_uid" in served.log.wait("client.disconnected")[-1].fields["reason"]


def test_reload_key_file_with_another_key_disconnects_client(served: ReloadableDaemon) -> None:
    """The path and the entry stay the same, and the file is read again. A connection
    with the old key ends.
    """
    file = served.home / "bob.key"
    file.write_text("bobs-first-key\n")
    file.chmod(0o600)
    served.write(OPS + "  bob: {key_file: bob.key}\n")
    assert served.reload() == []
    with served.connect("bob", "bobs-first-key") as bob:
        assert served.reload() == []
        assert not is_disconnected(bob)
        file.write_text("bobs-second-key\n")
        assert served.reload() == []
        assert is_disconnected(bob)
    assert list(served.log.named("daemon.reloaded")[-1].fields["changed"]) == ["bob"]
    served.connect("bob", "bobs-second-key").close()
    file.unlink()
    assert "there is no file" in served.reload()[0]
    served.connect("bob", "bobs-second-key").close()


def test_reload_keeps_queued_messages(served: ReloadableDaemon, ops: Any) -> None:
    """Bytes that wait for a client that does not read arrive afterwards, in order."""
    with served.connect("bob", "bobs-first-key") as bob:
        body, count = bytes(100_000), 40
        for _ in range(count):
            ops.send_confirmed("bob", body)
        served.write(OPS + BOB + "  carol: {key: c}\n")
        assert served.reload() == []
        ops.send_confirmed("bob", b"last")
        for _ in range(count):
            assert bob.recv(timeout=TIMEOUT_S).body == body
        assert bob.recv(timeout=TIMEOUT_S).body == b"last"


def test_reload_mode_that_cannot_be_set_changes_nothing(
    served: ReloadableDaemon, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sockets that change, the second fails. The first gets its old mode back,
    new ones are closed, and all else stays.
    """
    one, two, new = (served.home / name for name in ("one", "two", "new"))

    def listen(mode: str, more: str = "") -> str:
        return f", {{address: {one}, mode: '{mode}'}}, {{address: {two}, mode: '{mode}'}}{more}"

    served.write(OPS + BOB, listen=listen("0600"))
    assert served.reload() == []
    two.unlink()
    two.write_text("somebody else's file")
    served.write(OPS + BOB + "  carol: {key: c}\n", listen=listen("0666", f", {new}"))

    answer = ops.control("reload")

    assert "the socket is no longer this broker's" in answer["problems"][0]
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert not new.exists()
    assert "carol" not in served.daemon.config.clients
    # The next reload still makes this change.
    two.unlink()
    served.write(OPS + BOB, listen=f", {{address: {one}, mode: '0666'}}")
    assert served.reload() == []
    assert stat.S_IMODE(one.stat().st_mode) == 0o666


def test_reload_unknown_group_changes_nothing(served: ReloadableDaemon) -> None:
    """The whole reload is refused, and the error names the socket's path."""
    path = served.home / "sock"
    file = served.home / "brokerd.yaml"
    file.write_text(
        file.read_text().replace(
            str(path), f"{{address: {path}, mode: '0660', group: no-such-group}}"
        )
    )

    (problem,) = served.reload()

    assert str(path) in problem
    assert "no-such-group" in problem
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file to any group")
def test_reload_group_of_socket_file_is_set_and_reset(served: ReloadableDaemon) -> None:
    """A group removed from the configuration gives the file back to the broker's own
    group.
    """
    path = served.home / "second"
    for group, gid in ((", group: 12345", 12345), ("", os.getgid())):
        served.write(OPS + BOB, listen=f", {{address: {path}, mode: '0660'{group}}}")
        assert served.reload() == []
        assert (path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)) == (gid, 0o660)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file to any group")
@pytest.mark.parametrize(
    ("before", "after", "between"), [("0600", "0660", 0o600), ("0660", "0600", 0o600)]
)
def test_reload_mode_while_group_changes_is_allowed_by_both_entries(
    served: ReloadableDaemon, monkeypatch: pytest.MonkeyPatch, before: str, after: str, between: int
) -> None:
    """While a socket file gets another group, its mode is what both entries allow."""
    path = served.home / "second"
    served.write(OPS + BOB, listen=f", {{address: {path}, mode: '{before}'}}")
    assert served.reload() == []
    seen = []
    right = os.chown

    def chown(*arguments: Any, **named: Any) -> None:
        seen.append(stat.S_IMODE(path.stat().st_mode))
        right(*arguments, **named)

    monkeypatch.setattr(os, "chown", chown)
    served.write(OPS + BOB, listen=f", {{address: {path}, mode: '{after}', group: 12345}}")
    assert served.reload() == []
    assert seen == [between]
    assert stat.S_IMODE(path.stat().st_mode) == int(after, 8)


def test_reload_closed_listener_accepts_waiting_connection(served: ReloadableDaemon) -> None:
    """A connection that the system has made, and the broker has not seen yet, is not
    lost with the listener.
    """
    second = served.home / "second"
    served.write(OPS + BOB, listen=f", {second}")
    assert served.reload() == []
    served.write(OPS + BOB)
    config = load(served.home / "brokerd.yaml")

    def connect_and_close() -> Raw:
        raw = Raw(Address("AF_UNIX", path=str(second)))
        served.daemon.apply(config, "test")
        return raw

    with served.call(connect_and_close) as raw:
        assert not second.exists()
        raw.log_in(b"bobs-first-key", b"bob")
        raw.ping()


def list_open(file: Path) -> int:
    """Return how many descriptors of this process refer to the file."""
    there = 0
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            there += each.readlink() == file
    return there


@linux
def test_reload_waiting_for_file_does_not_block_broker(served: ReloadableDaemon, ops: Any) -> None:
    """While a reload waits for its files, messages flow and clients connect. When they
    can be read, it continues.
    """
    fifo = served.home / "slow.yaml"
    os.mkfifo(fifo)
    file = served.home / "brokerd.yaml"
    served.write(OPS + BOB)
    with file.open("a") as text:
        text.write("include: [slow.yaml]\n")
    writer = os.open(fifo, os.O_RDWR)
    answers: list[list[str]] = []
    reload = threading.Thread(target=lambda: answers.append(served.reload()))
    reload.start()
    try:
        # One descriptor belongs to the writer, one to the reload.
        while list_open(fifo) < 2:
            ops.ping()
        with pytest.raises(TimedOut):
            ops.control("reload", timeout=0.05)
        with served.connect("bob", "bobs-first-key") as bob:
            ops.send_confirmed("bob", "still")
            assert bob.recv(timeout=TIMEOUT_S).payload == "still"
        assert not answers
        # The second reload, which waits for the first, reads an ordinary file.
        served.write(OPS + BOB + "  dave: {key: d}\n")
        os.write(writer, b"clients: {carol: {key: c}}\n")
    finally:
        os.close(writer)
    reload.join(TIMEOUT_S)
    assert answers == [[]]
    served.log.wait("daemon.reloaded", 2)
    first, second = served.log.named("daemon.reloaded")
    assert (first.fields["added"], second.fields["added"]) == (["carol"], ["dave"])
    assert second.fields["removed"] == ["carol"]


def test_reload_several_at_once_run_one_after_another(served: ReloadableDaemon) -> None:
    """Each reads the files again, and the last one sees their last state."""
    served.write(OPS + BOB + "  carol: {key: c}\n")
    threads = [threading.Thread(target=served.reload) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)

    events = served.log.named("daemon.reloaded")
    assert [event.fields["added"] for event in events] == [["carol"], [], [], [], []]


def test_reload_during_drain_is_refused(served: ReloadableDaemon) -> None:
    """A broker that stops takes no new configuration, and the log gives the reason."""
    served.write(OPS + BOB + "  carol: {key: c}\n")
    served.stop_soon()

    assert "the broker is stopping" in served.reload()[0]
    assert served.log.named("daemon.reload_refused")[0].fields["cause"] == "draining"
    assert "carol" not in served.daemon.config.clients


def test_handshake_key_removed_by_reload_before_welcome_is_refused(
    served: ReloadableDaemon,
) -> None:
    """A reload may happen between the proof and the welcome. The configuration at the
    end of the handshake counts.
    """
    raw = Raw(served.daemon.addresses[0])
    raw.write(prefixed(raw.answer(b"bobs-first-key", b"bob")))
    assert raw.read_body() == WELCOME
    raw.challenge(b"bobs-first-key")
    served.write(OPS + "  bob: {key: bobs-second-key}\n")
    assert served.reload() == []

    raw.write(prefixed(WELCOME))

    assert raw.is_closed("key_removed")
    (refused,) = served.log.wait("client.refused")
    assert refused.fields["reason"] == "key removed from the configuration"
    raw.close()


def test_reload_keeps_last_use_of_keys(served: ReloadableDaemon, ops: Any) -> None:
    """The broker keeps which key was used and when. A key that was removed and added
    again counts as unused.
    """
    served.connect("bob", "bobs-first-key").close()

    def keys() -> dict[str, Any]:
        return {each["name"]: each["keys"] for each in ops.control("keys")["clients"]}

    before = keys()
    served.write(OPS + "  bob: {keys: [{key: bobs-second-key}, {key: bobs-first-key}]}\n")
    assert served.reload() == []
    (second, first) = keys()["bob"]
    assert first["last_used"] == before["bob"][0]["last_used"] is not None
    assert (second["last_used"], second["state"], first["id"]) == (
        None,
        "valid",
        before["bob"][0]["id"],
    )
    assert keys()["ops"][0]["connections"] == 1
    served.write(OPS + "  bob: {key: bobs-second-key}\n")
    assert served.reload() == []
    served.write(OPS + BOB)
    assert served.reload() == []
    assert keys()["bob"][0]["last_used"] is None


def test_reload_connection_whose_key_expired_stays(served: ReloadableDaemon, ops: Any) -> None:
    """The time of a key concerns logins only. The connection stays, a new one is
    refused, and the list shows it.
    """
    with served.connect("bob", "bobs-first-key") as bob:
        served.write(OPS + "  bob: {keys: [{key: bobs-first-key, not_after: 2001-01-01}]}\n")
        assert served.reload() == []
        assert not is_disconnected(bob)
        with pytest.raises((AuthenticationError, Disconnected)):
            served.connect("bob", "bobs-first-key")
        (key,) = next(
            each["keys"] for each in ops.control("keys")["clients"] if each["name"] == "bob"
        )
        assert (key["state"], key["connections"]) == ("expired", 1)
        (event,) = served.log.wait("key.expired")
        assert (event.fields["name"], event.fields["last"], event.fields["connections"]) == (
            "bob",
            True,
            1,
        )
        served.write(OPS + "  bob: {key: bobs-second-key}\n")
        assert served.reload() == []
        assert is_disconnected(bob)


def test_operation_keys_lists_client_with_peer_uid_without_id(
    served: ReloadableDaemon, ops: Any
) -> None:
    """Its one entry has no id, and counts its uses like any other."""
    served.write(OPS + f"  bob: {{peer_uid: [{os.getuid()}]}}\n")
    assert served.reload() == []
    with brokerd_client.connect(str(served.home / "sock"), name="bob"):
        (entry,) = next(
            each["keys"] for each in ops.control("keys")["clients"] if each["name"] == "bob"
        )
    assert (entry["id"], entry["connections"], "peer_uid" in entry["source"]) == (None, 1, True)
