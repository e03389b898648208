"""The mailboxes for a new process: their counts, and what each connection holds.

A snapshot is taken while nothing is on its way to the store or from it. The messages
themselves are on disk; only the frames that connections hold go over with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

from brokerd.core.consumer import Consumer
from brokerd.core.mailboxes.mailbox import Mailbox
from brokerd.core.stored_message import Message

if TYPE_CHECKING:
    from brokerd.core.mailboxes.mailboxes import Mailboxes
    from brokerd.core.session import Session

__all__ = ["capture", "restore"]

Facts: TypeAlias = dict[str, Any]


def capture(mailboxes: Mailboxes, index: Mapping[Session, int], pieces: list[Any]) -> Facts | None:
    """Return the facts of all mailboxes, or None without a store.

    Args:
        mailboxes: The mailboxes, which are quiet.
        index: The positions of the sessions in the snapshot.
        pieces: The bytes of the snapshot; the held frames are added.
    """
    if not mailboxes.is_active:
        return None
    # Those that have left since the pause; nothing of it is written.
    mailboxes.acknowledging.return_some(inf)
    assert mailboxes.is_quiet, "the upgrade waits until nothing is on its way"
    consumers = []
    for mailbox in mailboxes.boxes.values():
        for session, consumer in mailbox.consumers.items():
            rows = [
                [
                    message.seq,
                    message.size,
                    message.attempts,
                    message.stored_at,
                    message.expires_at,
                    message.is_timed,
                    mailboxes.clock.now - message.held_since,
                ]
                for message in consumer.held.values()
            ]
            pieces += [message.frame for message in consumer.held.values()]
            consumers.append([index[session], consumer.window, consumer.window_bytes, rows])
    return {
        "dedup": mailboxes.dedup,
        "failure": mailboxes.commits.failure,
        "boxes": [_box(mailbox) for mailbox in mailboxes.boxes.values()],
        "consumers": consumers,
    }


def _box(mailbox: Mailbox) -> list[Any]:
    delayed = mailbox.delayed_on_disk
    held = len(mailbox.held)
    return [
        mailbox.name,
        mailbox.next_seq,
        mailbox.messages,
        mailbox.size,
        mailbox.dead,
        mailbox.dead_size,
        mailbox.messages - mailbox.dead - delayed - held,
        delayed,
        mailbox.keys,
        mailbox.oldest(),
    ]


def restore(
    mailboxes: Mailboxes,
    facts: Facts,
    sessions: Sequence[Session],
    take: Callable[[int], memoryview],
) -> None:
    """Fill new mailboxes with the facts of ``capture``.

    What a connection held returns to the mailbox if the new configuration has no mailbox
    for it.

    Args:
        mailboxes: The new mailboxes; their store is opened later.
        facts: The facts.
        sessions: The sessions by their positions.
        take: Returns the next bytes of the snapshot.
    """
    mailboxes.dedup = facts["dedup"]
    mailboxes.commits.failure = facts["failure"]
    for row in facts["boxes"]:
        name, next_seq, messages, size, dead, dead_size, ready, delayed, keys, oldest = row
        mailbox = mailboxes.box(name)
        mailbox.next_seq, mailbox.committed_to = next_seq, next_seq - 1
        mailbox.messages, mailbox.size = messages, size
        mailbox.dead, mailbox.dead_size, mailbox.keys = dead, dead_size, keys
        mailbox.unloaded, mailbox.unloaded_since = ready, oldest
        mailbox.delayed = mailbox.unloaded_delayed = delayed
    for position, window, window_bytes, rows in facts["consumers"]:
        session = sessions[position]
        mailbox = mailboxes.boxes[session.client.name]
        consumer = Consumer(session, mailbox, window, window_bytes)
        for seq, size, attempts, stored_at, expires_at, is_timed, held_s in rows:
            message = Message(seq, bytes(take(size)), stored_at, expires_at, None, attempts)
            message.is_timed = is_timed
            consumer.hold(message, mailboxes.clock.now - held_s)
            mailbox.held[seq] = consumer
            mailbox.restored.add(seq)
        consumer.alone = len(rows) == 1 and rows[0][2] > 0
        session.consumer = mailbox.consumers[session] = consumer
        if session.client.mailbox is not mailbox:
            mailboxes.close(session)
