"""Processes are killed and stopped in the middle of traffic; the account of all
messages balances.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.outages.traffic import RECIPIENTS, SENDERS, Traffic
from support.outages.transports import Transport
from support.waiting import until

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs signals and /proc as on Linux"
)

NAMES = (*SENDERS, *RECIPIENTS)


def test_broker_killed_loses_only_messages_in_its_memory(
    socket_dir: Path, transport: Transport
) -> None:
    """Messages under way are in doubt, and all clients reconnect. Only the messages in
    the broker's memory are lost.
    """
    with BrokerProcess(socket_dir, NAMES, listen=transport.listen()) as broker:
        broker.wait("daemon.started")
        with transport.traffic(socket_dir, broker) as traffic:
            # Stopped first, so that messages are in flight.
            broker.signal(signal.SIGSTOP)
            _until_nothing_moves(traffic)
            broker.signal(signal.SIGKILL)
            broker.exit_status()
            with BrokerProcess(socket_dir, NAMES, listen=transport.listen_again(broker)) as again:
                again.wait("daemon.started")
                seconds = until(
                    lambda: len(again.events("client.connected")) == len(NAMES),
                    "not all clients have reconnected",
                )
                traffic.goes_on()
                account = traffic.finish(
                    transport.title("SIGKILL of the broker, started again"), killed=["broker"]
                )
    assert account.in_doubt > 0
    account.record(f"all clients back after {seconds:.1f} s")


@pytest.mark.parametrize(
    "transport", ["plain", pytest.param("tls", marks=pytest.mark.slow)], indirect=True
)
def test_recipient_killed_is_reported_to_its_senders(
    socket_dir: Path, transport: Transport
) -> None:
    """Its unanswered requests fail, and its messages come back as offline. Another
    process takes its place.
    """
    with BrokerProcess(socket_dir, NAMES, listen=transport.listen()) as broker:
        broker.wait("daemon.started")
        with transport.traffic(socket_dir, broker) as traffic:
            traffic.recipients["r0"].end()
            traffic.goes_on(but=["r0"])
            traffic.restart("r0")
            traffic.goes_on()
            account = traffic.finish(
                transport.title("SIGKILL of a recipient, started again"), killed=["r0"]
            )
    assert account.refused > 0
    account.record("all other clients were served")


@pytest.mark.slow
def test_sender_killed_messages_arrive_once_and_in_order(
    socket_dir: Path, transport: Transport
) -> None:
    """A message of the killed sender arrives once and in order, or not at all; no other
    client notices.
    """
    with BrokerProcess(socket_dir, NAMES, listen=transport.listen()) as broker:
        broker.wait("daemon.started")
        with transport.traffic(socket_dir, broker) as traffic:
            killed = traffic.senders.pop("s0")
            killed.end()
            traffic.goes_on()
            account = traffic.finish(transport.title("SIGKILL of a sender"))
            confirmed = {
                tuple(line[:3]) for line in killed.lines() if line[3] in ("Receipt", "Reply")
            }
            received = {
                (kind, name, number)
                for name, recipient in traffic.recipients.items()
                for kind, sender, number in recipient.lines()
                if sender == "s0"
            }
    # What had a receipt was delivered, sender or no sender.
    assert confirmed <= received
    # The account counts the sent messages of the others, and the received ones of this.
    account.sent += len(received)
    account.record("all messages with a receipt arrived")


def test_recipient_stopped_and_continued_gets_queued_messages(
    socket_dir: Path, transport: Transport
) -> None:
    """Its messages wait, and other clients are served. Afterwards it gets all of them,
    unless their senders got an error.
    """
    with BrokerProcess(
        socket_dir, NAMES, listen=transport.listen(), limits={"wait_timeout": "1s"}
    ) as broker:
        broker.wait("daemon.started")
        with transport.traffic(socket_dir, broker) as traffic:
            pid = traffic.recipients["r0"].popen.pid
            os.kill(pid, signal.SIGSTOP)
            traffic.goes_on(but=["r0"])
            os.kill(pid, signal.SIGCONT)
            traffic.goes_on()
            account = traffic.finish(transport.title("SIGSTOP of a recipient, then SIGCONT"))
    assert not broker.events("client.disconnected") or account.in_doubt == 0
    account.record("all other clients were served")


@pytest.mark.slow
def test_broker_stopped_and_continued_keeps_connections(
    socket_dir: Path, transport: Transport
) -> None:
    """All clients wait. When the broker continues, so do they, on the same connections."""
    with BrokerProcess(socket_dir, NAMES, listen=transport.listen()) as broker:
        broker.wait("daemon.started")
        with transport.traffic(socket_dir, broker) as traffic:
            broker.signal(signal.SIGSTOP)
            until(lambda: _is_stopped(broker.popen.pid), "it does not stop")
            _until_nothing_moves(traffic)
            broker.signal(signal.SIGCONT)
            traffic.goes_on()
            disconnected = len(broker.events("client.disconnected"))
            account = traffic.finish(transport.title("SIGSTOP of the broker, then SIGCONT"))
    assert disconnected == 0
    assert (account.in_doubt, account.refused) == (0, 0)
    account.record("no connection ended")


def _until_nothing_moves(traffic: Traffic) -> None:
    """Wait until no member has noted anything for half a second."""
    files = [each.note_file for each in (*traffic.senders.values(), *traffic.recipients.values())]
    seen: list[list[int]] = []

    def nothing_moves() -> bool:
        seen.append([file.stat().st_size for file in files])
        return len(seen) > 25 and all(sizes == seen[-1] for sizes in seen[-25:])

    until(nothing_moves, "the traffic goes on")


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
