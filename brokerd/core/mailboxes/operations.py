"""The `$broker` operations on mailboxes: their arguments, and who may ask what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.core.mailboxes.importing import MOST
from brokerd.core.mailboxes.inspection import STATES
from brokerd.core.refusal import Refusal, text_of
from brokerd_client.wire.envelope import BROKER, ErrorCode
from brokerd_client.wire.layout import MAX_ID

if TYPE_CHECKING:
    from brokerd.core.mailboxes.mailbox import Mailbox
    from brokerd.core.mailboxes.mailboxes import Mailboxes
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session

__all__ = ["MailboxOperations"]

_Arguments: TypeAlias = dict[str, Any]

#: Largest window of a connection, in messages, and its bytes if it names none.
_LARGEST_WINDOW: Final = 10_000
_WINDOW_BYTES: Final = 1024 * 1024
#: Messages shown per answer: without a number, and at most.
_SHOWN: Final = 20
_MOST_SHOWN: Final = 100


class MailboxOperations:
    """Carries out the operations on mailboxes, each for one connection.

    addresses_of: returns where clients can connect to another host of the cluster.
    home_of: returns the host that keeps the mailbox of a name, "" if none is known.
    """

    def __init__(
        self,
        mailboxes: Mailboxes,
        replies: Replies,
        addresses_of: Callable[[str], tuple[str, ...]],
        home_of: Callable[[str], str],
    ) -> None:
        self._mailboxes = mailboxes
        self._replies = replies
        self._addresses_of = addresses_of
        self._home_of = home_of

    def open(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``open_mailbox``; the REPLY precedes the first delivery."""
        self._own(source)
        if source.retired or source.parting:
            raise Refusal(ErrorCode.SHUTTING_DOWN, "the broker closes this connection", BROKER)
        window = arguments.get("window")
        if window is not None and not _is_number(window, 1, _LARGEST_WINDOW):
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                f"invalid window: it is a number of messages from 1 to {_LARGEST_WINDOW}",
                BROKER,
            )
        window_bytes = arguments.get("window_bytes", _WINDOW_BYTES)
        if not _is_number(window_bytes, 1, MAX_ID):
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                "invalid window_bytes: it is a number of bytes from 1 to the client's queue"
                f" ({source.client.config.queue})",
                BROKER,
            )
        reply = self._mailboxes.open(source, window, window_bytes)
        self._replies.reply(source, message_id, reply)

    def close(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        """Carry out ``close_mailbox``."""
        self._own(source)
        self._mailboxes.close(source)
        return {}

    def listed(self, source: Session) -> Iterator[_Arguments | None]:
        """Yield the entries of ``mailboxes``: the client's own, or all for administrators."""
        name = None if source.client.policy.admin else source.client.name
        for mailbox in self._mailboxes.listed(name):
            yield self._mailboxes.entry(mailbox) if source.open else None

    def show(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``mailbox_show``."""
        mailbox = self._mailbox(source, arguments)
        is_all = arguments.get("state") == "all"
        state = None if is_all else _state_of(arguments) or "ready"
        after, limit = arguments.get("after", 0), arguments.get("limit", _SHOWN)
        full = arguments.get("full", False)
        if not _is_number(after, 0, MAX_ID):
            raise Refusal(ErrorCode.UNSUPPORTED, "invalid after: it is a seq", BROKER)
        if not _is_number(limit, 1, _MOST_SHOWN):
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                f"invalid limit: it is a number of messages from 1 to {_MOST_SHOWN}",
                BROKER,
            )
        if not isinstance(full, bool):
            raise Refusal(ErrorCode.UNSUPPORTED, "invalid full: use true or false", BROKER)
        is_own = mailbox.name == source.client.name
        if not is_own:
            log_events = self._replies.log_events
            log_events.note("mailbox.shown", source, mailbox.name, "mailbox_show", state or "all")
        self._mailboxes.inspection.show(
            mailbox,
            state,
            after,
            limit,
            self._reply(source, message_id),
            payloads=is_own or source.client.config.admin_payload,
            full=full,
        )

    def kick(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``mailbox_kick``."""
        mailbox = self._mailbox(source, arguments)
        seq = None if arguments.get("all") is True else _seq_of(arguments, ' or "all": true')
        self._note(source, mailbox, "mailbox_kick", seq)
        self._mailboxes.inspection.kick(
            mailbox, seq, self._reply(source, message_id, seq, "dead letter")
        )

    def drop(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``mailbox_drop``."""
        mailbox = self._mailbox(source, arguments)
        seq = _seq_of(arguments)
        self._note(source, mailbox, "mailbox_drop", seq)
        self._mailboxes.inspection.drop(mailbox, seq, self._reply(source, message_id, seq))

    def purge(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``mailbox_purge``."""
        mailbox = self._mailbox(source, arguments)
        state = _state_of(arguments)
        self._note(source, mailbox, "mailbox_purge", state)
        self._mailboxes.inspection.purge(mailbox, state, self._reply(source, message_id))

    def import_(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        """Carry out ``mailbox_import``."""
        mailbox = self._mailbox(source, arguments)
        messages = arguments.get("messages")
        if not isinstance(messages, list) or not 0 < len(messages) <= MOST:
            raise Refusal(
                ErrorCode.UNSUPPORTED, f"messages is a list of 1 to {MOST} messages", BROKER
            )
        self._note(source, mailbox, "mailbox_import", f"{len(messages)} messages")
        self._mailboxes.importing.run(source, message_id, mailbox, messages)

    def _own(self, source: Session) -> Mailbox:
        if source.client.mailbox is None:
            name, home = source.client.name, source.client.config.home
            if home:
                raise Refusal(
                    ErrorCode.ELSEWHERE,
                    f"the mailbox of {name} is at host {home}: connect there",
                    BROKER,
                    host=home,
                    addresses=self._addresses_of(home),
                )
            raise Refusal(
                ErrorCode.UNSUPPORTED, f"{name} has no mailbox (clients.{name}.mailbox)", BROKER
            )
        return source.client.mailbox

    def _mailbox(self, source: Session, arguments: _Arguments) -> Mailbox:
        """Return the mailbox that an operation names: the client's own unless it names one."""
        name = text_of(arguments, "name") if "name" in arguments else source.client.name
        if name != source.client.name and not source.client.policy.admin:
            raise Refusal(
                ErrorCode.DENIED,
                f"the mailbox of {name} is only for {name} and clients with admin: true",
                name,
            )
        mailbox = self._mailboxes.boxes.get(name)
        if mailbox is None:
            home = self._home_of(name)
            reason = (
                f"the mailbox of {name} is at host {home}: ask there"
                if home
                else f"{name} has no mailbox"
            )
            raise Refusal(ErrorCode.UNSUPPORTED, reason, name)
        if self._mailboxes.commits.failure:
            reason = f"the store of the mailboxes has failed: {self._mailboxes.commits.failure}"
            raise Refusal(ErrorCode.STORE_FAILED, reason, name)
        if self._mailboxes.commits.is_paused:
            reason = "the broker is being replaced by a new process: ask again in a moment"
            raise Refusal(ErrorCode.SHUTTING_DOWN, reason, name)
        return mailbox

    def _reply(
        self, source: Session, message_id: int, seq: int | None = None, what: str = "message"
    ) -> Callable[[_Arguments], None]:
        """Return what replies to an operation. seq: the one message that it is about."""

        def reply(result: _Arguments) -> None:
            if seq is not None and result.get("damaged"):
                reason = f"message {seq} is damaged: its content is lost; mailbox_drop deletes it"
                self._replies.refuse(source, message_id, ErrorCode.UNSUPPORTED, reason, BROKER)
            elif seq is not None and not any(map(result.get, ("kicked", "dropped"))):
                reason = f"there is no {what} with the seq {seq}"
                self._replies.refuse(source, message_id, ErrorCode.EXPIRED, reason, BROKER)
            else:
                self._replies.reply(source, message_id, result)

        return reply

    def _note(self, source: Session, mailbox: Mailbox, op: str, detail: object) -> None:
        reason = "all" if detail is None else str(detail)
        self._replies.log_events.note("mailbox.changed", source, mailbox.name, op, reason)


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _seq_of(arguments: _Arguments, more: str = "") -> int:
    seq = arguments.get("seq")
    if not _is_number(seq, 1, MAX_ID):
        raise Refusal(ErrorCode.UNSUPPORTED, f"the operation needs seq, a number{more}", BROKER)
    assert isinstance(seq, int)
    return seq


def _state_of(arguments: _Arguments) -> str | None:
    state = arguments.get("state")
    if state is not None and state not in STATES:
        names = ", ".join(STATES)
        raise Refusal(ErrorCode.UNSUPPORTED, f"invalid state: use one of {names}", BROKER)
    return None if state is None else str(state)
