"""What an asyncio client gives to its user: messages that can be answered, openings, subscriptions, watches.

A part of the asyncio face; each hands what is asked of it on to its client.
"""

# ruff: noqa: ASYNC109 - both faces take the same arguments, timeouts among them
from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from brokerd_client import message
from brokerd_client.aio.waiters import WaitQueue
from brokerd_client.errors import Closed
from brokerd_client.presence import Presence, Watch
from brokerd_client.protocol.subscription_table import SubscriptionEntry

__all__ = ["BaseSubscription", "Message", "Opening", "PresenceWatch", "Subscription"]

T = TypeVar("T")


class Giver(message.Owner, Protocol):
    """The client, as far as it is needed here."""

    async def reply(self, message: Message, payload: object, *, codec: str | int | None = None) -> None: ...

    async def _fail(self, message: Message, text: str, code: str) -> None: ...

    def _fail_at_once(self, message: Message, text: str) -> None: ...

    def _check(self) -> None: ...

    def _limit(self, timeout: float | None) -> float | None: ...

    def _new_queue(self) -> WaitQueue[Any]: ...

    async def _unsubscribe(self, subscription: Subscription) -> None: ...

    def _unwatch(self, subscription: PresenceWatch) -> None: ...


class Message(message.Message):
    """A message received by an asyncio client; a REQUEST can be answered."""

    __slots__ = ()

    _owner: Giver

    async def reply(self, payload: object, *, codec: str | int | None = None) -> None:
        """Answer this request. Raises PayloadError, AlreadyAnswered, Disconnected or Closed."""
        await self._owner.reply(self, payload, codec=codec)

    async def fail(self, text: str, code: str = "failed") -> None:
        """Answer this request with an error: the caller gets RequestFailed with this code and text."""
        await self._owner._fail(self, text, code)


class Opened(Protocol):
    """What an Opening gives: it can be entered and iterated over."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...


O = TypeVar("O", bound=Opened)  # noqa: E741 - for Opened


class Opening(Generic[O]):
    """Something about to be opened: await it, enter it with ``async with``, or iterate over it with ``async for``."""

    def __init__(self, open: Callable[[], Awaitable[O]]) -> None:
        self._open = open
        self._opened: O | None = None

    def __await__(self) -> Generator[Any, None, O]:
        return self._open().__await__()

    async def __aenter__(self) -> O:
        self._opened = await self._open()
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[Any]:
        return Iteration(self._open)


class Iteration(Generic[O]):
    """An iterator over something that it opens at its first step, and closes at its end or when it is dropped.

    A step that is cancelled, as by a timeout, ends nothing: the next step goes on.
    """

    def __init__(self, open: Callable[[], Awaitable[O]]) -> None:
        self._open = open
        self._ended = False
        #: Suspended inside an ``async with``: the event loop closes a generator that is dropped, and with it what is
        #: open.
        self._holder: AsyncGenerator[O, None] | None = None
        self._items: AsyncIterator[Any] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if self._ended:
            raise StopAsyncIteration
        try:
            if self._items is None:
                holder = _hold(self._open)
                opened = await anext(holder)
                self._holder, self._items = holder, aiter(opened)
            return await anext(self._items)
        except Exception:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the iteration, and close what it has opened."""
        self._ended = True
        holder, self._holder, self._items = self._holder, None, None
        if holder is not None:
            await holder.aclose()


# Not a method: a generator that refers to its iterator would be dropped only by the garbage collector.
async def _hold(open: Callable[[], Awaitable[O]]) -> AsyncGenerator[O, None]:
    async with await open() as opened:
        yield opened


class BaseSubscription(Generic[T]):
    """What a subscription or a watch gives: an async iterator that ends when the feed or its client is closed."""

    def __init__(self, client: Giver) -> None:
        self._client = client
        self.queue: WaitQueue[T] = client._new_queue()

    async def recv(self, timeout: float | None = None) -> T:
        """Return the next one. Raises TimedOut; Closed after the end; the broker's refusal if it ended this."""
        self._client._check()
        return await self.queue.take(self._client._limit(timeout))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.recv()
        except Closed:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """Ask for nothing more."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self._client._check()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Subscription(BaseSubscription[Message]):
    """Events whose topic fits ``pattern``; those of a ``group`` are shared among its members.

    With a callback, a function or a coroutine function, the events go to it, one after the other.
    """

    def __init__(
        self, client: Giver, pattern: str, group: str | None, callback: Callable[[Message], object] | None
    ) -> None:
        super().__init__(client)
        self.pattern = pattern
        self.group = group
        self.callback = callback
        self._entry: SubscriptionEntry | None = None

    async def unsubscribe(self) -> None:
        """Ask for no more events; iterating ends with those that are here already."""
        await self._client._unsubscribe(self)

    close = unsubscribe

    def __repr__(self) -> str:
        return f"<Subscription {self.pattern!r}{f' in group {self.group!r}' if self.group else ''}>"


class PresenceWatch(BaseSubscription[Presence]):
    """One Presence for each client this one may send to, as it is now; then every change."""

    callback = None
    _watch: Watch | None = None

    async def close(self) -> None:
        """Ask for no more changes."""
        self._client._unwatch(self)
