"""``multiprocessing.managers`` by name: managers that a broker connects.

``BaseManager`` and ``SyncManager`` are those of the standard library, with the addresses
of this library: ``broker://NAME`` beside the usual ones. docs/channels.md shows how a
program that uses a manager is changed.
"""

from __future__ import annotations

import time
from multiprocessing import managers
from typing import Any

from brokerd_client.connection import Client, Connection, Listener
from brokerd_client.errors import Closed

__all__ = ["BaseManager", "SyncManager"]

#: Seconds between two calls of accept that fail, as when the broker does not let the
#: server listen any more.
_PAUSE_S = 0.1


class _ServerListener(Listener):
    """The listener of a manager's server, whose thread calls accept() again at once after
    any OSError, forever.
    """

    def accept(self, timeout: float | None = None) -> Connection:
        try:
            connection = super().accept(timeout)
        except Closed:
            # Ends the thread.
            raise SystemExit from None
        except OSError:
            time.sleep(_PAUSE_S)
            raise
        # A manager's server proves the key with each connection before it reads a request.
        connection._unpickles = True
        return connection


class _Serializer(str):
    """The name of the way in which managers connect.

    Unpickling it, as a part of a proxy, imports this module and so makes it known.
    """

    __slots__ = ()

    def __reduce__(self) -> str:
        return "SERIALIZER"


SERIALIZER = _Serializer("brokerd pickle")
#: The standard library's table of the listeners and clients of managers.
managers.listener_client[SERIALIZER] = (_ServerListener, Client)  # type: ignore[attr-defined]


class _Named:
    """The constructor of a manager whose addresses may be names."""

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        *arguments: Any,
        **options: Any,
    ) -> None:
        if serializer == "pickle":
            serializer = SERIALIZER
        super().__init__(address, authkey, serializer, *arguments, **options)  # type: ignore[call-arg]


class BaseManager(_Named, managers.BaseManager):
    """A manager that serves and connects at ``broker://NAME`` too.

    The arguments are those of the standard library's BaseManager: an address, the key
    that the server and its clients prove to each other, and the rest.
    """


class SyncManager(_Named, managers.SyncManager):
    """A manager at ``broker://NAME`` with the types of the standard library's SyncManager."""
