"""Reloads while clients send at full speed: every message is accounted for, and clients
that stay notice nothing.
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
from support.load.client_load import TIMEOUT_S, ClientLoad, write_atomically

from brokerd_client.errors import Disconnected

STAY = ["s0", "s1", "s2", "s3"]


def entry(name: str, **more: Any) -> dict[str, Any]:
    return {"key": key_of(name).decode(), **more}


def variant(directory: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """Return one of many configurations: the staying clients are the same in all,
    everything else changes.
    """
    clients: dict[str, Any] = {name: entry(name) for name in (*STAY, "reconnecting")}
    clients["ops"] = entry("ops", admin=True)
    clients["changing"] = entry(
        "changing", queue=rng.choice(["1MiB", "2MiB"]), publish=[f"t{number}.*"]
    )
    if number % 2:
        clients["guest"] = entry("guest")
    for extra in range(rng.randrange(5)):
        clients[f"extra{extra}"] = entry(f"extra{extra}", connections=rng.randrange(1, 4))
    listen: list[Any] = [str(directory / "brokerd.sock")]
    listen.append({"address": str(directory / "second.sock"), "mode": rng.choice(["0600", "0660"])})
    if rng.random() < 0.5:
        listen.append(str(directory / "third.sock"))
    if rng.random() < 0.5:
        listen.append("127.0.0.1:0")
    return {
        "listen": listen,
        "clients": clients,
        "limits": {
            "wait_timeout": rng.choice(["30s", "31s"]),
            "connections": rng.choice([1000, 2000]),
        },
    }


async def reload_often(
    broker: BrokerProcess, load: ClientLoad, directory: Path, times: int, rng: random.Random
) -> int:
    """Rewrite the file and reload, by signal and by the operation in turn; return how
    many connections ended.
    """
    disconnected = 0
    ops = await load.connect("ops", sends=False)
    for number in range(1, times + 1):
        write_atomically(broker.config, yaml.safe_dump(variant(directory, number, rng)))
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
            guest = await load.connect("guest", sends=False)
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
    rng = random.Random(seed)
    first = variant(directory, 0, rng)
    listen, clients = first["listen"][1:], first["clients"]
    with BrokerProcess(directory, clients, listen=listen, limits=first["limits"]) as broker:
        broker.wait("daemon.started")
        names = (*STAY, "guest", "reconnecting", "ops")
        load = ClientLoad(str(broker.socket), {name: key_of(name) for name in names}, seed)
        load.others = ["guest"]
        staying_clients = [await load.connect(name) for name in STAY]
        load.connect_repeatedly("reconnecting")
        disconnected = await reload_often(broker, load, directory, times, rng)
        assert all(client.connected for client in staying_clients)
        interrupted = {each["name"] for each in broker.events("client.disconnected")} & set(STAY)
        await load.finish()
        account = load.account()
        assert load.refused == []
        account |= {
            "reloads": times,
            "disconnected": disconnected,
            "new connections": load.reconnections,
            "refused": 0,
        }
        account["stayers who lost a connection"] = len(interrupted)
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
