"""The broker client for asyncio: coroutines and async iterators, on one event loop."""

from __future__ import annotations

from brokerd_client.aio.client import (
    Client,
    Message,
    PresenceWatch,
    Subscription,
    connect,
)
from brokerd_client.aio.opening import Opening

__all__ = [
    "Client",
    "Message",
    "Opening",
    "PresenceWatch",
    "Subscription",
    "connect",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
