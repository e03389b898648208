"""Loggers with bound fields: the peer of a connection, and the listener.

A logger is bound when an event is logged, not when a connection begins. Most
connections log two events, and would keep two more objects for all of their time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from brokerd.core.session import Session
    from brokerd.net.handshake.pending import PendingConnection
    from brokerd_client.address import Address

__all__ = ["handshake_logger", "listener_logger", "session_logger"]


def handshake_logger(log: FilteringBoundLogger, pending: PendingConnection) -> FilteringBoundLogger:
    """Return the logger of a handshake; it names the client once a key is proved."""
    if pending.credential is not None:
        log = log.bind(name=pending.credential.client.name)
    return log.bind(peer=pending.peer, listener=pending.listener)


def listener_logger(log: FilteringBoundLogger, address: Address) -> FilteringBoundLogger:
    """Return the logger of a listener."""
    return log.bind(listener=str(address))


def session_logger(log: FilteringBoundLogger, session: Session) -> FilteringBoundLogger:
    """Return the logger of an authenticated connection."""
    return log.bind(name=session.client.name, address=session.address, peer=session.peer)
