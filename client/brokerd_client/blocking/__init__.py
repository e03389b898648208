"""The broker client for ordinary code: one class for any number of threads."""

from __future__ import annotations

from brokerd_client.blocking.client import (
    Client,
    Listener,
    Message,
    PresenceWatch,
    Proxy,
    Subscription,
    connect,
)

__all__ = [
    "Client",
    "Listener",
    "Message",
    "PresenceWatch",
    "Proxy",
    "Subscription",
    "connect",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
