"""Objects that an asyncio client returns: messages, subscriptions and presence watches.

A part of the asyncio face; each object passes its calls on to its client.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from brokerd_client import message
from brokerd_client.aio.waiters import WaitQueue
from brokerd_client.errors import Closed, WrongUse
from brokerd_client.presence import Presence, Watch
from brokerd_client.protocol.mailbox import ack_body
from brokerd_client.protocol.subscription_table import SubscriptionEntry
from brokerd_client.settings import check_timeout

if TYPE_CHECKING:
    from typing_extensions import Self

    from brokerd_client.aio.client import Client

__all__ = ["BaseSubscription", "Message", "PresenceWatch", "Subscription"]

T = TypeVar("T")


class Message(message.Message):
    """A message received by an asyncio client; a REQUEST can be answered."""

    __slots__ = ()

    _owner: Client

    async def reply(self, payload: object, *, codec: str | int | None = None) -> None:
        """Answer this request.

        Args:
            payload: The object to send as the answer.
            codec: The codec of the payload, by name or number.

        Raises:
            PayloadError: The payload cannot be encoded.
            AlreadyAnswered: The request has been answered before.
            WrongUse: The message is not a request.
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
            WrongUse: The message is not a request.
            Disconnected: The client is not connected; nothing was sent.
            Closed: The client is closed.
        """
        await self._owner._fail(self, text, code)

    async def done(self) -> None:
        """Acknowledge this message from the mailbox: it is deleted there.

        A handler's return, and the next step of a loop over the client, do the same. If
        the connection is lost before, this does nothing: the message comes again.

        Raises:
            AlreadyAnswered: The message has been acknowledged before.
            WrongUse: The message is not from the mailbox.
        """
        await self._owner._settle(self, ack_body("done"))

    async def retry(self, delay: float = 0.0) -> None:
        """Return this message to the mailbox, to be delivered again.

        The attempt does not count. The next one follows after 0.1 s or a longer delay,
        preferably at another member of the pool.

        Args:
            delay: Seconds until then, at most 30 days.

        Raises:
            ValueError: The delay is not valid.
            AlreadyAnswered: The message has been acknowledged before.
            WrongUse: The message is not from the mailbox.
        """
        await self._owner._settle(self, ack_body("back", delay))

    async def failed(self, reason: str = "") -> None:
        """Return this message to the mailbox after a failed attempt.

        After as many attempts as the mailbox allows it becomes a dead letter. The broker
        waits longer before each further attempt. An exception of a handler does the same.

        Args:
            reason: Why it failed, for the operator.

        Raises:
            AlreadyAnswered: The message has been acknowledged before.
            WrongUse: The message is not from the mailbox.
        """
        await self._owner._settle(self, ack_body("failed", None, reason))

    async def dead(self, reason: str = "") -> None:
        """Make this message from the mailbox a dead letter: no other attempt follows.

        Args:
            reason: Why, for the operator who decides about it.

        Raises:
            AlreadyAnswered: The message has been acknowledged before.
            WrongUse: The message is not from the mailbox.
        """
        await self._owner._settle(self, ack_body("dead", None, reason))


class BaseSubscription(Generic[T]):
    """The base of subscriptions and watches: an async iterator of items.

    It ends when the subscription, the watch or its client is closed.
    """

    #: The callback for its items; None if callers wait for them.
    callback: Callable[[T], object] | None = None
    #: The text of the error that calls raise after close().
    _end_reason: ClassVar[str]

    def __init__(self, client: Client) -> None:
        self._client = client
        self.queue: WaitQueue[T] = client._new_queue()

    def _begin(self, call: object, deadline: float | None) -> int:
        """Queue the request to the broker; return its id."""
        raise NotImplementedError

    def _end(self, call: object, deadline: float | None) -> int | None:
        """Queue the request that ends it; return its id; None if none is needed."""
        raise NotImplementedError

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
            WrongUse: The subscription has a callback, which gets the items.
        """
        self._client._check()
        if self.callback is not None:
            raise WrongUse(
                "this subscription has a callback, which gets its events: leave out callback= to"
                " call recv() or to iterate"
            )
        return await self.queue.take(check_timeout(timeout))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.recv()
        except Closed:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """End the subscription or the watch.

        Iterating ends after the items that have arrived already.
        """
        await self._client._unsubscribe(self)

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

    With a callback, the client passes the events to it, one after the other.
    """

    _end_reason = "the subscription was ended"

    def __init__(
        self,
        client: Client,
        pattern: str,
        group: str | None,
        callback: Callable[[Message], object] | None,
    ) -> None:
        super().__init__(client)
        self.pattern = pattern
        self.group = group
        self.callback = callback
        self._entry: SubscriptionEntry | None = None

    def _begin(self, call: object, deadline: float | None) -> int:
        """Queue the request to the broker; return its id."""
        message_id, self._entry = self._client._dialog.subscribe(
            self.pattern, self.group, self, call, deadline
        )
        return message_id

    def _end(self, call: object, deadline: float | None) -> int | None:
        """Queue the request that ends it; return its id; None if none is needed."""
        if self._entry is None:
            return None
        return self._client._dialog.unsubscribe(self._entry, self, call, deadline)

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

    _end_reason = "the watch was ended"
    _watch: Watch | None = None

    def _begin(self, call: object, deadline: float | None) -> int:
        """Queue the request to the broker; return its id."""
        message_id, self._watch = self._client._dialog.watch(self, call, deadline)
        return message_id

    def _end(self, call: object, deadline: float | None) -> int | None:
        """Stop watching; no request is needed."""
        if self._watch is not None:
            self._client._dialog.unwatch(self._watch)
        return None
