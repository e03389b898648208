"""The client of docs/protocol.md, and the caller of docs/channels.md, typed as they stand
into every stock Python found, talk to our library.

The broker is a process, each stock Python is a process, and bob is a client of the
library.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.interpreters import ALL_VERSIONS, interpreters
from support.keys import key_of
from support.waiting import until

import brokerd_client
from brokerd_client.blocking import Client

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
CHANNELS = PAGE.with_name("channels.md")
#: These know no digest but MD5.
OLD = ("2.7", *(f"3.{minor}" for minor in range(6, 12)))
TIMEOUT_S = 30.0


def typed(address: str, name: str) -> str:
    """Return the page's example, with this test's address and key in place of the
    page's, and what it heard.
    """
    example = re.search(
        r"```python\n(from multiprocessing\.connection import Client\n.*?)```",
        PAGE.read_text(),
        re.DOTALL,
    )
    assert example is not None, "docs/protocol.md has no stock client"
    code = example[1]
    assert code.count('"/run/brokerd/brokerd.sock"') == code.count('b"alice\'s key"') == 1
    code = code.replace('"/run/brokerd/brokerd.sock"', repr(address)).replace(
        'b"alice\'s key"', repr(key_of(name))
    )
    return (
        f"{code}\nprint((kind, flags, codec, id, str(sender), payload == b'welcome, ' +"
        f" b'{name}'))\n"
    )


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerProcess]:
    """A broker with two clients for each Python: one that may use MD5 and one that may
    not.
    """
    clients = {"bob": None} | {
        f"py{version.replace('.', '')}{kind}": {"allow_md5": kind == "old"}
        for version in ALL_VERSIONS
        for kind in ("old", "young")
    }
    with (
        tempfile.TemporaryDirectory(prefix="bd-") as directory,
        BrokerProcess(Path(directory), clients) as process,
    ):
        process.wait("daemon.started")
        yield process


@pytest.fixture(scope="module")
def bob(broker: BrokerProcess) -> Iterator[Client]:
    with brokerd_client.connect(str(broker.socket), "bob", key_of("bob")) as client:
        yield client


def python(version: str) -> list[str]:
    path = interpreters().get(version)
    if path is None:
        pytest.skip(f"no Python {version} here")
    # Isolated: neither this directory nor anything of ours is on its path. 2.7 knows
    # the parts by other names.
    return [path, "-E", "-s"] if version == "2.7" else [path, "-I"]


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_protocol_page_example_works(version: str, broker: BrokerProcess, bob: Client) -> None:
    """With nothing installed and nothing changed; before 3.12 for a client with
    allow_md5.
    """
    name = f"py{version.replace('.', '')}{'old' if version in OLD else 'young'}"
    with subprocess.Popen(
        [*python(version), "-c", typed(str(broker.socket), name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as stock:
        try:
            message = bob.recv(timeout=TIMEOUT_S)
            assert (message.sender, message.payload) == (name, b"hello")
            bob.send(name, b"welcome, " + name.encode())
            output, _ = stock.communicate(timeout=TIMEOUT_S)
        finally:
            stock.kill()
    assert re.fullmatch(r"\(1, 0, 0, \d+L?, 'bob', True\)", output.strip()), output
    assert stock.returncode == 0


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_channels_page_caller_works(
    version: str, broker: BrokerProcess, bob: Client, tmp_path: Path
) -> None:
    """The caller opens a channel to a client of the library."""
    name = f"py{version.replace('.', '')}{'old' if version in OLD else 'young'}"
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "till").write_bytes(key_of(name) + b"\n")
    program = re.search(r"# till\.py\n(.*?)```", CHANNELS.read_text(), re.DOTALL)
    assert program is not None, "docs/channels.md has no stock caller"
    code = program[1].replace("./brokerd.sock", str(broker.socket))
    code = code.replace('0, 0, 5, 1) + b"stock"', '0, 0, 3, 1) + b"bob"')
    with (
        bob.listen() as listener,
        subprocess.Popen(
            [*python(version), "-c", code],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as stock,
    ):
        try:
            with listener.accept(TIMEOUT_S) as connection:
                assert (connection.peer, connection.recv_bytes()) == (name, b"apple")
                connection.send_bytes(b"here it is")
                output, _ = stock.communicate(timeout=TIMEOUT_S)
        finally:
            stock.kill()
    assert (output, stock.returncode) == ("here it is\n", 0)


@pytest.mark.parametrize("version", OLD)
def test_stock_client_old_python_without_allow_md5_is_refused(
    version: str, broker: BrokerProcess
) -> None:
    """It gets an AuthenticationError, and the log tells the operator which option would
    let it in.
    """
    name = f"py{version.replace('.', '')}young"
    stock = subprocess.run(
        [*python(version), "-c", typed(str(broker.socket), name)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert stock.returncode == 1
    assert "AuthenticationError" in stock.stderr

    def reasons() -> list[str]:
        return [
            event["reason"]
            for event in broker.events("client.refused")
            if event.get("name") == name
        ]

    # The log is written beside the work.
    until(lambda: bool(reasons()), "the log says nothing")
    assert "allow_md5" in reasons()[-1]


@pytest.mark.parametrize("version", ALL_VERSIONS)
def test_stock_client_wrong_key_at_the_broker_is_told(version: str, broker: BrokerProcess) -> None:
    """AuthenticationError, and not a hang, whatever the digest."""
    code = typed(str(broker.socket), "nobody")
    stock = subprocess.run(
        [*python(version), "-c", code],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert stock.returncode == 1
    assert "AuthenticationError" in stock.stderr
