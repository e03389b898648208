"""The broker client for ordinary code: one class for any number of threads."""

from __future__ import annotations

from brokerd_client.blocking.client import (
    Client,
    Message,
    PresenceWatch,
    Subscription,
    connect,
)

__all__ = [
    "Client",
    "Message",
    "PresenceWatch",
    "Subscription",
    "connect",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
