"""Calls of the store that it answers later, each with what follows from the answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from brokerd.core.mailboxes.journal import MAX_SEQ, ReadyRows
from brokerd.core.stored_message import Message, ready_messages, split_frames

if TYPE_CHECKING:
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.journal import Journal, Rows, State

__all__ = ["StoreCalls"]


class StoreCalls:
    """Questions to the store, by number.

    journal: the store; None before it was opened.
    """

    def __init__(self, commits: Commits) -> None:
        self._commits = commits
        self.journal: Journal | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, Callable[..., Any]] = {}

    def __len__(self) -> int:
        """Return the number of calls without an answer."""
        return len(self._answers)

    def flush(self) -> None:
        """Give the open batch to the store, so that a later call finds it written."""
        if self.journal is not None:
            self._commits.flush(self.journal)

    def read(
        self,
        mailbox: str,
        state: State | None,
        after: tuple[float, int],
        max_messages: int,
        max_bytes: int,
        then: Callable[[Rows], object],
    ) -> None:
        """Read messages; ``then`` is called with them. See Journal.read.

        after: its seq may be any that a client can name.
        """
        journal, request = self._begin(then)
        due_at, seq = after
        after = due_at, min(seq, MAX_SEQ)
        journal.read(request, mailbox, state, after, max_messages, max_bytes)

    def look_up_key(
        self, mailbox: str, key: tuple[str, str], then: Callable[[bool], object]
    ) -> None:
        """Ask whether a message with that sender and key was stored."""
        journal, request = self._begin(then)
        journal.look_up_key(request, mailbox, *key)

    def purge(
        self,
        mailbox: str,
        state: State | None,
        before_seq: int,
        without: tuple[int, ...],
        then: Callable[[int, int], object],
    ) -> None:
        """Remove messages; ``then`` gets their number and their bytes."""
        journal, request = self._begin(then)
        journal.purge(request, mailbox, state, before_seq, without)

    def _begin(self, then: Callable[..., Any]) -> tuple[Journal, int]:
        self.flush()
        assert self.journal is not None, "mailboxes are used after their store was opened"
        request = next(self._numbers)
        self._answers[request] = then
        return self.journal, request

    def answer(self, request: int, *result: Any) -> None:
        """Carry on with an answer of the store."""
        self._answers.pop(request)(*result)


def messages_of(rows: Rows) -> list[Message]:
    """Return the messages of rows that are not damaged."""
    if isinstance(rows, ReadyRows):
        frames: list[bytes] = []
        for contained, first, sizes in rows.joined:
            frames += split_frames(contained, first, sizes)
        return ready_messages(rows.seqs, frames, rows.stored_at, rows.expires_at)
    return [Message.from_row(row) for row in rows if row.frame]


def last_seq_of(rows: Rows) -> int:
    """Return the seq of the last row; 0 without one."""
    if isinstance(rows, ReadyRows):
        return rows.seqs[-1] if rows.seqs else 0
    return rows[-1].seq if rows else 0
