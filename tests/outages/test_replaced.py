"""The broker is upgraded, restarted, or renews its certificate, or a recipient reads
slowly.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.outages.traffic import RECIPIENTS, SENDERS, Account
from support.outages.transports import Transport

import brokerd_client
from brokerd_client.errors import Full

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

NAMES = (*SENDERS, *RECIPIENTS)
TIMEOUT_S = 30.0
#: By default over TLS alone; tests/e2e upgrades with plain connections too.
tls_by_default = pytest.mark.parametrize(
    "transport", [pytest.param("plain", marks=pytest.mark.slow), "tls"], indirect=True
)


@tls_by_default
@pytest.mark.parametrize("upgrades", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_upgrade_under_traffic_loses_nothing(
    socket_dir: Path, transport: Transport, upgrades: int
) -> None:
    """Plain connections go on; connections over TLS are closed in order and made again.
    No message is lost.
    """
    clients = {**dict.fromkeys(NAMES), "ops": {"admin": True}}
    with (
        BrokerProcess(socket_dir, clients, listen=transport.listen()) as broker,
        broker.login("ops") as ops,
    ):
        with transport.traffic(socket_dir, broker) as traffic:
            for _ in range(upgrades):
                answer = ops.ask("upgrade").json
                assert answer["upgraded"], answer
                traffic.goes_on()
            account = traffic.finish(
                transport.title(f"{upgrades} {'upgrades in a row' if upgrades > 1 else 'upgrade'}")
            )
        assert not broker.events("daemon.bug")
    if transport.issued is None:
        assert (account.refused, account.in_doubt) == (0, 0)
    account.record(
        "connections over TLS were made again" if transport.issued else "no connection ended"
    )


@pytest.mark.slow
def test_broker_restarted_three_times_loses_nothing(socket_dir: Path, transport: Transport) -> None:
    """A broker that gets SIGTERM delivers or reports its messages; all clients connect
    to the next one.
    """
    with contextlib.ExitStack() as brokers:
        broker = brokers.enter_context(BrokerProcess(socket_dir, NAMES, listen=transport.listen()))
        again = transport.listen_again(broker)
        with transport.traffic(socket_dir, broker) as traffic:
            for _ in range(3):
                broker.signal(signal.SIGTERM)
                assert broker.exit_status() == 0
                broker = brokers.enter_context(BrokerProcess(socket_dir, NAMES, listen=again))
                traffic.goes_on()
            account = traffic.finish(
                transport.title("SIGTERM of the broker, started again, 3 times")
            )
        assert not broker.events("daemon.bug")
    account.record("all clients were back each time")


@pytest.mark.slow
def test_certificate_renewed_five_times_keeps_connections(
    socket_dir: Path, over_tls: Transport
) -> None:
    """Connected clients go on, a new client gets the new certificate, and no client
    waits.
    """
    transport, renewals = over_tls, 5
    assert transport.issued is not None
    assert transport.authority is not None
    with BrokerProcess(socket_dir, (*NAMES, "late"), listen=transport.listen()) as broker:
        address = transport.address(broker)
        with transport.traffic(socket_dir, broker) as traffic:
            for number in range(1, renewals + 1):
                renewed = transport.authority.issue("renewed")
                transport.issued.certificate.write_bytes(renewed.certificate.read_bytes())
                transport.issued.key.write_bytes(renewed.key.read_bytes())
                broker.signal(signal.SIGHUP)
                broker.wait("daemon.reloaded", number)
                with brokerd_client.connect(
                    address, "late", key_of("late"), ssl=transport.context
                ) as late:
                    late.ping()
                traffic.goes_on()
            disconnected = [
                event["name"]
                for event in broker.events("client.disconnected")
                if event["name"] != "late"
            ]
            account = traffic.finish(transport.title(f"{renewals} renewals of the certificate"))
    assert disconnected == []
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended; new clients were accepted each time")


@tls_by_default
@pytest.mark.parametrize("when_full", ["refuse", "wait"])
def test_recipient_reading_slowly_gets_accepted_messages(
    socket_dir: Path, transport: Transport, when_full: str
) -> None:
    """It gets the accepted messages in order. The sender gets an error for each of the
    others, and other clients are served.
    """
    clients = {
        "alice": {"queue": "8MiB"},
        "bob": {"queue": "256KiB", "when_full": when_full},
        "carol": {},
    }
    account = Account(
        transport.title(f"a recipient that does not read (when_full: {when_full}), and then does")
    )
    limits = {"wait_timeout": "100ms"}
    accepted: list[int] = []
    with BrokerProcess(socket_dir, clients, listen=transport.listen(), limits=limits) as broker:
        address = transport.address(broker)
        alice, bob, carol = (
            brokerd_client.connect(address, name, key_of(name), ssl=transport.context, inbox=1)
            for name in clients
        )
        with alice, bob, carol:
            while not account.refused:
                assert account.sent < 20_000, "the queue was never full"
                numbers = range(account.sent, account.sent + 50)
                bulk = [("bob", b"%05d" % number + bytes(4000)) for number in numbers]
                outcomes = alice.send_many_confirmed(bulk, timeout=TIMEOUT_S)
                accepted += [
                    number
                    for number, each in zip(numbers, outcomes, strict=True)
                    if not isinstance(each, Full)
                ]
                account.sent += len(bulk)
                account.refused = account.sent - len(accepted)
                carol.ping()
            alice.send_confirmed("carol", "end", timeout=TIMEOUT_S)
            received = [int(bob.recv(TIMEOUT_S).body[:5]) for _ in accepted]
            alice.send_confirmed("bob", b"99999", timeout=TIMEOUT_S)
            assert bob.recv(TIMEOUT_S).body == b"99999"
            assert carol.recv(TIMEOUT_S).payload == "end"
    account.delivered, account.twice = len(set(received)), len(received) - len(set(received))
    account.out_of_order = received != sorted(received)
    account.unaccounted = len(set(accepted) ^ set(received))
    account.record("all other clients were served")
