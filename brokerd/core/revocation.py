"""Subscriptions that new rules may forbid, looked through and ended little by little.

One connection may have ten thousand of them, and ten connections would hold up everybody else for seconds. From the
moment the rules are new nothing is found under a pattern that they forbid; what remains to be done is to forget it.
Source of the rules: docs/configuration.md, "clients".
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
    """The connections whose subscriptions are looked through.

    on_ended: told of each subscription that the rules forbid: whose, its pattern and its group.
    """

    def __init__(self, topics: Topics[Session], on_ended: Callable[[Session, str, str | None], None]) -> None:
        self._topics = topics
        self._on_ended = on_ended
        #: In their order, each with what was not looked at; None where nothing was.
        self._rest: dict[Session, list[tuple[str, str | None]] | None] = {}

    def __len__(self) -> int:
        """How many connections these are."""
        return len(self._rest)

    def begin(self, session: Session) -> None:
        """Find a session under no pattern that its client's rules forbid; they are the new ones already."""
        if session.subscriptions:
            policy = session.client.policy
            self._topics.restrict(session, lambda pattern: policy.subscribing(pattern) is not None)
            self._rest[session] = None

    def finish(self, session: Session) -> None:
        """Look through the rest of a session's subscriptions at once: its rules are about to change."""
        if session in self._rest:
            self._go_on(session, sys.maxsize)
            self._end(session)

    def run_deferred(self, count: int) -> None:
        """Look at up to ``count`` subscriptions."""
        while self._rest and count > 0:
            session = next(iter(self._rest))
            looked_at = self._go_on(session, count)
            if looked_at < count:
                self._end(session)
            count -= looked_at + 1

    def _end(self, session: Session) -> None:
        del self._rest[session]
        self._topics.free(session)

    def _go_on(self, session: Session, count: int) -> int:
        """Look at up to ``count`` subscriptions of a session; return how many it were."""
        rest = self._rest[session]
        if rest is None:
            rest = self._rest[session] = list(session.subscriptions)
        some = rest[-count:]
        del rest[-count:]
        for pattern, group in some:
            # It may have ended since, and with it the whole session.
            if (pattern, group) in session.subscriptions and session.client.policy.subscribing(pattern) is None:
                self._topics.prune(pattern, session, group)
                session.subscriptions.discard((pattern, group))
                self._on_ended(session, pattern, group)
        return len(some)
