"""The broker client for asyncio: coroutines and async iterators, on one event loop."""

from __future__ import annotations

from brokerd_client.aio.client import (
    Client,
    Listener,
    Message,
    PresenceWatch,
    Proxy,
    Subscription,
    connect,
)
from brokerd_client.aio.opening import Opening
from brokerd_client.aio.streams import Stream

__all__ = [
    "Client",
    "Listener",
    "Message",
    "Opening",
    "PresenceWatch",
    "Proxy",
    "Stream",
    "Subscription",
    "connect",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
