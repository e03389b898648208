"""The library on the oldest Python that it supports, without any other package."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.interpreters import interpreters

from brokerd.testing import RunningBroker, running

ROOT = Path(__file__).resolve().parents[2]
#: The Pythons of the library, oldest first.
VERSIONS = tuple(f"3.{minor}" for minor in range(9, 16))

#: Both faces, TLS included, each in a conversation with itself.
PROGRAM = """
import asyncio, importlib, pkgutil, sys, warnings
warnings.simplefilter("error")
library, address, name, key = sys.argv[1:]
sys.path.insert(0, library)
import brokerd_client
from brokerd_client import aio

for module in pkgutil.walk_packages(brokerd_client.__path__, "brokerd_client."):
    if not module.name.endswith("named_pipes"):
        importlib.import_module(module.name)

with brokerd_client.connect(address, name, bytes.fromhex(key)) as client:
    client.on_request(lambda message: sum(message.payload))
    assert client.request(name, [1, 2], timeout=20).payload == 3
    assert client.send_many_confirmed([(name, "hello")] * 3)[2].to == name
    assert [client.recv(20).payload for _ in range(3)] == ["hello"] * 3
    try:
        client.recv(0.01)
    except brokerd_client.TimedOut as error:
        assert isinstance(error, TimeoutError)
    try:
        client.send_many([(name, 1), (name, 2, 3)])
    except ValueError:
        pass
    else:
        raise AssertionError("a triple is not a pair")

async def main():
    async with aio.connect(address, name, bytes.fromhex(key)) as client:
        @client.on_request
        async def answer(message):
            await asyncio.sleep(0)
            return message.payload * 2

        assert (await client.request(name, "ab", timeout=20)).payload == "abab"
        async with client.subscribe("news.>") as events:
            await client.publish_confirmed("news.today", b"x")
            assert (await events.recv(20)).topic == "news.today"
            try:
                await events.recv(0.01)
            except brokerd_client.TimedOut as error:
                assert isinstance(error, TimeoutError)
        assert str(brokerd_client.wire.envelope.ErrorCode.FULL) == "full"

asyncio.run(main())
print("%d.%d" % sys.version_info[:2])
"""


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    """A broker with one client."""
    with running({"alice": {}}) as running_broker:
        yield running_broker


def test_library_on_oldest_python_needs_no_package(broker: RunningBroker) -> None:
    """Without site-packages (-S), both faces of the library send, request and publish."""
    found = interpreters()
    version = next(version for version in VERSIONS if version in found)

    done = subprocess.run(
        [
            *(found[version], "-E", "-S", "-c", PROGRAM, str(ROOT / "client")),
            *(broker.address, "alice", broker.key("alice").hex()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr) == (f"{version}\n", "")
