"""Operations on one mailbox: show, kick, drop and purge its messages."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from brokerd.core.mailboxes.journal import Revive, Row, Rows, State
from brokerd.core.stored_message import Message, seq_at, tagged
from brokerd_client.wire.envelope import parse, split_address

if TYPE_CHECKING:
    from brokerd.core.mailboxes.acknowledging import Acknowledging
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.feeding import Feeding
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.mailboxes.store_calls import StoreCalls
    from brokerd.core.mailboxes.storing import Storing

__all__ = ["STATES", "Inspection"]

#: The states of a message that an operation may name.
STATES: Final = ("ready", "held", "delayed", "dead")
_ON_DISK: Final[tuple[State, ...]] = ("ready", "delayed", "dead")
#: Most messages that are looked at for one answer.
_SCANNED: Final = 20_000
#: Bytes of a payload that are shown, unless all are asked for.
_SHOWN: Final = 4096
#: Most bytes of messages per answer, and most dead letters revived at once.
_ANSWER: Final = 1024 * 1024
_REVIVED: Final = 500
#: Bytes of the length before a frame.
_PREFIX: Final = 4

_Reply: TypeAlias = Callable[[dict[str, Any]], object]


class Inspection:
    """Carries out the operations on single mailboxes. Each replies once it is done.

    Of those that change a mailbox, each begins when the one before it has replied. So what
    it reads from the disk has all their changes.
    """

    def __init__(
        self,
        commits: Commits,
        calls: StoreCalls,
        storing: Storing,
        feeding: Feeding,
        acknowledging: Acknowledging,
    ) -> None:
        self._commits = commits
        self._calls = calls
        self._storing = storing
        self._feeding = feeding
        self._acknowledging = acknowledging
        #: For each mailbox, the changes that wait for the one being carried out.
        self._waiting: dict[Mailbox, deque[Callable[[], None]]] = {}

    def _begin(self, mailbox: Mailbox, change: Callable[[], None]) -> None:
        """Begin a change of a mailbox, if no other is being carried out."""
        waiting = self._waiting.get(mailbox)
        if waiting is None:
            self._waiting[mailbox] = deque()
            change()
        else:
            waiting.append(change)

    def _end(self, mailbox: Mailbox) -> None:
        """Begin the next change of a mailbox, if any waits."""
        waiting = self._waiting[mailbox]
        if waiting:
            waiting.popleft()()
        else:
            del self._waiting[mailbox]

    # Show

    def show(
        self,
        mailbox: Mailbox,
        state: str | None,
        after: int,
        limit: int,
        reply: _Reply,
        *,
        payloads: bool,
        full: bool,
    ) -> None:
        """Reply with messages of one state, or of all, in order.

        Args:
            mailbox: The mailbox.
            state: One of STATES, or None for all.
            after: The last seq that is not wanted.
            limit: Most messages.
            reply: Called with the answer.
            payloads: Whether payloads are shown.
            full: Whether they are shown as a whole.
        """
        is_delayed = state == "delayed"
        most = _ANSWER if full and payloads else inf
        found: list[_Found] = []
        scanned = 0

        def on_rows(rows: Rows) -> None:
            nonlocal scanned, found
            scanned += len(rows)
            every = [*found]
            for row in rows:
                is_wanted = state is None or (row.seq in mailbox.held) == (state == "held")
                if is_wanted and row.seq > after:
                    shown = _shown(mailbox, state, row, payloads=payloads, full=full)
                    every.append(_Found(row.seq, len(row.frame), shown))
            every.sort(key=lambda each: each.seq)
            found = _first(every, limit, most)
            is_done = len(found) == limit or len(found) < len(every)
            # Delayed messages are read in the order in which they are due.
            if rows and scanned < _SCANNED and (is_delayed or not is_done):
                read_behind(rows[-1].due_at or 0.0 if is_delayed else 0.0, rows[-1].seq)
            else:
                reply({"messages": [each.shown for each in found]})

        def read_behind(due_at: float, seq: int) -> None:
            on_disk = None if state is None else _on_disk(state)
            if state == "held":
                # On disk, a held message is ready or delayed.
                on_disk = None
                behind = [each for each in mailbox.held if each > seq]
                if not behind:
                    on_rows([])
                    return
                seq = min(behind) - 1
            self._calls.read(mailbox.name, on_disk, (due_at, seq), limit, _ANSWER, on_rows)

        read_behind(0.0, 0 if is_delayed else after)

    # Kick

    def kick(self, mailbox: Mailbox, seq: int | None, reply: _Reply) -> None:
        """Make one dead letter ready again, or all of them, at the end of the mailbox.

        Damaged ones stay: their content is lost.
        """
        kicked: list[int] = []
        damaged = 0

        def on_rows(rows: Rows) -> None:
            nonlocal damaged
            found = [row for row in rows if seq in (None, row.seq)]
            kicked.extend(self._revive(mailbox, row) for row in found if row.frame)
            damaged += sum(not row.frame for row in found)
            if rows and seq is None:
                read(rows[-1].seq)
                return
            answer: dict[str, Any] = {"kicked": len(kicked)}
            if damaged:
                answer["damaged"] = damaged
            if seq is not None:
                answer["seq"] = kicked[0] if kicked else None
            reply(answer)
            self._end(mailbox)

        def read(after: int) -> None:
            most = _REVIVED if seq is None else 1
            self._calls.read(mailbox.name, "dead", (0.0, after), most, _ANSWER, on_rows)

        self._begin(mailbox, lambda: read(0 if seq is None else seq - 1))

    def _revive(self, mailbox: Mailbox, row: Row) -> int:
        """Give a dead letter a new seq; return that."""
        new_seq = mailbox.next_seq
        mailbox.next_seq += 1
        mailbox.dead -= 1
        mailbox.dead_size -= row.stored.size
        mailbox.is_warned = False
        message = Message(
            new_seq, tagged(row.frame, new_seq, 1), row.stored.stored_at, row.stored.expires_at
        )
        revive = Revive(mailbox.name, row.seq, new_seq, seq_at(row.frame))
        self._commits.revive(revive, mailbox, message)
        return new_seq

    # Drop

    def drop(self, mailbox: Mailbox, seq: int, reply: _Reply) -> None:
        """Delete one message, whatever its state is."""

        def on_rows(rows: Rows) -> None:
            found = [row for row in rows if row.seq == seq]
            reply({"dropped": sum(self._drop(mailbox, row) for row in found)})
            self._end(mailbox)

        def read() -> None:
            self._calls.read(mailbox.name, None, (0.0, seq - 1), 1, _ANSWER, on_rows)

        self._begin(mailbox, read)

    def _drop(self, mailbox: Mailbox, row: Row) -> bool:
        """Delete a message; return whether it was still in the mailbox."""
        # The ACKs may have arrived after the operation.
        self._acknowledging.collect_all()
        consumer = mailbox.held.get(row.seq)
        if consumer is not None:
            self._acknowledging.take_back(consumer, row.seq)
            self._feeding.note_room(consumer)
        elif row.state == "dead":
            mailbox.dead -= 1
            mailbox.dead_size -= row.stored.size
            mailbox.is_warned = False
        elif not mailbox.discard(row.seq, row.state, row.due_at):
            return False
        self._commits.remove(mailbox, (row.seq,))
        mailbox.messages -= 1
        mailbox.size -= row.stored.size
        self._storing.release(mailbox)
        return True

    # Purge

    def purge(self, mailbox: Mailbox, state: str | None, reply: _Reply) -> None:
        """Delete all messages of one state, or of any for None; held ones only if named."""
        if state == "held":
            held = list(mailbox.held.items())
            for seq, consumer in held:
                self._feeding.delete(mailbox, self._acknowledging.take_back(consumer, seq))
                self._feeding.note_room(consumer)
            reply({"purged": len(held)})
            return
        left = list(_ON_DISK) if state is None else [_on_disk(state)]
        purged = 0

        def on_purged(count: int, size: int) -> None:
            nonlocal purged
            purged += count
            mailbox.messages -= count
            mailbox.size -= size
            if left.pop(0) == "dead":
                mailbox.dead -= count
                mailbox.dead_size -= size
                mailbox.is_warned = False
            if left:
                begin()
                return
            self._storing.release(mailbox)
            reply({"purged": purged})
            self._end(mailbox)

        def begin() -> None:
            # Messages whose new state is on its way to the disk stay, as held ones do.
            without = (*mailbox.held, *mailbox.parked)
            before = mailbox.committed_to + 1
            mailbox.empty(left[0])
            self._calls.purge(mailbox.name, left[0], before, without, on_purged)

        self._begin(mailbox, begin)


class _Found(NamedTuple):
    """A message for an answer. size: bytes of its frame."""

    seq: int
    size: int
    shown: dict[str, Any]


def _first(found: list[_Found], limit: int, most: float) -> list[_Found]:
    """Return the first messages: up to ``limit``, with up to ``most`` bytes, at least one."""
    size = 0
    for count, each in enumerate(found[:limit]):
        size += each.size
        if size > most and count:
            return found[:count]
    return found[:limit]


def _on_disk(state: str) -> State:
    """Return the state on disk of a message in one of STATES."""
    return "delayed" if state == "delayed" else "dead" if state == "dead" else "ready"


def _shown(
    mailbox: Mailbox, state: str | None, row: Row, *, payloads: bool, full: bool
) -> dict[str, Any]:
    """Return what an answer in JSON tells of a message.

    state: The state that was asked for; None for any.
    """
    consumer = mailbox.held.get(row.seq)
    facts: dict[str, Any] = {
        "seq": row.seq,
        "sender": "",
        "state": state or (row.state if consumer is None else "held"),
        "attempts": row.attempts,
        "reason": row.reason,
        "error": row.error,
        "consumer": row.consumer if consumer is None else consumer.session.address,
        "at": row.at or None,
        "stored_at": row.stored.stored_at,
        "expires_at": row.stored.expires_at,
        "due_at": row.due_at,
        "key": None,
    } | _content(row.frame, payloads=payloads, full=full)
    key = row.stored.key
    # The key of an import is not the sender's.
    if key is not None and key[0] == split_address(facts["sender"])[0]:
        facts["key"] = key[1]
    return facts


def _content(frame: bytes, *, payloads: bool, full: bool) -> dict[str, Any]:
    """Return the sender and the payload of a delivery for an answer in JSON."""
    if not frame:
        # A damaged message.
        return {"encoding": "text", "payload": ""} if payloads else {}
    envelope = parse(memoryview(frame)[_PREFIX:])
    facts: dict[str, Any] = {
        "sender": envelope.name,
        "id": envelope.id,
        "kind": envelope.kind.name.lower(),
        "topic": envelope.topic,
        "codec": envelope.codec,
        "extension": envelope.extension,
        "size": len(envelope.payload),
    }
    if not payloads:
        return facts
    payload = envelope.payload
    encoding, text = "text", ""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        encoding = "base64"
    if encoding == "base64":
        text = base64.b64encode(payload if full else payload[:_SHOWN]).decode()
    elif not full:
        # A character may be cut in two.
        text = payload[:_SHOWN].decode(errors="ignore")
    return {**facts, "encoding": encoding, "payload": text}
