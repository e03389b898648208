"""Every key is changed while clients connect all the time, and no client is refused."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.broker_process import BrokerProcess
from support.load.client_load import TIMEOUT_S, ClientLoad, write_atomically

NAMES = ["a", "b", "c", "d"]


def key(name: str, generation: int) -> bytes:
    return f"{name}'s key number {generation}".encode()


def write_keys(directory: Path, generation: int) -> None:
    for name in NAMES:
        file = directory / f"{name}.{generation}"
        file.write_bytes(key(name, generation) + b"\n")
        file.chmod(0o600)


def clients(*generations: int) -> dict[str, Any]:
    """Return entries in which every client has the keys of these generations."""
    return {
        name: {"keys": [{"file": f"{name}.{each}"} for each in generations], "connections": 2}
        for name in NAMES
    }


async def rotate(broker: BrokerProcess, load: ClientLoad, directory: Path, generation: int) -> None:
    """Change every key to the next one: both are accepted, the clients change, the old
    key is removed.
    """

    async def reload(entries: dict[str, Any], count: int) -> None:
        whole = {**yaml.safe_load(broker.config.read_text()), "clients": entries}
        write_atomically(broker.config, yaml.safe_dump(whole))
        broker.signal(signal.SIGHUP)
        event = (await asyncio.to_thread(broker.wait, "daemon.reloaded", count))[-1]
        assert event["disconnected"] == []

    write_keys(directory, generation)
    await reload(clients(generation - 1, generation), 2 * generation - 1)
    for name in NAMES:
        load.keys[name] = key(name, generation)
    # Clients that are connecting now may still use the old key.
    await load.until_all_reconnected()
    await reload(clients(generation), 2 * generation)


async def rotate_under_load(directory: Path, times: int) -> dict[str, int]:
    write_keys(directory, 0)
    with BrokerProcess(directory, clients(0)) as broker:
        broker.wait("daemon.started")
        load = ClientLoad(str(broker.socket), {name: key(name, 0) for name in NAMES}, 0)
        for name in NAMES:
            load.connect_repeatedly(name)
        for generation in range(1, times + 1):
            async with asyncio.timeout(TIMEOUT_S):
                await rotate(broker, load, directory, generation)
        await load.finish()
        assert load.refused == []
        refusals = broker.events("client.refused") + broker.events("client.refused_more")
    used = len(load.keys_used)
    return {
        "rotations": times,
        "keys used": used,
        "connections": load.reconnections,
        "refused": len(refusals),
    }


@pytest.mark.parametrize("times", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_key_file_rotation_under_load_refuses_no_client(socket_dir: Path, times: int) -> None:
    """Clients that connect all the time are accepted each time, with each key in its
    turn.
    """
    account = asyncio.run(rotate_under_load(socket_dir, times))
    print(f"rotation under load: {account}")
    assert account["refused"] == 0
    assert account["keys used"] == len(NAMES) * (times + 1)
