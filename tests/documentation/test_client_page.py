"""docs/client.md: its examples run as they stand; those that stop on SIGTERM do so as
processes, while requests run.
"""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.pages import code_blocks
from support.waiting import until

from brokerd.testing import RunningBroker, broker, running
from brokerd_client import Offline, aio

assert broker, "the fixture is used by name"

BLOCKS = [block for block in code_blocks("docs/client.md") if block.language == "python"]
TIMEOUT_S = 30
#: What the examples call without defining it: work that says which process did it.
WORK = {
    "blocking": """
import os, time
def do(payload):
    time.sleep(0.02)
    return os.getpid()
""",
    "asyncio": """
import asyncio, os
async def do(payload):
    await asyncio.sleep(0.02)
    return os.getpid()
""",
}


def example(*words: str) -> str:
    """Return the one block that has all the words."""
    [text] = (block.text for block in BLOCKS if all(word in block.text for word in words))
    return text


def adapted(text: str, broker: RunningBroker) -> str:
    """Return an example with the address and the key file of a test's broker."""
    key_file = broker.environ("alice")["BROKERD_KEY_FILE"]
    return text.replace("/run/brokerd/brokerd.sock", broker.address).replace("keys/alice", key_file)


@pytest.fixture
def pool() -> Iterator[RunningBroker]:
    """A broker with a pool of two workers, and a requester."""
    with running({"worker": {"connections": 2}, "alice": {}}) as pool:
        yield pool


@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_client_page_sigterm_example_answers_every_request(
    face: str, pool: RunningBroker, tmp_path: Path
) -> None:
    """The documented service runs twice. One process gets SIGTERM while requests run:
    every request is answered until it has ended, and nothing is logged.
    """
    program = tmp_path / "service.py"
    words = {"blocking": "stop.wait()\nclient.drain", "asyncio": "await client.drain"}
    program.write_text(WORK[face] + example("signal.SIGTERM", words[face]))
    alice = pool.connect("alice")
    environ = {**os.environ, **pool.environ("worker")}
    services = [
        subprocess.Popen([sys.executable, str(program)], env=environ, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    answers: list[Any] = []
    try:
        until(lambda: pool.stats()["connections"] == len(services) + 1)

        def ask(number: int) -> None:
            while services[0].poll() is None:
                answer = alice.request("worker", number, timeout=TIMEOUT_S)
                answers.append(answer.payload)

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask, number) for number in range(8)]
            until(lambda: {service.pid for service in services} <= set(answers))
            services[0].send_signal(signal.SIGTERM)
            for each in asking:
                each.result(TIMEOUT_S)
        services[1].send_signal(signal.SIGTERM)
        ends = [service.communicate(timeout=TIMEOUT_S)[1] for service in services]
    finally:
        for service in services:
            service.kill()
            service.communicate()
    assert ends == [b"", b""]
    assert [service.returncode for service in services] == [0, 0]


def test_client_page_first_examples_talk_to_each_other(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alice's example sends a message and a request to bob's example."""
    bob = broker.connect("bob")
    serve = threading.Thread(target=exec, args=[example("for message in client"), {"client": bob}])
    serve.start()
    exec(adapted(example('client.request("bob"'), broker), {})
    printed: list[str] = []

    def all_printed() -> bool:
        printed.extend(capsys.readouterr().out.splitlines())
        return len(printed) == 2

    until(all_printed)
    bob.close()
    serve.join(TIMEOUT_S)
    assert sorted(printed) == ["3", "alice hello"]


def test_client_page_asyncio_example_receives_events(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example sends a message, and prints the events that another client publishes."""
    bob = broker.connect("bob")
    text = adapted(example("async with aio.connect"), broker)
    code = compile(text, "client.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def run() -> None:
        task = asyncio.ensure_future(eval(code, {}))
        await asyncio.to_thread(until, lambda: broker.stats()["subscriptions"] == 1)
        bob.publish("news.today", "rain")
        printed = ""
        while not printed:
            await asyncio.sleep(0.005)
            printed = capsys.readouterr().out
        assert printed == "news.today rain\n"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
    assert bob.recv(timeout=TIMEOUT_S).payload == "hello"


def test_client_page_channel_examples_talk_to_each_other(
    broker: RunningBroker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bob's example accepts the channel that alice's example opens, and prints its bytes."""
    alice, bob = broker.connect("alice"), broker.connect("bob")
    accept = example("bob.listen()", "listener.accept")
    accepting = threading.Thread(target=exec, args=[accept, {"bob": bob}], daemon=True)
    accepting.start()
    open_channel = example("alice.open(")

    def opens() -> bool:
        try:
            exec(open_channel, {"alice": alice, "array": b"numbers"})
        except Offline:
            return False
        return True

    until(opens)
    accepting.join(TIMEOUT_S)
    assert capsys.readouterr().out == "alice b'numbers'\n"


def test_client_page_asyncio_channel_examples_talk_to_each_other(broker: RunningBroker) -> None:
    """Bob's example answers with what it has read."""
    serve, open_stream = (
        compile(example(words), "client.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for words in ("async for reader, writer", "alice.open_stream")
    )

    async def run() -> None:
        async with (
            aio.connect(broker.address, "alice", broker.key("alice")) as alice,
            aio.connect(broker.address, "bob", broker.key("bob")) as bob,
        ):
            serving = asyncio.ensure_future(eval(serve, {"bob": bob}))
            names: dict[str, Any] = {"alice": alice}
            while "writer" not in names:
                try:
                    await eval(open_stream, names)
                except Offline:
                    await asyncio.sleep(0.005)
            names["writer"].write(b"hello")
            assert await names["reader"].read() == b"hello"
            names["writer"].close()
            serving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await serving

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_client_page_connection_example_notes_the_final_loss(broker: RunningBroker) -> None:
    """The handler of the example raises the alarm when the client gives up."""
    alarms: list[str] = []
    client = broker.connect("alice", reconnect=False)
    exec(example("@client.on_connection"), {"client": client, "alarm": alarms.append})
    broker.kill()
    until(lambda: len(alarms) == 1)
    assert alarms[0].startswith("no more work is done: ")


def test_client_page_tls_example_connects(
    authority: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example trusts the broker's CA, and shows a certificate of its own."""
    server, shown = authority.issue("broker"), authority.issue("alice")
    tls = {
        "certificate": str(server.certificate),
        "key": str(server.key),
        "client_ca": str(authority.file),
    }
    (tmp_path / "ca.pem").write_bytes(authority.file.read_bytes())
    (tmp_path / "alice.pem").write_bytes(shown.certificate.read_bytes())
    (tmp_path / "alice.key").write_bytes(shown.key.read_bytes())
    monkeypatch.chdir(tmp_path)
    with running({"alice": {}}, tls=tls) as broker:
        text = adapted(example("ssl.create_default_context"), broker)
        names: dict[str, Any] = {}
        exec(
            "import brokerd_client\n" + text.replace("tls://broker.example:6000", broker.address),
            names,
        )
        with names["client"] as client:
            assert client.name == "alice"


def test_client_page_codec_example_sends_values_of_registered_types(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client with the codec of the example gets the values as they were sent."""
    for variable, value in broker.environ("alice").items():
        monkeypatch.setenv(variable, value)
    # The decorator of dataclasses looks its class's module up.
    names: dict[str, Any] = {"__name__": __name__}
    with broker.connect("bob") as bob:
        exec(example("brokerd_client.JsonCodec()"), names)
        body = bob.recv(TIMEOUT_S).body
    sent = [names["Order"](7, names["date"](2026, 12, 24)), names["Fraction"](1, 3)]
    assert names["codec"].decode(body) == sent
