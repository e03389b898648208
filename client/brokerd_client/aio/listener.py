"""The listener of an asyncio client, and the requests for channels that it receives.

A part of the asyncio face; each object passes its calls on to its client.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from brokerd_client._common.dispatcher import log
from brokerd_client.aio.subscriptions import BaseSubscription
from brokerd_client.channel_offer import MOST_PENDING, ChannelOffer
from brokerd_client.errors import Closed, Disconnected, Refused, TimedOut
from brokerd_client.settings import check_timeout

if TYPE_CHECKING:
    from brokerd_client.aio.streams import Stream

__all__ = ["Listener"]


class Listener(BaseSubscription[ChannelOffer]):
    """The channels that other clients open to this client.

    It yields channels until it or its client is closed. After a reconnect the client
    listens again.
    """

    _end_reason = "the listener was closed"
    #: The address of the client whose channel was accepted last; None before the first.
    last_accepted: str | None = None

    def _begin(self, call: object, deadline: float | None) -> int:
        """Queue the request to the broker; return its id."""
        return self._client._dialog.listen(self, call, deadline)

    def _end(self, call: object, deadline: float | None) -> int | None:
        """Queue the request that ends it; return its id; None if none is needed."""
        dialog = self._client._dialog
        if dialog.may_answer:
            for offer in self.queue.take_all():
                dialog.refuse_channel(offer.token, "offline", "the client no longer listens")
        return dialog.unlisten(self, call, deadline)

    async def recv(self, timeout: float | None = None) -> ChannelOffer:
        """Return the next request for a channel, to be accepted or refused.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            The request: with ``sender`` and ``payload``, for :meth:`join` or
            :meth:`refuse`.

        Raises:
            TimedOut: No request arrived in time.
            Closed: The listener or its client is closed.
            Refused: The broker has ended the listening.
        """
        offer = await super().recv(timeout)
        # The broker keeps that many for a client, so older ones are over.
        while len(self.queue.inbox.items) >= MOST_PENDING:
            with contextlib.suppress(IndexError):
                offer = self.queue.inbox.items.popleft()
        return offer

    async def accept(self, timeout: float | None = None) -> Stream:
        """Return the next channel that a client has opened to this one.

        Callers that have given up meanwhile are skipped.

        Args:
            timeout: Seconds to wait; None for no limit.

        Returns:
            The channel.

        Raises:
            TimedOut: No client opened a channel in time.
            Closed: The listener or its client is closed.
            Refused: The broker has ended the listening.
        """
        limit = check_timeout(timeout)
        deadline = None if limit is None else time.monotonic() + limit
        while True:
            offer = await self.recv(
                None if deadline is None else max(0.0, deadline - time.monotonic())
            )
            try:
                channel = await self.join(offer)
            except (Refused, Disconnected, TimedOut) as error:
                log().info("the channel of %s was not accepted: %s", offer.sender, error)
                continue
            self.last_accepted = offer.sender
            return channel

    async def join(self, offer: ChannelOffer, timeout: float | None = 10.0) -> Stream:
        """Accept a request for a channel.

        Args:
            offer: The request.
            timeout: Seconds for the connection to the broker; None for no limit.

        Returns:
            The channel.

        Raises:
            Expired: The caller has given up, or the request was answered before.
            Refused: The broker refused the channel for another reason.
            TimedOut: The broker did not answer in time.
            Disconnected: The broker can't be reached.
        """
        return await self._client._join_channel(offer.token, timeout)

    async def refuse(self, offer: ChannelOffer, text: str, code: str = "refused") -> None:
        """Refuse a request for a channel: the caller gets RequestFailed.

        Args:
            offer: The request.
            text: The text of the error.
            code: The code of the error.

        Raises:
            Disconnected: The client is not connected; nothing was sent.
            Closed: The client is closed.
        """
        put = self._client._dialog.refuse_channel
        await self._client._put(None, put, offer.token, code, text)

    async def __anext__(self) -> Stream:  # type: ignore[override]
        try:
            return await self.accept()
        except Closed:
            raise StopAsyncIteration from None

    def __repr__(self) -> str:
        return f"<Listener of {self._client.name!r}>"
