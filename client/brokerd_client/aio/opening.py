"""Objects of the asyncio face that are opened on first use.

A part of the asyncio face. The blocking face has no such file: its calls return what
they open.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

    from brokerd_client.aio.client import Client
    from brokerd_client.aio.subscriptions import BaseSubscription

__all__ = ["Opening"]

O = TypeVar("O", bound="Client | BaseSubscription[Any]")  # noqa: E741 - for an opened object


class Opening(Generic[O]):
    """An object that is opened on first use.

    Await it, enter it with ``async with``, or iterate over it with ``async for``.

    Args:
        opener: Opens the object and returns it.
        call: The name of the call that returned this object.
    """

    def __init__(self, opener: Callable[[], Awaitable[O]], call: str) -> None:
        self._function = opener
        self._call = call
        self._used = False
        self._opened: O | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"the result of {self._call}() has no attribute {name!r} before it is awaited: write"
            f" 'await {self._call}(...)' or 'async with {self._call}(...) as ...'"
        )

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                f"{self._call}() was never awaited: it has done nothing",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )

    def _opener(self) -> Awaitable[O]:
        self._used = True
        return self._function()

    def __await__(self) -> Generator[Any, None, O]:
        return self._opener().__await__()

    async def __aenter__(self) -> O:
        self._opened = await self._opener()
        await self._opened.__aenter__()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[Any]:
        self._used = True
        return Iteration(self._function)


class Iteration(Generic[O]):
    """An iterator over an object that it opens at its first step.

    It closes the object at its end, or when it is dropped. A step that is cancelled,
    for example by a timeout, does not end the iteration: the next step continues.

    Args:
        opener: Opens the object and returns it.
    """

    def __init__(self, opener: Callable[[], Awaitable[O]]) -> None:
        self._opener = opener
        self._ended = False
        #: Suspended inside an ``async with``: when the generator is dropped, the event
        #: loop closes it, and with it the opened object.
        self._holder: AsyncGenerator[O, None] | None = None
        self._items: Any = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._items is None:
                holder = _hold(self._opener)
                opened = await holder.__anext__()
                self._holder, self._items = holder, opened.__aiter__()
            return await self._items.__anext__()
        except Exception:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the iteration, and close the object that it has opened."""
        self._ended = True
        holder, self._holder, self._items = self._holder, None, None
        if holder is not None:
            await holder.aclose()


# Not a method: a generator that refers to its iterator would be dropped only by the
# garbage collector.
async def _hold(opener: Callable[[], Awaitable[O]]) -> AsyncGenerator[O, None]:
    opened = await opener()
    async with opened:
        yield opened
