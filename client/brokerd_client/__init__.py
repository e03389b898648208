"""The library of the brokerd message broker: standard library only, no daemon needed.

``connect`` is the client for ordinary code, ``aio`` the same for asyncio (imported at the first use),
``connection`` the direct API, a drop-in for ``multiprocessing.connection``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd_client.blocking import Client, Message, PresenceWatch, Subscription, connect
from brokerd_client.errors import *  # noqa: F403 - the exception tree is public as a whole, and has an __all__
from brokerd_client.errors import __all__ as _errors
from brokerd_client.message import Receipt
from brokerd_client.presence import ClientInfo, Presence

if TYPE_CHECKING:
    from brokerd_client import aio, connection

__all__ = [
    "Client",
    "ClientInfo",
    "Message",
    "Presence",
    "PresenceWatch",
    "Receipt",
    "Subscription",
    "aio",
    "connect",
    "connection",
]
__all__ += [name for name in _errors if name != "refusal"]


def __getattr__(name: str) -> Any:
    """Import ``aio`` and ``connection`` when they are first asked for: asyncio takes long to import."""
    if name in ("aio", "connection"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
