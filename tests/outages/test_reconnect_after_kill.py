"""The broker is killed and started again: all clients reconnect, and know which calls
are in doubt.
"""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import pytest
from support.outages.restartable_broker import RestartableBroker, restartable_broker

from brokerd_client import aio
from brokerd_client.errors import InDoubt

#: Requests each client has outstanding when the broker dies.
OUTSTANDING = 3


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_broker_killed_and_restarted_clients_reconnect(
    socket_dir: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly the requests without an answer are in doubt, and every client works
    again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * count + 200:
        pytest.skip(f"{count} clients need more file descriptors than the {hard} allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2 * count + 200)), hard))
    names = [f"c{number}" for number in range(count)]
    with restartable_broker(socket_dir, [*names, "silent", "echo"]) as broker:
        seconds = asyncio.run(_scenario(broker, names))
    with capsys.disabled():
        print(f"\n{count} clients back {seconds:.2f} s after the broker was started again")


async def _scenario(broker: RestartableBroker, names: list[str]) -> float:
    async def connect(name: str) -> aio.Client:
        return await aio.connect(broker.address, name=name, key=broker.key(name), timeout=60)

    silent, echo = await connect("silent"), await connect("echo")
    echo.on_request(lambda message: message.payload)

    async def never_answer(message: aio.Message) -> None:
        await asyncio.Event().wait()

    silent.on_request(never_answer)
    clients = [await connect(name) for name in names]
    for client in clients:
        assert (await client.request("echo", client.name, timeout=60)).payload == client.name
    pending = [
        asyncio.create_task(client.request("silent", number, timeout=120))
        for client in clients
        for number in range(OUTSTANDING)
    ]
    # Every request has reached the broker when a later operation of the same client is
    # answered.
    await asyncio.gather(*(client.ping() for client in clients))
    broker.kill()
    outcomes = await asyncio.wait_for(asyncio.gather(*pending, return_exceptions=True), 60)
    assert [type(outcome) for outcome in outcomes] == [InDoubt] * len(pending)
    assert len({outcome.message_id for outcome in outcomes if isinstance(outcome, InDoubt)}) == len(
        pending
    )
    broker.start()
    began = time.monotonic()
    answers = await asyncio.wait_for(
        asyncio.gather(
            *(client.control("whoami", timeout=60) for client in [silent, echo, *clients])
        ),
        90,
    )
    seconds = time.monotonic() - began
    assert [answer["name"] for answer in answers] == ["silent", "echo", *names]
    for client in clients:
        assert (await client.request("echo", "again", timeout=60)).payload == "again"
    await asyncio.gather(*(client.close() for client in [silent, echo, *clients]))
    return seconds
