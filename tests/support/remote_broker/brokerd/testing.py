"""A stand-in for ``brokerd.testing`` whose broker is a process of another Python.

The environment variable BROKERD_BROKER_PYTHON names that Python; brokerd is installed
there. The clients are those of the Python that runs the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brokerd_client

if TYPE_CHECKING:
    from typing import Self

__all__ = ["RunningBroker", "running"]

_SERVE = Path(__file__).resolve().parents[2] / "broker_server.py"
_TIMEOUT_S = 60.0


class RunningBroker:
    """A broker in a process of its own; the methods are those of ``brokerd.testing``."""

    def __init__(self, clients: Any = None, **options: Any) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [os.environ["BROKERD_BROKER_PYTHON"], str(_SERVE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._calls, self._answers = self._process.stdin, self._process.stdout
        self._lock = threading.Lock()
        self._opened: list[Any] = []
        self.address = ""
        self._calls.write(json.dumps({"clients": clients, **options}) + "\n")

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        with self._lock:
            self._calls.write(json.dumps({"call": name, "args": args, "options": options}) + "\n")
            answer = json.loads(self._answers.readline())
        if "error" in answer:
            raise AssertionError(answer["error"])
        self.address = answer["address"]
        return answer["result"]

    def add(self, name: str, **entry: Any) -> None:
        """Add or change a client."""
        self._call("add", name, **entry)

    def key(self, name: str) -> bytes:
        """Return the key of a client."""
        return bytes.fromhex(self._call("key", name))

    def environ(self, name: str) -> dict[str, str]:
        """Return the environment variables of a program that is the client."""
        variables: dict[str, str] = self._call("environ", name)
        return variables

    def connect(self, name: str, **options: Any) -> Any:
        """Return a connected client of the library."""
        client = brokerd_client.connect(self.address, name=name, key=self.key(name), **options)
        self._opened.append(client)
        return client

    async def connect_async(self, name: str, **options: Any) -> Any:
        """Return a connected asyncio client."""
        from brokerd_client import aio

        return await aio.connect(self.address, name=name, key=self.key(name), **options)

    def start(self) -> None:
        """Start the broker."""
        self._call("start")

    def stop(self) -> None:
        """Drain and stop the broker."""
        self._call("stop")

    def kill(self) -> None:
        """End the broker without notifying its clients."""
        self._call("kill")

    def disconnect(self, name: str) -> None:
        """Close the connections of one client."""
        self._call("disconnect", name)

    def stats(self) -> Any:
        """Return the broker's figures."""
        return self._call("stats")

    def close(self) -> None:
        """Close the clients made by ``connect``, and end the process."""
        for client in self._opened:
            client.close()
        self._calls.close()
        self._process.wait(_TIMEOUT_S)
        self._answers.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@contextlib.contextmanager
def running(
    clients: Mapping[str, Mapping[str, Any]] | None = None, **options: Any
) -> Iterator[RunningBroker]:
    """Run a broker in a with statement."""
    with RunningBroker(clients, **options) as running_broker:
        yield running_broker
