"""The monitor of key expiry: its warnings, their time, and how often they are repeated."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from support.running_daemon import Recorder

from brokerd.config.load import load_text
from brokerd.config.model import Config
from brokerd.daemon.key_expiry import KeyExpiryMonitor
from brokerd.net.handshake.keyring import Credential

START = datetime(2026, 6, 1, tzinfo=UTC)


class Clock:
    """The time of day and the timers, both moved by hand."""

    def __init__(self) -> None:
        self.clock_change = timedelta()
        self._elapsed = timedelta()
        self._act: Callable[[], None] | None = None
        self._due = timedelta()

    @property
    def now(self) -> datetime:
        return START + self._elapsed + self.clock_change

    def call_later(self, delay_s: float, act: Callable[[], None]) -> Clock:
        self._act, self._due = act, self._elapsed + timedelta(seconds=delay_s)
        return self

    def cancel(self) -> None:
        self._act = None

    def advance(self, **how_long: float) -> None:
        """Let time pass, and run the timers that are due."""
        until = self._elapsed + timedelta(**how_long)
        while self._act is not None and self._due <= until:
            act, self._act, self._elapsed = self._act, None, self._due
            act()
        self._elapsed = until


def config(*clients: str, warning: str = "14d") -> Config:
    lines = "".join(
        f"  {name}: {{keys: [{keys}]}}\n"
        for name, _, keys in (each.partition(": ") for each in clients)
    )
    return load_text(
        f"listen: [/run/b.sock]\nlimits: {{expiry_warning: {warning}}}\nclients:\n{lines}", "f"
    )


class MonitoredKeys:
    def __init__(self, found: Config) -> None:
        self.clock, self.log = Clock(), Recorder()
        self.credentials: list[Credential] = []
        self.watch = KeyExpiryMonitor(
            self.log.logger,
            lambda: self.clock.now,
            self.clock.call_later,
            lambda name: [each for each in self.credentials if each.client.name == name],
        )
        self.watch.watch(found)

    def logged(self) -> list[tuple[str, str, str]]:
        """Return (level, event, client) of everything logged since the last call."""
        events, self.log.events = self.log.events, []
        return [(level, event, fields.get("name", "")) for level, event, fields in events]


def test_key_expiry_keys_without_end_cause_no_warning() -> None:
    """No event is logged and no key is listed."""
    monitored = MonitoredKeys(config("a: {key: a}", "b: {key: b, not_before: 2001-01-01}"))
    monitored.clock.advance(days=400)

    assert monitored.logged() == []
    assert monitored.watch.expiries() == {}


def test_key_expiry_warning_is_repeated_daily() -> None:
    """Warnings begin limits.expiry_warning before the end. At the end, and every day
    after it, the event says that the key has expired.
    """
    monitored = MonitoredKeys(config("a: {key: a, not_after: 2026-06-11}", warning="7d"))
    assert monitored.logged() == []
    monitored.clock.advance(days=2, hours=23)
    assert monitored.logged() == []
    monitored.clock.advance(hours=2)
    assert monitored.logged() == [("warning", "key.expiring", "a")]
    monitored.clock.advance(days=6)
    assert monitored.logged() == [("warning", "key.expiring", "a")] * 6
    assert monitored.watch.expiries() == {"a": datetime(2026, 6, 11, tzinfo=UTC)}
    # It is 01:00 on the day before; exactly at midnight the key is still accepted.
    monitored.clock.advance(hours=23)
    monitored.logged()
    monitored.clock.advance(seconds=0.1)
    assert monitored.logged() == [("warning", "key.expired", "a")]
    monitored.clock.advance(days=3)
    assert monitored.logged() == [("warning", "key.expired", "a")] * 3
    assert monitored.watch.expiries() == {"a": datetime(2026, 6, 11, tzinfo=UTC)}


def test_key_expiry_reload_repeats_warning() -> None:
    """The operator who reloads wants to see whether the warning is gone."""
    bad, good = (
        config("a: {key: a, not_after: 2026-06-11}"),
        config("a: {key: a, not_after: 2026-06-11}, {key: b}"),
    )
    monitored = MonitoredKeys(bad)
    assert monitored.logged() == [("warning", "key.expiring", "a")]
    monitored.watch.watch(bad)
    assert monitored.logged() == [("warning", "key.expiring", "a")]
    monitored.watch.watch(good)
    assert monitored.logged() == []


def test_key_expiry_old_key_beside_valid_one_is_logged_as_info() -> None:
    """It is logged once, when it happens, with the number of connections that still use
    it. It is not logged at the next start.
    """
    found = config("a: {key: a, not_after: 2026-06-02}, {key: b}")
    monitored = MonitoredKeys(found)
    client = found.clients["a"]
    monitored.credentials = [Credential(client, client.keys[0])] * 2 + [
        Credential(client, client.keys[1])
    ]
    monitored.clock.advance(days=5)

    (event,) = monitored.log.events
    assert (event.level, event.event) == ("info", "key.expired")
    assert (event.fields["key"], event.fields["last"], event.fields["connections"]) == (
        client.keys[0].key_id,
        False,
        2,
    )
    assert monitored.logged()
    monitored.watch.watch(found)
    assert monitored.logged() == []


def test_key_expiry_gap_between_two_keys_causes_warning() -> None:
    """A new key that begins after the old one has ended leaves a time without a valid
    key.
    """
    monitored = MonitoredKeys(
        config("a: {key: a, not_after: 2026-06-05}, {key: b, not_before: 2026-06-06}")
    )

    assert monitored.logged() == [("warning", "key.expiring", "a")]


def test_key_expiry_changed_clock_is_noticed_within_one_hour() -> None:
    """The monitor does not rely on one timer set days ago."""
    monitored = MonitoredKeys(config("a: {key: a, not_after: 2026-12-01}"))
    monitored.clock.clock_change = timedelta(days=200)
    monitored.clock.advance(hours=1, seconds=1)

    assert monitored.logged() == [("warning", "key.expired", "a")]


def test_key_expiry_many_clients_are_counted_in_one_event() -> None:
    """Fifty clients get an event each. One event counts the rest."""
    monitored = MonitoredKeys(
        config(*(f"c{number}: {{key: k{number}, not_after: 2026-06-05}}" for number in range(200)))
    )

    logged = monitored.logged()
    assert len(logged) == 51
    assert logged[-1] == ("warning", "key.expiring_more", "")


def test_key_expiry_warning_time_of_zero_warns_only_at_end() -> None:
    """With `expiry_warning: 0` only the end itself is logged."""
    monitored = MonitoredKeys(config("a: {key: a, not_after: 2026-06-05}", warning="0"))
    monitored.clock.advance(days=3)
    assert monitored.logged() == []
    monitored.clock.advance(days=1.5)
    assert monitored.logged() == [("warning", "key.expired", "a")]


def test_key_expiry_closed_monitor_logs_nothing() -> None:
    """When the daemon stops, no timer is left."""
    monitored = MonitoredKeys(config("a: {key: a, not_after: 2026-06-05}"))
    monitored.logged()
    monitored.watch.close()
    monitored.clock.advance(days=30)

    assert monitored.logged() == []


def test_key_expiry_events_contain_no_key() -> None:
    """Events contain ids, sources and times only."""
    monitored = MonitoredKeys(
        config("a: {key: a-canary, not_after: 2026-06-05}, {key: canary-b, not_after: 2026-06-06}")
    )
    monitored.clock.advance(days=10)

    assert len(monitored.log.events) > 3
    assert "canary" not in repr(monitored.log.events)
