"""The numbers of /metrics, compared with what the clients did."""

from __future__ import annotations

import random
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.channels import asked, channel, listening
from support.raw_client import (
    ERROR,
    MESSAGE,
    RECEIPT,
    REQUEST,
    WANT_RECEIPT,
    Raw,
    Rejected,
    login,
    packed,
)
from support.running_daemon import RunningDaemon
from support.scraping import families, get, samples, watched

from brokerd import __version__
from brokerd.core import routing
from brokerd_client.wire.envelope import ErrorCode


@pytest.mark.parametrize("openmetrics", [False, True], ids=["prometheus", "openmetrics"])
@pytest.mark.parametrize("per_client", [False, True], ids=["whole", "per client"])
def test_metrics_page_is_valid_in_both_formats(openmetrics: bool, per_client: bool) -> None:
    """Prometheus's own parser accepts the page in both formats. Every family has a
    description and a known type.
    """
    with watched(monitor={"address": "127.0.0.1:0", "per_client": per_client}) as broker:
        by_name = families(broker, openmetrics=openmetrics)

    assert len(by_name) > 30
    for family in by_name.values():
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram", "info"), family
        assert re.fullmatch(r"(brokerd|process)_[a-z][a-z0-9_]*", family.name)
        for sample in family.samples:
            assert family.type != "counter" or sample.name.endswith("_total")


def test_metrics_count_messages_and_bytes() -> None:
    """Five messages of ten bytes and their receipts are counted on both sides."""
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        for number in range(5):
            alice.send(MESSAGE, "bob", b"x" * 10, message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
            bob.recv()
        values = samples(broker)

    assert values["brokerd_messages_received_total"] == 5
    assert values["brokerd_received_bytes_total"] == 5 * (12 + len("bob") + 10)
    assert values["brokerd_messages_sent_total"] == 10
    assert values["brokerd_connections"] == 2
    assert values["brokerd_clients_online"] == 2
    assert values["brokerd_clients"] == 3


def test_metrics_count_channels_and_their_bytes() -> None:
    """Open ones, those that wait, and the bytes of ended ones too."""
    with watched() as broker, listening(broker, "bob") as bob:
        with channel(broker, "alice", "bob", bob) as (one, other):
            one.write(b"12345")
            other.read(5)
            with asked(broker, "alice", "bob"):
                bob.recv()
                values = samples(broker)
        broker.log.wait("channel.closed")
        after = samples(broker)

    assert values["brokerd_channels"] == values["brokerd_pending_channels"] == 1
    assert values["brokerd_channels_limit"] == 1000
    assert after["brokerd_channels"] == 0
    assert after["brokerd_opened_channels_total"] == 1
    assert after["brokerd_relayed_bytes_total"] == 5


def test_metrics_count_refusals_by_code_including_zero() -> None:
    """A code that has not occurred is 0, so that its first occurrence appears as an
    increase.
    """
    with watched() as broker, broker.login("alice") as alice:
        for _ in range(3):
            alice.send(MESSAGE, "bob", b"x", flags=WANT_RECEIPT)
            assert alice.recv().kind == ERROR
        values = samples(broker)

    counted = {code: values[f"brokerd_refused_total{{code={code}}}"] for code in ErrorCode}
    assert counted == {code: 3 if code is ErrorCode.OFFLINE else 0 for code in ErrorCode}


def test_metrics_count_handshakes_by_result() -> None:
    """Each way to connect is counted in the series that names it."""
    with watched(limits={"handshake_timeout": "2s"}) as broker:
        alice = broker.login("alice")
        with pytest.raises(Rejected):
            login(broker.address, b"no key of anybody's", b"alice")
        with broker.login("alice") as second:
            # Its name is connected already.
            assert second.is_closed("name_taken")
        malformed = broker.raw()
        malformed.sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        silent = broker.raw()
        with broker.raw() as leaves:
            assert leaves.sock.recv(1000)
            leaves.sock.sendall(b"\0\0")
        broker.raw().close()
        broker.log.wait("client.refused", 5)
        broker.log.wait("client.left")
        values = samples(broker)
        for each in (alice, malformed, silent):
            each.close()

    counted = {
        result: values[f"brokerd_handshakes_total{{result={result}}}"]
        for result in ("accepted", "rejected", "refused", "malformed", "timeout", "lost", "left")
    }
    assert counted == dict.fromkeys(counted, 1)


def test_metrics_show_queued_bytes_and_held_senders() -> None:
    """A client does not read: bytes wait, its queue is full, and its sender is held."""
    clients = {"alice": {}, "bob": {"queue": "1MiB"}}
    with watched(clients) as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.sock.setblocking(False)
        packet = packed(MESSAGE, "bob", bytes(100_000))
        held = False
        while not held:
            try:
                packet = packet[alice.sock.send(packet) :] or packed(MESSAGE, "bob", bytes(100_000))
            except BlockingIOError:
                held = broker.call(lambda: bool(broker.daemon.broker.held.deadlines))
        values = samples(broker)

    assert values["brokerd_held_senders"] == 1
    assert values["brokerd_slow_connections"] == 1
    assert 0.5 * 2**20 < values["brokerd_queued_bytes"] <= 2**20
    assert 0.5 < values["brokerd_fullest_queue_ratio"] <= 1


def test_metrics_count_pending_requests_until_answered() -> None:
    """Requests without an answer so far are counted."""
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"?", message_id=1)
        request = bob.recv()
        before = samples(broker)["brokerd_pending_requests"]
        bob.send(3, request.name, b"!", message_id=request.id)
        alice.recv()
        after = samples(broker)["brokerd_pending_requests"]

    assert (before, after) == (1, 0)


def test_metrics_count_requests_that_wait_for_room_in_flight() -> None:
    """Requests beyond a connection's in_flight are counted until they are delivered."""
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        bob.send(REQUEST, "$broker", b'{"op": "in_flight", "n": 1}', message_id=9, codec=2)
        bob.recv()
        alice.send(REQUEST, "bob", b"?", message_id=1)
        alice.send(REQUEST, "bob", b"?", message_id=2)
        request = bob.recv()
        before = samples(broker)["brokerd_waiting_requests"]
        bob.send(3, request.name, b"!", message_id=request.id)
        alice.recv()
        after = samples(broker)["brokerd_waiting_requests"]

    assert (before, after) == (1, 0)


def test_metrics_counters_never_decrease() -> None:
    """Clients connect, send and disconnect in a random order. No counter of the broker
    or of a client decreases between two scrapes.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    names = ["alice", "bob", "carol", "dave"]
    with watched(" ".join(names), monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        connected: dict[str, Raw] = {}
        before: dict[str, float] = {}
        sent = 0
        for _ in range(60):
            name = rng.choice(names)
            if name not in connected:
                connected[name] = broker.login(name)
            elif rng.random() < 0.3:
                connected.pop(name).close()
            else:
                for number in range(rng.randrange(5)):
                    connected[name].send(
                        REQUEST, "$broker", b'{"op": "ping"}', message_id=number, codec=2
                    )
                    connected[name].recv()
                    sent += 1
            now = {
                key: value
                for key, value in samples(broker).items()
                if "_total" in key or "_count" in key
            }
            assert now.keys() == before.keys() or not before
            decreased = {key: (before[key], now[key]) for key in before if now[key] < before[key]}
            assert not decreased
            before = now
        for each in connected.values():
            each.close()

    assert before["brokerd_messages_received_total"] == sent
    assert (
        sum(before[f"brokerd_client_messages_received_total{{client={name}}}"] for name in names)
        == sent
    )


def test_metrics_series_are_independent_of_client_input() -> None:
    """Names, topics, peers and reasons come from outside: none of them creates a
    series.
    """
    with watched("alice bob worker") as broker:
        before = samples(broker).keys()
        with broker.login("alice") as alice:
            for number in range(20):
                alice.send(MESSAGE, f"nobody{number}", b"x", flags=WANT_RECEIPT)
                alice.send(
                    REQUEST, "$broker", b'{"op": "subscribe", "topic": "t%d"}' % number, codec=2
                )
                alice.recv(), alice.recv()
            with pytest.raises(Rejected):
                login(broker.address, b"wrong", b"stranger")
            after = samples(broker).keys()
            text = get(broker, "/metrics").body

    assert after == before
    assert "alice" not in text
    assert "stranger" not in text


def test_metrics_per_client_have_series_for_each_client() -> None:
    """With per_client each configured client has its own series, connected or not."""
    monitor = {"address": "127.0.0.1:0", "per_client": True}
    with watched(monitor=monitor) as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.send(MESSAGE, "bob", b"x" * 10, flags=WANT_RECEIPT)
        alice.recv()
        alice.send(MESSAGE, "carol", b"x", flags=WANT_RECEIPT)
        assert alice.recv().code == "offline"
        values = samples(broker)

    def of(name: str) -> list[float]:
        kinds = ("connections", "messages_received_total", "messages_sent_total", "refused_total")
        return [values[f"brokerd_client_{kind}{{client={name}}}"] for kind in kinds]

    assert of("alice") == [1, 2, 2, 1]
    assert of("bob") == [1, 0, 1, 0]
    assert of("carol") == [0, 0, 0, 0]


def test_metrics_per_client_of_many_clients_are_one_family() -> None:
    """A family that is written in several pieces is still one, with a line for every
    client.
    """
    clients = {f"c{number:04}": {} for number in range(600)}
    with watched(clients, monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        plain, openmetrics = families(broker), families(broker, openmetrics=True)

    for by_name in (plain, openmetrics):
        family = by_name["brokerd_client_connections"]
        assert [sample.labels["client"] for sample in family.samples] == list(clients)


def test_metrics_show_key_expiry_in_advance() -> None:
    """The page shows the next client to lose its last valid key, and the number of
    clients without one. It also shows each key that expires.
    """
    now = datetime.now(UTC)
    soon, later, past = now + timedelta(days=3), now + timedelta(days=30), now - timedelta(days=1)
    clients: dict[str, Any] = {
        "alice": {
            "keys": [
                {"key": "a1", "not_after": now + timedelta(hours=1)},
                {"key": "a2", "not_after": later},
            ]
        },
        "bob": {"keys": [{"key": "b1", "not_after": soon}]},
        "carol": {"keys": [{"key": "c1", "not_after": past}]},
        "dave": {"keys": [{"key": "d1", "not_after": past}, {"key": "d2"}]},
        "eve": {"key": "e"},
    }
    with watched(clients, monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        values = samples(broker)
        text = get(broker, "/metrics").body
        bobs_key = broker.daemon.config.clients["bob"].keys[0].key_id

    assert values["brokerd_next_client_expiry_timestamp_seconds"] == pytest.approx(soon.timestamp())
    assert values["brokerd_clients_expired"] == 1
    series = f"brokerd_key_expiry_timestamp_seconds{{client=bob,key={bobs_key}}}"
    assert values[series] == pytest.approx(soon.timestamp())
    assert sum("brokerd_key_expiry_timestamp_seconds{" in key for key in values) == 5
    for key in ("a1", "b1", "c1", "d1", "d2"):
        assert f'"{key}"' not in text


def test_metrics_without_expiring_key_have_no_expiry_sample() -> None:
    """An invented time would cause an alert or hide one."""
    with watched() as broker:
        values = samples(broker)

    assert "brokerd_next_client_expiry_timestamp_seconds" not in values
    assert values["brokerd_clients_expired"] == 0


def test_metrics_build_info_has_version_and_routing_loop() -> None:
    """One series says what is running."""
    with watched() as broker:
        labels = families(broker)["brokerd_build_info"].samples[0].labels

    assert labels["version"] == __version__
    assert labels["routing"] == routing.NAME
    assert re.fullmatch(r"3\.\d+\.\d+.*", labels["python"])


def test_metrics_event_loop_lag_is_recorded() -> None:
    """The event loop is blocked for a third of a second: the histogram shows it."""

    def late_runs(broker: RunningDaemon) -> float:
        values = samples(broker)
        bucket = "brokerd_event_loop_lag_seconds_bucket"
        return values[f"{bucket}{{le=+Inf}}"] - values[f"{bucket}{{le=0.1}}"]

    with watched() as broker:
        before = late_runs(broker)
        recorded = threading.Event()
        lag = broker.daemon._monitor._server._lag  # type: ignore[union-attr]
        note = lag.note

        def noted(seconds: float) -> None:
            note(seconds)
            if seconds > 0.1:
                recorded.set()

        lag.note = noted  # type: ignore[method-assign]
        broker.call(lambda: time.sleep(0.4))
        assert recorded.wait(30)
        after = late_runs(broker)

    assert after > before


def test_metrics_expected_client_has_series_while_online_and_offline() -> None:
    """Only clients with expected: true are named; 1 is online."""
    with watched({"alice": {"expected": True}, "bob": {}}) as broker:

        def series() -> dict[str, float]:
            samples = families(broker)["brokerd_expected_client_online"].samples
            return {sample.labels["client"]: sample.value for sample in samples}

        assert series() == {"alice": 0.0}
        with broker.login("alice") as alice, broker.login("bob") as bob:
            alice.ping()
            bob.ping()
            assert series() == {"alice": 1.0}
