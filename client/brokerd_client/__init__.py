"""The library of the brokerd message broker: standard library only, no daemon needed.

``connect`` is the client for blocking code, and ``aio`` the client for asyncio.
``connection`` is the direct API, a drop-in replacement for
``multiprocessing.connection``. Each is imported at its first use; only the exceptions
are imported at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd_client import errors
from brokerd_client.errors import *  # noqa: F403 - the exception tree is public as a whole

if TYPE_CHECKING:
    from brokerd_client import (
        address,
        aio,
        blocking,
        codec,
        connection,
        connection_event,
        message,
        presence,
        protocol,
        settings,
        tls,
        topics,
        wire,
    )
    from brokerd_client.blocking import Client, Message, PresenceWatch, Subscription, connect
    from brokerd_client.connection_event import ConnectionEvent
    from brokerd_client.message import Receipt
    from brokerd_client.presence import ClientInfo, Presence

__version__ = "0.1.0"

__all__ = [
    "Client",
    "ClientInfo",
    "ConnectionEvent",
    "Message",
    "Presence",
    "PresenceWatch",
    "Receipt",
    "Subscription",
    "__version__",
    "address",
    "aio",
    "blocking",
    "codec",
    "connect",
    "connection",
    "connection_event",
    "errors",
    "message",
    "presence",
    "protocol",
    "settings",
    "tls",
    "topics",
    "wire",
]
__all__ += errors.__all__

#: The public modules that are imported at their first use.
_MODULES = (
    "address",
    "aio",
    "blocking",
    "codec",
    "connection",
    "connection_event",
    "message",
    "presence",
    "protocol",
    "settings",
    "tls",
    "topics",
    "wire",
)
#: The module of each name that is imported at its first use.
_HOMES = {
    "Client": "blocking",
    "ClientInfo": "presence",
    "ConnectionEvent": "connection_event",
    "Message": "blocking",
    "Presence": "presence",
    "PresenceWatch": "blocking",
    "Receipt": "message",
    "Subscription": "blocking",
    "connect": "blocking",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use.

    The daemon needs none of these names, and asyncio takes long to import.
    """
    import importlib

    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
