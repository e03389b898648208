"""Both client faces behind one set of blocking calls, so that a scenario is written
once.

The asyncio face runs on an event loop in a thread of its own. A call runs as a
coroutine there, and blocks until it is done.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import brokerd_client
from brokerd_client import aio

if TYPE_CHECKING:
    from typing import Self

#: Seconds that a call in a test may take at most.
PATIENCE = 20.0


class Face:
    """Makes clients of one kind, and closes them."""

    def __init__(self) -> None:
        self.clients: list[Any] = []

    def connect(self, *args: Any, **options: Any) -> Any:
        """Return a connected client, which is closed with the face."""
        raise NotImplementedError

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function in the clients' thread; return its result, awaited if it is
        awaitable.
        """
        return function()

    def close(self) -> None:
        """Close every client, and the thread or loop that it ran on."""
        for client in self.clients:
            client.close()


class Blocking(Face):
    """brokerd_client.connect."""

    def connect(self, *args: Any, **options: Any) -> Any:
        """Return a connected client."""
        client = brokerd_client.connect(*args, **options)
        self.clients.append(client)
        return client


class Asyncio(Face):
    """brokerd_client.aio.client.connect, on the loop that ``new_loop`` makes."""

    def __init__(
        self, new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    ) -> None:
        super().__init__()
        self.loop = new_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="asyncio face")
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function on the loop."""

        async def call() -> Any:
            result = function()
            return await result if inspect.isawaitable(result) else result

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def connect(self, *args: Any, **options: Any) -> Any:
        """Return a connected client, wrapped."""
        client = Wrapped(self, self.run(lambda: aio.connect(*args, **options)))
        self.clients.append(client)
        return client

    def close(self) -> None:
        """Close the clients, check that no task is left, and end the loop."""
        super().close()
        left = self.run(
            lambda: [
                task.get_name()
                for task in asyncio.all_tasks()
                if task is not asyncio.current_task()
            ]
        )
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE)
        self.loop.close()
        assert left == []


class Wrapped:
    """An object of the asyncio face whose coroutines block until they are done."""

    def __init__(self, face: Asyncio, inner: Any) -> None:
        self._face = face
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            given = [arg._inner if isinstance(arg, Wrapped) else arg for arg in args]
            return self._wrap(self._face.run(lambda: found(*given, **options)))

        return call

    def _wrap(self, result: Any) -> Any:
        kinds = (aio.Message, aio.Proxy, aio.Subscription, aio.PresenceWatch)
        return Wrapped(self._face, result) if isinstance(result, kinds) else result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
