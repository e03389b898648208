"""The changes of a client's connection to its broker, as on_connection reports them. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from brokerd_client._compat import slotted
from brokerd_client.errors import BrokerdError

__all__ = ["ConnectionEvent", "ConnectionState"]

ConnectionState = Literal["connected", "draining", "lost", "refused"]


@slotted
@dataclass(frozen=True)
class ConnectionEvent:
    """A change of a client's connection to its broker.

    Attributes:
        state: ``connected``: the client can send. ``draining``: the broker is about to
            close this connection. ``lost``: the connection ended, or no other will
            follow. ``refused``: an attempt to connect was refused.
        reason: Why the connection is lost or refused; None for the other states.
        final: Whether the client no longer reconnects.
    """

    state: ConnectionState
    reason: BrokerdError | None = None
    final: bool = False
