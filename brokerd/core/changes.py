"""The sessions and clients that have changed while their state is copied.

An upgrade copies the state while the broker serves. The broker and the network layer
note each change here meanwhile. So the final capture looks at what has changed only,
however many sessions there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brokerd.core.exchange import Client
    from brokerd.core.session import Session

__all__ = ["Changes"]


class Changes:
    """The changes since the sessions and clients were copied.

    Attributes:
        sessions: Those that may differ from their copies, or have no copy, in no order.
        clients: The same for clients.
        left: Sessions that have left.
    """

    def __init__(self, sessions: Iterable[Session], clients: Iterable[Client]) -> None:
        self.sessions: dict[Session, None] = dict.fromkeys(sessions)
        self.clients: dict[Client, None] = dict.fromkeys(clients)
        self.left: list[Session] = []

    def note(self, session: Session) -> None:
        """Record that a session and its client may have changed, or that it is new.

        A session that stands for a client of another host has no copy.
        """
        if not session.host:
            self.sessions[session] = None
        self.clients[session.client] = None

    def note_client(self, client: Client) -> None:
        """Record that a client may have changed."""
        self.clients[client] = None

    def note_left(self, session: Session) -> None:
        """Record that a session has left."""
        self.sessions.pop(session, None)
        self.clients[session.client] = None
        self.left.append(session)
