"""A client's own mailbox: whether it is open, and the payload of an ACK. No I/O.

Rules: docs/protocol.md, "Mailboxes". The client opens its mailbox on each connection
from the first moment on when the program receives.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from brokerd_client.errors import Elsewhere
from brokerd_client.wire.envelope import MAX_DELAY, is_delay

__all__ = ["Mailbox", "ack_body"]

#: Most characters of a reason that are sent to the broker.
_MAX_REASON: Final = 1000
#: Seconds until a mailbox at a host that can't be reached is asked for again: the first
#: time, doubled each time, and the maximum; and when all that is forgotten.
_FIRST_WAIT_S: Final = 5.0
_LONGEST_WAIT_S: Final = 60.0
_FORGET_S: Final = 300.0


class Mailbox:
    """The state of the mailbox on the present connection.

    Attributes:
        wanted: Whether the program receives.
        is_open: Whether the broker was asked to open it on this connection.
        connection: The number of this connection: a delivery is acknowledged on its own.
        retry_at: When it is asked for again; None if it is open, or there is none.
        home: The broker's answer that another host has it, while the client goes there.
        unsettled: Messages received on this connection that were not acknowledged.
    """

    __slots__ = (
        "_asked_at",
        "_limits",
        "_wait_s",
        "connection",
        "home",
        "is_open",
        "retry_at",
        "unsettled",
        "wanted",
    )

    def __init__(self, window: int | None, window_bytes: int | None) -> None:
        self.wanted = False
        self.is_open = False
        self.connection = 0
        self.unsettled = 0
        self.retry_at: float | None = None
        self.home: Elsewhere | None = None
        self._asked_at = -math.inf
        self._wait_s = _FIRST_WAIT_S
        limits = {"window": window, "window_bytes": window_bytes}
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}

    def connect(self) -> int:
        """Begin a new connection, on which it is closed; return the connection's number."""
        self.is_open = False
        self.unsettled = 0
        self.home = self.retry_at = None
        self.connection += 1
        return self.connection

    def begin_move(self, now: float) -> bool:
        """Return whether the client may leave for another host now, or asks again later.

        A host that can't be reached is tried at growing intervals.
        """
        elapsed = now - self._asked_at
        if elapsed < self._wait_s:
            self.retry_at = self._asked_at + self._wait_s
            return False
        self._wait_s = (
            min(2 * self._wait_s, _LONGEST_WAIT_S) if elapsed < _FORGET_S else _FIRST_WAIT_S
        )
        self._asked_at = now
        self.retry_at = now + self._wait_s
        return True

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the operation open_mailbox."""
        return dict(self._limits)


def ack_body(verb: str, delay: float | None = None, reason: str = "") -> bytes:
    """Return the payload of an ACK.

    Args:
        verb: What becomes of the message: done, back, failed or dead.
        delay: Seconds until it is delivered again at the earliest, or None.
        reason: Why it failed, for people.

    Raises:
        ValueError: The delay is not a number from 0 to MAX_DELAY.
    """
    if verb == "done":
        return b""
    fields: dict[str, Any] = {"verb": verb}
    if delay is not None:
        if not is_delay(delay):
            raise ValueError(
                f"{delay!r:.40} is not a valid delay: give seconds, from 0 to {MAX_DELAY}"
            )
        fields["delay"] = delay
    if reason:
        fields["reason"] = str(reason)[:_MAX_REASON]
    return json.dumps(fields, separators=(",", ":")).encode()
