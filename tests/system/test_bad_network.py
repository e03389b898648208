"""Bad networks: peers that become unreachable, and links that are cut and healed, that
delay, lose and repeat packets.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.channels import OPEN, is_open, joining
from support.keys import key_of
from support.outages.traffic import RECIPIENTS, SENDERS
from support.outages.transports import Transport, tls_transport
from support.raw_client import MESSAGE, WANT_RECEIPT, Raw, login, packed
from support.system.network import ADDRESSES, BROKER, CLIENTS, Link, needs_networks
from support.tls.raw_client import TlsRaw
from support.waiting import WAIT_S, until

import brokerd_client
from brokerd_client import aio
from brokerd_client.errors import InDoubt

pytestmark = [pytest.mark.system, needs_networks()]

NAMES = (*SENDERS, *RECIPIENTS)
KEEPALIVE_S = 4.0
#: What timers and processes of a busy machine may be late.
SCHEDULING_S = 0.5


def start_broker(directory: Path, link: Link, transport: Transport, **more: Any) -> BrokerProcess:
    """Return a broker at its end of the link, listening there too."""
    listen = transport.listen() if transport.issued else transport.listen(plain=True)
    return BrokerProcess(
        directory, (*NAMES, "probe"), listen=listen, preexec=link.inside(BROKER), **more
    )


def connect_raw(
    broker: BrokerProcess, link: Link, transport: Transport, name: str, word: str = ""
) -> Raw:
    """Return a connection across the link; word: what its handshake says behind the name."""
    said = (name + word).encode()
    with link.visit(CLIENTS):
        if transport.context is None:
            return login(transport.address(broker), key_of(name), said)
        raw = TlsRaw(transport.address(broker), transport.context, host=transport.host)
        return raw.log_in(key_of(name), said)


@pytest.fixture(scope="module")
def over_tls(tmp_path_factory: pytest.TempPathFactory) -> Transport:
    """TLS across the link."""
    return tls_transport(tmp_path_factory.mktemp("ca"), ADDRESSES[BROKER])


@pytest.fixture(params=["tcp", "tls"])
def transport(request: pytest.FixtureRequest, over_tls: Transport) -> Transport:
    """The connections of the clients: TCP or TLS."""
    return over_tls if request.param == "tls" else Transport(ADDRESSES[BROKER])


def fill(sock: socket.socket) -> None:
    """Write until nothing was taken for half a second."""
    sock.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            sock.send(bytes(65536))


def disconnected(broker: BrokerProcess, name: str) -> list[dict[str, Any]]:
    return [event for event in broker.events("client.disconnected") if event["name"] == name]


@pytest.fixture
def link() -> Iterator[Link]:
    with Link.wire() as wire:
        yield wire


@pytest.mark.timing
def test_keepalive_idle_peer_unreachable_is_disconnected(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """It is disconnected within limits.keepalive. A client that is only idle is not."""
    with start_broker(socket_dir, link, transport, limits={"keepalive": KEEPALIVE_S}) as broker:
        idle = connect_raw(broker, link, transport, "r0")
        link.cut(CLIENTS)
        began = time.monotonic()
        with broker.login("s0") as local:
            until(lambda: bool(disconnected(broker, "r0")), "it is never found")
            took = time.monotonic() - began
            assert disconnected(broker, "r0")[0]["reason"] == "Connection timed out"
            local.send(MESSAGE, "r0", b"x", message_id=5)
            assert local.recv().code == "offline"
            assert not disconnected(broker, "s0")
        idle.close()
    assert KEEPALIVE_S / 2 < took < KEEPALIVE_S + SCHEDULING_S
    print(f"found after {took:.2f} s")


@pytest.mark.timing
def test_keepalive_unreachable_peer_with_queue_is_disconnected(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """Messages still in the broker's memory go back to their sender then, and not a
    quarter of an hour later.
    """
    with start_broker(socket_dir, link, transport, limits={"keepalive": KEEPALIVE_S}) as broker:
        ended = connect_raw(broker, link, transport, "r0")
        link.cut(CLIENTS)
        began = time.monotonic()
        with broker.login("s0") as local:
            for number in range(100):
                local.send(MESSAGE, "r0", bytes(60_000), message_id=number + 1, flags=WANT_RECEIPT)
            outcomes: dict[int, list[str]] = {}
            for _ in range(100):
                frame = local.recv()
                outcomes.setdefault(frame.id, []).append("receipt")
            local.sock.settimeout(30)
            first = local.recv()
            took = time.monotonic() - began
            assert first.code == "offline"
            reason = disconnected(broker, "r0") or broker.wait("client.disconnected")
            assert "limits.keepalive" in reason[0]["reason"]
        ended.close()
    assert KEEPALIVE_S / 2 < took < KEEPALIVE_S + SCHEDULING_S
    print(f"found after {took:.2f} s")


@pytest.mark.timing
@pytest.mark.parametrize(
    ("stalled_s", "write_after_s"),
    [(0, None), (0, 0), (0, 1.5), (5, 0)],
    ids=["idle", "saturated", "written", "stalled"],
)
def test_channel_across_cut_link_ends_at_other_end(
    link: Link,
    socket_dir: Path,
    transport: Transport,
    stalled_s: float,
    write_after_s: float | None,
) -> None:
    """The end that the broker still reaches sees the channel end within
    limits.keepalive, idle or not.
    """
    with (
        start_broker(socket_dir, link, transport, limits={"keepalive": KEEPALIVE_S}) as broker,
        broker.login("r0") as listener,
    ):
        assert listener.ask("listen").json == {}
        far = connect_raw(broker, link, transport, "s0", " channel")
        far.write(packed(OPEN, "r0", message_id=1))
        near = joining(broker, "r0", listener.recv().id)
        assert is_open(far, "r0", 1)
        near.recv()
        if stalled_s:
            fill(near.sock)
            time.sleep(stalled_s)
        link.cut(CLIENTS)
        began = time.monotonic()
        if write_after_s is not None:
            time.sleep(write_after_s)
            fill(near.sock)
        near.sock.settimeout(3 * KEEPALIVE_S)
        assert near.read_to_end() == b""
        took = time.monotonic() - began
        near.close()
        far.close()
    assert KEEPALIVE_S / 2 < took < KEEPALIVE_S + SCHEDULING_S
    print(f"found after {took:.2f} s")


def test_keepalive_peer_that_does_not_read_stays_connected(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """Its kernel answers for it: with full buffers and a queue of messages it stays for
    many times limits.keepalive.
    """
    with start_broker(socket_dir, link, transport, limits={"keepalive": 1}) as broker:
        slow = connect_raw(broker, link, transport, "r0")
        with broker.login("s0") as local:
            for number in range(100):
                local.send(MESSAGE, "r0", bytes(60_000), message_id=number + 1)
            local.ping()
            began = time.monotonic()
            until(lambda: time.monotonic() - began > 8, "", 30)
            assert not disconnected(broker, "r0")
            for number in range(100):
                assert slow.recv().id == number + 1
        slow.close()


def test_partition_of_senders_healed_clients_reconnect(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """The link is cut for longer than the timeouts. The senders behind it are
    disconnected, connect again, and know which messages are in doubt.
    """
    limits = {"keepalive": KEEPALIVE_S, "wait_timeout": "1s"}
    # Recipients with the broker, senders behind the link: what they sent is in doubt.
    with (
        start_broker(socket_dir, link, transport, limits=limits) as broker,
        transport.traffic(
            socket_dir, broker, inside=link.inside(BROKER), inside_senders=link.inside(CLIENTS)
        ) as traffic,
    ):
        link.cut(CLIENTS)
        began = time.monotonic()
        until(
            lambda: {"s0", "s1"} <= {e["name"] for e in broker.events("client.disconnected")},
            "never found",
        )
        found = time.monotonic() - began
        link.heal(CLIENTS)
        healed = time.monotonic()
        traffic.goes_on()
        back = time.monotonic() - healed
        account = traffic.finish(
            transport.title("a partition between senders and broker, longer than the timeouts")
        )
    account.record(f"found after {found:.1f} s, at work {back:.1f} s after it healed")


def test_partition_of_recipients_healed_clients_reconnect(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """Messages for the recipients are given back as offline; the recipients connect
    again when the link is back.
    """
    limits = {"keepalive": KEEPALIVE_S, "wait_timeout": "1s"}
    with (
        start_broker(socket_dir, link, transport, limits=limits) as broker,
        transport.traffic(
            socket_dir, broker, inside=link.inside(CLIENTS), inside_senders=link.inside(BROKER)
        ) as traffic,
    ):
        link.cut(CLIENTS)
        began = time.monotonic()
        until(
            lambda: {"r0", "r1"} <= {e["name"] for e in broker.events("client.disconnected")},
            "never found",
        )
        found = time.monotonic() - began
        link.heal(CLIENTS)
        healed = time.monotonic()
        traffic.goes_on()
        back = time.monotonic() - healed
        fault = transport.title(
            "a partition between broker and recipients, longer than the timeouts"
        )
        account = traffic.finish(fault, killed=RECIPIENTS)
    account.record(f"found after {found:.1f} s, at work {back:.1f} s after it healed")


def test_partition_shorter_than_keepalive_only_delays(
    link: Link, socket_dir: Path, transport: Transport
) -> None:
    """A link that is cut for less than limits.keepalive ends no connection, and loses
    no message.
    """
    with (
        start_broker(socket_dir, link, transport) as broker,
        transport.traffic(socket_dir, broker, inside=link.inside(CLIENTS)) as traffic,
    ):
        link.cut(CLIENTS)
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2, "")
        link.heal(CLIENTS)
        traffic.goes_on()
        ended = broker.events("client.disconnected")
        account = traffic.finish(transport.title("a link that is cut for 2 s"))
    assert ended == []
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended")


@pytest.mark.parametrize(
    ("delay_ms", "jitter_ms", "loss", "twice"),
    [(25, 0, 0.0, 0.0), (5, 10, 0.05, 0.0), (5, 10, 0.0, 0.2), (10, 20, 0.03, 0.03)],
    ids=["delay", "loss", "duplication", "everything"],
)
def test_messages_over_bad_link_arrive_once_and_in_order(
    socket_dir: Path,
    transport: Transport,
    delay_ms: float,
    jitter_ms: float,
    loss: float,
    twice: float,
) -> None:
    """Packets arrive late, out of order, twice or never; messages still arrive once and
    in order.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with (
        Link.carried(
            delay_ms=delay_ms, jitter_ms=jitter_ms, loss=loss, twice=twice, seed=seed
        ) as link,
        start_broker(socket_dir, link, transport) as broker,
        transport.traffic(socket_dir, broker, inside=link.inside(CLIENTS)) as traffic,
    ):
        probe = connect_raw(broker, link, transport, "probe")
        began = time.monotonic()
        for _ in range(5):
            probe.ping()
        trip = (time.monotonic() - began) / 5
        probe.close()
        traffic.goes_on(more=100)
        ended = [
            event["name"]
            for event in broker.events("client.disconnected")
            if event["name"] != "probe"
        ]
        title = (
            f"packets {delay_ms:g} to {delay_ms + jitter_ms:g} ms late, {loss:.0%} lost,"
            f" {twice:.0%} doubled"
        )
        account = traffic.finish(transport.title(title))
    assert ended == []
    assert (account.refused, account.in_doubt) == (0, 0)
    assert trip > 2 * delay_ms / 1000
    account.record(f"round trip {trip * 1000:.0f} ms; no connection ended")


@pytest.mark.timing
@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_keepalive_of_client_broker_unreachable_is_disconnected(
    link: Link, socket_dir: Path, monkeypatch: pytest.MonkeyPatch, transport: Transport, face: str
) -> None:
    """Its pending calls are in doubt within keepalive.DEFAULT_S (shorter here), though
    no call has timed out.
    """
    for module in ("brokerd_client.blocking.transport", "brokerd_client.aio.transport"):
        monkeypatch.setattr(f"{module}.DEFAULT_S", KEEPALIVE_S)
    with start_broker(socket_dir, link, transport) as broker:
        address = str(broker.addresses()[1])
        began = 0.0

        def cut() -> None:
            nonlocal began
            link.cut(CLIENTS)
            began = time.monotonic()

        async def ask() -> None:
            async with aio.connect(
                address, "s0", key_of("s0"), ssl=transport.context, reconnect=False
            ) as client:
                await client.ping()
                cut()
                await client.request("s0", 1, timeout=WAIT_S)

        # A thread is in the network of the one that made it.
        with link.visit(CLIENTS):
            if face == "asyncio":
                with pytest.raises(InDoubt):
                    asyncio.run(ask())
            else:
                with brokerd_client.connect(
                    address, "s0", key=key_of("s0"), ssl=transport.context, reconnect=False
                ) as client:
                    client.ping()
                    cut()
                    with pytest.raises(InDoubt):
                        client.request("s0", 1, timeout=WAIT_S)
            took = time.monotonic() - began
    assert KEEPALIVE_S / 2 < took < KEEPALIVE_S + SCHEDULING_S
    print(f"found after {took:.2f} s")
