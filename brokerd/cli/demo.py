"""``brokerd demo``: a broker on a temporary socket, and three clients that exchange
messages.

Two clients use this package's library. The third is a stock Python in a process of its
own, without this or any other package. The demo takes a few seconds, needs no
configuration, and leaves nothing behind. It succeeds only if every message arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

import brokerd_client
from brokerd.config.key_files import new_key
from brokerd.config.load import build_config
from brokerd.daemon.daemon import Daemon
from brokerd.daemon.process import loop_factory
from brokerd.log.logger import quiet_log
from brokerd_client.errors import BrokerdError, NoSuchClient

__all__ = ["STOCK_CLIENT", "Interpreter", "find_interpreter", "run"]

#: The program of the stock Python. Its address is an argument. Its key comes through a
#: pipe, where no other process sees it.
STOCK_CLIENT: Final = """\
from multiprocessing.connection import Client
import struct, sys

address = sys.argv[1] if len(sys.argv) == 2 else (sys.argv[1], int(sys.argv[2]))
conn = Client(address, authkey=sys.stdin.buffer.read())
conn.send_bytes(struct.pack("!BBBBQ", 1, 0, 0, 3, 0) + b"bob" + b"hello from a stock Python")
frame = conn.recv_bytes()
kind, flags, codec, n, id = struct.unpack_from("!BBBBQ", frame)
sender, payload = frame[12:12 + n].decode(), frame[12 + n:]
print(sender, payload.decode(), sep="\\n")
"""

#: Limits each step of the demo, in seconds; then the demo has failed.
_TIMEOUT_S: Final = 20.0
#: The message in the channel: longer than any queue of the demo.
_LARGE: Final = bytes(range(256)) * 2**15
_COLOURS: Final = {"alice": "cyan", "bob": "green", "carol": "magenta", "broker": "yellow"}
#: The first Python whose standard library supports more than HMAC-MD5.
_MODERN: Final = (3, 12)


class _Failed(Exception):
    """A step of the demo failed."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python interpreter for the stock client. version: major and minor."""

    path: str
    version: tuple[int, int]

    @property
    def needs_md5(self) -> bool:
        return self.version < _MODERN


def run(console: Console | None = None) -> int:
    """Show the demo; return the exit status: 0 if every message arrived, else 1."""
    console = console or Console(highlight=False)
    began = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="brokerd-demo-") as directory,
            asyncio.Runner(loop_factory=loop_factory()) as runner,
        ):
            shown = runner.run(_with_broker(Path(directory), console))
    except (_Failed, BrokerdError, OSError, subprocess.SubprocessError) as error:
        console.print(
            f"The demo failed: {type(error).__name__}: {error}", style="bold red", markup=False
        )
        return 1
    console.print(
        f"\n{shown} messages arrived and none was lost, in {time.monotonic() - began:.1f} seconds.",
        style="bold",
    )
    return 0


def find_interpreter() -> Interpreter:
    """Return a modern Python: this one, or else the newest on the PATH.

    Without any, return this Python.
    """
    this = Interpreter(sys.executable, sys.version_info[:2])
    if not this.needs_md5:
        return this
    for minor in range(19, 11, -1):
        path = shutil.which(f"python3.{minor}")
        if path and _version(path) == (3, minor):
            return Interpreter(path, (3, minor))
    return this


def _version(path: str) -> tuple[int, int] | None:
    """Return the version of an interpreter, or None if it does not run.

    A program on the PATH may be a wrapper without a Python behind it.
    """
    try:
        done = subprocess.run(  # noqa: S603 - found under the name of a Python
            [path, "-I", "-S", "-c", "import sys; print(*sys.version_info[:2])"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        major, minor = map(int, done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return major, minor


async def _with_broker(directory: Path, console: Console) -> int:
    """Run a broker while the clients talk, and return the number of messages that
    arrived.
    """
    keys = {name: new_key() for name in ("alice", "bob", "carol")}
    stock = await asyncio.to_thread(find_interpreter)
    config = build_config(
        "127.0.0.1:0" if sys.platform == "win32" else str(directory / "brokerd.sock"),
        {
            name: {"key": key, "allow_md5": name == "carol" and stock.needs_md5}
            for name, key in keys.items()
        },
    )
    async with Daemon(config, quiet_log()) as daemon:
        return await asyncio.to_thread(_Demo(console, str(daemon.addresses[0]), keys, stock).show)


class _Demo:
    """The conversation, step by step; each step is printed when it is done."""

    def __init__(
        self, console: Console, address: str, keys: dict[str, str], stock: Interpreter
    ) -> None:
        self._console = console
        self._address = address
        self._keys = keys
        self._stock = stock
        self._arrived = 0

    def show(self) -> int:
        """Run the conversation and return the number of messages that arrived.

        Raises _Failed, or the library's errors, if a message did not arrive.
        """
        self._say("broker", f"listens at {self._address} and knows {', '.join(self._keys)}")
        with self._connect("alice") as alice, self._connect("bob") as bob:
            self._message(alice, bob)
            self._request(alice, bob)
            self._channel(alice, bob)
            self._refusal(alice)
            self._stock_python(bob)
        return self._arrived

    @contextlib.contextmanager
    def _connect(self, name: str) -> Iterator[brokerd_client.Client]:
        with brokerd_client.connect(
            self._address, name=name, key=self._keys[name], timeout=_TIMEOUT_S
        ) as client:
            self._say(name, "is connected, with a key of its own")
            yield client

    def _message(self, alice: brokerd_client.Client, bob: brokerd_client.Client) -> None:
        self._say("alice", 'sends "hello, bob" to bob')
        alice.send("bob", "hello, bob")
        self._receive(bob, "alice", "hello, bob")

    def _request(self, alice: brokerd_client.Client, bob: brokerd_client.Client) -> None:
        def answer(question: brokerd_client.Message) -> object:
            a, b = question.payload["multiply"]
            self._arrive("bob", f"is asked by {question.sender} to multiply {a} by {b}")
            return {"product": a * b}

        bob.on_request(answer)
        self._say("alice", "asks bob to multiply 6 by 7")
        reply = alice.request("bob", {"multiply": [6, 7]}, timeout=_TIMEOUT_S)
        self._expect(
            (reply.sender, reply.payload) == ("bob", {"product": 42}), "bob's answer is not 42"
        )
        self._arrive("alice", f"receives from bob: {reply.payload['product']}")

    def _channel(self, alice: brokerd_client.Client, bob: brokerd_client.Client) -> None:
        self._say("alice", "opens a channel to bob, and sends 8 MiB as one message")
        with bob.listen() as listener, ThreadPoolExecutor(1) as other:
            sent = other.submit(self._send_large, alice)
            with listener.accept(_TIMEOUT_S) as connection:
                body = connection.recv_bytes()
                self._expect(
                    (connection.peer, body) == ("alice", _LARGE), "the channel's bytes differ"
                )
            sent.result(_TIMEOUT_S)
        self._arrive("bob", f"receives from {listener.last_accepted}: {len(body) >> 20} MiB")

    @staticmethod
    def _send_large(alice: brokerd_client.Client) -> None:
        with alice.open("bob", timeout=_TIMEOUT_S) as connection:
            connection.send_bytes(_LARGE)

    def _refusal(self, alice: brokerd_client.Client) -> None:
        self._say("alice", "sends a message to dave, and there is no such client")
        try:
            alice.send_confirmed("dave", "are you there?", timeout=_TIMEOUT_S)
        except NoSuchClient as error:
            self._say("alice", f"gets the error: {error}")
        else:
            raise _Failed("a message to an unknown client was accepted")

    def _stock_python(self, bob: brokerd_client.Client) -> None:
        version = ".".join(map(str, self._stock.version))
        self._say("carol", f"is Python {version} with nothing installed, and runs these lines:")
        # Printed as text, which a narrow terminal wraps: a Syntax object would cut the
        # lines.
        for line in (
            Syntax(STOCK_CLIENT, "python", background_color="default")
            .highlight(STOCK_CLIENT)
            .split()
        ):
            self._console.print(Text("         ") + line, soft_wrap=True)
        # -S: without any installed package, this one included.
        command = [self._stock.path, "-I", "-S", "-c", STOCK_CLIENT, *self._split_address()]
        with subprocess.Popen(  # noqa: S603 - a Python, and the program above
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as carol:
            try:
                assert carol.stdin is not None
                carol.stdin.write(self._keys["carol"])
                carol.stdin.close()
                carol.stdin = None
                self._receive(bob, "carol", b"hello from a stock Python")
                self._say("bob", 'sends "welcome" to carol')
                bob.send("carol", b"welcome")
                heard, complaints = carol.communicate(timeout=_TIMEOUT_S)
            except BaseException:
                carol.kill()
                raise
        self._expect(carol.returncode == 0, f"the stock Python failed: {complaints.strip()[-500:]}")
        self._expect(
            heard.splitlines() == ["bob", "welcome"], f"the stock Python received {heard!r}"
        )
        self._arrive("carol", 'receives from bob: "welcome"')

    def _split_address(self) -> list[str]:
        host, colon, port = self._address.rpartition(":")
        return (
            [host, port]
            if colon and port.isdigit() and "/" not in self._address
            else [self._address]
        )

    def _receive(self, client: brokerd_client.Client, sender: str, payload: object) -> None:
        message = client.recv(timeout=_TIMEOUT_S)
        self._expect(
            (message.sender, message.payload) == (sender, payload),
            f"{message.sender} sent {message.payload!r}, expected {payload!r} from {sender}",
        )
        text = payload.decode() if isinstance(payload, bytes) else payload
        self._arrive("bob", f'receives from {sender}: "{text}"')

    def _expect(self, truth: bool, otherwise: str) -> None:
        if not truth:
            raise _Failed(otherwise)

    def _arrive(self, name: str, text: str) -> None:
        self._arrived += 1
        self._say(name, text)

    def _say(self, name: str, text: str) -> None:
        self._console.print(
            Text.assemble((f"{name:>6} ", f"bold {_COLOURS[name]}"), text), soft_wrap=True
        )
