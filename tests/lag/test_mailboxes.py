"""The event loop stays responsive while mailboxes with much content are looked at,
emptied and acknowledged.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.keys import key_of
from support.lag.crowded_broker import OWN, Crowded, crowded
from support.raw_client import (
    ACK,
    ERROR,
    EVENT,
    JSON,
    MESSAGE,
    RECEIPT,
    REPLY,
    REQUEST,
    WANT_ACK,
    WANT_RECEIPT,
    Frame,
    Raw,
    packed,
)

from brokerd.config.load import load_text

pytestmark = pytest.mark.slow

#: Messages in each mailbox, and of these, how many are held, delayed and dead.
COUNT = 20_000
SOME = 2_000
WINDOW = 10_000
NAMES = [f"box{number}" for number in range(50)]


def config(directory: str) -> str:
    """Return a configuration with many mailboxes; the test fills one of them."""
    box = "mailbox: {window: 10000, dead: 100%, attempts: 1}, queue: 64MiB"
    lines = [f'listen: ["{OWN}"]', f"store: {{path: {directory}, min_free: 0}}", "clients:"]
    for name, entry in {
        "alice": "",
        "ops": "admin: payload",
        "bob": f"{box}, connections: 2",
        **dict.fromkeys(NAMES, box),
    }.items():
        lines.append(f'  {name}: {{key: "{key_of(name).decode()}", {entry}}}')
    return "\n".join(lines) + "\n"


@pytest.fixture
def broker() -> Iterator[Crowded]:
    """A broker whose bob has a full mailbox."""
    with (
        tempfile.TemporaryDirectory(prefix="bd-") as directory,
        crowded(load_text(config(directory))) as broker,
    ):
        with broker.login("alice") as alice:
            fill(alice, COUNT)
        broker.idle()
        broker.meter.reset()
        yield broker


def fill(alice: Raw, count: int, to: str = "bob", size: int = 160) -> None:
    """Store messages, the last of which is on disk then."""
    payload = bytes(size)
    frames = [packed(MESSAGE, to, payload, message_id=number) for number in range(count - 1)]
    alice.write(b"".join(frames))
    alice.send(MESSAGE, to, payload, message_id=count, flags=WANT_RECEIPT)
    assert alice.recv().kind == RECEIPT


def is_answer(frame: Frame) -> bool:
    return frame.kind in (REPLY, ERROR) and frame.id == 7


def ask(peer: Raw, op: str, **arguments: Any) -> dict[str, Any]:
    """Return the REPLY to an operation; deliveries before it are passed over."""
    text = json.dumps({"op": op, **arguments}).encode()
    peer.send(REQUEST, "$broker", text, message_id=7, codec=JSON)
    while not is_answer(answer := peer.recv()):
        pass
    assert answer.kind == REPLY, answer
    reply: dict[str, Any] = answer.json
    return reply


def receive(peer: Raw, count: int) -> list[int]:
    """Return the seqs of the next deliveries."""
    found: list[int] = []
    while len(found) < count:
        frame = peer.recv()
        if frame.kind in (MESSAGE, EVENT):
            found.append(int.from_bytes(frame.body[:8], "big"))
    return found


def settle(peer: Raw, seqs: list[int], verb: str = "") -> None:
    """Acknowledge each message on its own, all at once; wait until that is on disk."""
    payload = json.dumps({"verb": verb}).encode() if verb else b""
    codec = JSON if verb else 0
    *most, last = seqs
    acks = [packed(ACK, "", payload, message_id=seq, codec=codec) for seq in most]
    acks.append(packed(ACK, "", payload, message_id=last, codec=codec, flags=WANT_RECEIPT))
    peer.write(b"".join(acks))
    while True:
        frame = peer.recv()
        if (frame.kind, frame.flags) == (RECEIPT, WANT_ACK):
            return


def test_event_loop_while_a_full_mailbox_is_looked_at(broker: Crowded) -> None:
    """Every state, whole pages; and an export of everything."""
    with broker.login("bob") as bob, broker.login("ops") as ops:
        ask(bob, "open_mailbox", window=SOME)
        settle(bob, receive(bob, SOME), "dead")
        ask(bob, "mailboxes")
        for state in ("ready", "held", "delayed", "dead", "all"):
            ask(ops, "mailbox_show", name="bob", state=state, limit=100, full=True)
            ask(ops, "mailbox_show", name="bob", state=state, limit=100, after=COUNT - 200)
        ask(ops, "why", name="bob")
        ask(ops, "stats")
        broker.idle()
    broker.idle()
    broker.meter.check()


@pytest.mark.parametrize("way", ["one by one", "cumulative", "failed", "back", "dead", "close"])
def test_event_loop_while_a_whole_window_is_acknowledged(broker: Crowded, way: str) -> None:
    """10,000 messages that one connection holds."""
    with broker.login("bob") as bob:
        ask(bob, "open_mailbox", window=WINDOW, window_bytes=1 << 24)
        seqs = receive(bob, WINDOW)
        if way == "cumulative":
            bob.send(ACK, "", message_id=seqs[-1], flags=WANT_ACK | WANT_RECEIPT)
            while bob.recv().kind != RECEIPT:
                pass
        elif way == "close":
            ask(bob, "close_mailbox")
        else:
            settle(bob, seqs, "" if way == "one by one" else way)
        broker.idle()
    broker.idle()
    broker.meter.check()


def test_event_loop_when_a_connection_with_a_whole_window_is_lost(broker: Crowded) -> None:
    with broker.login("bob") as bob:
        ask(bob, "open_mailbox", window=WINDOW, window_bytes=1 << 24)
        receive(bob, WINDOW)
    broker.until(lambda: not broker.daemon.broker.mailboxes.boxes["bob"].held)
    broker.idle()
    broker.meter.check()


@pytest.mark.parametrize(
    "act",
    [
        lambda ops: ask(ops, "mailbox_kick", name="bob", all=True),
        lambda ops: ask(ops, "mailbox_kick", name="bob", seq=WINDOW // 2),
        lambda ops: ask(ops, "mailbox_purge", name="bob", state="dead"),
        lambda ops: ask(ops, "mailbox_purge", name="bob", state="ready"),
        lambda ops: ask(ops, "mailbox_purge", name="bob"),
        lambda ops: ask(ops, "mailbox_drop", name="bob", seq=COUNT),
        lambda ops: [
            ask(ops, "mailbox_drop", name="bob", seq=seq) for seq in range(WINDOW + 1, WINDOW + 40)
        ],
    ],
    ids=["kick all", "kick", "purge dead", "purge ready", "purge", "drop", "drop many"],
)
def test_event_loop_while_an_operator_clears_a_mailbox(
    broker: Crowded, act: Callable[[Raw], object]
) -> None:
    """Half of its messages are dead letters."""
    with broker.login("bob") as bob:
        ask(bob, "open_mailbox", window=WINDOW, window_bytes=1 << 24)
        settle(bob, receive(bob, WINDOW), "dead")
    broker.idle()
    broker.meter.reset()
    with broker.login("ops") as ops:
        act(ops)
        broker.idle()
    broker.idle()
    broker.meter.check()


def test_event_loop_while_messages_are_imported(broker: Crowded) -> None:
    """The largest operation: one message of a MiB, in base64; and many small ones."""
    large = {"sender": "alice", "payload": "eHh4" * 350_000, "encoding": "base64"}
    small = {"sender": "alice", "payload": "x" * 900, "state": "dead"}
    with broker.login("ops") as ops:
        for lines in ([large], [small] * 100):
            reply = ask(ops, "mailbox_import", name="box1", messages=lines)
            assert reply == {"imported": len(lines), "known": 0, "expired": 0}
        shown = ask(ops, "mailbox_show", name="box1", state="all", full=True, limit=100)
        assert shown["messages"]
    broker.idle()
    broker.meter.check()


def test_event_loop_while_delayed_messages_come_due(broker: Crowded) -> None:
    """A whole window of them at once."""
    with broker.login("bob") as bob:
        ask(bob, "open_mailbox", window=WINDOW, window_bytes=1 << 24)
        seqs = receive(bob, WINDOW)
        payload = json.dumps({"verb": "back", "delay": 1}).encode()
        acks = [packed(ACK, "", payload, message_id=seq, codec=JSON) for seq in seqs]
        bob.write(b"".join(acks))
        settle(bob, receive(bob, WINDOW))
        broker.until(lambda: len(broker.daemon.broker.mailboxes.boxes["bob"].held) == WINDOW)
        broker.idle()
    broker.idle()
    broker.meter.check()
