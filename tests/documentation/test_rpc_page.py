"""docs/rpc.md: its examples run as they stand, but for how they connect."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from support.pages import code_blocks

from brokerd.testing import RunningBroker, broker

assert broker, "the fixture is used by name"

BLOCKS = [block.text for block in code_blocks("docs/rpc.md") if block.language == "python"]


def example(words: str) -> str:
    """Return the one block that has these words, with the arguments to connect."""
    [text] = (text for text in BLOCKS if words in text)
    return re.sub(r'connect\(name="(\w+)"\)', r'connect(address, "\1", key("\1"))', text)


def test_rpc_page_examples_call_each_other(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"address": broker.address, "key": broker.key}
    exec(example('brokerd_client.connect(name="bob")'), names)
    exec(example('brokerd_client.connect(name="alice")'), names)
    with names["alice"] as alice, names["bob"]:
        exec(example("total: int"), names)
        assert names["total"] == 11
        with pytest.raises(Exception, match="tea") as caught:
            exec(example("class OutOfStock"), names)
        assert type(caught.value) is names["OutOfStock"]
        call = alice.request("bob", [[1], {"b": 2}], extension={"rpc.method": "add"})
        assert call.payload == 3
    assert capsys.readouterr().out == "3\n"


def test_rpc_page_asyncio_example_calls_a_coroutine(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"address": broker.address, "key": broker.key}
    exec(example("async def main"), names)
    asyncio.run(names["main"]())
    assert capsys.readouterr().out == "3\n"
