"""The daemon is upgraded under load, and its clients notice nothing."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.load.upgrade import CLIENTS, Load

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

UPGRADES = 5


def upgraded_under_load(directory: Path, upgrades: int, idle: int = 0) -> list[str]:
    """Upgrade ``upgrades`` times in a row under full load; return the account of every
    message.
    """
    clients = {**CLIENTS, "idle": {"connections": max(idle, 1)}}
    with BrokerProcess(directory, clients, listen=["127.0.0.1:0"], log={"level": "info"}) as broker:
        ops = broker.login("ops")
        idle_clients = [broker.login("idle") for _ in range(idle)]
        pauses = []
        with ops, Load(broker) as load:
            for _ in range(upgrades):
                answer = ops.ask("upgrade").json
                assert answer["upgraded"], answer
                pauses.append(answer["pause_ms"])
                load.check()
            load.finish()
            stats = ops.ask("stats").json
        for raw in idle_clients:
            raw.ping()
            raw.close()
        assert stats["upgrades"] == upgrades
        assert not broker.events("daemon.bug")
        assert not broker.events("client.refused")
        last = broker.wait("daemon.upgraded", upgrades)[-1]["timestamp"]
        disconnected = [
            each["name"]
            for each in broker.events("client.disconnected")
            if each["timestamp"] <= last
        ]
        assert set(disconnected) <= {"newcomer"}
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0
    ms = ", ".join(f"{pause:g}" for pause in pauses)
    return [
        (
            f"{upgrades} upgrades in a row, {answer['connections']} connections at the last: pauses"
            f" of {ms} ms"
        ),
        *(f"  {count:9,}  {what}" for what, count in load.account.items()),
        (
            f"  {stats['messages_in']:9,}  in all, as the broker counted; {stats['dropped']}"
            " dropped for newer ones"
        ),
    ]


@pytest.mark.slow
def test_upgrade_ten_times_with_1000_connections_loses_nothing(
    socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same load with 1,000 more connections; the pauses are printed."""
    account = upgraded_under_load(socket_dir, 10, idle=1000)
    with capsys.disabled():
        print("", *account, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("connections", [1000, 10_000])
def test_upgrade_pause_without_load_is_short(
    socket_dir: Path, connections: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without other load, each connection costs some microseconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < connections + 100:
        pytest.skip(f"only {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    clients = {"ops": {"admin": True}, "idle": {"connections": connections}}
    with (
        BrokerProcess(socket_dir, clients, limits={"connections": connections + 10}) as broker,
        broker.login("ops") as ops,
    ):
        idle_clients = [broker.login("idle") for _ in range(connections)]
        pauses = [ops.ask("upgrade").json["pause_ms"] for _ in range(3)]
        for raw in idle_clients:
            raw.ping()
            raw.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with capsys.disabled():
        print(
            f"\n{connections:,} connections: pauses of"
            f" {', '.join(f'{pause:g}' for pause in pauses)} ms"
        )
    assert max(pauses) < 5000


def test_upgrade_five_times_under_full_load_loses_nothing(
    socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every message is accounted for, no connection ends, and no new client is refused."""
    account = upgraded_under_load(socket_dir, UPGRADES)
    with capsys.disabled():
        print("", *account, sep="\n")
