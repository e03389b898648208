"""A client's request for a channel, as the client that listens receives it."""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["MOST_PENDING", "ChannelOffer"]

#: Most requests that wait for one client's answer; the broker refuses more.
MOST_PENDING: Final = 64


class ChannelOffer(NamedTuple):
    """A request for a channel.

    Attributes:
        sender: The address of the client that asks, as authenticated.
        payload: The bytes that it has sent with the request, at most 1 KiB.
        token: The number with which the broker knows the request; valid once, for some
            seconds.
    """

    sender: str
    payload: bytes
    token: int

    def __repr__(self) -> str:
        # The token is as good as a key, as long as it is valid.
        return f"<ChannelOffer of {self.sender} with {len(self.payload)} bytes>"
