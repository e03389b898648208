"""Mailboxes end to end: raw sockets, a broker process, its store on a real disk."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from support.broker_process import BrokerProcess
from support.raw_client import (
    ACK,
    ERROR,
    EVENT,
    EXTENSION,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_ACK,
    WANT_RECEIPT,
    Frame,
    Raw,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")


class Delivery(NamedTuple):
    """A stored message as it arrives."""

    seq: int
    attempt: int
    sender: str
    payload: bytes


def delivered(frame: Frame) -> Delivery:
    """Take a delivery of a MESSAGE apart."""
    assert (frame.kind, frame.flags & WANT_ACK) == (MESSAGE, WANT_ACK), frame
    seq, attempt = struct.unpack_from("!QH", frame.body)
    return Delivery(seq, attempt, frame.name, frame.body[10:])


def extension(**values: Any) -> bytes:
    """Return an extension as it lies in a frame."""
    text = json.dumps(values).encode()
    return struct.pack("!H", len(text)) + text


def store(alice: Raw, payload: bytes, message_id: int = 1, to: str = "bob") -> None:
    """Send a message to a mailbox and wait for its RECEIPT."""
    alice.send(MESSAGE, to, payload, message_id=message_id, flags=WANT_RECEIPT)
    answer = alice.recv()
    assert (answer.kind, answer.id) == (RECEIPT, message_id), answer


def open_mailbox(bob: Raw, **arguments: Any) -> dict[str, Any]:
    """Open the mailbox; return the REPLY, which precedes the first delivery."""
    answer = bob.ask("open_mailbox", **arguments)
    assert answer.kind == REPLY, answer
    reply: dict[str, Any] = answer.json
    return reply


def done(bob: Raw, seq: int) -> None:
    """Acknowledge a message and wait for the RECEIPT, which has the flag ACK."""
    bob.send(ACK, "", message_id=seq, flags=WANT_RECEIPT)
    answer = bob.recv()
    assert (answer.kind, answer.flags, answer.id) == (RECEIPT, WANT_ACK, seq), answer


def broker_in(directory: Path, mailbox: Any = True, **more: Any) -> BrokerProcess:
    """Return a broker whose bob has a mailbox."""
    clients = {"alice": {}, "bob": {"mailbox": mailbox}, "ops": {"admin": True}}
    return BrokerProcess(directory, clients, store={"path": "store", "min_free": 0}, **more)


def test_mailbox_keeps_messages_over_a_stop_and_a_kill(tmp_path: Path) -> None:
    with broker_in(tmp_path) as broker, broker.login("alice") as alice:
        store(alice, b"one")
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0
    with broker_in(tmp_path) as broker, broker.login("alice") as alice:
        store(alice, b"two")
        broker.popen.kill()
        broker.popen.wait()
    with broker_in(tmp_path) as broker, broker.login("bob") as bob:
        reply = open_mailbox(bob)
        assert (reply["ready"], reply["window"]) == (2, 64)
        assert delivered(bob.recv()) == (1, 1, "alice", b"one")
        assert delivered(bob.recv()) == (2, 1, "alice", b"two")
        done(bob, 1)
        broker.popen.kill()
        broker.popen.wait()
    with broker_in(tmp_path) as broker, broker.login("bob") as bob:
        assert open_mailbox(bob)["ready"] == 1
        assert delivered(bob.recv()) == (2, 1, "alice", b"two")


def test_mailbox_returns_messages_of_a_lost_connection_with_another_attempt(
    tmp_path: Path,
) -> None:
    with broker_in(tmp_path) as broker, broker.login("alice") as alice:
        for number in range(3):
            store(alice, b"%d" % number)
        with broker.login("bob") as bob:
            open_mailbox(bob, window=2)
            assert [delivered(bob.recv()).seq for _ in range(2)] == [1, 2]
        with broker.login("bob") as bob:
            open_mailbox(bob)
            assert delivered(bob.recv())[:2] == (1, 2)
            bob.send(ACK, "", message_id=1)
            assert delivered(bob.recv())[:2] == (2, 2)
            failed = json.dumps({"verb": "dead", "reason": "bad"}).encode()
            bob.send(ACK, "", failed, message_id=2, codec=JSON)
            assert delivered(bob.recv())[:2] == (3, 1)
            done(bob, 3)
            shown = bob.ask("mailbox_show", state="dead").json["messages"]
            assert [(each["seq"], each["reason"], each["payload"]) for each in shown] == [
                (2, "bad", "1")
            ]


def test_mailbox_stores_events_and_deduplicates(tmp_path: Path) -> None:
    mailbox = {"subscribe": ["orders.>"]}
    with broker_in(tmp_path, mailbox) as broker, broker.login("alice") as alice:
        for message_id in (1, 2):
            alice.send(
                EVENT,
                "",
                b"payload",
                message_id=message_id,
                flags=WANT_RECEIPT | EXTENSION,
                between=b"\x0aorders.new" + extension(key="k"),
            )
            answer = alice.recv()
            assert (answer.kind, answer.id) == (RECEIPT, message_id)
        with broker.login("bob") as bob:
            assert open_mailbox(bob)["ready"] == 1
            event = bob.recv()
            assert (event.kind, event.flags, event.name) == (EVENT, WANT_ACK | EXTENSION, "alice")
            tag = struct.pack("!QH", 1, 1)
            assert event.body == b"\x0aorders.new" + tag + extension(key="k") + b"payload"


def test_mailbox_full_is_refused_and_live_traffic_goes_on(tmp_path: Path) -> None:
    with (
        broker_in(tmp_path, {"messages": 1}) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        store(alice, b"one")
        alice.send(MESSAGE, "bob", b"two", message_id=2)
        refusal = alice.recv()
        assert (refusal.code, refusal.id, refusal.json["name"]) == ("full", 2, "bob")
        alice.send(REQUEST, "bob", b"live", message_id=3)
        request = bob.recv()
        assert (request.kind, request.body) == (REQUEST, b"live")


def test_mailbox_delay_and_ttl_are_kept(tmp_path: Path) -> None:
    with (
        broker_in(tmp_path) as broker,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        for payload, values in ((b"late", {"delay": 0.3}), (b"gone", {"ttl": 0.05})):
            alice.send(
                MESSAGE,
                "bob",
                payload,
                message_id=5,
                flags=WANT_RECEIPT | EXTENSION,
                between=extension(**values),
            )
            assert alice.recv().kind == RECEIPT
        bob.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            bob.recv()
        bob.sock.settimeout(30)
        open_mailbox(bob)
        frame = bob.recv()
        assert frame.body[10:] == extension(delay=0.3) + b"late"
        report = alice.recv()
        assert (report.code, report.id, report.json["seq"]) == ("expired", 5, 2)


@pytest.mark.timing
def test_mailbox_first_message_after_a_start_has_the_time_of_day(tmp_path: Path) -> None:
    with broker_in(tmp_path) as broker:
        with broker.login("alice") as alice:
            alice.send(
                MESSAGE,
                "bob",
                flags=WANT_RECEIPT | EXTENSION,
                between=extension(delay=3600),
            )
            assert alice.recv().kind == RECEIPT
        with broker.login("bob") as bob:
            (shown,) = bob.ask("mailbox_show", state="delayed").json["messages"]
    assert abs(shown["due_at"] - 3600 - time.time()) < 300


def test_mailbox_reload_takes_a_mailbox_away_and_gives_it_back(tmp_path: Path) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(broker_in(tmp_path))
        alice, bob, ops = (stack.enter_context(broker.login(n)) for n in ("alice", "bob", "ops"))
        store(alice, b"one")
        with_box = broker.config.read_text()
        values = yaml.safe_load(with_box)
        del values["clients"]["bob"]["mailbox"]
        broker.config.write_text(yaml.safe_dump(values))
        plan = ops.ask("reload").json["plan"]
        assert plan["orphaned"] == ["bob"]
        (entry,) = ops.ask("mailboxes").json["mailboxes"]
        assert (entry["name"], entry["orphaned"], entry["ready"]) == ("bob", True, 1)
        assert bob.ask("open_mailbox").code == "unsupported"
        broker.config.write_text(with_box)
        assert ops.ask("reload").json["reloaded"]
        open_mailbox(bob)
        assert delivered(bob.recv()) == (1, 1, "alice", b"one")


def test_mailbox_reload_opens_a_store(tmp_path: Path) -> None:
    clients: dict[str, Any] = {"alice": {}, "bob": {}, "ops": {"admin": True}}
    with BrokerProcess(tmp_path, clients) as broker, broker.login("ops") as ops:
        values = yaml.safe_load(broker.config.read_text())
        values["clients"]["bob"]["mailbox"] = True
        broker.config.write_text(yaml.safe_dump(values))
        assert "needs a directory" in ops.ask("reload").json["problems"][0]
        (tmp_path / "file").touch()
        values["store"] = {"path": "file", "min_free": 0}
        broker.config.write_text(yaml.safe_dump(values))
        outcome = ops.ask("reload").json
        assert (outcome["reloaded"], outcome["cause"]) == (False, "store")
        values["store"] = {"path": "store", "min_free": 0}
        broker.config.write_text(yaml.safe_dump(values))
        assert ops.ask("reload").json["reloaded"]
        with broker.login("alice") as alice:
            store(alice, b"one")


def test_mailbox_store_that_is_killed_is_reported_and_live_traffic_goes_on(
    tmp_path: Path,
) -> None:
    with ExitStack() as stack:
        broker = stack.enter_context(broker_in(tmp_path))
        alice, bob = (stack.enter_context(broker.login(name)) for name in ("alice", "bob"))
        store(alice, b"one")
        open_mailbox(bob)
        assert delivered(bob.recv()).seq == 1
        children = Path(f"/proc/{broker.popen.pid}/task/{broker.popen.pid}/children")
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        broker.wait("mailbox.store_failed")
        alice.send(MESSAGE, "bob", b"two", message_id=2)
        assert alice.recv().code == "store_failed"
        bob.send(ACK, "", message_id=1)
        refusal = bob.recv()
        assert (refusal.kind, refusal.flags, refusal.code) == (ERROR, WANT_ACK, "store_failed")
        alice.send(REQUEST, "bob", b"live", message_id=3)
        assert bob.recv().body == b"live"
