"""Importing: the messages of an export, with their senders, keys, states and attempts.

They get new seqs at the end of the mailbox, and count as stored now.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from brokerd.core.mailboxes.commits import ImportOutcome
from brokerd.core.mailboxes.journal import Change, State, Stored, is_text, is_time
from brokerd.core.mailboxes.storing import extension_error
from brokerd.core.refusal import Refusal
from brokerd.core.sink import KEY_SIZE
from brokerd.core.stored_message import MAX_ATTEMPT, DeadLetter, Message, tagged
from brokerd_client.errors import InvalidName, MalformedEnvelope, PayloadError
from brokerd_client.wire.envelope import (
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    check_topic,
    encode,
    is_address,
    is_key,
    parse,
    split_address,
)
from brokerd_client.wire.framing import frame as make_frame

if TYPE_CHECKING:
    from brokerd.core.mailboxes.clock import Clock
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session

__all__ = ["MOST", "Importing"]

#: Most messages imported at once.
MOST: Final = 100
#: The sender of the keys of messages without a key of their own: an import that is
#: repeated stores nothing twice.
_IMPORT: Final = "$import"
#: The fields of a message: the types of their values, and the value if it is missing.
_FIELDS: Final[dict[str, tuple[type | tuple[type, ...], object]]] = {
    "sender": (str, None),
    "kind": (str, "message"),
    "topic": (str, ""),
    "id": (int, 0),
    "codec": (int, 0),
    "extension": ((dict, type(None)), None),
    "encoding": (str, "text"),
    "payload": (str, None),
    "key": ((str, type(None)), None),
    "mark": ((str, type(None)), None),
    "state": (str, "ready"),
    "attempts": (int, 0),
    "reason": (str, ""),
    "error": (str, ""),
    "consumer": (str, ""),
    "at": ((int, float, type(None)), None),
    "expires_at": ((int, float, type(None)), None),
    "due_at": ((int, float, type(None)), None),
}
_TIMES: Final = ("at", "expires_at", "due_at")
#: The state on disk of each state in an export.
_STATES: Final[dict[str, State]] = {
    "ready": "ready",
    "held": "ready",
    "delayed": "delayed",
    "dead": "dead",
}


class _Imported(NamedTuple):
    """One message of an export. frame: that of its delivery, with the seq 0."""

    frame: bytes
    key: tuple[str, str] | None
    state: State
    attempts: int
    expires_at: float | None
    due_at: float | None
    reason: str
    error: str
    consumer: str
    at: float


class Importing:
    """Stores the messages of exports."""

    def __init__(self, replies: Replies, commits: Commits, clock: Clock) -> None:
        self._replies = replies
        self._commits = commits
        self._clock = clock

    def run(
        self, source: Session, message_id: int, mailbox: Mailbox, entries: Sequence[object]
    ) -> None:
        """Store messages; the REPLY follows once they are on disk. Raises Refusal.

        Those whose ttl is over are left out, but for dead letters.
        """
        found = [_read(number, entry) for number, entry in enumerate(entries)]
        wall = self._clock.wall
        kept = [
            each
            for each in found
            if each.state == "dead" or each.expires_at is None or each.expires_at > wall
        ]
        self._check_room(mailbox, kept)
        outcome = ImportOutcome(source, message_id, len(kept), len(found) - len(kept))
        if not kept:
            self._replies.reply(source, message_id, outcome.reply())
            return
        source.uncommitted += 1
        for each in kept:
            self._append(mailbox, each, outcome)

    def _check_room(self, mailbox: Mailbox, messages: Sequence[_Imported]) -> None:
        config = mailbox.config
        if config is None:
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                f"{mailbox.name} has no mailbox any more (clients.{mailbox.name}.mailbox)",
                mailbox.name,
            )
        keys = mailbox.keys + sum(each.key is not None for each in messages)
        size = mailbox.size + sum(len(each.frame) for each in messages) + keys * KEY_SIZE
        if (
            self._commits.is_behind
            or mailbox.messages + len(messages) > config.messages
            or size > config.size
        ):
            raise Refusal(
                ErrorCode.FULL, f"the mailbox of {mailbox.name} has no room for them", mailbox.name
            )

    def _append(self, mailbox: Mailbox, given: _Imported, outcome: ImportOutcome) -> None:
        """Give a message the next seq, and write it with its state."""
        seq, wall = mailbox.next_seq, self._clock.wall
        due_at = given.due_at if given.state == "delayed" else None
        frame = tagged(given.frame, seq, 1)
        make = DeadLetter if given.state == "dead" else Message
        message = make(seq, frame, wall, given.expires_at, due_at, given.attempts)
        mailbox.next_seq += 1
        mailbox.messages += 1
        mailbox.uncommitted += 1
        mailbox.size += message.size
        mailbox.keys += given.key is not None
        stored = Stored(message.size, wall, given.expires_at, due_at, given.key)
        self._commits.append(mailbox, message, stored, outcome)
        if given.state == "dead" or given.attempts:
            change = Change(
                mailbox.name,
                seq,
                given.state,
                given.attempts,
                due_at,
                given.reason,
                given.error,
                given.consumer,
                given.at,
            )
            self._commits.change(mailbox, message, change)


def _read(number: int, entry: object) -> _Imported:
    """Return one message of an export. Raises Refusal if it is not one."""
    try:
        return _message_of(_fields_of(entry))
    except (ValueError, InvalidName, PayloadError, MalformedEnvelope) as error:
        raise Refusal(ErrorCode.UNSUPPORTED, f"messages[{number}]: {error}") from error


def _fields_of(entry: object) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError("a message of an export is an object")
    fields: dict[str, Any] = {}
    for name, (types, default) in _FIELDS.items():
        value = entry.get(name, default)
        if not isinstance(value, types) or isinstance(value, bool) or not _is_kept(name, value):
            raise ValueError(f"{name} is missing or not valid")
        fields[name] = value
    for name in _TIMES:
        # The database returns a float, whose seal differs from an integer's.
        if fields[name] is not None:
            fields[name] = float(fields[name])
    return fields


def _is_kept(name: str, value: object) -> bool:
    """Return whether the store can keep the value of a field."""
    if isinstance(value, str):
        return is_text(value)
    return name not in _TIMES or value is None or is_time(value)


def _message_of(fields: Mapping[str, Any]) -> _Imported:
    sender, attempts = fields["sender"], fields["attempts"]
    kind = Kind.EVENT if fields["kind"] == "event" else Kind.MESSAGE
    if not is_address(sender) or sender.startswith("$"):
        raise ValueError(f"{sender!r:.80} is not a client's address")
    if fields["kind"] not in ("message", "event") or fields["state"] not in _STATES:
        raise ValueError("kind or state is not valid")
    if not 0 <= attempts <= MAX_ATTEMPT:
        raise ValueError("attempts is not valid")
    if kind is Kind.EVENT:
        check_topic(fields["topic"])
    envelope = Envelope(
        kind,
        fields["id"],
        sender,
        _payload_of(fields),
        fields["codec"],
        Flag.ACK,
        fields["topic"] if kind is Kind.EVENT else "",
        fields["extension"],
        attempt=1,
    )
    # What a client would not accept is not stored.
    body = encode(envelope)
    error = extension_error(parse(body).extension or {})
    if error:
        raise ValueError(error)
    state = _STATES[fields["state"]]
    return _Imported(
        make_frame(body),
        _key_of(fields, sender),
        "ready" if state == "delayed" and fields["due_at"] is None else state,
        attempts,
        fields["expires_at"],
        fields["due_at"],
        fields["reason"],
        fields["error"],
        fields["consumer"],
        fields["at"] or 0.0,
    )


def _payload_of(fields: Mapping[str, Any]) -> bytes:
    text: str = fields["payload"]
    if fields["encoding"] == "base64":
        return base64.b64decode(text, validate=True)
    return text.encode()


def _key_of(fields: Mapping[str, Any], sender: str) -> tuple[str, str] | None:
    """Return the message's own key, or one that tells it from others of the export."""
    key, mark = fields["key"], fields["mark"]
    for each in (key, mark):
        if each is not None and not is_key(each):
            raise ValueError("key and mark are texts of 1 to 64 bytes")
    if key is not None:
        return split_address(sender)[0], key
    return None if mark is None else (_IMPORT, mark)
