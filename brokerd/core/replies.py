"""The broker's own frames to a session: answers, refusals and receipts.

This is the lowest part of the broker that writes to sessions. Delivery, events and
operations use it, and it calls none of them.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from brokerd.core.error_codes import BACK
from brokerd.core.log_events import LogEvents
from brokerd.core.routing_result import RoutingResult
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    encode,
    error_payload,
)
from brokerd_client.wire.framing import frame as make_frame
from brokerd_client.wire.layout import (
    ACK_FLAG,
    FRAME_HEAD,
    HEADER,
    ID,
    JSON_CODEC,
    RECEIPT_FLAG,
    RECEIPT_KIND,
    REPLY_KIND,
)

if TYPE_CHECKING:
    from brokerd.core.requests import Requests
    from brokerd.core.session import Session
    from brokerd.core.taps import Taps

__all__ = ["OUTCOME_RESERVE", "Replies"]

#: Bytes of the broker's own answers that may wait for one client beyond its queue
#: quota. A client with more waiting than that is not read from.
OUTCOME_RESERVE: Final = 256 * 1024
#: Kinds that answer a request.
_ANSWERS: Final = (Kind.REPLY, Kind.ERROR)
#: The sender of the broker's own frames.
_NAME: Final = BROKER.encode()


#: What stands before the payload in a frame of the broker's own: FRAME_HEAD and the name.
_START: Final = struct.Struct(f"{FRAME_HEAD.format}{len(_NAME)}s")
_BEFORE_PAYLOAD: Final = HEADER.size + len(_NAME)


def _start_of(kind: int, codec: int, message_id: int, payload_size: int, flags: int = 0) -> bytes:
    """Return what stands before the payload in a frame of the broker's own."""
    return _START.pack(
        _BEFORE_PAYLOAD + payload_size, kind, flags, codec, len(_NAME), message_id, _NAME
    )


#: A RECEIPT with the id 0, where the id begins, and bytes of ids per write.
_RECEIPT: Final = _start_of(RECEIPT_KIND, 0, 0, 0)
_ID_OFFSET: Final = FRAME_HEAD.size - ID.size
_CONFIRMED: Final = 2048 * ID.size


class Replies:
    """The broker's answers to sessions, and the counts of what it refused.

    Attributes:
        touched: Sessions with bytes to write, or to be closed.
        log_events: Events to write to the log.
        refused: Refusals by error code.
        dropped: Messages dropped without a report.
        taps: Copies of what passes; they are told what becomes of a message.
        returned: Messages left by closed sessions: ``reported`` to their senders,
            ``passed_on`` to other pool members, or ``lost``.
    """

    def __init__(self, requests: Requests, taps: Taps) -> None:
        self._requests = requests
        self.taps = taps
        self.touched: list[Session] = []
        self.log_events = LogEvents()
        self.refused: Counter[str] = Counter()
        self.dropped = 0
        self.returned: Counter[str] = Counter()

    def touch(self, session: Session) -> None:
        """List the session in ``touched``, to have it written to or closed."""
        if not session.outbox.touched:
            session.outbox.touched = True
            self.touched.append(session)

    def close(
        self, session: Session, reason: str, *, cut: bool = False, code: ErrorCode | None = None
    ) -> None:
        """Mark the session to be closed once its outbox is written.

        cut: close it at once, whether its outbox is written or not.
        code: the code of an ERROR with the id 0 that its client receives last.
        """
        if not session.closing:
            session.closing_code = code
        session.closing = session.closing or reason
        session.cut = session.cut or cut
        self.touch(session)

    def pass_on(self, target: Session, frame: bytes) -> None:
        """Queue a whole frame for a session, whatever its quota is."""
        (target.answers or target.outbox).append(frame)
        self.touch(target)

    def answer(self, source: Session, envelope: Envelope) -> None:
        """Send the broker's own frame to a session."""
        if source.open and not source.mute:
            self.pass_on(source, make_frame(encode(envelope)))

    def confirm(self, source: Session, message_id: int, flags: int = 0) -> None:
        """Send a RECEIPT to a session."""
        if source.open and not source.mute:
            self.pass_on(source, _start_of(RECEIPT_KIND, 0, message_id, 0, flags))

    def confirm_all(self, source: Session, ids: bytes | bytearray) -> None:
        """Send RECEIPTs to a session. ids: 8 bytes each, as they stand in a frame."""
        if not source.open or source.mute:
            return
        for start in range(0, len(ids), _CONFIRMED):
            some = ids[start : start + _CONFIRMED]
            receipts = bytearray(_RECEIPT * (len(some) // ID.size))
            for at in range(ID.size):
                receipts[_ID_OFFSET + at :: len(_RECEIPT)] = some[at :: ID.size]
            (source.answers or source.outbox).extend(receipts, len(_RECEIPT))
        self.touch(source)

    def reply(self, source: Session, message_id: int, reply: Mapping[str, Any]) -> None:
        """Send the REPLY to an operation."""
        self.reply_json(source, message_id, json.dumps(reply).encode())

    def reply_json(self, source: Session, message_id: int, *pieces: bytes) -> None:
        """Send the REPLY to an operation. pieces: of a JSON object, which may be long."""
        if source.open and not source.mute:
            start = _start_of(REPLY_KIND, JSON_CODEC, message_id, sum(map(len, pieces)))
            # The only copy of them before that into the outbox.
            self.pass_on(source, b"".join((start, *pieces)))

    def give_back(self, source: Session, message_id: int, name: str) -> None:
        """Return a request to the host of its requester; the requester does not learn it."""
        payload = json.dumps({"code": BACK, "message": "no member here", "name": name}).encode()
        self.answer(source, Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON))

    def refuse(
        self,
        source: Session,
        message_id: int,
        code: ErrorCode,
        message: str,
        name: str = "",
        *,
        topic: str = "",
        field: str = "",
        flags: int = 0,
        seq: int = 0,
        names: Sequence[str] = (),
        host: str = "",
        addresses: Sequence[str] = (),
    ) -> None:
        """Send an ERROR to a session.

        Args:
            source: The session.
            message_id: The id of the frame that the ERROR is about.
            code: Its code.
            message: Its text, for people.
            name: The recipient that it is about.
            flags: Those of the ERROR.
            topic: The topic that it is about.
            field: The rules that do not allow the message, by their name in the entry; or
                ``mailbox``, which is full.
            seq: The number of a stored message that it is about, or 0.
            names: The mailboxes that it is about, if there may be several.
            host, addresses: Where the recipient is, for the code ``elsewhere``.
        """
        if source.mute:
            # The message cannot be delivered, and its sender cannot be told.
            if name != BROKER:
                self.returned["lost"] += 1
                self.drop_own(source, name, code, message, message_id)
            return
        self.refused[code] += 1
        source.errors_in += 1
        if self.taps.active:
            self.taps.note_refusal(source, message_id, topic or name, code)
        self.log_events.note(
            "message.refused",
            source,
            topic or name,
            code,
            message,
            field=field,
            message_id=message_id,
        )
        payload = error_payload(
            code, message, name, seq=seq, names=names, host=host, addresses=addresses
        )
        self.answer(
            source,
            Envelope(Kind.ERROR, message_id, BROKER, payload, codec=CodecId.JSON, flags=flags),
        )

    def malformed(self, source: Session, message_id: int, message: str) -> RoutingResult:
        """Refuse a malformed frame; close its connection once the ERROR is written."""
        self.refuse(source, message_id, ErrorCode.MALFORMED, message)
        self.close(source, "malformed")
        return RoutingResult.CLOSE

    def refuse_frame(
        self,
        source: Session,
        envelope: Envelope,
        code: ErrorCode,
        message: str,
        name: str | None = None,
        *,
        field: str = "",
    ) -> RoutingResult:
        """Send the sender of a frame an ERROR about it.

        An ERROR frame that cannot be delivered is not answered by another ERROR, unless
        its sender asked for a receipt. The requester that waits for a refused answer
        receives an ERROR as well.
        """
        self.fail_request(source, envelope.kind, envelope.name, envelope.id, code, message)
        if envelope.kind is Kind.ERROR and not envelope.flags & RECEIPT_FLAG:
            reason = f"an ERROR that cannot be delivered: {message}"
            self.drop_own(source, envelope.name, code, reason, envelope.id)
        else:
            about = envelope.name if name is None else name
            # The host of the sender tells answers to events by this flag.
            flags = ACK_FLAG if source.host and envelope.kind is Kind.EVENT else 0
            self.refuse(
                source,
                envelope.id,
                code,
                message,
                about,
                topic=envelope.topic,
                field=field,
                flags=flags,
            )
        return RoutingResult.CONSUMED

    def fail_request(
        self,
        answerer: Session,
        kind: int,
        requester: str,
        message_id: int,
        code: ErrorCode,
        message: str,
    ) -> None:
        """End the request whose answer was refused, and send its requester an ERROR.

        kind: of the refused frame, which may not be an answer.
        """
        if kind not in _ANSWERS:
            return
        request = answerer.incoming_requests.get((requester, message_id))
        if request is not None:
            self._requests.end(request)
            reason = f"the answer of {answerer.address} was refused: {message}"
            self.refuse(request.requester, message_id, code, reason, answerer.address)

    def revoke(
        self, holder: Session, requester: Session, message_id: int, code: ErrorCode, message: str
    ) -> None:
        """Tell the connection that holds a request that the request is over.

        A connection that has not asked for it, or that does not read, is not told. Another
        host is always told, and its last word about the request is then ignored.
        """
        if holder.host:
            holder.revoked.add((requester.identity.decode(), message_id))
            name = requester.identity.decode()
            payload = error_payload(code, message, holder.address)
            frame = encode(
                Envelope(Kind.ERROR, message_id, name, payload, codec=CodecId.JSON, flags=ACK_FLAG)
            )
            holder.outbox.append(make_frame(frame))
            self.touch(holder)
            return
        if holder.cancels and not (holder.finished or self.reads_nothing(holder)):
            payload = error_payload(code, message, holder.address)
            self.answer(
                holder,
                Envelope(
                    Kind.ERROR,
                    message_id,
                    requester.address,
                    payload,
                    codec=CodecId.JSON,
                    flags=ACK_FLAG,
                ),
            )

    def drop(
        self, session: Session, other: str, code: str, reason: str, message_id: int | None = None
    ) -> None:
        """Count a message to a session that is dropped without a report, and log it.

        other: its sender.
        """
        self.dropped += 1
        if self.taps.active:
            self.taps.note_drop(other, session.address, message_id, code)
        self.log_events.note("message.dropped", session, other, code, reason, message_id=message_id)

    def drop_own(
        self, session: Session, other: str, code: str, reason: str, message_id: int | None = None
    ) -> None:
        """Count a message of a session that is dropped without a report to it, and log it.

        other: its recipient.
        """
        self.dropped += 1
        if self.taps.active:
            self.taps.note_drop(session.address, other, message_id, code)
        self.log_events.note(
            "message.unreported", session, other, code, reason, message_id=message_id
        )

    def lose(
        self, session: Session, other: str, code: str, reason: str, message_id: int | None = None
    ) -> None:
        """Drop a message to a session that was to be returned to its sender, ``other``."""
        self.returned["lost"] += 1
        self.drop(session, other, code, reason, message_id)

    @property
    def reserve(self) -> int:
        """Bytes of the broker's answers that may wait for a client beyond its queue."""
        return OUTCOME_RESERVE

    def reads_nothing(self, source: Session) -> bool:
        """Return whether more waits for a client than queue and reserve allow."""
        return source.outbox.waiting > source.outbox.limit + OUTCOME_RESERVE
