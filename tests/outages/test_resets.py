"""Connections are reset at every byte of a handshake and of a frame, in both
directions; TLS is also cut short.

Cut short means that both ends are told of an end in order, by TCP, though TLS has not
said goodbye: as somebody on the way can do who can neither read nor write what passes.
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
from support.outages.cutter import Cutter
from support.outages.traffic import Account
from support.outages.transports import Way
from support.waiting import until

import brokerd_client
from brokerd_client.errors import Abandoned, AuthenticationError, Disconnected, InDoubt, Offline

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="counts descriptors in /proc"
)

TIMEOUT_S = 30.0
PLAIN = Way()
PAYLOAD = 100
#: How it is cut. Everyday some of the positions are enough, beginning with one by
#: chance.
every_byte = pytest.mark.parametrize(
    ("way", "cut", "step"),
    [
        pytest.param(*each, step, marks=marks)
        for steps, marks in (((19, 61, 61), ()), ((1, 1, 1), (pytest.mark.slow,)))
        for each, step in zip(
            [("plain", "reset"), ("tls", "reset"), ("tls", "cut short")], steps, strict=True
        )
    ],
    indirect=["way"],
)


def positions(size: int, step: int) -> range:
    first = random.randrange(step)
    print(f"positions from {first} in steps of {step}")
    return range(first, size, step)


@contextmanager
def broker_and_cutter(
    directory: Path, way: Way, cut: str
) -> Iterator[tuple[BrokerProcess, Cutter]]:
    """Run a broker and a relay to it; what the cuts left behind in the broker is looked
    for at the end.
    """
    with BrokerProcess(
        directory, ("alice", "bob"), listen=way.listen() or ["127.0.0.1:0"]
    ) as broker:
        tcp = broker.addresses()[1]
        descriptors = Path(f"/proc/{broker.popen.pid}/fd")
        before = len(list(descriptors.iterdir()))
        with Cutter((tcp.host, tcp.port), gently=cut == "cut short") as cutter:
            yield broker, cutter
        until(
            lambda: len(list(descriptors.iterdir())) == before,
            "the broker keeps descriptors of connections cut",
        )
        assert not broker.events("daemon.bug")


def connect(address: str, name: str, way: Way = PLAIN) -> brokerd_client.Client:
    return brokerd_client.connect(
        address, name, key=key_of(name), timeout=TIMEOUT_S, reconnect=False, ssl=way.context
    )


@every_byte
def test_handshake_reset_at_each_byte_leaves_nothing_behind(
    socket_dir: Path, way: Way, cut: str, step: int
) -> None:
    """The client connects at its next try or gets an error at once. The broker keeps
    nothing, and other clients are served.
    """
    with (
        broker_and_cutter(socket_dir, way, cut) as (broker, cutter),
        connect(str(broker.socket), "bob") as other,
    ):
        connect(cutter.address, "alice", way).close()
        up, down = cutter.passed
        assert min(up, down) > 100
        places = [
            *({"up": at} for at in positions(up, step)),
            *({"down": at} for at in positions(down, step)),
        ]
        # A handshake that was cut off is tried again; a client that was let in hears of
        # the cut when it asks something.
        told = got_in = 0
        for number, place in enumerate(places, 1):
            cutter.cut_after(**place)
            try:
                with connect(cutter.address, "alice", way) as client:
                    client.ping()
                got_in += 1
            except (Disconnected, AuthenticationError):
                told += 1
            cutter.wait_for_cuts(number)
            other.ping()
        assert told + got_in == len(places)
        assert got_in > 0
        with connect(cutter.address, "alice", way) as client:
            client.ping()
    title = way.title(f"connections {cut} at every byte of a handshake")
    account = Account(title, sent=len(places), delivered=got_in, refused=told)
    account.record(
        f"{up} bytes up, {down} down: each client connected or got an error, and nothing was left"
        " behind"
    )


@every_byte
def test_message_reset_at_each_byte_is_delivered_at_most_once(
    socket_dir: Path, way: Way, cut: str, step: int
) -> None:
    """A message cut short is not delivered. A message whose receipt was cut is in
    doubt, and was delivered once.
    """
    account = Account(
        way.title(f"connections {cut} at every byte of a message, and of its receipt")
    )
    got: list[int] = []
    with (
        broker_and_cutter(socket_dir, way, cut) as (broker, cutter),
        connect(str(broker.socket), "bob") as bob,
    ):
        up, down = frame_sizes(cutter, bob, way)
        whole: list[int] = []
        perhaps: list[int] = []
        for place in (
            *({"up": at} for at in positions(up + 1, step)),
            *({"down": at} for at in positions(down, step)),
        ):
            account.sent += 1
            with connect(cutter.address, "alice", way) as alice:
                cutter.cut_after(**place)
                try:
                    alice.send_confirmed(
                        "bob",
                        b"%05d" % account.sent + bytes(PAYLOAD),
                        timeout=TIMEOUT_S,
                    )
                except InDoubt:
                    account.in_doubt += 1
                cutter.wait_for_cuts(account.sent)
                # Let in after that, she has been read to the end.
            if "down" in place:
                whole.append(account.sent)
            elif place["up"] == up:
                # Whole, but it may still be unread when the reset comes.
                perhaps.append(account.sent)
        with connect(str(broker.socket), "alice") as alice:
            alice.send_confirmed("bob", b"end", timeout=TIMEOUT_S)
        while (payload := bob.recv(TIMEOUT_S).payload) != b"end":
            got.append(int(payload.rstrip(b"\0")))
    account.delivered, account.twice = len(set(got)), len(got) - len(set(got))
    account.out_of_order = got != sorted(got)
    account.unaccounted = len(set(whole) - set(got))
    assert set(got) <= {*whole, *perhaps}
    assert account.in_doubt == account.sent
    account.record(
        f"{up} bytes of the message, {down} of the receipt; none of those cut short was delivered"
    )


def frame_sizes(cutter: Cutter, bob: brokerd_client.Client, way: Way) -> tuple[int, int]:
    """Return how many bytes a message and its receipt have."""
    with connect(cutter.address, "alice", way) as alice:
        alice.ping()
        before = list(cutter.passed)
        alice.send_confirmed("bob", b"00001" + bytes(PAYLOAD), timeout=TIMEOUT_S)
        bob.recv(TIMEOUT_S)
        return cutter.passed[0] - before[0], cutter.passed[1] - before[1]


@every_byte
def test_request_reset_at_each_byte_fails_at_once(
    socket_dir: Path, way: Way, cut: str, step: int
) -> None:
    """The recipient's connection is cut: the requester gets an error at once, unless
    the whole reply was through.
    """
    account = Account(
        way.title(f"connections {cut} at every byte of a request to a client, and of its reply")
    )
    handed: queue.Queue[bytes] = queue.Queue()
    with (
        broker_and_cutter(socket_dir, way, cut) as (broker, cutter),
        connect(str(broker.socket), "alice") as alice,
    ):

        def answerer() -> brokerd_client.Client:
            bob = connect(cutter.address, "bob", way)

            def answer(message: brokerd_client.Message) -> bytes:
                handed.put(message.payload)
                return bytes(message.payload)

            bob.on_request(answer)
            return bob

        with answerer():
            alice.ping()
            before = list(cutter.passed)
            alice.request("bob", b"00001" + bytes(PAYLOAD), timeout=TIMEOUT_S)
            up, down = (
                after - earlier for after, earlier in zip(cutter.passed, before, strict=True)
            )
        for place in (
            *({"down": at} for at in positions(down + 1, step)),
            *({"up": at} for at in positions(up + 1, step)),
        ):
            account.sent += 1
            with answerer():
                cutter.cut_after(**place)
                try:
                    alice.request("bob", b"%05d" % account.sent + bytes(PAYLOAD), timeout=TIMEOUT_S)
                    account.delivered += 1
                except (Offline, Abandoned):
                    account.refused += 1
                cutter.wait_for_cuts(account.sent)
        came = [handed.get_nowait() for _ in range(handed.qsize())][1:]
    account.twice = len(came) - len(set(came))
    assert account.delivered + account.refused == account.sent
    account.record(
        f"{down} bytes of the request, {up} of the reply; each requester got an error at once"
    )
