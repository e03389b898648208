"""The properties that a client has in both faces."""

from __future__ import annotations

from typing import Any, NoReturn

from brokerd_client.address import Address
from brokerd_client.protocol.dialog import Dialog
from brokerd_client.protocol.state import State

__all__ = ["ClientProperties"]


class ClientProperties:
    """The properties of a client; the client sets the attributes below."""

    _dialog: Dialog[Any]
    #: Where the broker listens, in the order in which the addresses are tried.
    _addresses: tuple[Address, ...]

    @property
    def _broker_address(self) -> Address:
        """The address of the present connection, or of the next attempt."""
        return (*self._dialog.detour, *self._addresses)[self._dialog.turn]

    @property
    def name(self) -> str:
        """The client's name, as the broker reported it."""
        return self._dialog.name

    @property
    def address(self) -> str:
        """The sender's address that other clients see: the name, or NAME/INSTANCE in a
        pool.

        It may change with a reconnect.
        """
        return self._dialog.address

    @property
    def connected(self) -> bool:
        """Whether the client is connected and ready to send at this moment."""
        return self._dialog.state is State.READY

    @property
    def closed(self) -> bool:
        """Whether close() was called, or the connection is lost for good."""
        return self._dialog.state in (State.CLOSING, State.CLOSED, State.GONE)

    @property
    def counters(self) -> dict[str, int]:
        """Counts of failures so far, by kind.

        ``dropped``: requests whose requesters did not wait any more. ``late``:
        answers that came after their call had ended, and answers of this
        client that came too late. ``undelivered``: sends without a waiting call that
        failed. ``unreadable``: received frames that were skipped. ``unrouted``: events
        that no subscription matched any more. ``losses``: connections that were lost.
        ``failed_attempts``: attempts to connect that failed.
        """
        return self._dialog.counters

    def __repr__(self) -> str:
        return (
            f"<Client {self.address or self.name!r} at {self._broker_address}"
            f" {self._dialog.state.name.lower()}>"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a client can't be pickled or copied, and neither can what belongs to it, such as a"
            " message: connect in the child, or pass on the message's payload"
        )
