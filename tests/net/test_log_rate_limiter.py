"""How refusals are logged, one by one or counted. Also how a bug of the broker ends one
connection.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.raw_client import packed
from support.running_daemon import Recorder, configuration, running_daemon

from brokerd.core import routing
from brokerd.core.log_events import LogEvent
from brokerd.log.minute_counts import MOST, MinuteCounts
from brokerd.log.rate_limit import LogRateLimiter
from brokerd.net.core_events import report


def test_log_many_refused_connections_are_counted_not_repeated(socket_dir: Path) -> None:
    """The first refusals have a line each. The rest share lines with their number, and
    none is left out.
    """
    with running_daemon(configuration(str(socket_dir / "sock"))) as broker:
        for _ in range(300):
            with broker.raw() as peer:
                peer.read_body()
                peer.write(b"GET / HTTP/1.1\r\n\r\n")
                assert peer.is_refused()
        broker.log.wait("client.refused_more")
        # All three hundred are accounted for, however many periods they fell into.
        broker.login("alice").close()
        broker.log.wait("client.disconnected")
        broker.stop_soon()
        broker.log.wait("daemon.stopped")
        more = sum(event.fields["count"] for event in broker.log.named("client.refused_more"))
        assert len(broker.log.named("client.refused")) + more == 300


@pytest.mark.parametrize(
    "bug",
    [ZeroDivisionError("a bug"), UnicodeDecodeError("utf-8", b"\xff of a message", 0, 1, "a bug")],
)
def test_log_exception_in_routing_is_error_and_ends_one_connection(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, bug: Exception
) -> None:
    """The log has the traceback and no payload. Other connections are not affected."""
    with running_daemon(configuration(str(socket_dir / "sock"))) as broker:
        alice, bob = broker.login("alice"), broker.login("bob")
        right = routing.feed

        def wrong(broker: object, source: object, *rest: object) -> object:
            if getattr(source, "address", "") == "alice":
                raise bug
            return right(broker, source, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(routing, "feed", wrong)
        alice.send(1, "bob", b"hello")
        assert alice.is_closed()
        event = broker.log.wait("daemon.bug")[0]
        assert event.level == "error"
        assert type(bug).__name__ in event.fields["error"]
        assert "a bug" in "".join(event.fields["trace"])
        assert "of a message" not in str(event.fields)
        assert bob.ask("whoami").json["name"] == "bob"
        alice.close()
        bob.close()


def test_log_denied_message_is_warning(socket_dir: Path) -> None:
    """The event has both names, the address, the origin, the code and the reason."""
    clients = {"alice": {"send_to": ["bob"]}, "bob": None, "carol": None}
    with (
        running_daemon(configuration(str(socket_dir / "sock"), clients)) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(1, "carol", b"hello")
        alice.recv()
        event = broker.log.wait("message.refused")[0]
        assert (event.level, event.fields) == (
            "warning",
            {
                "name": "alice",
                "address": "alice",
                "peer": f"unix uid={os.getuid()}",
                "to": "carol",
                "code": "denied",
                "reason": "alice may not send to carol",
            },
        )


def test_log_message_to_offline_recipient_is_debug(socket_dir: Path) -> None:
    """An error that concerns only its sender does not fill an operator's log."""
    with (
        running_daemon(configuration(str(socket_dir / "sock"))) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(1, "bob", b"hello")
        alice.recv()
        assert broker.log.wait("message.refused")[0].level == "debug"


def test_log_many_refused_messages_are_counted(socket_dir: Path) -> None:
    """Twenty thousand denied messages make a few lines, and every message is counted."""
    clients = {"alice": {"send_to": ["bob"]}, "bob": None, "carol": None}
    with (
        running_daemon(configuration(str(socket_dir / "sock"), clients)) as broker,
        broker.login("alice") as alice,
    ):
        for _ in range(20):
            alice.write(packed(1, "carol", b"hello") * 1000)
            for _ in range(1000):
                assert alice.recv().code == "denied"
        broker.stop_soon()
        broker.log.wait("daemon.stopped")
        lines, more = broker.log.named("message.refused"), broker.log.named("message.refused_more")
        assert len(lines) + len(more) < 30
        counts = [event.fields.get("count", 1) for event in (*lines, *more)]
        assert sum(counts) == 20_000
        assert {reason for event in more for reason in event.fields["reasons"]} <= {
            "alice, carol: denied"
        }


class _Clock:
    """The loop's time and its timers, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Any, *arguments: Any) -> Any:
        due = (self.now + seconds, lambda: call(*arguments))
        self.timers.append(due)
        return SimpleNamespace(cancel=lambda: self.timers.remove(due))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [timer for timer in self.timers if timer[0] <= end]:
            self.now, call = first = min(due, key=lambda timer: timer[0])
            self.timers.remove(first)
            call()
        self.now = end


def test_log_rate_limiter_lasting_flood_is_logged_less_and_less_often() -> None:
    """An hour of one refusal, ten times a second, makes about a hundred lines. After a
    pause the limiter starts over.
    """
    clock, log = _Clock(), Recorder()
    log_limiter = LogRateLimiter(clock, log.logger)  # type: ignore[arg-type]

    for _ in range(36_000):
        log_limiter.note("warning", "x.happened", "alice, bob: denied")
        clock.advance(0.1)

    assert len(log.events) < 150
    clock.advance(200)
    counted = sum(event.fields["count"] for event in log.named("x.happened_more"))
    assert len(log.named("x.happened")) + counted == 36_000
    log.events.clear()
    for _ in range(3):
        log_limiter.note("warning", "x.happened", "alice, bob: denied")
    assert len(log.named("x.happened")) == 3


def test_log_rate_limiter_flood_with_many_reasons_is_bounded() -> None:
    """However many names a peer invents, some dozens of lines are logged, and one with
    the number of the rest.
    """
    clock, log = _Clock(), Recorder()
    log_limiter = LogRateLimiter(clock, log.logger)  # type: ignore[arg-type]

    for number in range(100_000):
        log_limiter.note("warning", "x.happened", f"alice, {number}: denied")
    # Each reason contains a peer's own text, and is kept for up to a minute.
    assert len(log_limiter._flows["x.happened"].limit.counted) <= 1001
    log_limiter.close()

    assert len(log.named("x.happened")) == 50
    (more,) = log.named("x.happened_more")
    assert more.fields["count"] == 99_950
    assert len(more.fields["reasons"]) == 5


@pytest.mark.parametrize(
    ("op", "level"), [("stats", "debug"), ("keys", "debug"), ("drain", "info"), ("reload", "info")]
)
def test_log_admin_change_is_info_and_query_is_debug(op: str, level: str) -> None:
    """A dashboard that asks for counts every second does not fill the log. A change is
    logged.
    """
    log = Recorder()
    session: Any = SimpleNamespace(
        client=SimpleNamespace(name="ops"), address="ops", peer="unix uid=0"
    )
    clock: Any = _Clock()
    counts = MinuteCounts(clock, log.logger)
    events = [LogEvent("admin.asked", session, "", op, "", 1)]
    report(events, LogRateLimiter(clock, log.logger), counts)
    (event,) = log.events
    assert (event.level, event.event, event.fields["op"]) == (level, "admin.asked", op)


def test_minute_counts_repeated_key_is_logged_at_once_and_then_once_a_minute() -> None:
    """Each key has at most one line a minute, and no event is left out."""
    clock, log = _Clock(), Recorder()
    counts = MinuteCounts(clock, log.logger)  # type: ignore[arg-type]

    counts.note("x.counted", {"sender": "alice", "to": "bob"}, 1, reason="first")
    assert [event.fields["count"] for event in log.events] == [1]
    for _ in range(70):
        counts.note("x.counted", {"sender": "alice", "to": "bob"}, 2, reason="later")
        clock.advance(1)
    counts.note("x.counted", {"sender": "alice", "to": "carol"}, 1)
    clock.advance(300)

    lines = [(event.fields["to"], event.fields["count"]) for event in log.named("x.counted")]
    assert lines == [("bob", 1), ("bob", 120), ("carol", 1), ("bob", 20)]
    assert log.events[1].fields["reason"] == "later"
    assert not counts._counts
    assert not clock.timers


def test_minute_counts_with_many_keys_are_bounded() -> None:
    """Keys beyond the bound share one, and closing logs what was only counted."""
    clock, log = _Clock(), Recorder()
    counts = MinuteCounts(clock, log.logger)  # type: ignore[arg-type]

    for number in range(10 * MOST):
        counts.note("x.counted", {"sender": "alice", "to": f"name{number}"}, 1)
    counts.close()

    assert len(log.events) == MOST + 2
    assert sum(event.fields["count"] for event in log.events) == 10 * MOST
    assert log.events[-1].fields["to"] == "others"
    assert not clock.timers


def test_log_message_to_offline_recipient_is_counted_at_info(socket_dir: Path) -> None:
    """At the default level, a refusal shows at once, with both names and the code."""
    with (
        running_daemon(configuration(str(socket_dir / "sock"))) as broker,
        broker.login("alice") as alice,
    ):
        alice.send(1, "bob", b"hello")
        alice.recv()
        (event,) = broker.log.wait("message.refusals")
        assert (event.level, event.fields) == (
            "info",
            {
                "sender": "alice",
                "to": "bob",
                "code": "offline",
                "count": 1,
                "reason": "bob is not connected",
            },
        )
