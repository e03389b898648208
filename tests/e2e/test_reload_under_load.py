"""Reloads while clients send at full speed: every message is accounted for, and nobody
who stays notices.
"""

from __future__ import annotations

import asyncio
import random
import signal
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.load.crowd import TIMEOUT_S, Crowd, write_whole

from brokerd_client.errors import Disconnected

STAY = ["s0", "s1", "s2", "s3"]


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"key": key_of(name).decode(), **more}


def variant(directory: Path, number: int, chance: random.Random) -> dict[str, Any]:
    """Return one of many configurations: those who stay are the same in all, everything
    else changes.
    """
    clients: dict[str, Any] = {name: entry(name) for name in (*STAY, "knocker")}
    clients["ops"] = entry("ops", admin=True)
    clients["changing"] = entry(
        "changing", queue=chance.choice(["1MiB", "2MiB"]), publish=[f"t{number}.*"]
    )
    if number % 2:
        clients["guest"] = entry("guest")
    for extra in range(chance.randrange(5)):
        clients[f"extra{extra}"] = entry(f"extra{extra}", connections=chance.randrange(1, 4))
    listen: list[Any] = [str(directory / "brokerd.sock")]
    listen.append(
        {"address": str(directory / "second.sock"), "mode": chance.choice(["0600", "0660"])}
    )
    if chance.random() < 0.5:
        listen.append(str(directory / "third.sock"))
    if chance.random() < 0.5:
        listen.append("127.0.0.1:0")
    return {
        "listen": listen,
        "clients": clients,
        "limits": {
            "wait_timeout": chance.choice(["30s", "31s"]),
            "connections": chance.choice([1000, 2000]),
        },
    }


async def reload_often(
    broker: BrokerProcess, crowd: Crowd, directory: Path, times: int, chance: random.Random
) -> int:
    """Rewrite the file and reload, by signal and by the operation in turn; return who
    was disconnected in all.
    """
    disconnected = 0
    ops = await crowd.enter("ops", sends=False)
    for number in range(1, times + 1):
        write_whole(broker.config, yaml.safe_dump(variant(directory, number, chance)))
        if number % 3:
            broker.signal(signal.SIGHUP)
            event = (await asyncio.to_thread(broker.wait, "daemon.reloaded", number))[-1]
        else:
            answer = await ops.control("reload")
            assert answer["reloaded"], answer
            event = (await asyncio.to_thread(broker.wait, "daemon.reloaded", number))[-1]
            assert event["changed"] == answer["plan"]["changed"]
        disconnected += len(event["disconnected"])
        assert {each["address"] for each in event["disconnected"]} <= {"guest"}
        if number % 2:
            guest = await crowd.enter("guest", sends=False)
        else:
            await disconnected_by_the_broker(guest)
        check_modes(broker.config)
    return disconnected


async def disconnected_by_the_broker(client: Any) -> None:
    with suppress(Disconnected):
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                await client.ping()


def check_modes(file: Path) -> None:
    for each in yaml.safe_load(file.read_text())["listen"]:
        if isinstance(each, dict):
            assert stat.S_IMODE(Path(each["address"]).stat().st_mode) == int(each["mode"], 8)


async def load_and_reload(directory: Path, times: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    first = variant(directory, 0, chance)
    listen, clients = first["listen"][1:], first["clients"]
    with BrokerProcess(directory, clients, listen=listen, limits=first["limits"]) as broker:
        broker.wait("daemon.started")
        names = (*STAY, "guest", "knocker", "ops")
        crowd = Crowd(str(broker.socket), {name: key_of(name) for name in names}, seed)
        crowd.others = ["guest"]
        clients_there = [await crowd.enter(name) for name in STAY]
        crowd.knock("knocker")
        disconnected = await reload_often(broker, crowd, directory, times, chance)
        assert all(client.connected for client in clients_there)
        staying = {each["name"] for each in broker.events("client.disconnected")} & set(STAY)
        await crowd.finish()
        account = crowd.account()
        assert crowd.refused == []
        account |= {
            "reloads": times,
            "disconnected": disconnected,
            "new connections": crowd.knocks,
            "refused": 0,
        }
        account["stayers who lost a connection"] = len(staying)
        broker.signal()
        assert broker.exit_status() == 0
        assert not broker.events("daemon.bug")
    return account


def check(directory: Path, times: int, seed: int) -> None:
    account = asyncio.run(load_and_reload(directory, times, seed))
    print(f"reload under load, seed {seed}: {account}")
    assert account["sent"] > 100 * times
    assert (account["twice"], account["out_of_order"], account["unaccounted"]) == (0, 0, 0)
    assert account["delivered_and_reported"] == 0
    assert account["sent"] == account["delivered"] + account["reported"]
    assert account["new connections"] > 0
    assert account["stayers who lost a connection"] == 0


def test_reload_30_times_under_load_loses_nothing(socket_dir: Path) -> None:
    """The reloads add, change and remove clients. Every message arrives once and in
    order, or is reported.
    """
    check(socket_dir, 30, random.randrange(2**32))


@pytest.mark.slow
def test_reload_500_times_under_load_loses_nothing(socket_dir: Path) -> None:
    """The same five hundred times."""
    check(socket_dir, 500, random.randrange(2**32))
