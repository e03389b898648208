"""The library of the brokerd message broker: standard library only, no daemon needed.

``connect`` is the client for blocking code, and ``aio`` the client for asyncio.
``connection`` is the direct API, a drop-in replacement for
``multiprocessing.connection``. Each is imported at its first use; only the exceptions
are imported at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brokerd_client.errors import *  # noqa: F403 - the exception tree is public as a whole, and has an __all__
from brokerd_client.errors import __all__ as _errors

if TYPE_CHECKING:
    from brokerd_client import aio, connection
    from brokerd_client.blocking import Client, PresenceWatch, Subscription, connect
    from brokerd_client.blocking.subscriptions import Message
    from brokerd_client.message import Receipt
    from brokerd_client.presence import ClientInfo, Presence

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

#: The module of each name.
_HOMES = {
    "Client": "blocking",
    "ClientInfo": "presence",
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

    if name in ("aio", "connection"):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
