"""The end of subscriptions that new rules forbid, checked a few at a time.

One connection may have ten thousand subscriptions. Checking those of ten connections at
once would delay all clients for seconds. From the moment new rules apply, a look-up
finds no subscription under a pattern that they forbid. Only its removal is left to be
done. Source of the rules: docs/configuration.md, "clients".
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from brokerd.core.topics import Topics

if TYPE_CHECKING:
    from brokerd.core.session import Session

__all__ = ["Revocation"]


class Revocation:
    """The sessions whose subscriptions are being checked.

    on_ended: called for each subscription that the rules forbid, with session, pattern
    and group.
    """

    def __init__(
        self, topics: Topics[Session], on_ended: Callable[[Session, str, str | None], None]
    ) -> None:
        self._topics = topics
        self._on_ended = on_ended
        #: The sessions in their order, each with its unchecked subscriptions; None
        #: where checking has not begun.
        self._rest: dict[Session, list[tuple[str, str | None]] | None] = {}

    def __len__(self) -> int:
        """Return the number of sessions."""
        return len(self._rest)

    def begin(self, session: Session) -> None:
        """Hide a session under patterns that its client's (already new) rules forbid."""
        if session.subscriptions:
            policy = session.client.policy
            self._topics.restrict(session, lambda pattern: policy.subscribing(pattern) is not None)
            self._rest[session] = None

    def finish(self, session: Session) -> None:
        """Check the rest of a session's subscriptions at once: its rules are about to
        change.
        """
        if session in self._rest:
            self._go_on(session, sys.maxsize)
            self._end(session)

    def run_deferred(self, count: int) -> None:
        """Check up to ``count`` subscriptions."""
        while self._rest and count > 0:
            session = next(iter(self._rest))
            checked = self._go_on(session, count)
            if checked < count:
                self._end(session)
            count -= checked + 1

    def _end(self, session: Session) -> None:
        del self._rest[session]
        self._topics.free(session)

    def _go_on(self, session: Session, count: int) -> int:
        """Check up to ``count`` subscriptions of a session; return how many were
        checked.
        """
        remaining = self._rest[session]
        if remaining is None:
            remaining = self._rest[session] = list(session.subscriptions)
        batch = remaining[-count:]
        del remaining[-count:]
        for pattern, group in batch:
            # The subscription may have ended since then, and the whole session with it.
            if (pattern, group) in session.subscriptions and session.client.policy.subscribing(
                pattern
            ) is None:
                self._topics.prune(pattern, session, group)
                session.subscriptions.discard((pattern, group))
                self._on_ended(session, pattern, group)
        return len(batch)
