"""The table of mailboxes, and the details of one mailbox with its dead letters."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

from brokerd.core.broker import Broker
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd.monitor.tables.table import SHOWN, Row, Table, in_turns

__all__ = ["DeadLetters", "MailboxTable"]

#: Most dead letters shown of one mailbox, the oldest.
_LETTERS: Final = 20
#: Seconds until the dead letters of a mailbox are read again.
_READ_AGAIN_S: Final = 5.0
#: Seconds within which the store must answer.
_ANSWER_S: Final = 2.0


class MailboxTable(Table):
    """All mailboxes, also orphaned ones that have messages."""

    COLUMNS = (
        "name",
        "ready",
        "held",
        "delayed",
        "dead",
        "bytes",
        "fill",
        "oldest",
        "consumers",
        "state",
    )
    SEARCHED = ("name", "state")

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self._broker = broker

    async def _read_rows(self, elapsed: float) -> list[Row]:
        self._broker.mailboxes.clock.advance(asyncio.get_running_loop().time())
        listed = list(self._broker.mailboxes.listed(None))
        return [_row(self._broker, mailbox) async for mailbox in in_turns(listed)]


def _row(broker: Broker, mailbox: Mailbox) -> Row:
    counts = broker.mailboxes.counts(mailbox)
    config = mailbox.config
    fill = 0.0
    if config is not None:
        fill = max(mailbox.messages / config.messages, counts["bytes"] / config.size)
    return {
        **counts,
        "fill": round(fill, 3),
        "consumers": len(mailbox.consumers),
        "state": _state_of(mailbox, fill),
    }


def _state_of(mailbox: Mailbox, fill: float) -> str:
    """Return the state of a mailbox in words."""
    if mailbox.client is None:
        return "orphaned"
    if fill >= 1:
        return f"full, holds {len(mailbox.waiting)}" if mailbox.waiting else "full"
    return "open" if mailbox.consumers else "not open"


class DeadLetters:
    """The details of mailboxes, with dead letters that were read lately."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        #: By name: what was read, and until when it does.
        self._read: dict[str, tuple[list[dict[str, Any]] | None, float]] = {}

    async def details_of(self, name: str) -> dict[str, Any] | None:
        """Return all that the page shows of one mailbox, or None if there is none."""
        mailbox = self._broker.mailboxes.boxes.get(name)
        if mailbox is None:
            return None
        letters = await self._letters(mailbox) if mailbox.dead else []
        entry = self._broker.mailboxes.entry(mailbox)
        config = mailbox.config
        return _row(self._broker, mailbox) | {
            "connections": entry["connections"][:SHOWN],
            "place": "" if mailbox.client is None else str(mailbox.client.config.source),
            "limits": None
            if config is None
            else {
                "messages": config.messages,
                "size": config.size,
                "attempts": config.attempts,
                "when_full": str(config.when_full),
                "subscribe": [rule.pattern for rule in config.subscribe[:SHOWN]],
            },
            # None: the store has not answered.
            "letters": letters,
        }

    async def _letters(self, mailbox: Mailbox) -> list[dict[str, Any]] | None:
        """Return the first dead letters, without their payloads."""
        now = asyncio.get_running_loop().time()
        letters, until = self._read.get(mailbox.name, (None, 0.0))
        if now < until:
            return letters
        # Other pages do not read them too meanwhile.
        self._read = {name: read for name, read in self._read.items() if read[1] > now}
        self._read[mailbox.name] = letters, now + _READ_AGAIN_S
        letters = await self._ask(mailbox)
        self._read[mailbox.name] = letters, now + _READ_AGAIN_S
        return letters

    async def _ask(self, mailbox: Mailbox) -> list[dict[str, Any]] | None:
        mailboxes = self._broker.mailboxes
        if not mailboxes.is_active or mailboxes.commits.failure or mailboxes.commits.is_paused:
            return None
        answer: asyncio.Future[list[dict[str, Any]]] = asyncio.get_running_loop().create_future()

        def on_read(reply: dict[str, Any]) -> None:
            if not answer.done():
                answer.set_result(reply["messages"])

        mailboxes.inspection.show(mailbox, "dead", 0, _LETTERS, on_read, payloads=False, full=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                return await answer
        return None
