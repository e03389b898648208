"""Taps over real sockets: when their copies are sent."""

from __future__ import annotations

import json
import select
from pathlib import Path

from support.raw_client import EVENT, MESSAGE, RECEIPT, WANT_RECEIPT, Raw
from support.running_daemon import configuration, running_daemon
from support.waiting import until

HEAD = b"\x0b$broker.tap"
CLIENTS = {"ops": {"admin": True}, "alice": {}, "bob": {"queue": "64KiB", "when_full": "wait"}}


def copied(ops: Raw) -> int:
    """Wait for the next copies; return their number."""
    event = ops.recv()
    assert event.kind == EVENT
    return len(json.loads(event.body.removeprefix(HEAD))["copies"])


def test_tap_copy_of_released_sender_is_sent_without_further_traffic(socket_dir: Path) -> None:
    """Its frame passes while the broker carries out what another read has decided."""
    with (
        running_daemon(configuration(str(socket_dir / "s"), CLIENTS)) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        (session,) = broker.daemon.broker.exchange.clients["alice"].sessions.values()

        def is_held() -> bool:
            return broker.call(lambda: session.held_by is not None)

        def is_answered() -> bool:
            return bool(select.select([alice.sock], [], [], 0)[0])

        # Less than limits.wait_timeout, at whose end another turn follows.
        ops.sock.settimeout(10)
        ops.ask("tap", pattern="alice")
        sent = seen = 0
        while not is_held():
            alice.send(MESSAGE, "bob", bytes(30_000), message_id=sent, flags=WANT_RECEIPT)
            sent += 1
            until(lambda: is_answered() or is_held())
            if is_answered():
                assert alice.recv().kind == RECEIPT
        for _ in range(sent):
            bob.recv()
        while seen < sent:
            seen += copied(ops)
        assert seen == sent


def test_tap_is_noted_for_the_audit_with_its_pattern(socket_dir: Path) -> None:
    """At level info, as whatever an administrator does besides reading counters."""
    with (
        running_daemon(configuration(str(socket_dir / "s"), CLIENTS)) as broker,
        broker.login("ops") as ops,
    ):
        ops.ask("stats")
        ops.ask("tap", pattern="alice")
        stats, tap = broker.log.wait("admin.asked", 2)

    assert (stats.level, tap.level) == ("debug", "info")
    assert {key: tap.fields[key] for key in ("name", "op", "to")} == {
        "name": "ops",
        "op": "tap",
        "to": "alice",
    }
