"""Connections are reset at every byte of a handshake and of a frame, in both
directions; TLS is also cut short.

Cut short means that TCP closes both ends in order, though TLS has sent no close_notify.
An attacker on the path can do that without reading or writing the traffic.
"""

from __future__ import annotations

import queue
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.outages.cutting_relay import CuttingRelay
from support.outages.traffic import Account
from support.outages.transports import Transport
from support.waiting import until

import brokerd_client
from brokerd_client.errors import Abandoned, AuthenticationError, Disconnected, InDoubt, Offline

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts descriptors in /proc"
)

TIMEOUT_S = 30.0
PLAIN = Transport()
PAYLOAD = 100


def every_byte(plain: int, tls: int) -> pytest.MarkDecorator:
    """Parametrize with how connections are cut.

    By default some of the positions are enough, in these steps from a random one.
    """
    return pytest.mark.parametrize(
        ("transport", "cut", "step"),
        [
            pytest.param(*each, step, marks=marks)
            for steps, marks in (((plain, tls, tls), ()), ((1, 1, 1), (pytest.mark.slow,)))
            for each, step in zip(
                [("plain", "reset"), ("tls", "reset"), ("tls", "cut short")], steps, strict=True
            )
        ],
        indirect=["transport"],
    )


def positions(size: int, step: int) -> range:
    first = random.randrange(step)
    print(f"positions from {first} in steps of {step}")
    return range(first, size, step)


@contextmanager
def broker_and_relay(
    directory: Path, transport: Transport, cut: str
) -> Iterator[tuple[BrokerProcess, CuttingRelay]]:
    """Run a broker and a relay to it; check at the end that the cuts left nothing
    behind in the broker.
    """
    with BrokerProcess(
        directory, ("alice", "bob"), listen=transport.listen() or ["127.0.0.1:0"]
    ) as broker:
        tcp = broker.addresses()[1]
        descriptors = Path(f"/proc/{broker.popen.pid}/fd")
        before = len(list(descriptors.iterdir()))
        with CuttingRelay((tcp.host, tcp.port), gently=cut == "cut short") as relay:
            yield broker, relay
        until(
            lambda: len(list(descriptors.iterdir())) == before,
            "the broker keeps descriptors of connections cut",
        )
        assert not broker.events("daemon.bug")


def connect(address: str, name: str, transport: Transport = PLAIN) -> brokerd_client.Client:
    return brokerd_client.connect(
        address, name, key=key_of(name), timeout=TIMEOUT_S, reconnect=False, ssl=transport.context
    )


@every_byte(plain=79, tls=307)
def test_handshake_reset_at_each_byte_leaves_nothing_behind(
    socket_dir: Path, transport: Transport, cut: str, step: int
) -> None:
    """The client connects at its next try or gets an error at once. The broker keeps
    nothing, and other clients are served.
    """
    with (
        broker_and_relay(socket_dir, transport, cut) as (broker, relay),
        connect(str(broker.socket), "bob") as other,
    ):
        connect(relay.address, "alice", transport).close()
        up, down = relay.passed
        assert min(up, down) > 100
        places = [
            *({"up": at} for at in positions(up, step)),
            *({"down": at} for at in positions(down, step)),
        ]
        # A handshake that was cut off is tried again; an accepted client notices the cut
        # with its next request.
        refused = accepted = 0
        for number, place in enumerate(places, 1):
            relay.cut_after(**place)
            try:
                with connect(relay.address, "alice", transport) as client:
                    client.ping()
                accepted += 1
            except (Disconnected, AuthenticationError):
                refused += 1
            relay.wait_for_cuts(number)
            other.ping()
        assert refused + accepted == len(places)
        assert accepted > 0
        with connect(relay.address, "alice", transport) as client:
            client.ping()
    title = transport.title(f"connections {cut} at every byte of a handshake")
    account = Account(title, sent=len(places), delivered=accepted, refused=refused)
    account.record(
        f"{up} bytes up, {down} down: each client connected or got an error, and nothing was left"
        " behind"
    )


@every_byte(plain=19, tls=61)
def test_message_reset_at_each_byte_is_delivered_at_most_once(
    socket_dir: Path, transport: Transport, cut: str, step: int
) -> None:
    """A message cut short is not delivered. A message whose receipt was cut is in
    doubt, and was delivered once.
    """
    account = Account(
        transport.title(f"connections {cut} at every byte of a message, and of its receipt")
    )
    received: list[int] = []
    with (
        broker_and_relay(socket_dir, transport, cut) as (broker, relay),
        connect(str(broker.socket), "bob") as bob,
    ):
        up, down = frame_sizes(relay, bob, transport)
        complete: list[int] = []
        maybe_delivered: list[int] = []
        for place in (
            *({"up": at} for at in positions(up + 1, step)),
            *({"down": at} for at in positions(down, step)),
        ):
            account.sent += 1
            with connect(relay.address, "alice", transport) as alice:
                # The answers to what the client asks when it connects are through by then.
                alice.ping()
                relay.cut_after(**place)
                try:
                    alice.send_confirmed(
                        "bob",
                        b"%05d" % account.sent + bytes(PAYLOAD),
                        timeout=TIMEOUT_S,
                    )
                except InDoubt:
                    account.in_doubt += 1
                relay.wait_for_cuts(account.sent)
                # Accepted after that: the broker has read all of the earlier connection.
            if "down" in place:
                complete.append(account.sent)
            elif place["up"] == up:
                # Whole, but it may still be unread when the reset comes.
                maybe_delivered.append(account.sent)
        with connect(str(broker.socket), "alice") as alice:
            alice.send_confirmed("bob", b"end", timeout=TIMEOUT_S)
        while (payload := bob.recv(TIMEOUT_S).payload) != b"end":
            received.append(int(payload.rstrip(b"\0")))
    account.delivered, account.twice = len(set(received)), len(received) - len(set(received))
    account.out_of_order = received != sorted(received)
    account.unaccounted = len(set(complete) - set(received))
    assert set(received) <= {*complete, *maybe_delivered}
    assert account.in_doubt == account.sent
    account.record(
        f"{up} bytes of the message, {down} of the receipt; none of those cut short was delivered"
    )


def frame_sizes(
    relay: CuttingRelay, bob: brokerd_client.Client, transport: Transport
) -> tuple[int, int]:
    """Return the size in bytes of a message and of its receipt."""
    with connect(relay.address, "alice", transport) as alice:
        alice.ping()
        before = list(relay.passed)
        alice.send_confirmed("bob", b"00001" + bytes(PAYLOAD), timeout=TIMEOUT_S)
        bob.recv(TIMEOUT_S)
        return relay.passed[0] - before[0], relay.passed[1] - before[1]


@every_byte(plain=19, tls=61)
def test_request_reset_at_each_byte_fails_at_once(
    socket_dir: Path, transport: Transport, cut: str, step: int
) -> None:
    """The recipient's connection is cut: the requester gets an error at once, unless
    the whole reply was through.
    """
    account = Account(
        transport.title(
            f"connections {cut} at every byte of a request to a client, and of its reply"
        )
    )
    requests_seen: queue.Queue[bytes] = queue.Queue()
    with (
        broker_and_relay(socket_dir, transport, cut) as (broker, relay),
        connect(str(broker.socket), "alice") as alice,
    ):

        def answerer() -> brokerd_client.Client:
            bob = connect(relay.address, "bob", transport)

            def answer(message: brokerd_client.Message) -> bytes:
                requests_seen.put(message.payload)
                return bytes(message.payload)

            bob.on_request(answer)
            # The number of requests that the handler takes at once is known by then.
            bob.ping()
            return bob

        with answerer():
            alice.ping()
            before = list(relay.passed)
            alice.request("bob", b"00001" + bytes(PAYLOAD), timeout=TIMEOUT_S)
            up, down = (
                after - earlier for after, earlier in zip(relay.passed, before, strict=True)
            )
        for place in (
            *({"down": at} for at in positions(down + 1, step)),
            *({"up": at} for at in positions(up + 1, step)),
        ):
            account.sent += 1
            with answerer():
                relay.cut_after(**place)
                try:
                    alice.request("bob", b"%05d" % account.sent + bytes(PAYLOAD), timeout=TIMEOUT_S)
                    account.delivered += 1
                except (Offline, Abandoned):
                    account.refused += 1
                relay.wait_for_cuts(account.sent)
        handled = [requests_seen.get_nowait() for _ in range(requests_seen.qsize())][1:]
    account.twice = len(handled) - len(set(handled))
    assert account.delivered + account.refused == account.sent
    account.record(
        f"{down} bytes of the request, {up} of the reply; each requester got an error at once"
    )
