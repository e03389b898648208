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
        channel_offer,
        codec,
        connection,
        connection_event,
        json_codec,
        managers,
        message,
        presence,
        protocol,
        settings,
        tls,
        topics,
        wire,
    )
    from brokerd_client._common.rpc import current_request
    from brokerd_client.blocking import (
        Client,
        Listener,
        Message,
        PresenceWatch,
        Proxy,
        Subscription,
        connect,
    )
    from brokerd_client.channel_offer import ChannelOffer
    from brokerd_client.connection_event import ConnectionEvent
    from brokerd_client.json_codec import JsonCodec
    from brokerd_client.message import Receipt
    from brokerd_client.presence import ClientInfo, Presence

__version__ = "0.1.0"

__all__ = [
    "ChannelOffer",
    "Client",
    "ClientInfo",
    "ConnectionEvent",
    "JsonCodec",
    "Listener",
    "Message",
    "Presence",
    "PresenceWatch",
    "Proxy",
    "Receipt",
    "Subscription",
    "__version__",
    "address",
    "aio",
    "blocking",
    "channel_offer",
    "codec",
    "connect",
    "connection",
    "connection_event",
    "current_request",
    "errors",
    "json_codec",
    "managers",
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
    "channel_offer",
    "codec",
    "connection",
    "connection_event",
    "json_codec",
    "managers",
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
    "ChannelOffer": "channel_offer",
    "Client": "blocking",
    "ClientInfo": "presence",
    "ConnectionEvent": "connection_event",
    "JsonCodec": "json_codec",
    "Listener": "blocking",
    "Message": "blocking",
    "Presence": "presence",
    "PresenceWatch": "blocking",
    "Proxy": "blocking",
    "Receipt": "message",
    "Subscription": "blocking",
    "connect": "blocking",
    "current_request": "_common.rpc",
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
