"""Objects that an asyncio client returns: messages, openings, subscriptions and
watches.

A part of the asyncio face; each object passes its calls on to its client.
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
    """The part of the client that this module needs."""

    async def reply(
        self, message: Message, payload: object, *, codec: str | int | None = None
    ) -> None: ...

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
        """Answer this request.

        Args:
            payload: The object to send as the answer.
            codec: The codec of the payload, by name or number.

        Raises:
            PayloadError: The payload cannot be encoded.
            AlreadyAnswered: The request has been answered before.
            Disconnected: The client is not connected; nothing was sent.
            Closed: The client is closed.
        """
        await self._owner.reply(self, payload, codec=codec)

    async def fail(self, text: str, code: str = "failed") -> None:
        """Answer this request with an error: the requester gets RequestFailed.

        Args:
            text: The text of the error.
            code: The code of the error.

        Raises:
            AlreadyAnswered: The request has been answered before.
            Disconnected: The client is not connected; nothing was sent.
            Closed: The client is closed.
        """
        await self._owner._fail(self, text, code)


class Opened(Protocol):
    """The result of an Opening: it can be entered and iterated over."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def __aiter__(self) -> AsyncIterator[Any]: ...


O = TypeVar("O", bound=Opened)  # noqa: E741 - for Opened


class Opening(Generic[O]):
    """An object that is opened on first use.

    Await it, enter it with ``async with``, or iterate over it with ``async for``.
    """

    def __init__(self, open: Callable[[], Awaitable[O]]) -> None:
        self._open = open
        self._opened: O | None = None

    def __await__(self) -> Generator[Any, None, O]:
        return self._open().__await__()

    async def __aenter__(self) -> O:
        self._opened = await self._open()
        return await self._opened.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[Any]:
        return Iteration(self._open)


class Iteration(Generic[O]):
    """An iterator over an object that it opens at its first step.

    It closes the object at its end, or when it is dropped. A step that is cancelled,
    for example by a timeout, does not end the iteration: the next step continues.
    """

    def __init__(self, open: Callable[[], Awaitable[O]]) -> None:
        self._open = open
        self._ended = False
        #: Suspended inside an ``async with``: when the generator is dropped, the event
        #: loop closes it, and with it the opened object.
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
        """End the iteration, and close the object that it has opened."""
        self._ended = True
        holder, self._holder, self._items = self._holder, None, None
        if holder is not None:
            await holder.aclose()


# Not a method: a generator that refers to its iterator would be dropped only by the
# garbage collector.
async def _hold(open: Callable[[], Awaitable[O]]) -> AsyncGenerator[O, None]:
    async with await open() as opened:
        yield opened


class BaseSubscription(Generic[T]):
    """The base of subscriptions and watches: an async iterator of items.

    It ends when the subscription, the watch or its client is closed.
    """

    def __init__(self, client: Giver) -> None:
        self._client = client
        self.queue: WaitQueue[T] = client._new_queue()

    async def recv(self, timeout: float | None = None) -> T:
        """Return the next item.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            The next event or presence change.

        Raises:
            TimedOut: No item arrived in time.
            Closed: The subscription, the watch or its client is closed.
            Refused: The broker has ended the subscription or the watch.
        """
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
        """End the subscription or the watch."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self._client._check()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class Subscription(BaseSubscription[Message]):
    """Events whose topic fits ``pattern``; those of a ``group`` are shared among its
    members.

    With a callback, a function or a coroutine function, the events go to it, one after
    the other.
    """

    def __init__(
        self,
        client: Giver,
        pattern: str,
        group: str | None,
        callback: Callable[[Message], object] | None,
    ) -> None:
        super().__init__(client)
        self.pattern = pattern
        self.group = group
        self.callback = callback
        self._entry: SubscriptionEntry | None = None

    async def unsubscribe(self) -> None:
        """End the subscription.

        Iterating ends after the events that have arrived already.
        """
        await self._client._unsubscribe(self)

    close = unsubscribe

    def __repr__(self) -> str:
        return f"<Subscription {self.pattern!r}{f' in group {self.group!r}' if self.group else ''}>"


class PresenceWatch(BaseSubscription[Presence]):
    """First one Presence for each client that this one may send to; then every change."""

    callback = None
    _watch: Watch | None = None

    async def close(self) -> None:
        """End the watch."""
        self._client._unwatch(self)
