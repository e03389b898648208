"""What /metrics says, compared with what was done to the broker."""

from __future__ import annotations

import random
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
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
def test_prometheus_can_read_it(openmetrics: bool, per_client: bool) -> None:
    """Its own parser takes the page in both formats; every family has words and a known
    type.
    """
    with watched(monitor={"address": "127.0.0.1:0", "per_client": per_client}) as broker:
        found = families(broker, openmetrics=openmetrics)

    assert len(found) > 30
    for family in found.values():
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram", "info"), family
        assert re.fullmatch(r"(brokerd|process)_[a-z][a-z0-9_]*", family.name)
        for sample in family.samples:
            assert family.type != "counter" or sample.name.endswith("_total")


def test_messages_and_bytes_are_counted() -> None:
    """Five messages of ten bytes and their receipts are seen on both sides."""
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        for number in range(5):
            alice.send(MESSAGE, "bob", b"x" * 10, message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
            bob.recv()
        found = samples(broker)

    assert found["brokerd_messages_received_total"] == 5
    assert found["brokerd_received_bytes_total"] == 5 * (12 + len("bob") + 10)
    assert found["brokerd_messages_sent_total"] == 10
    assert found["brokerd_connections"] == 2
    assert found["brokerd_clients_online"] == 2
    assert found["brokerd_clients"] == 3


def test_refusals_are_counted_by_code_and_every_code_is_there() -> None:
    """A code that has not occurred is 0, so that its first occurrence is seen as a
    rise.
    """
    with watched() as broker, broker.login("alice") as alice:
        for _ in range(3):
            alice.send(MESSAGE, "bob", b"x", flags=WANT_RECEIPT)
            assert alice.recv().kind == ERROR
        found = samples(broker)

    counted = {code: found[f"brokerd_refused_total{{code={code}}}"] for code in ErrorCode}
    assert counted == {code: 3 if code is ErrorCode.OFFLINE else 0 for code in ErrorCode}


def test_handshakes_are_counted_by_how_they_ended() -> None:
    """Each way to connect ends in the series that names it."""
    with watched(limits={"handshake_timeout": "200ms"}) as broker:
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
        found = samples(broker)
        for each in (alice, malformed, silent):
            each.close()

    counted = {
        result: found[f"brokerd_handshakes_total{{result={result}}}"]
        for result in ("accepted", "rejected", "refused", "malformed", "timeout", "lost", "left")
    }
    assert counted == dict.fromkeys(counted, 1)


def test_queues_and_those_who_wait_for_them_are_seen() -> None:
    """Somebody does not read: bytes wait, the queue is full, and who sends there is
    held.
    """
    clients = {"alice": {}, "bob": {"queue": "1MiB"}}
    with watched(clients) as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.sock.setblocking(False)
        packet = packed(MESSAGE, "bob", bytes(100_000))
        held = False
        while not held:
            try:
                packet = packet[alice.sock.send(packet) :] or packed(MESSAGE, "bob", bytes(100_000))
            except BlockingIOError:
                held = broker.call(lambda: broker.daemon.broker.held)
        found = samples(broker)

    assert found["brokerd_held_senders"] == 1
    assert found["brokerd_slow_connections"] == 1
    assert 0.5 * 2**20 < found["brokerd_queued_bytes"] <= 2**20
    assert 0.5 < found["brokerd_fullest_queue_ratio"] <= 1


def test_a_request_is_pending_until_it_is_answered() -> None:
    """Requests that somebody owes an answer to are seen."""
    with watched() as broker, broker.login("alice") as alice, broker.login("bob") as bob:
        alice.send(REQUEST, "bob", b"?", message_id=1)
        outgoing_requests = bob.recv()
        before = samples(broker)["brokerd_pending_requests"]
        bob.send(3, outgoing_requests.name, b"!", message_id=outgoing_requests.id)
        alice.recv()
        after = samples(broker)["brokerd_pending_requests"]

    assert (before, after) == (1, 0)


def test_no_counter_ever_falls() -> None:
    """Clients come, send and go in a random order; no counter of the whole or of a
    client falls between two looks.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    names = ["alice", "bob", "carol", "dave"]
    with watched(" ".join(names), monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        there: dict[str, Raw] = {}
        before: dict[str, float] = {}
        sent = 0
        for _ in range(60):
            name = chance.choice(names)
            if name not in there:
                there[name] = broker.login(name)
            elif chance.random() < 0.3:
                there.pop(name).close()
            else:
                for number in range(chance.randrange(5)):
                    there[name].send(
                        REQUEST, "$broker", b'{"op": "ping"}', message_id=number, codec=2
                    )
                    there[name].recv()
                    sent += 1
            now = {
                key: value
                for key, value in samples(broker).items()
                if "_total" in key or "_count" in key
            }
            assert now.keys() == before.keys() or not before
            fell = {key: (before[key], now[key]) for key in before if now[key] < before[key]}
            assert not fell
            before = now
        for each in there.values():
            each.close()

    assert before["brokerd_messages_received_total"] == sent
    assert (
        sum(before[f"brokerd_client_messages_received_total{{client={name}}}"] for name in names)
        == sent
    )


def test_whatever_clients_do_the_number_of_series_stays() -> None:
    """Names, topics, peers and reasons come from outside: none of them makes a series."""
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


def test_each_client_is_told_of_only_where_that_is_asked_for() -> None:
    """With per_client each configured name has its series, connected or not, and what
    it did is its own.
    """
    monitor = {"address": "127.0.0.1:0", "per_client": True}
    with watched(monitor=monitor) as broker, broker.login("alice") as alice, broker.login("bob"):
        alice.send(MESSAGE, "bob", b"x" * 10, flags=WANT_RECEIPT)
        alice.recv()
        alice.send(MESSAGE, "carol", b"x", flags=WANT_RECEIPT)
        assert alice.recv().code == "offline"
        found = samples(broker)

    def of(name: str) -> list[float]:
        kinds = ("connections", "messages_received_total", "messages_sent_total", "refused_total")
        return [found[f"brokerd_client_{kind}{{client={name}}}"] for kind in kinds]

    assert of("alice") == [1, 2, 2, 1]
    assert of("bob") == [1, 0, 1, 0]
    assert of("carol") == [0, 0, 0, 0]


def test_many_clients_are_one_family_each() -> None:
    """A family that is written in several pieces is still one, with a line for every
    client.
    """
    clients = {f"c{number:04}": {} for number in range(600)}
    with watched(clients, monitor={"address": "127.0.0.1:0", "per_client": True}) as broker:
        plain, openmetrics = families(broker), families(broker, openmetrics=True)

    for found in (plain, openmetrics):
        family = found["brokerd_client_connections"]
        assert [sample.labels["client"] for sample in family.samples] == list(clients)


def test_a_key_that_ends_is_seen_before_it_does() -> None:
    """The next client to be left without a key, those that are already, and each key
    with an end.
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
        found = samples(broker)
        text = get(broker, "/metrics").body
        bobs_key = broker.daemon.config.clients["bob"].keys[0].key_id

    assert found["brokerd_next_client_expiry_timestamp_seconds"] == pytest.approx(soon.timestamp())
    assert found["brokerd_clients_expired"] == 1
    series = f"brokerd_key_expiry_timestamp_seconds{{client=bob,key={bobs_key}}}"
    assert found[series] == pytest.approx(soon.timestamp())
    assert sum("brokerd_key_expiry_timestamp_seconds{" in key for key in found) == 5
    for key in ("a1", "b1", "c1", "d1", "d2"):
        assert f'"{key}"' not in text


def test_where_no_key_ends_there_is_no_sample_of_it() -> None:
    """A made-up moment would set off an alert or hide one."""
    with watched() as broker:
        found = samples(broker)

    assert "brokerd_next_client_expiry_timestamp_seconds" not in found
    assert found["brokerd_clients_expired"] == 0


def test_the_version_and_the_loop_are_told() -> None:
    """One series says what is running."""
    with watched() as broker:
        labels = families(broker)["brokerd_build_info"].samples[0].labels

    assert labels["version"] == __version__
    assert labels["routing"] == routing.NAME
    assert re.fullmatch(r"3\.\d+\.\d+.*", labels["python"])


def test_a_loop_that_is_held_up_is_seen() -> None:
    """Something keeps the loop for a third of a second: the histogram has it."""

    def late(broker: RunningDaemon) -> float:
        found = samples(broker)
        bucket = "brokerd_event_loop_lag_seconds_bucket"
        return found[f"{bucket}{{le=+Inf}}"] - found[f"{bucket}{{le=0.1}}"]

    with watched() as broker:
        before = late(broker)
        rung = threading.Event()
        lag = broker.daemon._monitor._site._lag  # type: ignore[union-attr]
        note = lag.note

        def noted(seconds: float) -> None:
            note(seconds)
            if seconds > 0.1:
                rung.set()

        lag.note = noted  # type: ignore[method-assign]
        broker.call(lambda: time.sleep(0.4))
        assert rung.wait(30)
        after = late(broker)

    assert after > before
